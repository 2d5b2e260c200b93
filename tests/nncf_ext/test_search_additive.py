"""Sums of losses within a budget of sums of costs: all points, one by one, are the oracle."""

import itertools
import math

import nncf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nncf_ext import SearchSpace, additive_front, best_additive

NUMBERS = st.integers(-3, 6).map(float) | st.floats(-2, 9, allow_subnormal=False)


@st.composite
def knapsacks(draw):
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    space = SearchSpace({f"d{number}": tuple(range(count, 0, -1)) for number, count in enumerate(counts)})
    losses, costs = (
        {
            name: draw(st.lists(NUMBERS, min_size=len(sizes), max_size=len(sizes)))
            for name, sizes in space.dimensions.items()
        }
        for _ in range(2)
    )
    return space, losses, costs


def total(space, table, point):
    return sum(table[name][space.dimensions[name].index(size)] for name, size in point.items())


def smallest_difference(space, losses):
    """What counts as no difference."""
    return 1e-6 * max(max(losses[name]) - min(losses[name]) for name in space.dimensions) + 1e-12


@settings(max_examples=60, deadline=None)
@given(knapsacks(), st.floats(-8, 30))
def test_the_best_within_a_budget_is_that_of_all_points(knapsack, budget):
    space, losses, costs = knapsack
    every = [*space.enumerate()]
    within = [total(space, losses, point) for point in every if total(space, costs, point) <= budget]
    if not within:
        least = min(total(space, costs, point) for point in every)
        with pytest.raises(nncf.ValidationError, match="the least of all points is") as error:
            best_additive(space, losses, costs, budget)
        assert float(str(error.value).split()[-1].rstrip(".")) == pytest.approx(least, rel=1e-5, abs=1e-9)
        return
    found = best_additive(space, losses, costs, budget)
    assert total(space, costs, found) <= budget
    assert min(within) <= total(space, losses, found) <= min(within) + smallest_difference(space, losses)


@settings(max_examples=30, deadline=None)
@given(knapsacks(), st.integers(1, 9))
def test_a_front_holds_what_nothing_beats(knapsack, count):
    space, losses, costs = knapsack
    front = additive_front(space, losses, costs, points=count)
    values = [(total(space, costs, point), total(space, losses, point)) for point in front]
    every = [(total(space, costs, point), total(space, losses, point)) for point in space.enumerate()]
    assert 1 <= len(front) <= count and values == sorted(values) and len(set(values)) == len(values)
    slack = smallest_difference(space, losses)
    for cost, loss in values:
        assert not any(price <= cost and other < loss - slack for price, other in every)
    assert values[0][0] == pytest.approx(min(every)[0], abs=1e-9)
    if count > 1:
        assert values[-1][1] == pytest.approx(min(loss for _, loss in every), abs=1e-9)


def test_a_budget_between_costs_that_tolerances_do_not_tell_apart():
    """One byte of a gigabyte decides."""
    space = SearchSpace({"a": (2, 1), "b": (2, 1)})
    losses = {"a": [0.0, 1.0], "b": [0.0, 1.5]}
    costs = {"a": [1e9 + 1, 0.0], "b": [1e9 + 2, 0.0]}
    assert best_additive(space, losses, costs, 1e9 + 2) == {"a": 1, "b": 2}
    assert best_additive(space, losses, costs, 1e9 + 1) == {"a": 2, "b": 1}
    assert best_additive(space, losses, costs, 1e9) == {"a": 1, "b": 1}
    assert best_additive(space, losses, costs, math.inf) == {"a": 2, "b": 2}


def test_bits_of_a_hundred_layers():
    """Its size is that of real models; the bound of Lagrange says how good the solution can be at all."""
    draw = np.random.default_rng(0)
    space = SearchSpace({f"layer{number}": (8, 6, 4, 2) for number in range(100)})
    weights = draw.integers(1000, 100_000, 100)
    slopes = draw.random(100)
    names, bits = [*space.dimensions], np.array([8.0, 6.0, 4.0, 2.0])
    lost, cost = 4.0**-bits * slopes[:, None], weights[:, None] * bits
    losses, costs = dict(zip(names, lost.tolist(), strict=True)), dict(zip(names, cost.tolist(), strict=True))
    budget = 4.0 * weights.sum()
    found = total(space, losses, best_additive(space, losses, costs, budget))
    bound = max((lost + rate * cost).min(axis=1).sum() - rate * budget for rate in np.geomspace(1e-12, 1e-3, 400))
    assert bound <= found <= 1.05 * bound
    uniform = total(space, losses, dict.fromkeys(space.dimensions, 4))
    assert found < 0.8 * uniform


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda table: table.pop("a"), r"2 dimensions; missing: \['a'\], unknown: \[\]"),
        (lambda table: table.update(c=[1.0]), r"missing: \[\], unknown: \['c'\]"),
        (lambda table: table.update(a=[1.0]), r"of a are a finite number for each of its sizes \[2, 1\]; got \[1.0\]"),
        (lambda table: table.update(a=[1.0, math.nan]), "of a are a finite number"),
    ],
)
@pytest.mark.parametrize("what", ["losses", "costs"])
def test_bad_tables(change, text, what):
    space = SearchSpace({"a": (2, 1), "b": (2, 1)})
    tables = {name: {"a": [0.0, 1.0], "b": [0.0, 1.0]} for name in ("losses", "costs")}
    change(tables[what])
    with pytest.raises(nncf.ValidationError, match=f"{what}.*{text}"):
        best_additive(space, budget=9, **tables)
    with pytest.raises(nncf.ValidationError, match=f"{what}.*{text}"):
        additive_front(space, **tables)


def test_bad_number_of_points():
    with pytest.raises(nncf.ValidationError, match="at least 1; got 0"):
        additive_front(SearchSpace({"a": (1,)}), {"a": [0.0]}, {"a": [0.0]}, points=0)


def test_sums_that_are_not_of_one_scale():
    space = SearchSpace({f"d{number}": (3, 2, 1) for number in range(5)})
    draw = np.random.default_rng(1)
    losses = {name: (1e-7 * draw.random(3)).tolist() for name in space.dimensions}
    costs = {name: (1e9 + 1e3 * draw.integers(0, 99, 3)).tolist() for name in space.dimensions}
    every = [(total(space, costs, point), total(space, losses, point)) for point in space.enumerate()]
    for budget in np.quantile([cost for cost, _ in every], [0.05, 0.3, 0.7]):
        expected = min(loss for cost, loss in every if cost <= budget)
        found = best_additive(space, losses, costs, float(budget))
        assert total(space, losses, found) == pytest.approx(expected, abs=1e-12)
    assert len(list(itertools.islice(additive_front(space, losses, costs), 3))) == 3
