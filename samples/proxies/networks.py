"""Three spaces of small convolutional networks, and the one recipe by which all of them learn."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SPACES = ("plain", "residual", "pooled")
Blocks = list[tuple[int, int]]
"""Width and kernel of each block."""


def draw(space: str, random: Random) -> Blocks:
    """
    :param space: ``"plain"``: blocks in a row; ``"residual"``: each with a way past it; ``"pooled"``: half the size
        after each second block.
    :param random: Source of randomness.
    :return: Two to six blocks of 4 to 32 channels, kernels of 1, 3 or 5. A common scale is drawn first, so that small
        and large networks are equally frequent.
    """
    scale = 4 * 8 ** random.random()
    widths = [4 * max(1, round(scale * random.uniform(0.6, 1.6) / 4)) for _ in range(random.randint(2, 6))]
    return [(min(width, 32), random.choice((1, 3, 5))) for width in widths]


class Network(nn.Module):
    """
    :param space: Its space.
    :param blocks: Its blocks.
    """

    def __init__(self, space: str, blocks: Blocks) -> None:
        super().__init__()
        self.space = space
        widths = [blocks[0][0], *(width for width, _ in blocks)]
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(before, width, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(width),
            )
            for before, (width, kernel) in zip(widths, blocks, strict=False)
        )
        self.shortcuts = nn.ModuleList(
            nn.Identity() if before == width else nn.Conv2d(before, width, 1, bias=False)
            for before, (width, _) in zip(widths, blocks, strict=False)
            if space == "residual"
        )
        self.rectifier = nn.ReLU()
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """:return: Logits ``[batch, 10]`` of images ``[batch, 1, height, width]``."""
        x = self.stem(x)
        for place, block in enumerate(self.blocks):
            made = block(x)
            x = made + self.shortcuts[place](x) if self.space == "residual" else made
            if self.space == "pooled" and place % 2:
                rows = 2 if x.shape[2] > 3 else 1
                x = nn.functional.avg_pool2d(x, (rows, 2)) if x.shape[3] > 3 else x
        return self.head(self.rectifier(x).mean((2, 3)))


def network(space: str, blocks: Blocks) -> Network:
    """:return: The network of some blocks, with weights that are always the same."""
    torch.manual_seed(0)
    return Network(space, blocks).eval()


def accuracy(space: str, blocks: Blocks, data: Any, steps: int, seed: int) -> float:
    """
    :param space: Its space.
    :param blocks: A network.
    :param data: What it learns from, and what it is judged by.
    :param steps: Of 32 images: AdamW, the rate falls from 0.01 to zero by half a cosine.
    :param seed: Of weights and batches.
    :return: Share of images named rightly, 0 to 1.
    """
    (images, labels), (test, wanted) = data
    torch.manual_seed(seed)
    model = Network(space, blocks).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.01)
    for step in range(steps):
        chosen = torch.randint(len(images), (32,))
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (1 + math.cos(math.pi * step / steps))
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((model.eval()(test).argmax(1) == wanted).float().mean())
