"""
What a long run has finished, on disk, so that an interrupted run continues where it stopped.

A folder with ``journal.json`` (the header: what the run was asked for, and digests of its data) and one file for each
finished entry. Files are written aside and renamed, so a file that exists is whole.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import nncf
from safetensors import SafetensorError

from nncf_ext.files import write_whole

_VERSION = 1
_HEADER = "journal.json"
_UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError)

TEntry = TypeVar("TEntry")


class Journal:
    """
    :param folder: Where entries are kept; made if it does not exist.
    :param what: What the run is, for messages: ``"compression"``, ``"search"``.
    :param header: What the run was asked for, as plain data for JSON; must equal what the folder was begun with.
    :raises nncf.ValidationError: The folder belongs to another run, or is no journal.
    """

    def __init__(self, folder: Path, what: str, header: Mapping[str, Any]) -> None:
        self._folder = folder
        asked = json.loads(json.dumps({"version": _VERSION, **header}))
        found = self.read(_HEADER, read_json)
        if found is not None:
            differing = sorted(key for key in {*found, *asked} if found.get(key) != asked.get(key))
            if differing:
                msg = (
                    f"{folder} was begun by another {what}; it differs in {', '.join(differing)}. Resume with the same "
                    "model, data and settings, or name a new folder."
                )
                raise nncf.ValidationError(msg)
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            msg = f"resume={str(folder)!r} is neither a journal of an earlier {what} nor an empty or new folder."
            raise nncf.ValidationError(msg)
        folder.mkdir(parents=True, exist_ok=True)
        self.write(_HEADER, lambda aside: aside.write_text(json.dumps(asked, indent=1)))

    def names(self, pattern: str) -> list[str]:
        """
        :param pattern: A pattern of file names, such as ``"unit-*.safetensors"``.
        :return: The entries that are finished, sorted.
        """
        return sorted(path.name for path in self._folder.glob(pattern))

    def read(self, name: str, reader: Callable[[Path], TEntry]) -> TEntry | None:
        """
        :param name: File name of an entry.
        :param reader: Reads JSON or safetensors from the path that it is given.
        :return: What it gave, or None if the entry is not finished.
        :raises nncf.ValidationError: The file cannot be read.
        """
        path = self._folder / name
        if not path.is_file():
            return None
        try:
            return reader(path)
        except _UNREADABLE as error:
            remedy = "Name a new folder" if name == _HEADER else "Delete it: what it kept will be done again"
            msg = f"{path} is damaged ({type(error).__name__}: {error}). {remedy}."
            raise nncf.ValidationError(msg) from error

    def write(self, name: str, writer: Callable[[Path], Any]) -> None:
        """
        :param name: File name of an entry.
        :param writer: Writes all of the entry to the path that it is given.
        """
        write_whole(self._folder / name, writer)


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
