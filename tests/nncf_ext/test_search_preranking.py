"""A cheap score chooses what a search measures, as long as it tells more than chance."""

import itertools
import logging
import math
from dataclasses import dataclass
from random import Random
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from scipy import stats

import nncf_ext
from nncf_ext import ElasticMode, Objective, SearchSampler, search
from nncf_ext.exploration.preranking import agreement, by_chance
from tests.networks import network as torch_network
from tests.nncf_ext.searches import COST, Network, accuracy, cost, keys, network


@dataclass
class Score:
    """A score of points, from a function."""

    name: str
    function: Any
    asked: int = 0

    def bind(self, net: Network) -> Any:
        def score(point: dict[str, int]) -> float:
            self.asked += 1
            return self.function(point)

        return score


def noise(point: dict[str, int]) -> float:
    return Random(str(point)).random()


def naive_tau(one: list[float], other: list[float]) -> float:
    signs = [
        (np.sign(a - b), np.sign(c - d)) for (a, c), (b, d) in itertools.combinations(zip(one, other, strict=True), 2)
    ]
    pairs = sum(x * y for x, y in signs)
    return float(pairs / math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)))


def test_agreement_by_the_definition() -> None:
    draw = Random(0)
    one, other, size = ([draw.randrange(6) + 0.0 for _ in range(15)] for _ in range(3))
    assert math.isclose(agreement(one, other), naive_tau(one, other))
    xy, xz, yz = naive_tau(one, other), naive_tau(one, size), naive_tau(other, size)
    partial = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert math.isclose(agreement(one, other, size), partial)
    # A score that says the size says nothing beside it.
    assert agreement(size, [value + 0.1 * noise for value, noise in zip(size, one, strict=True)], size) == 0.0
    assert agreement([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) == 0.0
    assert agreement([-math.inf, 1.0, 2.0], [1.0, 2.0, 3.0]) == 1.0


@pytest.mark.parametrize(("tau", "count"), [(0.0, 20), (0.3, 16), (0.3, 60), (-0.2, 30), (1.0, 16)])
def test_chance_by_shuffling(tau, count) -> None:
    draw = np.random.default_rng(0)
    order = np.arange(count)
    drawn = [stats.kendalltau(order, draw.permutation(count)).statistic for _ in range(500)]
    assert abs(np.mean(np.array(drawn) >= tau) - by_chance(tau, count)) < 0.07


@pytest.mark.parametrize(
    ("sampler", "gain"),
    [
        (SearchSampler.RANDOM, 1),
        (SearchSampler.NSGA2, 1),
        pytest.param(SearchSampler.TPE, 0.5, marks=pytest.mark.slow),  # learns by itself where good points are
    ],
)
def test_a_score_that_knows_finds_more(sampler, gain) -> None:
    objective = Objective("accuracy", accuracy)
    plain = search(network(8), [objective], sampler=sampler, budget=40, seed=3)
    score = Score("knows", lambda point: accuracy(point) + 0.5 * noise(point))
    ranked = search(network(8), [objective], sampler=sampler, budget=40, seed=3, prerank=score)
    assert len(ranked.evaluations) == 40 == len({*keys(ranked.evaluations)})
    best = [max(each.values["accuracy"] for each in report.evaluations) for report in (plain, ranked)]
    assert best[1] >= best[0]
    means = [np.mean([each.values["accuracy"] for each in report.evaluations]) for report in (plain, ranked)]
    assert means[1] > means[0] + gain
    assert ranked.notes[-1].startswith("Score knows: Kendall's tau 0.") and ranked.notes[-1].endswith(
        "used to the end."
    )
    assert score.asked >= 10 * 20


def test_a_score_that_knows_nothing_is_switched_off(caplog) -> None:
    objective = Objective("accuracy", accuracy)
    with caplog.at_level(logging.INFO, logger="nncf_ext"):
        report = search(
            network(8), [objective], sampler=SearchSampler.RANDOM, budget=40, seed=1,
            prerank=Score("wrong", lambda point: -accuracy(point)),
        )  # fmt: skip
    assert "wrong is no better than chance" in caplog.text and "not used at the end" in report.notes[-1]
    first, last = (
        [each.values["accuracy"] for each in report.evaluations[part]] for part in (slice(1, 16), slice(18, 40))
    )
    assert np.mean(last) > np.mean(first) + 1  # what is drawn at random is better than what it chose


def test_less_is_better_where_the_objective_is_minimized() -> None:
    lower = Objective("loss", lambda point: -accuracy(point), maximize=False)
    score = Score("knows", accuracy)
    report = search(network(8), [lower], sampler=SearchSampler.RANDOM, budget=30, prerank=score)
    assert "tau 1.00" in report.notes[-1]


def test_with_several_objectives_points_of_one_cost_are_compared() -> None:
    net: Any = network(8)
    net.macs = cost
    objectives = [Objective("accuracy", accuracy), COST]
    by_size = search(net, objectives, sampler=SearchSampler.RANDOM, budget=40, prerank=Score("size", cost))
    drawn = search(network(8), objectives, sampler=SearchSampler.RANDOM, budget=40)
    costs = [np.mean([each.values["cost"] for each in report.evaluations]) for report in (by_size, drawn)]
    assert abs(costs[0] - costs[1]) < 16  # ten candidates by size alone would be larger by 25 and more
    assert "tau 0.00 over 40 points measured; no better than chance" in by_size.notes[-1]


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(tmp_path) -> None:
    def run(budget: int, storage: Any = None) -> list[tuple[int, ...]]:
        score = Score("knows", lambda point: accuracy(point) + noise(point))
        objectives = [Objective("accuracy", accuracy), COST]
        report = search(
            network(8), objectives, sampler=SearchSampler.NSGA2, budget=budget, storage=storage, prerank=score
        )
        return keys(report.evaluations)

    whole = run(45)
    for budget in (20, 33, 45):
        found = run(budget, tmp_path / "search.log")
    assert found == whole


@pytest.mark.slow
def test_proxies_of_a_super_network() -> None:
    model = torch_network("basic")
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    settings = nncf_ext.AdvancedBootstrapNasParameters(min_width=2, width_step=3)
    net = nncf_ext.make_elastic(model, ElasticMode.WIDTH, example_input=images[:1], advanced_parameters=settings)
    point, before = net.random(1), net.active
    small = nncf_ext.extract(net, point)
    for name in ("params", "macs", "snip", "zen"):
        for fresh in (False, True):
            proxy = nncf_ext.Proxy(name, images, labels, fresh=fresh)
            wanted = net.macs(point) if name == "macs" else proxy(small)
            assert math.isclose(proxy.bind(net)(point), wanted, rel_tol=1e-6)
    assert net.active == before
    objective = Objective("size", lambda at: float(net.parameter_count(at)))
    report = search(net, [objective], sampler=SearchSampler.RANDOM, budget=8, prerank=nncf_ext.Proxy("params"))
    assert "Score params: Kendall's tau 1.00 over 8 points" in report.notes[-1]


def test_bad_requests() -> None:
    objective = Objective("accuracy", accuracy)
    for sampler in (SearchSampler.LINAS, SearchSampler.HILL_CLIMBING, nncf_ext.LinasSampler(5)):
        with pytest.raises(nncf.ParameterNotSupportedError, match="Use SearchSampler.RANDOM, TPE or NSGA2"):
            search(network(), [objective], sampler=sampler, prerank=nncf_ext.Proxy("params"))
    with pytest.raises(nncf.ValidationError, match="prerank is a score of points.*got 'params'"):
        search(network(), [objective], sampler=SearchSampler.RANDOM, prerank="params")
