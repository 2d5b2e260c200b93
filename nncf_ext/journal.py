"""
What a long run has finished, on disk, so that an interrupted run continues where it stopped.

A folder with ``journal.json`` (the header: what the run was asked for, and digests of its data) and two files for each
finished entry: the entry, and beside it ``<entry>.sha256``, its seal. Files are written aside and renamed, so a file
that exists is whole; the seal is written last, so an entry without one is not finished. A seal covers the header, the
entry's name and its bytes: what was changed, renamed or put in from another run is refused. Version 1 had no seals.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import nncf
from safetensors import SafetensorError

from nncf_ext.drafts import remove_leftovers
from nncf_ext.files import write_whole

_VERSION = 2
_HEADER = "journal.json"
_SEAL = ".sha256"
_UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

TEntry = TypeVar("TEntry")


class Journal:
    """
    :param folder: Where entries are kept; made if it does not exist.
    :param what: What the run is, for messages: ``"compression"``, ``"search"``.
    :param header: What the run was asked for, as plain data for JSON; must equal what the folder was begun with.
    :raises nncf.ValidationError: The folder belongs to another run or another version, or is no journal.
    """

    def __init__(self, folder: Path, what: str, header: Mapping[str, Any]) -> None:
        self._folder = folder
        asked = json.loads(json.dumps({"version": _VERSION, **header}))
        self._begun = json.dumps(asked, sort_keys=True)
        if (folder / _HEADER).is_file():
            _check_header(folder, what, self._parsed(_HEADER, read_json), asked)
            remove_leftovers(folder)  # here and not at each entry: a search keeps thousands
            return
        # A run that was killed while it wrote the header has left a draft of it at most.
        drafts = set(folder.glob(f".{_HEADER}.*")) if folder.is_dir() else set()
        if folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - drafts):
            msg = f"Asked to resume from {folder}: neither a journal of an earlier {what} nor an empty or new folder."
            raise nncf.ValidationError(msg)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _HEADER, lambda aside: aside.write_text(json.dumps(asked, indent=1)))

    def names(self, pattern: str) -> list[str]:
        """
        :param pattern: A pattern of file names, such as ``"unit-*.safetensors"``.
        :return: The entries that are finished, sorted.
        """
        return sorted(path.name for path in self._folder.glob(pattern) if self._seal_of(path.name).is_file())

    def read(self, name: str, reader: Callable[[Path], TEntry]) -> TEntry | None:
        """
        :param name: File name of an entry.
        :param reader: Reads JSON or safetensors from the path that it is given.
        :return: What it gave, or None if the entry is not finished.
        :raises nncf.ValidationError: The file is not what was written, or cannot be read.
        """
        if not (self._folder / name).is_file() or not self._seal_of(name).is_file():
            return None
        if self._seal_of(name).read_bytes() != self._seal(name):
            raise nncf.ValidationError(self._damaged(name, "its bytes are not those that were written"))
        return self._parsed(name, reader)

    def write(self, name: str, writer: Callable[[Path], Any]) -> None:
        """
        :param name: File name of an entry.
        :param writer: Writes all of the entry to the path that it is given.
        """
        self._seal_of(name).unlink(missing_ok=True)
        write_whole(self._folder / name, writer, clean_up=False)
        write_whole(self._seal_of(name), lambda aside: aside.write_bytes(self._seal(name)), clean_up=False)

    def _seal_of(self, name: str) -> Path:
        return self._folder / f"{name}{_SEAL}"

    def _seal(self, name: str) -> bytes:
        sha = hashlib.sha256(f"{self._begun}\n{name}\n".encode())
        with (self._folder / name).open("rb") as file:
            while part := file.read(2**20):
                sha.update(part)
        return sha.hexdigest().encode()

    def _parsed(self, name: str, reader: Callable[[Path], TEntry]) -> TEntry:
        try:
            return reader(self._folder / name)
        except _UNREADABLE as error:
            raise nncf.ValidationError(self._damaged(name, f"{type(error).__name__}: {error}")) from error

    def _damaged(self, name: str, why: str) -> str:
        remedy = "Name a new folder" if name == _HEADER else "Delete it: what it kept will be done again"
        return f"{self._folder / name} is damaged ({why}). {remedy}."


def _check_header(folder: Path, what: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if found.get("version") != _VERSION:
        msg = (
            f"{folder} holds a journal of version {found.get('version')!r}; this release continues version {_VERSION} "
            f"alone, whose entries are sealed against damage. Finish the {what} with the release that began it, or "
            "name a new folder."
        )
        raise nncf.ValidationError(msg)
    # A key that is missing is not a key that holds null; JSON has no tuple.
    differing = sorted(key for key in {*found, *asked} if found.get(key, ()) != asked.get(key, ()))
    if differing:
        msg = (
            f"{folder} was begun by another {what}; it differs in {', '.join(differing)}. Resume with the same model, "
            "data and settings, or name a new folder."
        )
        raise nncf.ValidationError(msg)


def read_json(path: Path) -> dict[str, Any]:
    """
    :param path: A file.
    :return: The JSON object in it.
    :raises TypeError: It holds something else.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        msg = f"{type(content).__name__} instead of an object"
        raise TypeError(msg)
    return content
