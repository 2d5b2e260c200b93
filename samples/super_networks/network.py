"""
A small residual network whose every width can be told, in torch alone: what is extracted from a super-network of it is
a network of the same class, and loads strictly wherever this file is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Sizes = dict[str, Any]
"""``kernel`` of the stem, ``widths`` of the stem and of each stage, ``inner`` widths of the blocks of each stage."""

DENSE: Sizes = {"kernel": 5, "widths": [16, 16, 32, 64], "inner": [[16, 16], [32, 32], [64, 64]]}


class Block(nn.Module):
    """Two 3x3 convolutions around an inner width, and what goes past them."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(hidden)))


class SmallResNet(nn.Module):
    """
    Stem, three stages (8, 4 and 2 pixels a side), mean, head.

    :param sizes: Its sizes.
    :param classes: Number of classes.
    """

    def __init__(self, sizes: Mapping[str, Any] = DENSE, classes: int = 10) -> None:
        super().__init__()
        kernel, widths = sizes["kernel"], sizes["widths"]
        self.stem = nn.Conv2d(1, widths[0], kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        widths[stage if place == 0 else stage + 1], width, widths[stage + 1], self.stride(stage, place)
                    )
                    for place, width in enumerate(inner)
                )
            )
            for stage, inner in enumerate(sizes["inner"])
        )
        self.head = nn.Linear(widths[-1], classes)

    @staticmethod
    def stride(stage: int, place: int) -> int:
        """:return: The first block of all stages but the first halves the sides."""
        return 2 if stage and not place else 1

    def forward(self, images: Tensor) -> Tensor:
        """:return: Logits ``[batch, classes]`` of images ``[batch, 1, 8, 8]``."""
        x = torch.relu(self.norm(self.stem(images)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def scaled(share: float) -> Sizes:
    """
    :param share: Of every width, 0 to 1.
    :return: Sizes with all widths scaled alike, to whole channels.
    """

    def times(width: int) -> int:
        return max(1, round(width * share))

    inner = [[times(width) for width in stage] for stage in DENSE["inner"]]
    return {"kernel": DENSE["kernel"], "widths": [times(width) for width in DENSE["widths"]], "inner": inner}


def sizes_of(model: nn.Module) -> Sizes:
    """
    :param model: A network of this class, whatever was cut from it. Blocks that were left out have no parameters.
    :return: Its sizes.
    """
    net: Any = model
    blocks: list[Sequence[Any]] = [[each for each in stage if isinstance(each, Block)] for stage in net.stages]
    widths = [net.stem.out_channels]
    for stage in blocks:
        widths.append(stage[-1].conv2.out_channels if stage else widths[-1])
    inner = [[each.conv1.out_channels for each in stage] for stage in blocks]
    return {"kernel": net.stem.kernel_size[0], "widths": widths, "inner": inner}


def save(model: nn.Module, folder: Path) -> None:
    """
    :param model: A network of this class.
    :param folder: For ``sizes.json`` and ``weights.pt``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sizes.json").write_text(json.dumps(sizes_of(model)))
    torch.save(model.state_dict(), folder / "weights.pt")


def load(folder: Path) -> SmallResNet:
    """
    :param folder: From :func:`save`.
    :return: The network in evaluation mode; every tensor has its place and its shape.
    """
    model = SmallResNet(json.loads((folder / "sizes.json").read_text()))
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True), strict=True)
    return model.eval()
