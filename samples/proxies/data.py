"""Two data sets that need no download: scikit-learn's digits, and signals that are made."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Parts = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and labels to learn from, and to report: ``[count, 1, height, width]``, ``[count]``."""


def digits() -> Parts:
    """:return: 1000 images of 8 x 8 to learn from, 797 to report; noise on all, so that networks differ."""
    from sklearn.datasets import load_digits

    found = load_digits()
    draw = torch.Generator().manual_seed(0)
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images += 0.6 * torch.randn(images.shape, generator=draw)
    return _split(images, torch.tensor(found.target), 1000, draw)


def signals(count: int = 1800) -> Parts:
    """
    :param count: Number of signals, 1000 of them to learn from.
    :return: Ten shapes of 12 points, each stretched, tilted, moved along 40 points, smoothed and with noise; as images
        of one row. In the manner of MNIST-1D, arXiv 2011.14439.
    """
    random = np.random.default_rng(0)
    shapes = random.normal(size=(10, 12)).cumsum(1)
    shapes = (shapes - shapes.mean(1, keepdims=True)) / shapes.std(1, keepdims=True)
    labels = random.integers(10, size=count)
    rows = random.normal(size=(count, 40)) * 0.25
    for row, label in zip(rows, labels, strict=True):
        length = int(random.integers(12, 25))
        shape = np.interp(np.linspace(0, 11, length), np.arange(12), shapes[label])
        shape = shape * random.uniform(0.6, 1.4) + np.linspace(-1, 1, length) * random.uniform(-0.75, 0.75)
        begin = int(random.integers(0, 41 - length))
        row[begin : begin + length] += shape
        row += np.convolve(random.normal(size=40), np.ones(5) / 5, "same") * 0.5
    images = torch.tensor(rows, dtype=torch.float32)[:, None, None, :]
    return _split(images, torch.tensor(labels), 1000, torch.Generator().manual_seed(0))


def _split(images: Tensor, labels: Tensor, training: int, draw: torch.Generator) -> Parts:
    order = torch.randperm(len(images), generator=draw)
    parts = order[:training], order[training:]
    return tuple((images[each], labels[each]) for each in parts)  # type: ignore[return-value]
