"""The digits super-network: its table is what its sub-networks give, its costs are what they take."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import digits_space, linas
from benchmarks.digits_space import SPACE, SuperNetwork, data, distinct, evaluate, macs, stages_of


def test_costs_are_those_of_the_forward() -> None:
    net = SuperNetwork(0)
    images = torch.zeros(1, 1, 8, 8)
    for step in range(5):
        point = SPACE.draw(0, step)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(images, point)
        assert counter.get_total_flops() == 2 * macs(point)


def test_the_table_holds_what_sub_networks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_space, "WIDTHS", (8,))
    monkeypatch.setattr(digits_space, "INNER", (4, 2))
    net = SuperNetwork(1)
    found = evaluate(net).found
    assert len(found) == (2 + 4) ** 3
    _, (images, labels) = data()
    points = [SPACE.minimal() | {"width": 8}, {name: 2 if "depth" in name else 4 for name in SPACE.dimensions}]
    for point in points:
        point["width"] = 8
        logits = net(images, point)
        right, loss = found[stages_of(point)]
        assert right == (logits.argmax(1) == labels).float().mean().item()
        assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [*distinct()]
    assert len(points) == len({stages_of(point) for point in points}) == 3 * (4 + 16) ** 3
    values = np.random.default_rng(0).random((len(points), 2))
    np.save(tmp_path / "table.npy", values)
    options = ["--samplers", "NSGA-II", "random", "--seeds", "2", "--limit", "25", "--population", "10"]
    files = ["--table", str(tmp_path / "table.npy"), "--json", str(tmp_path / "found.json")]
    linas.main([*options, *files, "--share", "0.01"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"NSGA-II", "random"} and all(1 <= float(each) <= 25 for each in found["random"])
    linas.main([*options, *files, "--share", "1"])
    assert set(map(float, json.loads((tmp_path / "found.json").read_text())["random"])) == {math.inf}
    assert "1500" not in capsys.readouterr().out
