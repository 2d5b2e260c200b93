"""scikit-learn's handwritten digits, in three parts that do not meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

TRAINING, VALIDATION = 600, 300


@dataclass(frozen=True)
class Digits:
    """
    :param images: ``[images, 1, 8, 8]``, 0 to 1.
    :param labels: ``[images]`` int64.
    """

    images: Tensor
    labels: Tensor

    def batch(self, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """:return: Random images, each moved by up to one pixel in both directions, and their labels."""
        chosen = torch.randint(len(self.images), (size,), generator=draw)
        padded = F.pad(self.images[chosen], (1, 1, 1, 1))
        down, right = torch.randint(0, 3, (2, size), generator=draw)
        rows = down[:, None] + torch.arange(8)
        columns = right[:, None] + torch.arange(8)
        moved = padded[torch.arange(size)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
        return moved[:, None], self.labels[chosen]


def split(seed: int) -> tuple[Digits, Digits, Digits]:
    """
    :param seed: Who is in which part.
    :return: 600 images to train on, 300 to choose by, and the other 897, which nothing is chosen by.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(labels)))
    ends = (0, TRAINING, TRAINING + VALIDATION, len(order))
    parts = [order[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]
    training, validation, test = (Digits(images[each], labels[each]) for each in parts)
    return training, validation, test
