"""One process per engine, stopped while idle: engines share no threads and no memory, and nothing of one runs, not even
a spinning worker thread, while another is timed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class EngineDied(RuntimeError):
    """The process of an engine ended by itself."""


class Engine:
    """An object in a process of its own that runs only during :meth:`call`. Leaving the context kills it.

    :param name: For messages.
    :param make: Makes the object, there; picklable, as are arguments and results of its methods.
    :param prepare: Runs before ``make``; what it loads (code) does not count as the engine's memory.
    :raises Exception: What ``make`` raised.
    """

    def __init__(self, name: str, make: Callable[[], Any], prepare: Callable[[], object] | None = None) -> None:
        self.name = name
        self._pipe, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from benchmarks import engines; engines.serve({theirs.fileno()})"
        )
        # A session of its own: Ctrl-C reaches this process only, which then kills the engines.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL
        )
        theirs.close()  # the only other end is the engine's, so that its death is seen
        try:
            self._exchange((make, prepare))
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """Wake the engine, run a method, and stop the engine again.

        :param method: Method of the object; ``"memory"`` is :func:`memory_added`.
        :param arguments: Its arguments.
        :return: What it returned.
        :raises EngineDied: The process ended, for instance because memory ran out.
        :raises Exception: What the method raised.
        """
        os.kill(self.pid, signal.SIGCONT)
        return self._exchange((method, arguments))

    def kill(self) -> None:
        """End the process, stopped or not."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def _exchange(self, message: object) -> Any:
        try:
            self._pipe.send(message)
            done, value = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            code = self._process.wait()
            hint = " Memory may have run out." if code == -signal.SIGKILL else ""
            raise EngineDied(f"{self.name}: its process ended with code {code}.{hint}") from error
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # a stop takes effect a little later
        if not done:
            raise value
        return value


def serve(descriptor: int) -> None:
    """Be the process of an :class:`Engine`.

    :param descriptor: Of the pipe to the process that started this one.
    """
    # The kernel kills this process when that one ends, however it ends: SIGKILL works on stopped processes, too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe, engine = Connection(descriptor), None
    before: dict[str, int] = {}
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        try:
            if engine is None:
                make, prepare = message
                if prepare:
                    prepare()
                before = status()
                engine, result = make(), None
            else:
                method, arguments = message
                result = memory_added(before) if method == "memory" else getattr(engine, method)(*arguments)
            answer: tuple[bool, Any] = True, result
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = False, error
        try:
            pipe.send(answer)
        except Exception as error:  # not picklable
            pipe.send((False, RuntimeError(f"{answer[1]!r} cannot be sent: {error!r}")))


def status() -> dict[str, int]:
    """:return: KiB by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def memory_added(before: dict[str, int]) -> dict[str, float]:
    """:param before: :func:`status` before the engine was made.
    :return: MiB that the engine adds to a process with its code: ``resident_mib``; ``resident_anonymous_mib``, without
        pages of mapped files, which the system can drop and read again; ``peak_mib``, the highest value of
        ``resident_mib`` so far.
    """
    names = {"resident": "VmRSS", "resident_anonymous": "RssAnon", "peak": "VmHWM"}
    now = status()
    since = before | {"VmHWM": before["VmRSS"]}
    return {f"{key}_mib": (now[name] - since[name]) / 1024 for key, name in names.items()}
