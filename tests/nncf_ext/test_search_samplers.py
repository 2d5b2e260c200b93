"""LINAS and what it is made of: fronts against the definition, regression against scikit-learn, spaces walked whole."""

import itertools

import nncf
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

from nncf_ext import LinasSampler, search
from nncf_ext.exploration.domains import Domains
from nncf_ext.exploration.evolution import evolve
from nncf_ext.exploration.fronts import best_first, by_gain, crowding, hypervolume, ranks, unbeaten
from nncf_ext.exploration.linas import _Features
from nncf_ext.exploration.predictors import Predictor, SmoothPredictor, one_hot
from tests.nncf_ext.searches import ACCURACY, COST, accuracy, brute_front, cost, keys, network, pairs
from tests.nncf_ext.searches import hypervolume as area

optuna.logging.set_verbosity(optuna.logging.WARNING)

LOSSES = st.tuples(st.integers(1, 12), st.integers(1, 3)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(0, 4).map(float))
)


def beats(one, other):
    return all(one <= other) and any(one < other)


@given(LOSSES)
def test_front_by_the_definition(losses):
    expected = [not any(beats(other, one) for other in losses) for one in losses]
    assert unbeaten(losses).tolist() == expected


@given(LOSSES, st.data())
def test_ranks_by_the_definition(losses, data):
    violations = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 2.0]), min_size=12, max_size=12)))
    violations = violations[: len(losses)]
    expected, left, rank = np.full(len(losses), -1), {*np.flatnonzero(violations == 0)}, 0
    while left:
        front = {one for one in left if not any(beats(losses[other], losses[one]) for other in left)}
        expected[[*front]] = rank
        left, rank = left - front, rank + 1
    for amount in sorted({*violations} - {0.0}):
        expected[violations == amount] = rank
        rank += 1
    assert ranks(losses, violations, len(losses)).tolist() == expected.tolist()


@given(LOSSES)
def test_hypervolume_counts_the_cells_that_are_beaten(losses):
    sides = losses.shape[1]
    cells = itertools.product(range(4), repeat=sides)
    beaten = sum(any(all(one <= cell) for one in losses) for cell in map(np.array, cells))
    assert hypervolume(losses, np.full(sides, 4.0)) == beaten


def test_crowding_by_hand():
    losses = np.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0], [4.0, 0.0], [9.0, 9.0]])
    rank = ranks(losses, np.zeros(5), 5)
    assert rank.tolist() == [0, 0, 0, 0, 1]
    assert crowding(losses, rank).tolist() == [np.inf, 3 / 4 + 3 / 4, 3 / 4 + 2 / 4, np.inf, np.inf]
    assert best_first(losses, np.zeros(5), 5).tolist() == [0, 3, 1, 2, 4]
    assert best_first(losses, np.array([1.0, 0, 0, 0, 0]), 5)[-1] == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans(), st.integers(0, 99))
def test_evolution_judges_points_of_the_space_once(counts, resets, seed):
    sizes, asked = np.array(counts), []

    def judge(points):
        asked.extend(map(tuple, points.tolist()))
        return np.stack([points.sum(axis=1), -points[:, 0]], axis=1).astype(float), np.zeros(len(points))

    found = evolve(judge, sizes, 6, 8, np.random.default_rng(seed), 0.2, resets)
    assert [tuple(point) for point in found.points.tolist()] == asked and len(set(asked)) == len(asked) <= 48
    assert all(0 <= gene < count for point in asked for gene, count in zip(point, counts, strict=True))
    before = asked.copy()
    asked.clear()
    evolve(judge, sizes, 6, 8, np.random.default_rng(seed), 0.2, resets)
    assert asked == before


@pytest.mark.parametrize("resets", [False, True])
def test_evolution_finds_the_front(resets):
    """Of points with 6 genes of 4 values, those that have fewest of one thing for what they have of the other."""
    weights = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])

    def judge(points):
        return np.stack([points @ weights, ((3 - points) ** 2).sum(axis=1)], axis=1), np.zeros(len(points))

    every = np.array([*itertools.product(range(4), repeat=6)])
    reference = np.array([96.0, 54.0])
    best = hypervolume(judge(every)[0], reference)
    found = evolve(judge, np.full(6, 4), 40, 40, np.random.default_rng(0), 1 / 6, resets)
    assert hypervolume(found.losses, reference) > 0.97 * best
    assert len(found.points) < len(every) / 2


def test_constraints_lead_evolution():
    def judge(points):
        return points.sum(axis=1, keepdims=True).astype(float), (points[:, 0] < 3).astype(float)

    found = evolve(judge, np.full(5, 4), 10, 20, np.random.default_rng(1), 0.2, True)
    best = best_first(found.losses, found.violations, 1)[0]
    assert found.points[best].tolist() == [3, 0, 0, 0, 0]


# Predictors


def test_ridge_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    features = one_hot(rng.integers(0, 4, (43, 6)), np.full(6, 4))
    labels = 0.3 + features @ rng.normal(size=24) / 100 + rng.normal(size=43) / 300
    scale = 10.0 ** (np.floor(np.log10(np.abs(labels).max())) - 1)
    searched = GridSearchCV(
        Ridge(), {"alpha": np.arange(1, 101) / 10}, cv=5, scoring="neg_mean_absolute_percentage_error"
    ).fit(features, labels / scale)
    predictor = Predictor(features, labels)
    new = one_hot(rng.integers(0, 4, (9, 6)), np.full(6, 4))
    assert np.allclose(predictor(new), searched.predict(new) * scale, rtol=1e-9)


def test_the_machine_is_taken_where_ridge_cannot_follow():
    points = np.array([*itertools.product(range(4), repeat=3)])
    order = np.random.default_rng(0).permutation(len(points))[:50]
    features = one_hot(points, np.full(3, 4))
    values = 50.0 + 10 * ((points[:, 0] > 1) ^ (points[:, 1] > 1))
    predictor = Predictor(features[order], values[order])
    rest = np.setdiff1d(np.arange(len(points)), order)
    assert np.abs(predictor(features[rest]) - values[rest]).mean() < 3  # ridge: 5
    assert predictor.error < 0.07


@pytest.mark.parametrize("labels", [np.zeros(7), np.full(7, -3.0), np.array([1.0, 2.0])])
def test_labels_without_a_lesson(labels):
    features = np.eye(7)[: len(labels)]
    predictor = Predictor(features, labels)
    assert np.isfinite(predictor(features)).all() and abs(predictor(features).mean() - labels.mean()) < 1


def test_inactive_parameters_make_no_difference():
    ranges = dict.fromkeys("abc", optuna.distributions.IntDistribution(0, 2))
    domains = Domains(ranges, lambda params: {"b"} if params["a"] == 0 else set())
    features = _Features(domains, smooth=False)
    points = np.array([[0, 0, 1], [0, 2, 1], [1, 0, 1], [1, 2, 1]])
    seen = features(points)
    assert np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[2], seen[3])
    assert np.array_equal(seen[0], [1, 0, 0, 0, 0, 0, 0, 1, 0])


def test_smooth_features_know_the_order_of_values():
    kinds = optuna.distributions.CategoricalDistribution(["x", "y"])
    ranges = {"a": optuna.distributions.IntDistribution(0, 4), "b": kinds}
    features = _Features(Domains(ranges, lambda params: {"a"} if params["b"] == "y" else set()), smooth=True)
    seen = features(np.array([[0, 0], [1, 0], [4, 0], [4, 1], [2, 1]]))
    assert np.array_equal(seen, [[0, 1, 0], [0.25, 1, 0], [1, 1, 0], [-0.5, 0, 1], [-0.5, 0, 1]])


def test_a_smooth_predictor_learns_a_product_from_few_points():
    places = np.array([*itertools.product(range(5), repeat=4)])
    labels = np.exp(-places @ [0.5, 0.3, 0.2, 0.1]) * (1 + 0.5 * places[:, 0])
    chosen = np.random.default_rng(0).permutation(len(places))
    train, held_out = chosen[:15], chosen[15:]
    predictor = SmoothPredictor(places[train] / 4, labels[train])
    errors = np.abs(np.log(predictor(places[held_out] / 4) / labels[held_out]))
    spread = np.abs(np.log(labels[held_out]) - np.log(labels[train]).mean())
    assert np.median(errors) < 0.2 * np.median(spread)
    negative = SmoothPredictor(places[train] / 4, -labels[train])  # no logarithm: values as they are
    assert np.corrcoef(negative(places[held_out] / 4), -labels[held_out])[0, 1] > 0.9


@given(st.data())
def test_points_by_gain_are_those_of_the_definition(data):
    shapes = st.integers(1, 8), st.integers(1, 5)
    candidates, measured = (
        data.draw(arrays(np.float64, (data.draw(count), 2), elements=st.integers(0, 6).map(float))) for count in shapes
    )
    found = by_gain(candidates, measured, 3).tolist()
    assert sorted(found) == [*range(len(candidates))]
    worst, taken = measured.max(axis=0), [*measured]

    def volume(points):  # unit squares, one by one
        cells = itertools.product(range(int(worst[0])), range(int(worst[1])))
        return sum(any(x <= cell[0] and y <= cell[1] for x, y in points) for cell in cells)

    for place in found[:3]:
        gains = [volume([*taken, candidates[each]]) for each in range(len(candidates))]
        if max(gains) == volume(taken):
            break
        assert gains[place] == max(gains)
        taken.append(candidates[place])


# The sampler


def test_a_study_of_anyone_is_walked_without_a_repeat():
    sampler = LinasSampler(8, inner_evaluations=64, seed=3)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

    def objective(trial):
        kind = trial.suggest_categorical("kind", ["a", "b", None])
        layers = trial.suggest_int("layers", 2, 8, step=3)
        rate = trial.suggest_float("rate", 0.1, 0.4, step=0.1)
        return layers * (2 if kind == "b" else 1) - rate, layers + rate

    study.optimize(objective, n_trials=36)
    values = [(trial.params["kind"], trial.params["layers"], round(trial.params["rate"], 6)) for trial in study.trials]
    assert len(set(values)) == 3 * 3 * 4 == len(values)


def test_with_perfect_predictors_the_second_round_holds_the_front():
    net = network()
    values = pairs(net.space)
    front = brute_front(values)
    names, lists = [*net.space.dimensions], [*net.space.dimensions.values()]

    def point(params):
        return {name: sizes[params[name]] for name, sizes in zip(names, lists, strict=True)}

    sampler = LinasSampler(
        len(front),
        resets=True,
        exact={0: lambda params: accuracy(point(params)), 1: lambda params: cost(point(params))},
    )
    report = search(net, [ACCURACY, COST], sampler=sampler, budget=2 * len(front))
    assert front <= set(keys(report.evaluations)) and len(report.evaluations) == 2 * len(front)
    assert len(front) < 40


def test_linas_needs_fewer_points_than_chance():
    net = network(6, (32, 24, 16, 8))
    values = pairs(net.space)
    worst = (min(gain for gain, _ in values.values()), max(price for _, price in values.values()))
    best = area(values.values(), worst)

    def share(sampler, seed):
        report = search(net, [ACCURACY, COST], sampler=sampler, budget=75, seed=seed)
        measured = keys(report.evaluations)
        assert len(set(measured)) == len(measured) == 75
        assert area([values[key] for key in measured], worst) == pytest.approx(
            report.hypervolume(accuracy=worst[0], cost=worst[1])
        )
        return area([values[key] for key in measured], worst) / best

    ours = [share(LinasSampler(15, inner_evaluations=600, seed=seed), seed) for seed in range(3)]
    chance = [share("random", seed) for seed in range(3)]
    assert min(ours) > 0.95 > max(chance)


def test_the_search_in_small_rounds_needs_fewer_points_than_chance():
    net = network(6, (32, 24, 16, 8))
    values = pairs(net.space)
    worst = (min(gain for gain, _ in values.values()), max(price for _, price in values.values()))
    best = area(values.values(), worst)

    def share(sampler, seed):
        report = search(net, [ACCURACY, COST], sampler=sampler, budget=45, seed=seed)
        measured = keys(report.evaluations)
        assert len(set(measured)) == len(measured) == 45
        return area([values[key] for key in measured], worst) / best

    assert min(share("linas", seed) for seed in range(2)) > 0.9 > max(share("random", seed) for seed in range(2))


@pytest.mark.parametrize(("sampler", "least"), [("nsga2", 24), ("linas", 24), ("nemo", 12)])
def test_constraints_lead_the_search(sampler, least, monkeypatch):
    """
    Where one point in four keeps them, most of the 48 that are measured after the first round do, with NEMO more than
    by chance; without constraints, fewer.
    """
    from nncf_ext import SearchSampler

    rounds = dict.fromkeys((SearchSampler.NSGA2, SearchSampler.LINAS, SearchSampler.NEMO), 12)
    monkeypatch.setattr("nncf_ext.exploration.loop._FIRST_ROUNDS", rounds)
    net = network(4, (32, 24, 16, 8))
    report = search(net, [ACCURACY, COST], sampler=sampler, budget=60, constraints=["cost <= 50%"])
    free = search(net, [ACCURACY, COST], sampler=sampler, budget=60)
    kept, by_chance = (sum(each.values["cost"] <= 64 for each in one.evaluations[12:]) for one in (report, free))
    assert kept > by_chance and kept > least
    assert report.full == {"accuracy": accuracy(net.space.maximal()), "cost": 128}
    assert report.chosen.values["cost"] <= 64


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: LinasSampler(4), nncf.ValidationError, "population and a first round of at least 5"),
        (lambda: LinasSampler(50, inner_evaluations=49), nncf.ValidationError, "got 50, 50 and 49"),
        (lambda: LinasSampler(first_round=4), nncf.ValidationError, "got 50, 4 and 5000"),
        (lambda: LinasSampler(mutation=2), nncf.ValidationError, "0 to 1; got 2"),
        (
            lambda: sample(lambda trial: trial.suggest_float("x", 0, 1)),
            nncf.ParameterNotSupportedError,
            "floats with a step.*x has Float",
        ),
        (
            lambda: sample(lambda trial: trial.suggest_int("x", 1, 10**6)),
            nncf.ParameterNotSupportedError,
            "at most 1000 values; x has Int",
        ),
        (
            lambda: search(network(), [ACCURACY, COST], sampler="linas", budget=9),
            nncf.ValidationError,
            "9 points is less than the first round of the sampler, 10.*population_size=5",
        ),
        (
            lambda: search(network(), [ACCURACY, COST], sampler="nemo", budget=19),
            nncf.ValidationError,
            "19 points is less than the first round of the sampler, 20",
        ),
        (
            lambda: search(
                network(), [ACCURACY, COST], sampler=optuna.samplers.NSGAIISampler(population_size=30), budget=29
            ),
            nncf.ValidationError,
            "less than the first round",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def sample(distribution) -> None:
    optuna.create_study(sampler=LinasSampler()).optimize(distribution, n_trials=2)
