"""Turns rotate, ratios are other time / our time and paired by round."""

from __future__ import annotations

import numpy as np

from benchmarks.arms import Settings
from benchmarks.matmul import Bench
from benchmarks.timing import fastest, interleave, paired_ratio


def test_arms_take_turns_in_rotating_order() -> None:
    log: list[str] = []

    def turn(name: str, seconds: float):
        def run() -> float:
            log.append(name)
            return seconds

        return run

    arms = {"a": turn("a", 1.0), "b": turn("b", 2.0), "c": turn("c", 3.0)}
    seconds = interleave(
        arms, 2, 2, warmup=1, before_round=lambda: log.append("|"), after_round=lambda: log.append(".")
    )
    assert "".join(log) == "abc|abcbca.|bcacab."
    assert {name: values.tolist() for name, values in seconds.items()} == {
        "a": [[1.0, 1.0], [1.0, 1.0]],
        "b": [[2.0, 2.0], [2.0, 2.0]],
        "c": [[3.0, 3.0], [3.0, 3.0]],
    }
    assert fastest(seconds) == "a"


def test_ratio_is_other_over_ours_and_paired_by_round() -> None:
    ours = np.array([[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])  # the machine slows down; one outlier
    ratio = paired_ratio(2.0 * np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 50.0]]), ours)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    ratio = paired_ratio(np.array([[3.0], [1.0], [2.0]]), np.ones((3, 1)))
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 3.0)


def test_matmul_takes_the_faster_stock_setting() -> None:
    bench = Bench(Settings(threads=1), rounds=3, calls=1, buffer=1 << 20, advance=lambda: None)
    times = bench.times({"default": lambda: 0.5, "128": lambda: 0.3, "ours": lambda: 0.1}, weight_bytes=10**9)
    assert times["stock_arm"] == "128"
    assert np.isclose(times["stock_ms"], 300) and np.isclose(times["ours_ms"], 100) and np.isclose(times["ratio"], 3)
    assert np.isclose(times["gbps"], 10) and times["bandwidth_gbps"] > 0
    assert times["bandwidth_share"] > 0
