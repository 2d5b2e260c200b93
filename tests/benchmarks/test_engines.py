"""Engines live in processes of their own that run only when called. None outlives its program, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.arms import UnfairComparison
from benchmarks.comparison import Entrant, running
from benchmarks.engines import Engine, EngineDied

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


class Counter:
    """Counts in a thread of its own, as a spinning pool of workers would."""

    def __init__(self) -> None:
        import threading

        self.count = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.count += 1
            time.sleep(0.001)

    def read(self) -> int:
        return self.count

    def pid(self) -> int:
        return os.getpid()

    def fail(self, kind: str) -> None:
        if kind == "user":
            raise UnfairComparison("expanded")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "unpicklable":
            raise Unpicklable(lambda: None)

    def allocate(self, mib: int) -> None:
        self.kept = bytearray(os.urandom(1 << 20) * mib)


class Unpicklable(Exception):
    pass


def refuse() -> Counter:
    raise ValueError("no such model")


def state(pid: int) -> str:
    """One letter: T is stopped; "gone" without a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if all(state(pid) in ("gone", "Z") for pid in pids):
            return True
        time.sleep(0.01)
    return False


def test_an_engine_is_another_process_and_stands_still_between_calls() -> None:
    with Engine("a", Counter) as engine:
        assert engine.call("pid") == engine.pid != os.getpid()
        assert state(engine.pid) == "T"
        first = engine.call("read")
        time.sleep(1)
        # Left running it would count to 500 or more, even on a busy machine. It does run for the moment of each call.
        assert engine.call("read") - first < 400
        assert state(engine.pid) == "T"
    assert gone([engine.pid])


def test_errors_keep_their_type_and_leave_the_engine_usable() -> None:
    with Engine("a", Counter) as engine:
        with pytest.raises(UnfairComparison, match="expanded") as caught:
            engine.call("fail", "user")
        assert any("in fail" in note for note in caught.value.__notes__)  # where it happened
        with pytest.raises(RuntimeError, match="cannot be sent"):
            engine.call("fail", "unpicklable")
        assert engine.call("pid") == engine.pid and state(engine.pid) == "T"


def test_a_process_that_ends_by_itself_is_named() -> None:
    with Engine("the one", Counter) as engine:
        with pytest.raises(EngineDied, match="the one.*-9.*[Mm]emory"):
            engine.call("fail", "killed")
    assert gone([engine.pid])


def test_memory_is_what_the_engine_adds() -> None:
    with Engine("a", Counter) as engine:
        assert 0 <= engine.call("memory")["resident_anonymous_mib"] < 16
        engine.call("allocate", 64)
        memory = engine.call("memory")
        assert 64 <= memory["resident_anonymous_mib"] < 80
        assert 64 <= memory["resident_mib"] <= memory["peak_mib"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_kills_all_stopped_engines(error: type[BaseException]) -> None:
    pids: list[int] = []
    with pytest.raises(error):
        with running([Entrant("ours", "int4", s, Counter) for s in (0.5, 0.6)], lambda text: None) as engines:
            pids = [engine.pid for engine in engines.values()]
            assert [state(pid) for pid in pids] == ["T", "T"]
            raise error
    assert len(pids) == 2 and gone(pids)


def test_an_engine_that_cannot_be_made_kills_those_before_it() -> None:
    seen: list[int] = []

    def remember(text: str) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        seen.extend(int(pid) for pid in children if state(int(pid)) == "T")

    entrants = [Entrant("ours", "int4", 0.5, Counter), Entrant("ours", "int8", 0.5, refuse)]
    with pytest.raises(ValueError, match="no such model"):
        with running(entrants, remember):
            pytest.fail("it was loaded")
    assert seen and gone(seen)


PROGRAM = """
import sys
from benchmarks.engines import Engine
from tests.benchmarks.test_engines import Counter
with Engine("a", Counter) as a, Engine("b", Counter) as b:
    print(a.pid, b.pid, flush=True)
    {wait}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "calling"])
def test_no_engine_outlives_its_program(number: signal.Signals, busy: bool) -> None:
    wait = "while True: a.call('read')" if busy else "import time; time.sleep(60)"
    command = [sys.executable, "-c", PROGRAM.format(wait=wait)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as program:
        assert program.stdout
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2
        # As a terminal does it: Ctrl-C goes to the whole group.
        os.killpg(program.pid, number) if number == signal.SIGINT else os.kill(program.pid, number)
        assert program.wait(30) != 0
    assert gone(pids)
