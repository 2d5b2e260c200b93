"""Turns rotate and reverse; ratios are other time / our time, paired by round; each round has its bandwidth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import comparison
from benchmarks.comparison import OURS, STOCK, Entrant, Race, absent, rows_of_table
from benchmarks.timing import fastest, interleave, paired_ratio


def test_engines_take_turns_in_changing_order() -> None:
    log: list[str] = []

    def turn(name: str, seconds: list[float]):
        def run() -> list[float]:
            log.append(name)
            return seconds

        return run

    turns = {"a": turn("a", [1.0, 1.5]), "b": turn("b", [2.0, 2.0]), "c": turn("c", [3.0, 3.0])}
    seconds = interleave(turns, 4, before_round=lambda: log.append("|"), after_round=lambda: log.append("."))
    assert "".join(log) == "|abc.|cba.|bca.|acb."
    assert {name: values.tolist() for name, values in seconds.items()} == {
        "a": [[1.0, 1.5]] * 4,
        "b": [[2.0, 2.0]] * 4,
        "c": [[3.0, 3.0]] * 4,
    }
    assert fastest(seconds) == "a"


def test_ratio_is_other_over_ours_and_paired_by_round() -> None:
    ours = np.array([[1.0, 1.0, 9.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])  # the machine slows down; one outlier
    ratio = paired_ratio(2.0 * np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 50.0]]), ours)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    ratio = paired_ratio(np.array([[3.0], [1.0], [2.0]]), np.ones((3, 1)))
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 3.0)


def test_a_race_takes_the_fastest_settings_and_the_bandwidth_of_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    bandwidths = iter([(99.0, 20.0), (99.0, 10.0), (99.0, 40.0)])
    monkeypatch.setattr(comparison.native, "read_bandwidth", lambda *arguments: next(bandwidths))
    slow, quick = (Entrant(STOCK, "int8", 0.5, setting=name) for name in ("default", "f32"))
    ours, int4 = Entrant(OURS, "int8", 0.5), Entrant(STOCK, "int4", 0.5)
    seconds = {slow: [[0.5] * 3] * 3, quick: [[0.3] * 3] * 3, ours: [[0.1, 0.1, 7.0], [0.2] * 3, [0.1] * 3]}
    seconds[int4] = [[0.2] * 3] * 3
    turns = {entrant: iter(rows).__next__ for entrant, rows in seconds.items()}
    race = Race(rounds=3, threads=1, buffer=1 << 20, advance=lambda: None)
    measured = race.run(turns, dict.fromkeys(seconds, 10**9))
    assert [measured[e]["fastest"] for e in (slow, quick, ours, int4)] == [False, True, True, True]
    record = measured[ours]
    assert (record["ratio"], record["ratio_min"], record["ratio_max"]) == pytest.approx((3.0, 1.5, 3.0))
    assert (record["ratio_int4"], record["ratio_int4_min"], record["ratio_int4_max"]) == pytest.approx((2.0, 1.0, 2.0))
    assert (record["ms"], record["ms_min"], record["ms_max"]) == pytest.approx((100, 100, 200))  # rounds, not calls
    assert record["gbps"] == pytest.approx(10)
    assert (record["bandwidth_gbps"], record["bandwidth_min"], record["bandwidth_max"]) == (20, 10, 40)
    assert record["bandwidth_share"] == pytest.approx(0.5)  # of 10/20, 5/10, 10/40
    assert measured[slow]["ratio"] == pytest.approx(0.6) and measured[quick]["ratio"] == 1.0


def test_engines_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Entrant("llama.cpp", "int4", 0.5, weights="Q4_0")
    monkeypatch.setattr(comparison, "find_spec", lambda name: None if name == "gguf" else object())
    [record] = absent([Entrant(OURS, "int4", 0.5), peer, replace(peer, setting="x"), Entrant("PyTorch", "bf16", 0.5)])
    assert record["engine"] == "llama.cpp" and record["weights"] == "Q4_0"
    assert "pip install" in record["setting"] and "ms" not in record
    [row] = rows_of_table([record | {"beside": "int4"}])
    assert row["setting"].startswith("not installed")


def test_the_table_has_the_fastest_settings_and_stock_int4_once() -> None:
    numbers = {"ratio": 2.0, "ratio_min": 1.5, "ratio_max": 2.5}
    records = [
        {"engine": OURS, "kind": "int8", "beside": "int8", "fastest": True} | numbers,
        {"engine": OURS, "kind": "int8", "beside": "int8", "fastest": False} | numbers,
        {"engine": STOCK, "kind": "int4", "beside": "int8", "fastest": True} | numbers,
        {"engine": STOCK, "kind": "int4", "beside": "int4", "fastest": True} | numbers,
    ]
    rows = rows_of_table(records)
    assert [(r["engine"], r["kind"]) for r in rows] == [(OURS, "int8"), (STOCK, "int4")]
    assert rows[0]["ratio_range"] == "1.50 - 2.50"
