"""Several processes on one study, in a journal and in PostgreSQL: nothing measured twice, nothing lost by a kill."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nncf
import optuna
import pytest

from nncf_ext import Objective, search
from nncf_ext.exploration import workers
from nncf_ext.exploration.storage import open_storage
from tests.nncf_ext.searches import ACCURACY, COST, accuracy, keys, network

optuna.logging.set_verbosity(optuna.logging.WARNING)
ROOT = Path(__file__).parents[2]


def worker(storage: str, log: Path, sampler: str = "random", budget: int = 24, seconds: float = 0.05, stop: int = 0):
    settings = [storage, sampler, str(budget), str(log), str(seconds), str(stop)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.nncf_ext.search_worker", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NNCF_EXT_NO_TELEMETRY": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def begun(log: Path) -> list[tuple[int, ...]]:
    return [tuple(ast.literal_eval(line)) for line in log.read_text().splitlines()] if log.exists() else []


def finish(process) -> list[tuple[int, ...]]:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    return ast.literal_eval(out.splitlines()[-1])


def until(condition) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def two_workers_and_a_kill(storage: str, folder: Path, sampler: str) -> None:
    """One is killed while it measures; the other, and one that comes later, finish what it began."""
    log = folder / "points.log"
    # The first hangs at its fourth point before the other comes, which could be through with all of them before that.
    killed = worker(storage, log, sampler, stop=4)
    until(lambda: [pid for pid, *_ in begun(log)].count(killed.pid) == 4)
    other = worker(storage, log, sampler)
    until(lambda: len(begun(log)) >= 6)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    late = worker(storage, log, sampler)
    reports = [finish(other), finish(late)]
    assert reports[0] == reports[1] and len(set(reports[0])) == len(reports[0]) == 24
    measured = [tuple(point) for _, *point in begun(log)]
    # What was measured when the kill came is measured once more, by one of the others; nothing else is.
    assert set(measured) == set(reports[0]) and len(measured) == 25
    assert storage and len(search(network(), [ACCURACY, COST], sampler=sampler, budget=24, storage=storage).front) > 1


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "nsga2", "nemo"])
def test_processes_on_one_journal(tmp_path, sampler):
    two_workers_and_a_kill(str(tmp_path / "search.log"), tmp_path, sampler)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of an empty data base of a server that lives as long as the tests of this file."""
    programs = [shutil.which(name) for name in ("initdb", "postgres")]
    try:
        import psycopg
    except ImportError:
        psycopg = None
    if not all(programs) or psycopg is None:
        pytest.skip("there is no PostgreSQL server (initdb, postgres) with its driver (psycopg) here")
    # The server refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if user is not None:
        shutil.chown(folder, user)
    data = folder / "data"
    subprocess.run(
        [programs[0], "-D", data, "-A", "trust", "-U", "optuna", "--no-sync"],
        user=user,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    server = subprocess.Popen(
        [programs[1], "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
        user=user,
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )
    try:

        def answers() -> bool:
            assert server.poll() is None
            try:
                psycopg.connect(host=str(folder), user="optuna", dbname="postgres").close()
            except psycopg.OperationalError:
                return False
            return True

        until(answers)
        yield f"postgresql+psycopg://optuna@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder)


@pytest.mark.slow
def test_processes_on_postgresql(tmp_path, postgresql):
    two_workers_and_a_kill(postgresql, tmp_path, "random")


@pytest.mark.slow
def test_a_search_in_postgresql_is_the_one_in_memory(postgresql):
    whole = search(network(), [ACCURACY], budget=12, sampler="random", seed=2)
    for budget in (5, 12):
        report = search(
            network(), [ACCURACY], budget=budget, sampler="random", seed=2, storage=postgresql, study_name="continued"
        )
    assert report.evaluations == whole.evaluations


def test_data_bases_that_cannot_be_opened(tmp_path):
    for url in (
        f"sqlite:///{tmp_path}/no/folder/search.db",
        "postgresql+nodriver://anna:secret@localhost/search",
        "nonsense://anna:secret@localhost/search",
    ):
        with pytest.raises(nncf.ValidationError, match=r"cannot be opened.*server running") as error:
            search(network(), [ACCURACY], storage=url)
        assert "secret" not in str(error.value)


# Who is there, without processes.


class Elsewhere:
    """Another worker of a study, on a machine that we know from its records only."""

    def __init__(self, study) -> None:
        self.study = study
        self.key = "worker 0"

    def sign(self, trial: int | None, age: float = 0.0) -> None:
        record = {"where": "another machine", "pid": 1, "born": "1", "trial": trial, "seen": time.time() - age}
        self.study.set_user_attr(self.key, record)


def begin(study):
    names = network().space.dimensions
    return study.ask({name: optuna.distributions.IntDistribution(0, 2) for name in names})


def study_of(storage):
    """A study that ``search`` takes for its own."""
    search(network(), [ACCURACY], sampler="random", budget=3, storage=storage)
    study = optuna.load_study(study_name="nncf_ext", storage=open_storage(storage))
    study.sampler = optuna.samplers.RandomSampler(seed=7)
    return study


def test_what_is_measured_elsewhere_is_left_alone_and_waited_for(tmp_path, monkeypatch):
    storage = tmp_path / "search.log"
    study = study_of(storage)
    trial = begin(study)
    there = Elsewhere(study)
    there.sign(trial.number)
    theirs = tuple(sizes[trial.params[name]] for name, sizes in network().space.dimensions.items())
    measured = []

    def measure(point):
        measured.append(tuple(point.values()))
        return accuracy(point)

    # Once the rest is measured, there is nothing to do but to wait; then the other one is done.
    monkeypatch.setattr("nncf_ext.exploration.loop.time.sleep", lambda seconds: study.tell(trial, 77.0))
    report = search(network(), [Objective("accuracy", measure)], sampler="random", budget=9, storage=storage)
    assert theirs not in measured and len(measured) == 5 and len(report.evaluations) == 9
    assert report.chosen.values == {"accuracy": 77.0} and keys([report.chosen]) == [theirs]


@pytest.mark.parametrize("how", ["gone", "silent", "left it"])
def test_what_was_left_elsewhere_is_taken_over(tmp_path, how):
    storage = tmp_path / "search.log"
    study = study_of(storage)
    trial = begin(study)
    there = Elsewhere(study)
    there.sign(trial.number, age=workers.LEASE + 1 if how == "silent" else 0)
    if how == "gone":
        study.set_user_attr(there.key, {**study.user_attrs[there.key], "seen": 0.0})
    if how == "left it":
        there.sign(None, age=workers.LEASE + 1)
    report = search(network(), [ACCURACY], sampler="random", budget=4, storage=storage)
    theirs = tuple(sizes[trial.params[name]] for name, sizes in network().space.dimensions.items())
    assert keys(report.evaluations)[3] == theirs


def test_two_that_asked_for_the_same_point(tmp_path, monkeypatch):
    """The one with the earlier trial measures it; the other one asks again."""
    storage = tmp_path / "search.log"
    study = study_of(storage)
    trial = begin(study)
    Elsewhere(study).sign(trial.number)
    theirs = [trial.params[name] for name in network().space.dimensions]
    study.enqueue_trial(dict(zip(network().space.dimensions, theirs, strict=True)))
    monkeypatch.setattr("nncf_ext.exploration.loop.time.sleep", lambda seconds: study.tell(trial, 77.0))
    report = search(network(), [ACCURACY], sampler="random", budget=5, storage=storage)
    found = {network().space.encode(each.point): each.values["accuracy"] for each in report.evaluations}
    assert len(found) == 5 and found[tuple(theirs)] == 77.0
    states = [each.state for each in study.get_trials(deepcopy=False)]
    assert states.count(optuna.trial.TrialState.FAIL) == 1
