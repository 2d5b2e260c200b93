"""Which species found what is worth most, how many of the next generation are its, and who are the parents?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nncf_ext.exploration.evolution import Integers
from nncf_ext.exploration.fronts import Floats, best_first, crowding, exclusive, ranks

_MARGIN = 0.1
_MEMORY = 0.5


@dataclass(frozen=True)
class Past:
    """
    Points measured, each once, in the order in which they were begun.

    :param numbers: ``[points]``: of their trials.
    :param species: ``[points]``: places of the species that found them; -1: none of ours.
    :param losses: ``[points, objectives]``.
    :param violations: ``[points]``, 0 where a point keeps all constraints.
    """

    numbers: Integers
    species: Integers
    losses: Floats
    violations: Floats

    def __getitem__(self, chosen: slice | Integers | NDArray[np.bool_]) -> "Past":
        """Some of the points."""
        return Past(self.numbers[chosen], self.species[chosen], self.losses[chosen], self.violations[chosen])


@dataclass(frozen=True)
class Worth:
    """
    :param credits: ``[species]``: the hypervolume that the front of all would miss without each of a species' points,
        added up over these.
    :param best: ``[species]``: number of the trial that alone adds most; -1 where none adds anything.
    """

    credits: Floats
    best: Integers


def reference_of(losses: Floats) -> Floats:
    """
    :param losses: ``[points, objectives]`` of the first generation, at least one.
    :return: ``[objectives]``: the worst of each and a tenth of its extent beyond, or 1 where all are equal.
    """
    extent = np.ptp(losses, axis=0)
    return losses.max(axis=0) + np.where(extent > 0, _MARGIN * extent, 1.0)


def worth(past: Past, species: int, reference: Floats) -> Worth:
    """
    :param past: What was measured.
    :param species: Number of species.
    :param reference: ``[objectives]``: the worst that counts.
    :return: What each species has found. Of points with equal values, the first has the credit.
    """
    keeping = past[past.violations <= 0]
    first = keeping[np.sort(np.unique(keeping.losses, axis=0, return_index=True)[1])]
    gains = exclusive(first.losses, reference)
    mine = first.species == np.arange(species)[:, None]
    found = np.where(mine, gains, 0.0)
    best = [int(first.numbers[row.argmax()]) if row.any() else -1 for row in found]
    return Worth(found.sum(axis=1), np.array(best, dtype=np.int64))


def shared(credits: Sequence[Floats], species: int, total: int, smallest: int) -> Integers:
    """
    :param credits: For each generation so far, ``[species]``: what each species has found by then.
    :param species: Number of species.
    :param total: Number of points of a generation.
    :param smallest: What each species has at least.
    :return: ``[species]``: how many points of the next generation are those of each: even shares at first; then beyond
        the smallest in proportion to credits, a moving mean of half-life one generation. Where nobody has any, shares
        stay as they are.
    """
    sizes, mean = _rounded(np.ones(species), total, smallest), np.zeros(species)
    for credit in credits:
        mean = _MEMORY * mean + (1 - _MEMORY) * credit
        if mean.sum() > 0:
            sizes = _rounded(mean, total, smallest)
    return sizes


def _rounded(weights: Floats, total: int, smallest: int) -> Integers:
    """Whole shares by largest remainder; of equal remainders the first."""
    exact = (total - smallest * len(weights)) * weights / weights.sum()
    sizes = np.floor(exact).astype(np.int64)
    order = np.argsort(sizes - exact, kind="stable")
    sizes[order[: total - smallest * len(weights) - int(sizes.sum())]] += 1
    return sizes + smallest


@dataclass(frozen=True)
class Pool:
    """
    Points that can become parents, with rank and crowding among themselves.

    :param numbers: ``[points]``: of their trials.
    :param rank: ``[points]``.
    :param crowded: ``[points]``.
    """

    numbers: Integers
    rank: Integers
    crowded: Floats

    @classmethod
    def of(cls, past: Past, size: int) -> "Pool":
        """
        :param past: What was measured of a species.
        :param size: How many of the best become parents.
        :return: The pool.
        """
        best = past[best_first(past.losses, past.violations, size)[:size]]
        rank = ranks(best.losses, best.violations, len(best.numbers))
        return cls(best.numbers, rank, crowding(best.losses, rank))

    def winner(self, rng: np.random.Generator) -> int:
        """
        :param rng: Where chance comes from.
        :return: The trial of the better of two: by rank, then by room around it.
        """
        one, other = rng.integers(0, len(self.numbers), 2)
        loses = (self.rank[one], -self.crowded[one]) > (self.rank[other], -self.crowded[other])
        return int(self.numbers[other if loses else one])
