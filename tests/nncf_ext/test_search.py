"""search(): fronts against brute force, resume against uninterrupted runs, and what is never done with test data."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import nncf
import optuna
import pytest

import nncf_ext
from nncf_ext import HillClimbingSampler, Objective, SearchSampler, SearchSpace, search
from nncf_ext.exploration.storage import open_storage

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass
class Network:
    """An elastic network of nothing; notes what was activated."""

    space: SearchSpace
    active: dict[str, int] = field(init=False)
    activated: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.active = self.space.minimal()

    def activate(self, point) -> None:
        self.active = self.space.check(point)
        self.activated.append(self.active)


def network(dimensions: int = 5, sizes: tuple[int, ...] = (32, 24, 16)) -> Network:
    return Network(SearchSpace({f"d{number}": sizes for number in range(dimensions)}))


def accuracy(point: dict[str, int]) -> float:
    """More is better, with returns that diminish differently by dimension, and an interaction."""
    gains = [(number + 1) * (1 - 8 / size) for number, size in enumerate(point.values())]
    return sum(gains) - 0.4 * (point["d0"] == point["d1"])


def cost(point: dict[str, int]) -> float:
    return float(sum(point.values()))


ACCURACY, COST = Objective("accuracy", accuracy), Objective("cost", cost, maximize=False)


def pairs(space: SearchSpace) -> dict[tuple[int, ...], tuple[float, float]]:
    return {tuple(point.values()): (accuracy(point), cost(point)) for point in space.enumerate()}


def brute_front(values: dict) -> set:
    """Keys that nothing beats, by the definition."""
    return {
        key
        for key, (gain, price) in values.items()
        if not any((g >= gain and p <= price) and (g > gain or p < price) for g, p in values.values())
    }


def hypervolume(values, worst: tuple[float, float]) -> float:
    """Area between a front and the worst point."""
    area, reached = 0.0, worst[0]
    for gain, price in sorted(values, key=lambda pair: pair[1]):
        if gain > reached:
            area += (gain - reached) * (worst[1] - price)
            reached = gain
    return area


def keys(evaluations) -> list[tuple[int, ...]]:
    return [tuple(evaluation.point.values()) for evaluation in evaluations]


@pytest.mark.parametrize(
    "sampler", [SearchSampler.RANDOM, SearchSampler.NSGA2, "random", optuna.samplers.RandomSampler(seed=0)]
)
def test_whole_space_gives_the_front_of_brute_force(sampler):
    net = network(2)
    report = search(net, [ACCURACY, COST], sampler=sampler, budget=100)
    values = pairs(net.space)
    assert sorted(keys(report.evaluations)) == sorted(values)
    assert set(keys(report.front)) == brute_front(values)
    gains = [evaluation.values["accuracy"] for evaluation in report.front]
    assert gains == sorted(gains, reverse=True)
    assert report.complete and report.best == net.space.maximal() | {"d0": 24}


def test_nsga2_finds_most_of_the_front_in_half_of_the_space():
    """On average over a few seeds; any one of them may have bad luck."""
    net = network()
    values = pairs(net.space)
    worst = (min(gain for gain, _ in values.values()), max(price for _, price in values.values()))
    shares: dict[SearchSampler, list[float]] = {SearchSampler.NSGA2: [], SearchSampler.RANDOM: []}
    for sampler, found in shares.items():
        for seed in range(4):
            report = search(net, [ACCURACY, COST], sampler=sampler, budget=120, seed=seed)
            measured = {key: values[key] for key in keys(report.evaluations)}
            assert len(measured) == len(report.evaluations) == 120
            assert set(keys(report.front)) == brute_front(measured)
            found.append(hypervolume(measured.values(), worst) / hypervolume(values.values(), worst))
    by_nsga2, by_chance = (sum(found) / len(found) for found in shares.values())
    assert by_nsga2 >= max(0.97, by_chance)


def test_hill_climbing_reaches_the_optimum_of_brute_force():
    net = network()
    report = search(net, [ACCURACY], budget=200, seed=1)
    best = max(net.space.enumerate(), key=accuracy)
    assert report.best == best and report.chosen.values == {"accuracy": accuracy(best)}
    assert keys(report.evaluations)[0] == (24,) * 5
    assert len(report.evaluations) < 120, "it stops when nothing around is better"
    # Every point is a neighbour of the best before it.
    top = report.evaluations[0]
    for evaluation in report.evaluations[1:]:
        steps = [abs(net.space.dimensions[name].index(size) - net.space.dimensions[name].index(top.point[name]))
                 for name, size in evaluation.point.items()]  # fmt: skip
        assert max(steps) == 1 and sum(steps) in (1, 2)
        top = max(top, evaluation, key=lambda each: each.values["accuracy"])


def test_heuristic_is_one_evaluation():
    net = network()
    report = search(net, [ACCURACY, COST], sampler="heuristic", budget=50)
    assert [evaluation.point for evaluation in report.evaluations] == [net.space.heuristic()]
    assert report.chosen.values == {"accuracy": accuracy(net.space.heuristic()), "cost": 120}


@pytest.mark.parametrize("sampler", list(SearchSampler))
def test_point_is_active_while_measured_and_the_old_one_afterwards(sampler):
    net = network()
    before = net.active

    def measure(point):
        assert net.active == point
        return accuracy(point)

    report = search(net, [Objective("accuracy", measure)], sampler=sampler, budget=40)
    assert net.active == before
    measured = [tuple(point.values()) for point in net.activated[:-1]]
    assert measured == keys(report.evaluations) and len(set(measured)) == len(measured)


def test_minimization():
    report = search(network(), [Objective("loss", lambda point: -accuracy(point), maximize=False)], budget=200, seed=1)
    assert report.best == max(network().space.enumerate(), key=accuracy)


# The test function.


def test_gap_between_validation_and_test_of_the_chosen_point_alone():
    net = network()
    tested = []

    def test(point):
        assert net.active == point and len(net.activated) == 30 + 1
        tested.append(dict(point))
        return accuracy(point) - 0.25

    report = search(net, [ACCURACY], sampler="random", budget=30, test=test)
    assert tested == [report.best]
    assert report.test == pytest.approx(report.chosen.values["accuracy"] - 0.25)
    assert report.gap == pytest.approx(0.25)
    assert "gap +0.25" in str(report)
    assert net.active == net.space.minimal()
    without = search(net, [ACCURACY], sampler="random", budget=30)
    assert without.best == report.best and without.gap is None and without.test is None
    fewer_is_better = Objective("loss", lambda point: -accuracy(point), maximize=False)
    assert search(net, [fewer_is_better], budget=5, test=lambda point: 0.5 - accuracy(point)).gap == pytest.approx(0.5)


@pytest.mark.parametrize("test", [accuracy, ACCURACY])
def test_validation_cannot_be_the_test(test):
    net = network()
    with pytest.raises(nncf.ValidationError, match="very function of accuracy"):
        search(net, [ACCURACY], test=test)
    assert not net.activated


def test_limits_decide_which_point_is_chosen_and_tested():
    net = network(3)
    tested = []
    report = search(
        net,
        [ACCURACY, COST],
        sampler="random",
        budget=27,
        limits={"cost": 64},
        test=lambda point: tested.append(point) or 0.0,
    )
    allowed = [point for point in net.space.enumerate() if cost(point) <= 64]
    assert accuracy(report.best) == max(map(accuracy, allowed)) and tested == [report.best]
    assert report.pick(cost=72, accuracy=1.0) == max(
        (each for each in report.evaluations if each.values["cost"] <= 72), key=lambda each: each.values["accuracy"]
    )
    assert report.pick(accuracy=1e9) is None
    with pytest.raises(nncf.ValidationError, match=r"limits on \['latency'\]; the objectives are \['accuracy', 'cost'"):
        report.pick(latency=3)


def test_limits_that_no_point_keeps():
    report = search(network(), [ACCURACY], budget=5, limits={"accuracy": 1e9}, test=lambda point: 1 / 0)
    assert report.chosen is None and report.gap is None and report.to_dict()["chosen"] is None
    assert "5 points measured" in str(report)
    with pytest.raises(nncf.ValidationError, match="None of the 5 points measured keeps the limits"):
        report.best  # noqa: B018


def test_ties_are_decided_by_the_next_objective():
    level = Objective("level", lambda point: 1.0)
    report = search(network(3), [level, COST], sampler="random", budget=27)
    assert report.best == report.front[0].point == network(3).space.minimal() and len(report.front) == 1


# Interruptions.


class Interrupted:
    """An objective that is interrupted once, at its n-th call."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, point) -> float:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return accuracy(point)


SINGLE = [SearchSampler.HILL_CLIMBING, SearchSampler.RANDOM, SearchSampler.NSGA2]


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
]


@pytest.fixture
def small_generations(monkeypatch):
    monkeypatch.setattr("nncf_ext.exploration.engine._POPULATION", 3)
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
    report = search(network(), [ACCURACY, COST], sampler="nsga2", budget=6, storage=file)
    assert not [each for each in recwarn if issubclass(each.category, optuna.exceptions.ExperimentalWarning)]
    study = stock_study(file)
    assert study.metric_names == ["accuracy", "cost"]
    sizes = [trial.user_attrs["sizes"] for trial in study.trials]
    assert sizes[0] == dict.fromkeys(network().space.dimensions, 24)
    assert [cost(each) for each in sizes] == [trial.values[1] for trial in study.trials]
    assert all(each.point in sizes for each in report.evaluations)


def test_a_file_without_sizes_and_names_continues(tmp_path):
    """As earlier releases wrote it."""
    settings = {"sampler": "random", "seed": 3}
    whole, old = tmp_path / "whole.log", tmp_path / "old.log"
    search(network(), [ACCURACY], budget=4, storage=whole, **settings)
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"sizes"' not in line and b"metric_names" not in line]
    assert len(kept) == len(lines) - 5
    old.write_bytes(b"".join(kept))
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
        with pytest.raises(nncf.ValidationError, match="of another space or other objectives.*Name another"):
            search(net, objectives, sampler="random", storage=storage)
    search(network(4), [ACCURACY], budget=2, storage=storage, study_name="other")


# Reports and samplers by themselves.


def test_report_is_plain_data():
    report = search(network(2), [ACCURACY, COST], sampler="random", budget=9, test=lambda point: 1.0)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["objectives"] == {"accuracy": "maximize", "cost": "minimize"}
    front = [plain["evaluations"][place]["point"] for place in plain["front"]]
    assert front == [evaluation.point for evaluation in report.front]
    assert plain["chosen"]["point"] == report.best and plain["test"] == 1.0 and plain["complete"]
    text = str(report)
    assert text.count("│ chosen") == 1 and "accuracy (max)" in text and "d0: 24, d1: 32" in text


def test_table_of_many_dimensions_counts_sizes():
    text = str(search(network(9), [ACCURACY], sampler="heuristic"))
    assert "sizes 24 (9 times)" in text and "d8" not in text


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plot(tmp_path, suffix, magic):
    report = search(network(3), [ACCURACY, COST], sampler="random", budget=20)
    report.plot(tmp_path / f"front{suffix}")
    assert (tmp_path / f"front{suffix}").read_bytes().startswith(magic)
    with pytest.raises(nncf.ValidationError, match="two objectives; this search had accuracy alone"):
        search(network(), [ACCURACY], budget=1).plot(tmp_path / "front.png")


def test_hill_climbing_in_a_study_of_its_own():
    sampler = HillClimbingSampler(neighbours=15, distance=1, seed=0)
    study = optuna.create_study(direction="minimize", sampler=sampler)

    def bowl(trial):
        x, y = trial.suggest_int("x", -8, 12), trial.suggest_int("y", 0, 60, step=4)
        return (x - 7) ** 2 + (y - 20) ** 2

    study.optimize(bowl, n_trials=200, callbacks=[lambda study, _: sampler.converged(study) and study.stop()])
    assert study.trials[0].params == {"x": 2, "y": 28}
    assert study.best_params == {"x": 7, "y": 20} and len(study.trials) < 120


def sample(distribution: Callable, directions=("maximize",)) -> None:
    study = optuna.create_study(directions=list(directions), sampler=HillClimbingSampler())
    study.optimize(lambda trial: [distribution(trial)] * len(directions), n_trials=2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: sample(lambda trial: trial.suggest_float("x", 0, 1)),
            nncf.ParameterNotSupportedError,
            "x has a Float",
        ),
        (
            lambda: sample(lambda trial: trial.suggest_int("x", 1, 8, log=True)),
            nncf.ParameterNotSupportedError,
            "integers; x has",
        ),
        (
            lambda: sample(lambda trial: trial.suggest_int("x", 0, 8), ("maximize", "minimize")),
            nncf.ParameterNotSupportedError,
            "one objective; the study has 2",
        ),
        (lambda: HillClimbingSampler(neighbours=0), nncf.ValidationError, "at least 1; got 0 and 2"),
        (lambda: search(network(), []), nncf.ValidationError, "at least one Objective"),
        (lambda: search(network(), [accuracy]), nncf.ValidationError, "at least one Objective, each"),
        (lambda: search(network(), [ACCURACY, ACCURACY], sampler="random"), nncf.ValidationError, "name of its own"),
        (lambda: search(network(), [ACCURACY], sampler="grid"), nncf.ParameterNotSupportedError, "grid.*NSGA2"),
        (lambda: search(network(), [ACCURACY], sampler=None), nncf.ParameterNotSupportedError, "None.*Optuna"),
        (lambda: search(network(), [ACCURACY, COST]), nncf.ParameterNotSupportedError, "one objective.*NSGA2"),
        (
            lambda: search(network(), [ACCURACY, COST], sampler=HillClimbingSampler()),
            nncf.ParameterNotSupportedError,
            "one objective",
        ),
        (lambda: search(network(), [ACCURACY], budget=0), nncf.ValidationError, "at least 1; got 0"),
        (lambda: search(network(), [ACCURACY], limits={"cost": 1}), nncf.ValidationError, r"limits on \['cost'\]"),
        (
            lambda: search(network(), [Objective("loss", lambda point: float("nan"))]),
            nncf.ValidationError,
            "loss is nan at .*finite",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_search_over_ranks_of_real_adapters():
    from tests.nncf_ext.adapters import adapted, qkv, tokens

    net = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 3, 1)])
    report = search(
        net,
        [
            Objective("loss", lambda point: float(net.model(**tokens()).loss.detach()), maximize=False),
            Objective("parameters", net.adapter_parameters, maximize=False),
        ],
        sampler="nsga2",
        budget=9,
        test=lambda point: float(net.model(**tokens(seed=9)).loss.detach()),
    )
    losses = {}
    for point in net.space.enumerate():
        small = nncf_ext.extract(net, point)
        size = sum(value.numel() for name, value in small.named_parameters() if "lora_" in name)
        losses[tuple(point.values())] = (-float(small(**tokens()).loss.detach()), size)
    assert set(keys(report.front)) == brute_front(losses)
    for evaluation in report.evaluations:
        loss, size = losses[tuple(evaluation.point.values())]
        assert evaluation.values == {"loss": pytest.approx(-loss, rel=1e-5), "parameters": size}
    assert report.gap == pytest.approx(report.test - report.chosen.values["loss"])
    assert net.active == net.maximal()
