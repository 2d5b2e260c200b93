"""
A search space whose every point is known: a small residual network on scikit-learn's digits, trained as one
super-network with elastic width, inner widths and depth, all of whose 24,000 sub-networks are evaluated once.

Searches on its table cost nothing, so that they can be compared over many seeds against the front of all points.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from nncf_ext import SearchSpace
from nncf_ext.files import write_whole

WIDTHS, INNER, DEPTHS, STAGES = (16, 8, 4), (16, 8, 4, 2), (2, 1), 3
HELD_OUT, SIDE, CLASSES = 600, 8, 10
SPACE = SearchSpace(
    {
        "width": WIDTHS,
        **{f"stage{stage}.depth": DEPTHS for stage in range(STAGES)},
        **{f"stage{stage}.block{block}": INNER for stage in range(STAGES) for block in range(max(DEPTHS))},
    }
)
Stage = tuple[int, ...]
"""Inner widths of the blocks that run."""
Key = tuple[int, tuple[Stage, ...]]
"""A sub-network: its width and its stages."""


def stages_of(point: Mapping[str, int]) -> Key:
    """
    :param point: A point.
    :return: The width, and for each stage the inner widths of the blocks that run. A block that is skipped has none.
    """
    stages = (
        tuple(point[f"stage{stage}.block{block}"] for block in range(point[f"stage{stage}.depth"]))
        for stage in range(STAGES)
    )
    return point["width"], tuple(stages)


def macs(point: Mapping[str, int]) -> int:
    """
    :param point: A point.
    :return: Multiplications of one image.
    """
    width, stages = stages_of(point)
    pixels = [(SIDE >> stage) ** 2 for stage in range(STAGES)]
    blocks = sum(size * 2 * 9 * width * sum(inner) for size, inner in zip(pixels, stages, strict=True))
    return pixels[0] * 9 * width + blocks + width * CLASSES


class SuperNetwork(nn.Module):
    """
    Stem, three stages of two residual blocks (8, 4 and 2 pixels a side), mean, head. A sub-network is leading channels.

    :param seed: Seed of the weights.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def weights(*shape: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw) * gain * (2 / np.prod(shape[1:])) ** 0.5)

        width, inner = WIDTHS[0], INNER[0]
        self.stem = weights(width, 1, 3, 3)
        places = [(stage, block) for stage in range(STAGES) for block in range(max(DEPTHS))]
        self.first = nn.ParameterDict({f"{each}": weights(inner, width, 3, 3) for each in places})
        self.second = nn.ParameterDict({f"{each}": weights(width, inner, 3, 3, gain=0.3) for each in places})
        self.head = weights(CLASSES, width)

    def begin(self, images: Tensor, width: int) -> Tensor:
        """:return: ``[images, width, 8, 8]`` of ``[images, 1, 8, 8]``."""
        return F.relu(F.conv2d(images, self.stem[:width], padding=1))

    def stage(self, x: Tensor, number: int, inner: Stage) -> Tensor:
        """:return: What a stage makes of ``[images, width, side, side]``, with half as many pixels a side."""
        width = x.shape[1]
        for block, size in enumerate(inner):
            key = f"{(number, block)}"
            hidden = F.relu(F.conv2d(x, self.first[key][:size, :width], padding=1))
            x = F.relu(x + F.conv2d(hidden, self.second[key][:width, :size], padding=1))
        return x if number == STAGES - 1 else F.avg_pool2d(x, 2)

    def end(self, x: Tensor) -> Tensor:
        """:return: Logits ``[images, 10]``."""
        return F.linear(x.mean((2, 3)), self.head[:, : x.shape[1]])

    def forward(self, images: Tensor, point: Mapping[str, int]) -> Tensor:
        width, stages = stages_of(point)
        x = self.begin(images, width)
        for number, inner in enumerate(stages):
            x = self.stage(x, number, inner)
        return self.end(x)


def trained(steps: int, seed: int = 0) -> SuperNetwork:
    """
    :param steps: Steps of 64 images; in each the largest, the smallest and a random sub-network learn.
    :param seed: Seed of weights, batches and sub-networks.
    :return: The network.
    """
    net = SuperNetwork(seed)
    (images, labels), _ = data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = torch.randint(len(images), (64,), generator=draw)
        for point in (SPACE.maximal(), SPACE.minimal(), SPACE.draw(seed, step)):
            F.cross_entropy(net(images[batch], point), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """:return: Images ``[images, 1, 8, 8]`` and labels for training, and the 600 held-out ones."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.tensor(np.random.default_rng(0).permutation(len(labels)))
    train, held_out = order[HELD_OUT:], order[:HELD_OUT]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


@dataclass(frozen=True)
class Table:
    """
    :param found: Share of the held-out images named rightly (0 to 1), and cross-entropy in nats, by width and stages.
    """

    found: dict[Key, tuple[float, float]]

    def accuracy(self, point: Mapping[str, int]) -> float:
        """:return: The accuracy of a point, 0 to 1."""
        return self.found[stages_of(point)][0]

    def loss(self, point: Mapping[str, int]) -> float:
        """:return: The cross-entropy of a point, in nats."""
        return self.found[stages_of(point)][1]


def distinct() -> Iterator[dict[str, int]]:
    """:return: A point for every sub-network: blocks that are skipped have the largest inner width."""
    for point in SPACE.enumerate():
        skipped = (f"stage{stage}.block1" for stage in range(STAGES) if point[f"stage{stage}.depth"] == 1)
        if all(point[name] == INNER[0] for name in skipped):
            yield point


@torch.no_grad()
def evaluate(net: SuperNetwork) -> Table:
    """
    :param net: A trained super-network.
    :return: What every sub-network is worth. What the first stages give is computed once.
    """
    _, (images, labels) = data()
    stages = [inner for depth in DEPTHS for inner in itertools.product(INNER, repeat=depth)]
    found: dict[Key, tuple[float, float]] = {}
    for width in WIDTHS:
        begun = net.begin(images, width)
        for one in stages:
            after_one = net.stage(begun, 0, one)
            for two in stages:
                after_two = net.stage(after_one, 1, two)
                for three in stages:
                    logits = net.end(net.stage(after_two, 2, three))
                    right = (logits.argmax(1) == labels).float().mean().item()
                    found[width, (one, two, three)] = right, F.cross_entropy(logits, labels).item()
    return Table(found)


def table(file: Path, steps: int = 800, seed: int = 0) -> Table:
    """
    :param file: Keeps accuracies and losses between runs; made where it does not exist.
    :param steps: See :func:`trained`.
    :param seed: The same.
    :return: The table.
    """
    keys = [stages_of(point) for point in distinct()]
    if not file.exists():
        made = evaluate(trained(steps, seed)).found
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda aside: np.save(aside, np.array([made[key] for key in keys])))
    return Table({key: (right, loss) for key, (right, loss) in zip(keys, np.load(file).tolist(), strict=True)})
