"""search(): fronts against brute force, resume against uninterrupted runs, and what is never done with test data."""

import json
from collections.abc import Callable

import nncf
import optuna
import pytest

import nncf_ext
from nncf_ext import HillClimbingSampler, Objective, SearchSampler, search
from tests.nncf_ext.searches import (
    ACCURACY,
    COST,
    accuracy,
    brute_front,
    cost,
    hypervolume,
    keys,
    network,
    pairs,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize(
    "sampler",
    [SearchSampler.RANDOM, SearchSampler.NSGA2, SearchSampler.NEMO, "random", optuna.samplers.RandomSampler(seed=0)],
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


def test_given_points_are_measured_first_and_not_with_the_heuristic_alone():
    net = network()
    starts = [net.space.minimal(), net.space.draw(3)]
    report = search(net, [ACCURACY], budget=4, starts=starts, sampler="random")
    assert [each.point for each in report.evaluations[:3]] == [*starts, net.space.heuristic()]
    with pytest.raises(nncf.ParameterNotSupportedError, match="HEURISTIC"):
        search(net, [ACCURACY], starts=starts, sampler="heuristic")
    with pytest.raises(nncf.ValidationError, match="misses"):
        search(net, [ACCURACY], starts=[{}], sampler="random")


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

    report = search(net, [Objective("accuracy", measure)], sampler=sampler, budget=60)
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


def test_constraints_decide_which_point_is_chosen_and_tested():
    net = network(3)
    tested = []
    report = search(
        net,
        [ACCURACY, COST],
        sampler="random",
        budget=27,
        constraints=["cost <= 64"],
        test=lambda point: tested.append(point) or 0.0,
    )
    allowed = [point for point in net.space.enumerate() if cost(point) <= 64]
    assert accuracy(report.best) == max(map(accuracy, allowed)) and tested == [report.best]
    assert report.pick(cost=72, accuracy=1.0) == max(
        (each for each in report.evaluations if each.values["cost"] <= 72), key=lambda each: each.values["accuracy"]
    )
    with pytest.raises(nncf.ValidationError, match=r"None of the 27 .* accuracy >= 1e\+09.* nearest: accuracy"):
        report.pick(accuracy=1e9)
    with pytest.raises(nncf.ValidationError, match=r"constraint on 'latency'; the objectives are \['accuracy', 'cost'"):
        report.pick(latency=3)


def test_constraints_that_no_point_keeps():
    report = search(network(), [ACCURACY], budget=5, constraints=["accuracy >= 1e9"], test=lambda point: 1 / 0)
    assert report.chosen is None and report.gap is None and report.to_dict()["chosen"] is None
    assert "5 points measured" in str(report)
    with pytest.raises(nncf.ValidationError, match="None of the 5 points measured keeps accuracy >= 1e"):
        report.best  # noqa: B018


def test_ties_are_decided_by_the_next_objective():
    level = Objective("level", lambda point: 1.0)
    report = search(network(3), [level, COST], sampler="random", budget=27)
    assert report.best == report.front[0].point == network(3).space.minimal() and len(report.front) == 1


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
        (
            lambda: search(network(), [ACCURACY], constraints=["cost <= 1"]),
            nncf.ValidationError,
            r"constraint on 'cost'; the objectives are \['accuracy'\]",
        ),
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
