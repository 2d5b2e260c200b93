"""
How far can a search trust its latency? Networks of a convolutional super-network are timed in OpenVINO, timed anew, and
predicted from the table of their operations: ``python -m benchmarks.latency_table``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from itertools import combinations
from statistics import median

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.options import positive
from nncf_ext import SearchSpace, latency
from nncf_ext.exploration.space import Point

WIDTHS, INNER, DEPTHS, STAGES = (64, 48, 32, 16), (64, 48, 32, 16), (3, 2, 1), 3


class Block(nn.Module):
    """A residual block of two convolutions with batch norm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Family:
    """Residual networks on an image of 32x32: width and depth of three stages, inner width of each. Random weights."""

    def __init__(self) -> None:
        stages = range(STAGES)
        self.space = SearchSpace(
            {f"width{stage}": WIDTHS for stage in stages}
            | {f"inner{stage}": INNER for stage in stages}
            | {f"depth{stage}": DEPTHS for stage in stages}
        )
        self.active = self.space.maximal()
        self.example_input = torch.zeros(1, 3, 32, 32)

    def activate(self, point: Mapping[str, int]) -> None:
        self.active = self.space.check(point)

    def extract(self, point: Mapping[str, int]) -> nn.Module:
        """:return: The network of a point."""
        layers: list[nn.Module] = []
        before = 3
        for stage in range(STAGES):
            width = point[f"width{stage}"]
            layers += [nn.Conv2d(before, width, 3, padding=1, stride=2), nn.ReLU()]
            layers += [Block(width, point[f"inner{stage}"]) for _ in range(point[f"depth{stage}"])]
            before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def rank_agreement(one: np.ndarray, other: np.ndarray) -> float:
    """:return: Kendall's tau: how many more pairs are in the same order than not, as a share of all pairs."""
    pairs = [*combinations(range(len(one)), 2)]
    return float(np.mean([np.sign((one[a] - one[b]) * (other[a] - other[b])) for a, b in pairs]))


def main(arguments: list[str] | None = None) -> None:
    """Time, predict, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=positive, default=20)
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args(arguments)
    family = Family()
    points: list[Point] = [family.space.draw(0, step) for step in range(options.networks)]
    config = {"INFERENCE_NUM_THREADS": options.threads}
    console, found, seconds = Console(), {}, {}
    for name, table in (("timed", False), ("timed again", False), ("predicted", True)):
        objective = latency("CPU", config=config, table=table).bind(family)
        begin = time.perf_counter()
        found[name] = np.array([objective(point) for point in points])
        seconds[name] = time.perf_counter() - begin
        note = objective.note() if objective.note else None
        console.print(f"{name}: {seconds[name] / len(points):.2f} s a network, conversion included. {note or ''}")
    for name in ("timed again", "predicted"):
        off = np.abs(found[name] / found["timed"] - 1)
        tau = rank_agreement(found[name], found["timed"])
        off_by = f"off by {median(off):.1%} in the median, {off.max():.1%} at most"
        console.print(f"{name} against timed: {off_by}; Kendall's tau {tau:.3f}")
    console.print(f"from {found['timed'].min():.3f} to {found['timed'].max():.3f} ms, {options.threads} thread(s)")


if __name__ == "__main__":
    main()
