"""Atomic writes: a folder or a file appears complete or not at all."""

from __future__ import annotations

import atexit
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


class FolderExistsError(ValueError):
    """The output folder is there already."""


@contextmanager
def whole_folder(out: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Build a folder under another name and rename it when it is complete.

    :param out: The folder to make.
    :param overwrite: Replace an existing model folder. The old one stays until the new one is complete.
    :return: Context manager. It gives an empty folder to fill, beside ``out`` on the same file system.
    :raises FolderExistsError: ``out`` exists and may not be replaced: see :func:`refuse_existing`.
    """
    out = Path(out).resolve()
    refuse_existing(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    draft, old = (out.with_name(f".{out.name}.{purpose}-{mark}") for purpose in ("new", "old"))
    # Ctrl-C may fall between here and the caller's block, where no frame of ours is left that could clean up.
    clean = partial(shutil.rmtree, draft, ignore_errors=True)
    atexit.register(clean)
    try:
        draft.mkdir()
        yield draft
        refuse_existing(out, overwrite)  # it may have appeared meanwhile
        if out.exists():
            out.rename(old)
        draft.rename(out)
    finally:
        if old.exists() and not out.exists():  # an error or an interrupt between the two
            old.rename(out)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        atexit.unregister(clean)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Check an output folder before the long work begins.

    :param out: The folder to make.
    :param overwrite: Whether an existing model folder may be replaced.
    :raises FolderExistsError: ``out`` is a file or a folder with files, and either ``overwrite`` is False or it holds
        no OpenVINO model.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FolderExistsError(f"{out} exists. Choose another folder, or pass --overwrite (overwrite=True).")
    if not out.is_dir() or not any(out.glob("*.xml")):
        raise FolderExistsError(f"{out} exists and holds no OpenVINO model, so it is not overwritten. Remove it first.")


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that an interruption leaves the old file or the new one.

    :param path: The file.
    :param text: Its whole content.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
