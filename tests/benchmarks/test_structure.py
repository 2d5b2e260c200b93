"""The benchmark of cut models runs, and removes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import structure
from benchmarks.llama import TINY
from tests.structure_models import by_layer

pytestmark = pytest.mark.slow


def test_a_tiny_model_is_cut_exported_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--work-dir", str(tmp_path), "--json", str(tmp_path / "r.json")]
    dense, cut = structure.main(arguments)
    assert (dense["model"], cut["model"]) == ("dense", "cut") and dense["speedup"] == 1
    assert 1.2 < dense["weight_mb"] / cut["weight_mb"] < 1.3  # a fifth of the parameters is gone
    assert cut["ms"] > 0 and json.loads((tmp_path / "r.json").read_text()) == [dense, cut]
    assert "bytes, dense / this" in capsys.readouterr().out


def test_proportions_are_those_found() -> None:
    model = structure.random_llama(TINY, 0)
    plan = structure.plan_of(model, 0.2, 4)
    gone = [TINY.mlp - len(kept["mlp"]) for kept in by_layer(plan)]
    assert gone[0] / gone[1] == pytest.approx(4 / 4, rel=0.1)  # layers 0 and 3 of six stand for two
    with pytest.raises(ValueError, match="90%"):
        structure.plan_of(model, 0.9, 4)
