"""Time several arms in interleaved rounds, and compare them round by round.

On a shared machine the speed of everything changes by up to a factor of two within minutes. What survives is the ratio
of two arms timed in the same round; its median over rounds is what the benchmarks report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Turn = Callable[[], float]  # runs an arm once and says how many seconds that took


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


def timed(run: Callable[[], object]) -> Turn:
    """:return: A turn that is the wall time of one call."""

    def turn() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return turn


def interleave(
    arms: Mapping[str, Turn],
    rounds: int,
    calls: int,
    warmup: int = 2,
    before_round: Callable[[], None] | None = None,
    after_round: Callable[[], None] | None = None,
) -> dict[str, np.ndarray]:
    """Let arms take turns, one call each, in an order that rotates.

    An arm's weights are read between two turns of every other arm, so they leave the cache as far as its size permits.

    :param arms: The arms by name.
    :param rounds: Rounds; each is one sample of every ratio.
    :param calls: Turns of every arm in a round.
    :param warmup: Turns of every arm before the first round.
    :param before_round: Called at the start of every round, outside the times.
    :param after_round: Called at the end of every round: for a progress bar.
    :return: Seconds ``[rounds, calls]`` by name.
    """
    names = list(arms)
    for _ in range(warmup):
        for name in names:
            arms[name]()
    seconds = {name: np.empty((rounds, calls)) for name in names}
    for r in range(rounds):
        if before_round:
            before_round()
        for c in range(calls):
            first = (r + c) % len(names)
            for name in names[first:] + names[:first]:
                seconds[name][r, c] = arms[name]()
        if after_round:
            after_round()
    return seconds


def paired_ratio(other: np.ndarray, ours: np.ndarray) -> Ratio:
    """:return: other / ours; both are seconds ``[rounds, calls]`` of one :func:`interleave`."""
    ratios = np.median(other, axis=1) / np.median(ours, axis=1)
    return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))


def fastest(seconds: Mapping[str, np.ndarray]) -> str:
    """:return: Name of the arm with the smallest median."""
    return min(seconds, key=lambda name: float(np.median(seconds[name])))
