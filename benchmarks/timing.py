"""Time several engines in interleaved rounds, and compare them round by round.

On a shared machine the speed of everything changes by up to a factor of two within minutes. What survives is the ratio
of two engines timed in the same round; its median over rounds is what the benchmarks report.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Turn = Callable[[], list[float]]  # runs an engine some times and says how many seconds each took
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Ratio:
    """Other time / our time, paired by round.

    :param median: Median over rounds.
    :param low: Smallest round.
    :param high: Largest round.
    """

    median: float
    low: float
    high: float


def interleave(
    turns: Mapping[K, Turn],
    rounds: int,
    before_round: Callable[[], None] | None = None,
    after_round: Callable[[], None] | None = None,
) -> dict[K, np.ndarray]:
    """Let engines take turns, in an order that rotates and reverses from round to round.

    :param turns: The engines.
    :param rounds: Rounds; each is one sample of every ratio.
    :param before_round: Called at the start of every round, outside the times.
    :param after_round: Called at the end of every round: for a progress bar.
    :return: Seconds ``[rounds, calls]``.
    """
    names = list(turns)
    seconds: dict[K, list[list[float]]] = {name: [] for name in names}
    for r in range(rounds):
        if before_round:
            before_round()
        first = r // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order[::-1] if r % 2 else order:
            seconds[name].append(turns[name]())
        if after_round:
            after_round()
    return {name: np.array(values) for name, values in seconds.items()}


def paired_ratio(other: np.ndarray, ours: np.ndarray) -> Ratio:
    """:return: other / ours; both are seconds ``[rounds, calls]`` of one :func:`interleave`."""
    ratios = np.median(other, axis=1) / np.median(ours, axis=1)
    return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))


def fastest(seconds: Mapping[K, np.ndarray]) -> K:
    """:return: The engine with the smallest median."""
    return min(seconds, key=lambda name: float(np.median(seconds[name])))
