"""Losses on held-out text, paired; tables and pictures of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

Losses = NDArray[np.float64]
"""``[windows]``, nats a token."""


@torch.no_grad()
def losses(model: Any, ids: Tensor, batch: int = 8) -> Losses:
    """
    :param model: A causal language model, of torch or of Optimum-Intel.
    :param ids: ``[windows, tokens]``.
    :param batch: Windows at once.
    :return: Mean loss of each window.
    """
    found = []
    for rows in ids.split(batch):
        logits = torch.as_tensor(model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits)[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2).float(), rows[:, 1:], reduction="none")
        found.append(each.double().mean(dim=1).cpu())
    return torch.cat(found).numpy()


def interval(statistic: Callable[..., float], *samples: Losses, draws: int = 10_000) -> tuple[float, float, float]:
    """
    Paired bootstrap: every draw takes the same windows of all samples.

    :param statistic: Of the samples.
    :param samples: Losses of the same windows.
    :param draws: How many.
    :return: The statistic, and the ends of its 95 % interval.
    """
    drawn = stats.bootstrap(
        samples,
        statistic,
        n_resamples=draws,
        batch=1000,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = drawn.confidence_interval
    return statistic(*samples), float(low), float(high)


def difference(one: Losses, other: Losses) -> float:
    """:return: Mean difference of losses, nats a token."""
    return float((one - other).mean())


def closed(after: Losses, before: Losses, dense: Losses) -> float:
    """:return: Share of the gap between `before` and `dense` that `after` closes."""
    return float(1 - (after - dense).mean() / (before - dense).mean())


def in_words(found: tuple[float, float, float], form: str) -> str:
    """
    :param found: From :func:`interval`.
    :param form: How to write a number, such as ``".1%"``.
    :return: The statistic and its interval.
    """
    value, low, high = (format(each, form) for each in found)
    return f"{value} (95 %: {low} to {high})"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """
    :param title: Of the table.
    :param columns: Headings; the first stands left, the others right.
    :param rows: Cells.
    """
    table = Table(title=title)
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def speed(model: Any, prompt: Mapping[str, Any], tokens: int = 128) -> float:
    """
    :param model: From ``ov_ext.optimum.load``.
    :param prompt: Encoded text.
    :param tokens: To generate.
    :return: Tokens a second, the median of five runs.
    """
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        model.generate(**prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return tokens / float(np.median(seconds[1:]))  # the first compiles


def plot(file: Path, lines: Mapping[str, Sequence[tuple[float, float]]], axes: tuple[str, str]) -> None:
    """
    :param file: Picture to write.
    :param lines: Points by name; a single point is a mark.
    :param axes: Labels of x and y.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for name, points in lines.items():
        x, y = zip(*points, strict=True)
        axis.plot(x, y, marker="o", markersize=3 if len(points) > 1 else 8, linewidth=1.2, label=name)
    axis.set_xlabel(axes[0])
    axis.set_ylabel(axes[1])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
