"""
NSGA-II over vectors of integers whose worth costs nothing: the inner search of LINAS, on predictors.

Optuna's NSGA-II keeps every point as a trial of a study, which suits measurements. Thousands of predictions for each
round want arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nncf_ext.exploration.fronts import Floats, best_first, crowding, ranks

Integers = NDArray[np.int64]
Judge = Callable[[Integers], tuple[Floats, Floats]]
"""Of points ``[points, genes]``: losses ``[points, objectives]`` and violations ``[points]``."""

_CROSSED, _CROSSED_GENE, _CROSSOVER_INDEX, _MUTATION_INDEX = 0.9, 0.5, 15.0, 20.0
_TRIES = 20
"""How often offspring are made to replace those that were there already."""


@dataclass(frozen=True)
class Judged:
    """
    :param points: ``[points, genes]``, distinct, in the order in which they came up.
    :param losses: ``[points, objectives]``.
    :param violations: ``[points]``.
    """

    points: Integers
    losses: Floats
    violations: Floats


def evolve(
    judge: Judge,
    counts: Integers,
    population: int,
    generations: int,
    rng: np.random.Generator,
    mutation: float,
    resets: bool = False,
) -> Judged:
    """
    :param judge: What points are worth.
    :param counts: ``[genes]``: gene i is 0 to ``counts[i] - 1``.
    :param population: Points of a generation.
    :param generations: Number of generations, the first random one included.
    :param rng: Where chance comes from.
    :param mutation: Chance of each gene of a child to mutate.
    :param resets: A gene that mutates takes any other value, instead of one near the old one (polynomial mutation).
    :return: Every point that was judged.

    Source: NSGA-II (Deb et al., 2002); simulated binary crossover (probability 0.9, index 15) and polynomial mutation
    (index 20), rounded, duplicates removed, as in DyNAS-T.
    """
    seen: set[bytes] = set()
    alive = _judged(judge, _new(rng.integers(0, counts, (population, len(counts))), seen, population))
    everyone = [alive]
    for _ in range(generations - 1):
        rank = ranks(alive.losses, alive.violations, len(alive.points))
        crowded = crowding(alive.losses, rank)
        fresh: list[Integers] = []
        for _ in range(_TRIES):
            missing = population - sum(map(len, fresh))
            if not missing:
                break
            children = _children(alive.points, rank, crowded, counts, rng, mutation, resets)
            fresh.append(_new(children, seen, missing))
        if missing := population - sum(map(len, fresh)):  # nothing else is to be bred
            fresh.append(_new(rng.integers(0, counts, (missing, len(counts))), seen, missing))
        if not sum(map(len, fresh)):
            break
        born = _judged(judge, np.concatenate(fresh))
        everyone.append(born)
        both = _joined([alive, born])
        kept = best_first(both.losses, both.violations, population)[:population]
        alive = Judged(both.points[kept], both.losses[kept], both.violations[kept])
    return _joined(everyone)


def _judged(judge: Judge, points: Integers) -> Judged:
    return Judged(points, *judge(points))


def _joined(groups: list[Judged]) -> Judged:
    return Judged(
        np.concatenate([each.points for each in groups]),
        np.concatenate([each.losses for each in groups]),
        np.concatenate([each.violations for each in groups]),
    )


def _new(points: Integers, seen: set[bytes], limit: int) -> Integers:
    """The first few that did not come up before; they have now."""
    stays = np.zeros(len(points), dtype=bool)
    for place, point in enumerate(points):
        stays[place] = limit > 0 and (key := point.tobytes()) not in seen
        if stays[place]:
            seen.add(key)
            limit -= 1
    return points[stays]


def _children(
    points: Integers,
    rank: Integers,
    crowded: Floats,
    counts: Integers,
    rng: np.random.Generator,
    mutation: float,
    resets: bool,
) -> Integers:
    """As many children as there are points, of parents that won a tournament of two."""
    pairs = rng.integers(0, len(points), (2, len(points) + len(points) % 2))
    first, second = pairs
    wins = (rank[first] < rank[second]) | ((rank[first] == rank[second]) & (crowded[first] >= crowded[second]))
    parents = points[np.where(wins, first, second)].astype(np.float64)
    top = counts.astype(np.float64) - 1.0
    children = _crossed(parents[::2], parents[1::2], top, rng)
    mutates = rng.random(children.shape) < mutation
    if resets:
        whole = np.rint(children)
        other = rng.integers(0, np.maximum(counts - 1, 1), children.shape)
        children = np.where(mutates & (top > 0), other + (other >= whole), whole)
    else:
        children = np.where(mutates, _polynomial(children, top, rng), children)
    return np.clip(np.rint(children), 0, top).astype(np.int64)


def _crossed(one: Floats, other: Floats, top: Floats, rng: np.random.Generator) -> Floats:
    """Simulated binary crossover within bounds: two children of each pair, one below the other."""
    low, high = np.minimum(one, other), np.maximum(one, other)
    between = high - low
    applies = (between > 0) & (rng.random(one.shape) < _CROSSED_GENE) & (rng.random((len(one), 1)) < _CROSSED)
    power = 1 / (_CROSSOVER_INDEX + 1)
    chance = rng.random(one.shape)

    def spread(room: Floats) -> Floats:
        """How far a child lies from the middle, in halves of the distance; `room` is what is left to the bound."""
        with np.errstate(divide="ignore", invalid="ignore"):
            alpha = 2 - (1 + 2 * room / between) ** -(_CROSSOVER_INDEX + 1)
            return np.where(chance <= 1 / alpha, (chance * alpha) ** power, (1 / (2 - chance * alpha)) ** power)

    with np.errstate(invalid="ignore"):
        down = np.where(applies, (low + high - spread(low) * between) / 2, low)
        up = np.where(applies, (low + high + spread(top - high) * between) / 2, high)
    # Which child has the smaller value is a matter of chance where genes cross, and as in the parents elsewhere.
    swaps = np.where(applies, rng.random(one.shape) < 0.5, one > other)
    return np.concatenate([np.where(swaps, up, down), np.where(swaps, down, up)])


def _polynomial(values: Floats, top: Floats, rng: np.random.Generator) -> Floats:
    """Polynomial mutation within bounds."""
    extent = np.maximum(top, 1e-12)
    chance, power = rng.random(values.shape), _MUTATION_INDEX + 1
    downward = 2 * chance + (1 - 2 * chance) * (1 - values / extent) ** power
    upward = 2 * (1 - chance) + (2 * chance - 1) * (values / extent) ** power
    step = np.where(chance < 0.5, np.abs(downward) ** (1 / power) - 1, 1 - np.abs(upward) ** (1 / power))
    return values + step * top
