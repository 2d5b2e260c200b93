"""From which length on keys and values are pruned: what is measured, kept, and made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from typer.testing import CliRunner

import ov_ext
from ov_ext import cli
from ov_ext.sparse_attention import calibration, costs
from ov_ext.sparse_attention.costs import AttentionCosts
from ov_ext.sparse_weights import store
from tests.ov_ext.test_sparse_attention import DIM, F32, HEADS, attention, feed

# Stock is faster at 64 and 256 tokens, slower at 1024; ratios 0.5, 0.8, 1.2.
COSTS = AttentionCosts(1024, (64, 256, 1024), (50.0, 80.0, 240.0), (100.0, 100.0, 200.0), 0.02)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, whose contents are used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OV_EXT_CALIBRATE", "1")
    monkeypatch.setattr(store, "_warned", set())


def test_break_even_lies_between_lengths_and_follows_the_elements_of_a_layer() -> None:
    assert COSTS.break_even(1024) == 512  # half-way from 0.8 to 1.2, on a logarithmic scale
    assert COSTS.break_even(512) == 1024 == COSTS.break_even(256)  # no further than was measured
    assert AttentionCosts(1024, (64, 256), (10.0, 10.0), (9.0, 10.0), 0.0).break_even(1024) == 0
    assert AttentionCosts(1024, (64, 256), (10.0, 10.0), (9.0, 11.0), 0.0).break_even(1024) is None
    # What pays at a short length and not at a longer one was noise, or is of no use.
    assert AttentionCosts(1024, (1, 4, 16), (2.0, 1.0, 3.0), (1.0, 2.0, 2.0), 0.0).break_even(1024) == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"elements": 0},
        {"tokens": [256, 64, 1024]},
        {"tokens": []},
        {"stock": [1.0]},
        {"ours": [1, 2, -3]},
        {"ours": [1, 2, float("inf")]},
        {"error": True},
        {"error": 2},
        {"more": 1},
    ],
)
def test_what_is_no_measurement_is_refused(wrong: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    data = json.loads(json.dumps(COSTS.to_dict()))
    assert costs.read_costs(data) == COSTS
    with pytest.raises(ValueError):
        costs.read_costs(data | wrong)
    store.keep(store.path("attention"), data | wrong)
    assert costs.known_costs() is None and "are ignored" in caplog.text


def test_a_layer_packs_from_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ov_ext.sparsify_attention(attention())[1].layers[0].pack_from == 0  # nothing is known
    costs.keep(COSTS)
    assert costs.known_costs() == COSTS and store.read() is None  # that of weights is another file
    model, report = ov_ext.sparsify_attention(attention())
    expected = min(1024, 512 * 1024 // (HEADS * DIM))
    (node,) = (node for node in model.get_ops() if node.get_type_name() == "SparseKVAttention")
    assert node.get_attributes()["pack_from"] == report.layers[0].pack_from == expected and str(expected) in str(report)
    for asked in (0, 100):
        policy = ov_ext.SparseAttentionPolicy(pack_from=asked)
        assert ov_ext.sparsify_attention(attention(), policy)[1].layers[0].pack_from == asked
    monkeypatch.setenv("OV_EXT_CALIBRATE", "0")
    assert ov_ext.sparsify_attention(attention())[1].layers[0].pack_from == 0


def test_a_layer_that_never_pays_stays_stock() -> None:
    costs.keep(AttentionCosts(1024, (64, 256), (1.0, 1.0), (2.0, 2.0), 0.0))
    report = ov_ext.sparsify_attention(attention())[1]
    assert not report.replaced and "faster on this CPU up to 256 tokens" in report.layers[0].note
    assert ov_ext.sparsify_attention(attention(), ov_ext.SparseAttentionPolicy(pack_from=0))[1].replaced


def test_a_short_context_gives_what_stock_gives(core: ov.Core) -> None:
    """Ninety percent are pruned, but not before 150 tokens."""
    policy = ov_ext.SparseAttentionPolicy(k=0.9, v=0.9, sink=0, recent=0, pack_from=150)
    models = attention(), ov_ext.sparsify_attention(attention(), policy)[0]
    ours, stock = (
        core.compile_model(model, "CPU", F32 | {"KV_CACHE_PRECISION": "f32"}).create_infer_request()
        for model in reversed(models)
    )
    rng, past, errors = np.random.default_rng(0), 0, []
    for count in (100, 1, 40, 1, 6, 1, 1, 1):  # the last one comes behind 150
        inputs = feed(rng, count, past)
        errors.append(float(np.abs(ours.infer(inputs)[0] - stock.infer(inputs)[0]).max()))
        past += count
    assert max(errors[:7]) < 1e-5 < 0.05 < errors[7]


class Timed:
    """Times that a test says: seconds of one token behind so many."""

    def __init__(self, times: Iterator[float]) -> None:
        self.count, self.more, self.times = 0, 0, times

    def fill(self, count: int) -> None:
        self.count, self.more = count, 0

    def seconds(self) -> float:
        self.more += 1
        assert self.more <= max(calibration._CALLS, self.count // 10)  # the past has about the length that is asked for
        return 1e-6 * self.count * next(self.times)


def steady() -> Iterator[float]:
    while True:
        yield 1.0


def test_medians_of_what_is_timed_are_kept() -> None:
    def make(ours: bool) -> Timed:
        timed = Timed(steady())
        if not ours:
            timed.times = (2.0 for _ in iter(int, 1))
        return timed

    found = ov_ext.calibrate_attention(5, make)
    assert found is not None and found == costs.known_costs() and found.error == 0
    assert found.ours == tuple(map(float, calibration.TOKENS)) and found.stock == tuple(2 * each for each in found.ours)


def test_a_busy_machine_is_said_and_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    assert ov_ext.calibrate_attention(1e-3, lambda ours: Timed(iter(rng.exponential(1, 10**6)))) is None
    assert "too busy to measure attention" in caplog.text and costs.known_costs() is None
    with pytest.raises(ValueError, match="seconds is a time above 0, got 0"):
        ov_ext.calibrate_attention(0)


def test_the_command_shows_and_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.calibration, "calibrate", lambda *_: cli.CostTable("this one", 1, {}))
    monkeypatch.setattr(cli, "calibrate_attention", lambda seconds: COSTS)
    result = CliRunner().invoke(cli.app, ["calibrate", "--report", str(tmp_path / "times.json")])
    assert "Microseconds of one token" in result.stdout and "1.20" in result.stdout
    assert json.loads((tmp_path / "times.json").read_text())["attention"]["ours"] == [100, 100, 200]


@pytest.mark.parametrize(
    ("options", "expected"), [([], min(1024, 512 * 1024 // (HEADS * DIM))), (["--no-calibrate"], 0)]
)
def test_packing_a_folder_takes_it_unless_told_not_to(tmp_path: Path, options: list[str], expected: int) -> None:
    costs.keep(COSTS)
    (tmp_path / "in").mkdir()
    ov_ext.save_model(attention(), tmp_path / "in" / "m.xml")
    paths = [str(tmp_path / name) for name in ("in", "out", "r.json")]
    options = [*paths[:2], "--kv-sparsity", "0.5", "--report", paths[2], *options]
    result = CliRunner().invoke(cli.app, ["pack", *options])
    assert result.exit_code == 0, result.output
    (layer,) = json.loads(Path(paths[2]).read_text())["m.xml"]["attention"]
    assert layer["pack_from"] == expected


@pytest.mark.slow
def test_this_cpu() -> None:
    """Whether or not the machine is busy."""
    found = ov_ext.calibrate_attention(4)
    assert found == costs.known_costs()
    if found is not None:
        assert found.error <= calibration.CERTAIN and found.stock[-1] > found.stock[0]
