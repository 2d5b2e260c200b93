"""Ends a process at each of its changes of the file system in turn, as a power cut or an out-of-memory killer would."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KILLED = 66
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.symlink"}


def kill_points(write: Callable[[], Any], prepare: Callable[[], Any]) -> Iterator[int]:
    """
    Runs a function in forked processes, each of which ends just before its first, second, ... change of the file
    system: before it makes, opens for writing, renames, links or removes a file or folder.

    :param write: The function.
    :param prepare: Makes the state that each process finds.
    :return: The number of the change, after the process has ended there. The last process was not ended.
    """
    step = 0
    while True:
        prepare()
        if _run(write, step) == 0:
            return
        yield step
        step += 1


def _run(write: Callable[[], Any], step: int) -> int:
    child = os.fork()
    if child == 0:
        left = [step]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes or event in _CHANGES:
                if left[0] == 0:
                    os._exit(KILLED)
                left[0] -= 1

        sys.addaudithook(watch)
        try:
            write()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), f"the process itself failed: {code}"
    return code


def contents(path: Path) -> Any:
    """
    :param path: A file, a folder or nothing.
    :return: The bytes of a file, the contents of a folder by name at any depth, None for nothing.
    """
    if path.is_dir():
        return {entry.name: contents(entry) for entry in path.iterdir()}
    return path.read_bytes() if path.exists() else None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """
    The disk is full, as far as this process can tell: no file may be longer.

    :param size: Bytes.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
