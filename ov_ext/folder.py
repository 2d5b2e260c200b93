"""Model folders and reports: complete or not there, and never in the place of something else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ov_ext import drafts


class FolderExistsError(ValueError):
    """The output folder is there already."""


@contextmanager
def whole_folder(out: str | os.PathLike[str], overwrite: bool = False, size: int = 0) -> Iterator[Path]:
    """Build a folder under another name and give it its own when it is complete.

    :param out: The folder to make.
    :param overwrite: Replace an existing model folder. The old one stays until the new one is complete.
    :param size: About how many bytes OpenVINO will write, to tell a full disk from its other errors.
    :return: Context manager. It gives an empty folder to fill, beside ``out`` on the same file system.
    :raises FolderExistsError: ``out`` exists and may not be replaced: see :func:`refuse_existing`.
    :raises OSError: It cannot be written; of a full disk the message says what to do.
    """
    out = Path(out).resolve()
    refuse_existing(out, overwrite)
    with drafts.whole_folder(out, size=size) as draft:
        yield draft
        refuse_existing(out, overwrite)  # it may have appeared meanwhile


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
    :raises OSError: It cannot be written; of a full disk the message says what to do.
    """
    with drafts.whole_file(path) as draft:
        draft.write_text(text)
