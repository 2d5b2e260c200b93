"""Spaces that are known: a table holds what sub-networks give, costs are what they take, fronts are those of all."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import digits_space, precision_space, samplers
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
    samplers.main([*options, *files, "--share", "0.01"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"NSGA-II", "random"} and all(1 <= float(each) <= 25 for each in found["random"])
    samplers.main([*options, *files, "--share", "1"])
    assert set(map(float, json.loads((tmp_path / "found.json").read_text())["random"])) == {math.inf}
    assert "1500" not in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 1])
def test_the_front_of_the_chain_is_that_of_all_points(seed: int) -> None:
    workload = precision_space.Workload(6, seed)
    space = workload.space
    every = np.array([(workload.loss(point), workload.cost(point)) for point in space.enumerate()])
    beaten = [((every <= one).all(axis=1) & (every < one - 1e-12).any(axis=1)).any() for one in every]
    expected = np.unique(every[~np.array(beaten)].round(9), axis=0)[::-1]
    assert np.allclose(workload.front(), expected, atol=1e-8) and len(expected) > 10
    point = space.draw(seed)
    amplitude = workload.errors * 2.0 ** -np.array([*point.values()])
    pairs = sum(2 * share * a * b for share, a, b in zip(workload.shared, amplitude, amplitude[1:], strict=False))
    assert workload.loss(point) == pytest.approx(math.log10(sum(amplitude**2) + pairs))


def test_species_find_more_than_direct_genomes() -> None:
    """Where neighbours want alike values; the mean over seeds, since any one of them may have bad luck."""
    task = samplers.precision(argparse.Namespace(layers=24, workload=1))

    def share(name: str, seeds: range, limit: int = 80) -> float:
        found = [samplers.outcome(samplers.SAMPLERS[name](task, 20, seed), task, 2.0, limit).share for seed in seeds]
        return sum(found) / len(found)

    assert share("NEMO", range(4)) >= share("NEMO, direct only", range(4)) > share("random", range(2))
