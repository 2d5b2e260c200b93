"""search() with a storage: interrupted, killed, damaged and shared, it ends as if nothing had been."""

import json

import nncf
import optuna
import pytest

from nncf_ext import Objective, SearchSampler, search
from nncf_ext.exploration.storage import open_storage
from tests.nncf_ext.searches import ACCURACY, COST, accuracy, cost, keys, network

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Interrupted:
    """An objective that is interrupted once, at its n-th call."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, point) -> float:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return accuracy(point)


SINGLE = [SearchSampler.HILL_CLIMBING, SearchSampler.RANDOM, SearchSampler.NSGA2, SearchSampler.NEMO]


@pytest.mark.parametrize("at", [1, 23])
@pytest.mark.parametrize("sampler", SINGLE)
def test_killed_search_continues_as_if_nothing_had_been(tmp_path, sampler, at):
    settings = {"sampler": sampler, "budget": 36, "seed": 5}
    expected = search(network(), [ACCURACY], storage=tmp_path / "whole.log", **settings)
    measure = Interrupted(at, ZeroDivisionError)
    objectives = [Objective("accuracy", measure)]
    net = network()
    with pytest.raises(ZeroDivisionError):
        search(net, objectives, storage=tmp_path / "parts.log", **settings)
    assert net.active == net.space.minimal()
    report = search(network(), objectives, storage=tmp_path / "parts.log", **settings)
    assert report.evaluations == expected.evaluations and report.chosen == expected.chosen and report.complete
    assert measure.calls == len(expected.evaluations) + 1, "what was measured is not measured again"
    again = search(network(), objectives, storage=tmp_path / "parts.log", **settings)
    assert measure.calls == len(expected.evaluations) + 1 and again.evaluations == expected.evaluations


class Lives:
    """Searches in a journal file, each cut off by a kill: what stands in the file then is a beginning of it."""

    def __init__(self, folder, sampler, objectives) -> None:
        self.file, self.objectives = folder / "search.log", objectives
        self.settings = {"sampler": sampler, "budget": 7, "seed": 5, "storage": self.file}

    def run(self, before: bytes = b""):
        """The evaluations of a search that finds this in its file, and what stands there at its end."""
        self.file.write_bytes(before)
        report = search(network(2, (32, 24, 16, 8)), self.objectives, **self.settings)
        return report.evaluations, self.file.read_bytes().splitlines(keepends=True)


EVERY_SEARCH = [
    (SearchSampler.HEURISTIC, [ACCURACY]),
    (SearchSampler.HILL_CLIMBING, [ACCURACY]),
    (SearchSampler.RANDOM, [ACCURACY]),
    pytest.param(SearchSampler.NSGA2, [ACCURACY], marks=pytest.mark.slow),
    pytest.param(SearchSampler.NSGA2, [ACCURACY, COST], marks=pytest.mark.slow),
    (SearchSampler.TPE, [ACCURACY]),
    pytest.param(SearchSampler.LINAS, [ACCURACY, COST], marks=pytest.mark.slow),
    pytest.param(SearchSampler.NEMO, [ACCURACY, COST], marks=pytest.mark.slow),
]


@pytest.fixture
def small_generations(monkeypatch):
    first_rounds = {SearchSampler.NSGA2: 3, SearchSampler.LINAS: 5, SearchSampler.NEMO: 5}
    monkeypatch.setattr("nncf_ext.exploration.loop._FIRST_ROUNDS", first_rounds)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize(("sampler", "objectives"), EVERY_SEARCH)
def test_a_search_killed_at_any_line_of_its_file_continues_to_the_same_end(
    tmp_path, small_generations, sampler, objectives
):
    """Before the study says what it is, between the parameters of a trial, in the middle of a line, and so on."""
    lives = Lives(tmp_path, sampler, objectives)
    expected, lines = lives.run()
    assert len(expected) == (1 if sampler is SearchSampler.HEURISTIC else 7)
    for count, line in enumerate(lines):
        torn = line[: len(line) // 2] if count % 2 else b""
        assert lives.run(b"".join(lines[:count]) + torn)[0] == expected, (count, torn)
    # Many lives, each of so few lines that trials are left half-asked.
    kept: list[bytes] = []
    while True:
        found, after = lives.run(b"".join(kept))
        assert found == expected
        if len(kept) == len(after):
            break
        kept = after[: len(kept) + 8]


def test_a_study_without_a_word_is_ours_if_it_is_empty_alone(tmp_path):
    """What a process leaves that is killed between creating the study and saying what it is; in a data base, too."""
    for storage in (str(tmp_path / "search.log"), f"sqlite:///{tmp_path}/search.db"):
        backend = open_storage(storage)
        optuna.create_study(study_name="killed", storage=backend, directions=["maximize"])
        optuna.create_study(study_name="other", storage=backend, directions=["minimize"])
        used = optuna.create_study(study_name="used", storage=backend, directions=["maximize"])
        used.tell(used.ask(), 1.0)
        report = search(network(), [ACCURACY], budget=3, storage=storage, study_name="killed")
        assert len(report.evaluations) == 3
        for name in ("other", "used"):
            with pytest.raises(nncf.ValidationError, match=f"holds a search '{name}' of another space"):
                search(network(), [ACCURACY], budget=3, storage=storage, study_name=name)


def test_no_flipped_bit_of_a_search_file_gives_another_result(tmp_path, small_generations):
    lives = Lives(tmp_path, SearchSampler.RANDOM, [ACCURACY])
    expected, lines = lives.run()
    whole, refused = b"".join(lines), 0
    for place in {0, len(whole) - 1, *range(0, len(whole), 41)}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        try:
            # The end of the last line is the one place that may be lost: what the line kept is then done again.
            assert lives.run(bytes(flipped))[0] == expected
        except nncf.ValidationError as error:
            refused += 1
            assert str(lives.file) in str(error) and ("Delete it" in str(error) or "Name another" in str(error))
    assert refused > 0.9 * len(whole) / 41


@pytest.mark.parametrize(
    "content", ["{}\n", "[1]\n", '{"a report": 1}', '{"op_code":[\n{}\n', '{"op_code":99}\n', "text"]
)
def test_files_that_are_no_journal_are_refused_and_kept(tmp_path, content):
    file = tmp_path / "report.json"
    file.write_text(content)
    with pytest.raises(nncf.ValidationError, match=r"report.json.* (is no journal|is damaged)"):
        search(network(), [ACCURACY], budget=3, storage=file)
    assert file.read_text() == content


def test_the_lock_of_a_killed_process_does_not_stop_the_next(tmp_path, monkeypatch):
    """The file is named from another folder than its own, where a link to that very name would lead nowhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    locks = []

    def lock(path):
        locks.append(optuna.storages.journal.JournalFileSymlinkLock(path, grace_period=3))
        return locks[-1]

    monkeypatch.setattr("nncf_ext.exploration.storage.JournalFileSymlinkLock", lock)
    first = search(network(), [ACCURACY], budget=1, storage="work/search.log")
    locks[-1].acquire()
    again = search(network(), [ACCURACY], budget=2, storage="work/search.log")
    assert again.evaluations[:1] == first.evaluations and len(again.evaluations) == 2


def test_stock_optuna_reads_and_continues_the_file(tmp_path):
    file = tmp_path / "search.log"
    report = search(network(), [ACCURACY], sampler="random", budget=5, storage=file)
    study = stock_study(file)
    assert [trial.value for trial in study.trials] == [each.values["accuracy"] for each in report.evaluations]
    trial = study.ask({name: optuna.distributions.IntDistribution(0, 2) for name in network().space.dimensions})
    places = tuple(trial.params.values())
    study.tell(trial, 77.0)
    again = search(network(), [ACCURACY], sampler="random", budget=6, storage=file)
    assert again.evaluations[5].values == {"accuracy": 77.0} and network().space.encode(again.best) == places


def stock_study(file):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    return optuna.load_study(study_name="nncf_ext", storage=storage)


def test_tools_of_optuna_show_sizes_and_names(tmp_path, recwarn):
    file = tmp_path / "search.log"
    report = search(network(), [ACCURACY, COST], sampler="nsga2", budget=20, storage=file)
    assert not [each for each in recwarn if issubclass(each.category, optuna.exceptions.ExperimentalWarning)]
    study = stock_study(file)
    assert study.metric_names == ["accuracy", "cost"]
    sizes = [trial.user_attrs["sizes"] for trial in study.trials]
    assert sizes[0] == dict.fromkeys(network().space.dimensions, 32)  # with several objectives the full network first
    assert [cost(each) for each in sizes] == [trial.values[1] for trial in study.trials]
    assert all(each.point in sizes for each in report.evaluations)


def test_a_file_without_sizes_and_names_continues(tmp_path):
    """As earlier releases wrote it."""
    settings = {"sampler": "random", "seed": 3}
    whole, old = tmp_path / "whole.log", tmp_path / "old.log"
    search(network(), [ACCURACY], budget=4, storage=whole, **settings)
    lines = [json.loads(line) for line in whole.read_bytes().splitlines()]
    dropped = 0
    for line in list(lines):
        line.pop("sha256")
        if "sizes" in line.get("user_attr", {}) or "study:metric_names" in line.get("system_attr", {}):
            lines.remove(line)
            dropped += 1
        elif line.get("user_attrs", {}).pop("sizes", None) is not None:
            dropped += 1
    assert dropped == 5
    old.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    reports = [search(network(), [ACCURACY], budget=7, storage=file, **settings) for file in (whole, old)]
    assert reports[0].evaluations == reports[1].evaluations
    assert stock_study(old).metric_names == ["accuracy"]
    assert ["sizes" in trial.user_attrs for trial in stock_study(old).trials] == [False] * 4 + [True] * 3


@pytest.mark.parametrize("stored", [False, True])
def test_ctrl_c_keeps_the_results(tmp_path, stored, caplog):
    storage = tmp_path / "search.log" if stored else None
    measure = Interrupted(24, KeyboardInterrupt)
    net = network()
    report = search(
        net, [Objective("accuracy", measure)], sampler="random", budget=60, storage=storage, test=lambda point: 1 / 0
    )
    assert not report.complete and len(report.evaluations) == 23 and report.test is None
    assert report.chosen.values["accuracy"] == max(map(accuracy, net.activated[:-2]))
    assert net.active == net.space.minimal()
    assert "23 of 60 points are measured" in caplog.text and ("same call continues" in caplog.text) == stored
    assert "interrupted" in str(report)


def test_ctrl_c_before_the_first_result_and_during_the_test():
    with pytest.raises(KeyboardInterrupt):
        search(network(), [Objective("accuracy", Interrupted(1, KeyboardInterrupt))])

    def test(point):
        raise KeyboardInterrupt

    report = search(network(), [ACCURACY], budget=5, test=test)
    assert len(report.evaluations) == 5 and report.chosen is not None and not report.complete


def test_a_larger_budget_continues_a_finished_search(tmp_path):
    storage = tmp_path / "search.log"
    first = search(network(), [ACCURACY], sampler="random", budget=10, storage=storage)
    more = search(network(), [ACCURACY], sampler="random", budget=25, storage=storage)
    whole = search(network(), [ACCURACY], sampler="random", budget=25)
    assert more.evaluations[:10] == first.evaluations and more.evaluations == whole.evaluations


def test_two_searches_on_one_storage_share_results(tmp_path):
    storage, measured = tmp_path / "search.log", []

    def measure(point):
        measured.append(tuple(point.values()))
        if len(measured) == 10:
            other = search(network(), [ACCURACY], sampler="random", budget=20, storage=storage, seed=1)
            measured.extend(keys(other.evaluations)[9:])
        return accuracy(point)

    report = search(network(), [Objective("accuracy", measure)], sampler="random", budget=30, storage=storage)
    assert len(report.evaluations) == 30 and set(measured) == set(keys(report.evaluations))
    # The other search took over the one point that was being measured when it began.
    assert len(measured) == 31


def test_data_base_as_storage(tmp_path):
    url = f"sqlite:///{tmp_path}/search.db"
    first = search(network(), [ACCURACY], sampler="random", budget=6, storage=url)
    assert search(network(), [ACCURACY], sampler="random", budget=6, storage=url).evaluations == first.evaluations
    assert optuna.get_all_study_names(url) == ["nncf_ext"]


@pytest.mark.parametrize("sampler", SINGLE)
def test_seed_decides(sampler):
    reports = [search(network(), [ACCURACY], sampler=sampler, budget=30, seed=seed) for seed in (1, 1, 2)]
    assert reports[0].evaluations == reports[1].evaluations != reports[2].evaluations


def test_storage_of_another_search(tmp_path):
    storage = tmp_path / "search.log"
    search(network(), [ACCURACY], budget=2, storage=storage)
    for net, objectives in (
        (network(4), [ACCURACY]),
        (network(), [ACCURACY, COST]),
        (network(), [Objective("accuracy", accuracy, maximize=False)]),
    ):
        with pytest.raises(nncf.ValidationError, match="of another space or other objectives, .*Name another"):
            search(net, objectives, sampler="random", storage=storage)
    search(network(4), [ACCURACY], budget=2, storage=storage, study_name="other")
