"""
Architecture and bits together, or one after the other (SimQ-NAS, arXiv 2312.13301)?

LINAS on the joint vector of a small super-network's sizes and the bits of each of its layers, against LINAS on the
sizes with INT8 everywhere and then on the bits of the best, for as many evaluations.
``python -m benchmarks.joint_precision --help``.

The super-network is that of `digits_space`. Candidates are quantized after training: weights symmetric with a scale for
each output channel, activations asymmetric with a scale for each tensor from a batch of training images. The cost is
bit operations: multiplications times bits of weights times bits of activations, as a share of 8 by 8 bits everywhere in
the largest network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import optuna
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks import digits_space
from benchmarks.digits_space import DEPTHS, SIDE, STAGES, SuperNetwork, data, stages_of, trained
from benchmarks.options import positive
from nncf_ext import SearchSpace, search
from nncf_ext.exploration.fronts import hypervolume
from nncf_ext.exploration.objectives import Objective
from nncf_ext.parameters import SearchSampler

BITS = (8, 4, 2)
CALIBRATION = 256  # training images whose activations give the ranges
LAYERS = ("stem", *(f"{which}.{stage}.{block}" for stage in range(STAGES) for block in range(max(DEPTHS))
                    for which in ("first", "second")), "head")  # fmt: skip
WIDTH, TOP = max(digits_space.WIDTHS), max(digits_space.INNER)
LARGEST_LOSS = 1.0  # nats; the reference of the hypervolume, beside the cost of 1


def skipped(point: Mapping[str, int]) -> set[str]:
    """:return: What makes no difference: inner widths and bits of blocks that do not run."""
    gone = [stage for stage in range(STAGES) if point.get(f"stage{stage}.depth", 2) == 1]
    names = {f"stage{stage}.block1" for stage in gone} & {*point}
    return names | {f"bits.{which}.{stage}.1" for stage in gone for which in ("first", "second")} & {*point}


class Quantized:
    """
    An elastic network: the super-network's sizes, and bits for each layer.

    :param net: The trained super-network.
    :param dimensions: What can be chosen; what is missing is as given.
    :param rest: Sizes and bits of what cannot be chosen.
    """

    def __init__(self, net: SuperNetwork, dimensions: Mapping[str, Any], rest: Mapping[str, int]) -> None:
        self._net, self._rest = net, dict(rest)
        self.space = SearchSpace(dimensions, inactive=skipped)
        self.active = self.space.maximal()

    def activate(self, point: Mapping[str, int]) -> None:
        """Makes a point the active one."""
        self.active = dict(point)

    def extract(self, point: Mapping[str, int]) -> Any:
        """Nothing here needs a network of one point alone."""
        raise NotImplementedError

    def whole(self, point: Mapping[str, int]) -> dict[str, int]:
        """:return: Sizes and bits of everything."""
        return {**self._rest, **point}

    def loss(self, point: Mapping[str, int]) -> float:
        """:return: Cross-entropy on the held-out images, nats."""
        return loss(self._net, self.whole(point))

    def cost(self, point: Mapping[str, int]) -> float:
        """:return: Bit operations, as a share of the largest network's on 8 bits."""
        return cost(self.whole(point))


def products(point: Mapping[str, int]) -> dict[str, int]:
    """:return: Multiplications of one image in each layer that runs."""
    width, stages = stages_of(point)
    found = {"stem": SIDE**2 * 9 * width, "head": width * digits_space.CLASSES}
    for number, inner in enumerate(stages):
        for block, size in enumerate(inner):
            both = (SIDE >> number) ** 2 * 9 * width * size
            found |= {f"first.{number}.{block}": both, f"second.{number}.{block}": both}
    return found


def cost(point: Mapping[str, int]) -> float:
    """:return: Bit operations, as a share of those of the largest network on 8 bits."""
    largest = {**{name: sizes[0] for name, sizes in digits_space.SPACE.dimensions.items()}}
    whole = sum(products(largest).values()) * 8 * 8
    return sum(count * point[f"bits.{layer}"] * 8 for layer, count in products(point).items()) / whole


@torch.no_grad()
def loss(net: SuperNetwork, point: Mapping[str, int]) -> float:
    """:return: Cross-entropy on the held-out images of the quantized sub-network, nats."""
    (images, _), (held_out, labels) = data()
    ranges: dict[str, tuple[float, float]] = {}
    forward(net, images[:CALIBRATION], point, lambda name, x: seen(ranges, name, x))
    logits = forward(net, held_out, point, lambda name, x: on_8_bits(x, *ranges[name]))
    return float(F.cross_entropy(logits, labels))


def forward(
    net: SuperNetwork, images: Tensor, point: Mapping[str, int], activation: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """:return: Logits, with weights on their bits and what each layer reads as `activation` makes it."""
    width, stages = stages_of(point)

    def weight(name: str, whole: Tensor) -> Tensor:
        levels = 2 ** (point[f"bits.{name}"] - 1) - 1
        scale = whole.flatten(1).abs().amax(1).clamp(min=1e-8).view(-1, *(1,) * (whole.ndim - 1)) / levels
        return (whole / scale).round() * scale

    x = F.relu(F.conv2d(activation("stem", images), weight("stem", net.stem[:width]), padding=1))
    for number, inner in enumerate(stages):
        for block, size in enumerate(inner):
            first, second, key = f"first.{number}.{block}", f"second.{number}.{block}", f"{(number, block)}"
            read = weight(first, net.first[key][:size, :width])
            hidden = F.relu(F.conv2d(activation(first, x), read, padding=1))
            written = weight(second, net.second[key][:width, :size])
            x = F.relu(x + F.conv2d(activation(second, hidden), written, padding=1))
        x = x if number == STAGES - 1 else F.avg_pool2d(x, 2)
    return F.linear(activation("head", x.mean((2, 3))), weight("head", net.head[:, :width]))


def seen(ranges: dict[str, tuple[float, float]], name: str, x: Tensor) -> Tensor:
    """Notes the range of an activation, zero included, and gives it on."""
    ranges[name] = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    return x


def on_8_bits(x: Tensor, low: float, high: float) -> Tensor:
    """:return: The activation on 256 levels between two ends."""
    step = max(high - low, 1e-8) / 255
    return ((x - low) / step).round().clamp(0, 255) * step + low


Measured = list[tuple[float, float, dict[str, int]]]
"""Loss, cost and the whole point."""
ON_INT8 = {f"bits.{layer}": 8 for layer in LAYERS}
FREE = {f"bits.{layer}": BITS for layer in LAYERS}


def found(net: Quantized, budget: int, seed: int, starts: Sequence[Mapping[str, int]] = ()) -> Measured:
    """:return: Everything that LINAS measures, first the points that it begins with."""
    objectives = [Objective("loss", net.loss, maximize=False), Objective("cost", net.cost, maximize=False)]
    begin = [dict(each) for each in starts]
    report = search(net, objectives, sampler=SearchSampler.LINAS, budget=budget, starts=begin, seed=seed)
    return [(each.values["loss"], each.values["cost"], net.whole(each.point)) for each in report.evaluations]


def front_of(points: Measured) -> Measured:
    """:return: Those that no other one beats, cheapest first."""
    front = [one for one in points if not any(o[0] <= one[0] and o[1] <= one[1] and o is not one for o in points)]
    return sorted(front, key=lambda each: each[1])


def then_together(net: SuperNetwork, budget: int, seed: int) -> Measured:
    """Sizes on INT8 with half of the budget; from their front on everything together with the other half."""
    first = found(Quantized(net, digits_space.SPACE.dimensions, ON_INT8), budget // 2, seed)
    starts = [point for _, _, point in front_of(first)]
    whole = Quantized(net, {**digits_space.SPACE.dimensions, **FREE}, {})
    return [*first, *found(whole, budget - budget // 2 + len(starts), seed, starts)]


def one_after_the_other(net: SuperNetwork, budget: int, seed: int) -> Measured:
    """Sizes on INT8 with half of the budget; the bits of the best four on the front with the other half."""
    first = found(Quantized(net, digits_space.SPACE.dimensions, ON_INT8), budget // 2, seed)
    front = front_of(first)
    chosen = [front[round(place)] for place in np.linspace(0, len(front) - 1, min(4, len(front)))]
    points = first
    for number, (_, _, point) in enumerate(chosen):
        rest = (budget - budget // 2) // len(chosen) + (number < (budget - budget // 2) % len(chosen))
        points = [*points, *found(Quantized(net, FREE, point), max(rest, 11), seed)]
    return points


def main(arguments: list[str] | None = None) -> None:
    """Compares, prints a table, writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--budget", type=positive, default=120, help="evaluations of each way")
    parser.add_argument("--steps", type=positive, default=800, help="of training of the super-network")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    net = trained(options.steps)
    reference = np.array([LARGEST_LOSS, 1.0])
    sizes, budget = digits_space.SPACE.dimensions, options.budget
    ways: dict[str, Callable[[int], Measured]] = {
        "together": lambda seed: found(Quantized(net, {**sizes, **FREE}, {}), budget, seed),
        "one after the other": lambda seed: one_after_the_other(net, budget, seed),
        "INT8 first, then together": lambda seed: then_together(net, budget, seed),
        "INT8 everywhere": lambda seed: found(Quantized(net, sizes, ON_INT8), budget, seed),
    }
    rows = {
        name: [hypervolume(np.array([each[:2] for each in way(seed)]), reference) for seed in range(options.seeds)]
        for name, way in ways.items()
    }
    grid = Table(title=f"Hypervolume after {options.budget} evaluations, {options.seeds} seeds", width=100)
    for column in ("way", "mean", "median", "of each seed"):
        grid.add_column(column)
    for name, volumes in rows.items():
        each = ", ".join(f"{volume:.4f}" for volume in volumes)
        grid.add_row(name, f"{mean(volumes):.4f}", f"{median(volumes):.4f}", each)
    Console().print(grid)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
