"""
Where does a search keep its results? In a data base of Optuna's, or in a file: Optuna's journal, a line for each event.

Each line of ours carries a SHA-256 of itself beside what Optuna reads, so any Optuna reads the file, and we notice
damage. Lines without one, by Optuna itself or an earlier release, are taken as they are. A process that is killed while
it writes leaves half a line at the end; it counts as not written, and the next one to write removes it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import nncf
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock

_SEAL = "sha256"
_BEGINNING = b'{"op_code":'


def open_storage(storage: str | os.PathLike[str] | None) -> BaseStorage | None:
    """
    :param storage: File of a journal, URL of a data base, or None.
    :return: What Optuna takes.
    :raises nncf.ValidationError: The file is no journal, or damaged; the data base cannot be reached, or its driver is
        not installed.
    """
    if storage is None:
        return None
    if "://" in str(storage):
        return _data_base(str(storage))
    try:
        return JournalStorage(SealedJournalFile(storage))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        what = f"({type(error).__name__}: {error})"
        msg = f"{os.fspath(storage)} is no journal of Optuna {what}. Name another file for the search."
        raise nncf.ValidationError(msg) from error


def without_password(storage: str | os.PathLike[str] | None) -> str:
    """
    :param storage: File or URL.
    :return: It, for messages.
    """
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", str(storage))


def _data_base(url: str) -> BaseStorage:
    try:
        return get_storage(url)
    except Exception as error:  # each driver has errors of its own
        what = without_password(str(error)).splitlines() or [""]
        msg = (
            f"The data base {without_password(url)} cannot be opened ({type(error).__name__}: {what[0]}). Is its "
            "server running, and its driver installed (PostgreSQL: pip install 'psycopg[binary]', with a URL that "
            "begins with postgresql+psycopg://)?"
        )
        raise nncf.ValidationError(msg) from error


class SealedJournalFile(BaseJournalBackend):
    """
    :param path: The file; made if it does not exist.
    :raises nncf.ValidationError: The file is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The lock is a link to the file. A relative one would point nowhere from another folder, and a lock that a
        # killed process left would be waited for without end.
        self._path = os.path.abspath(path)
        self._lock = JournalFileSymlinkLock(self._path)
        self._offsets = {0: 0}
        with open(self._path, "ab+") as file:
            file.seek(0)
            begins = file.read(len(_BEGINNING))
        if begins != _BEGINNING[: len(begins)]:
            msg = f"{path} is no journal of Optuna. Name another file for the search."
            raise nncf.ValidationError(msg)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Optuna's interface: what was written from some event on, without half a line at the end."""
        known = max(number for number in self._offsets if number <= log_number_from)
        with open(self._path, "rb") as file:
            file.seek(self._offsets[known])
            for number, line in enumerate(file, start=known):
                if not line.endswith(b"\n"):
                    return
                self._offsets[number + 1] = self._offsets[number] + len(line)
                if number >= log_number_from:
                    yield self._parsed(line, number)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Optuna's interface: writes events."""
        lines = "".join(f"{_text({**log, _SEAL: _digest(log)})}\n" for log in logs)
        self._lock.acquire()
        try:
            with open(self._path, "rb+") as file:
                _to_end_of_lines(file)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._lock.release()

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            log = json.loads(line)
            seal = log.pop(_SEAL, None)
            sound = seal is None or seal == _digest(log)
        except (ValueError, AttributeError, TypeError, RecursionError):
            sound = False
        if not sound:
            msg = (
                f"Line {number + 1} of {self._path} is damaged. Delete it and all lines after it, and the search does "
                "again what they kept; or name another file."
            )
            raise nncf.ValidationError(msg)
        return log


def _text(log: dict[str, Any]) -> str:
    return json.dumps(log, separators=(",", ":"))


def _digest(log: dict[str, Any]) -> str:
    # Read back first: enumerations and tuples are written as plain data.
    return hashlib.sha256(_text(json.loads(_text(log))).encode()).hexdigest()


def _to_end_of_lines(file: BinaryIO) -> None:
    """Goes to the end, without half a line that stands there."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
