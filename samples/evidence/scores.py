"""Losses on held-out text, paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
"""``[windows]``, nats a token."""


def token_losses(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> Losses:
    """
    :param logits: ``[tokens, vocabulary]``, of any model in any engine.
    :param ids: ``[tokens]``.
    :return: ``[tokens - 1]``: negative log-likelihood of each token but the first, nats.
    """
    scores = logits[:-1].astype(np.float32, copy=False)
    highest = scores.max(axis=1, keepdims=True)
    normalizer = np.log(np.exp(scores - highest).sum(axis=1, dtype=np.float64)) + highest[:, 0]
    return normalizer - scores[np.arange(len(scores)), ids[1:]]


def losses(model: Any, ids: Any, batch: int = 8) -> Losses:
    """
    :param model: A causal language model, of torch or of Optimum-Intel.
    :param ids: int64 tensor ``[windows, tokens]``.
    :param batch: Windows at once.
    :return: Mean loss of each window.
    """
    import torch

    from nncf_ext.calibration.float_products import fast_products

    found: list[float] = []
    with torch.no_grad(), fast_products(model) if isinstance(model, torch.nn.Module) else nullcontext():
        for rows in ids.split(batch):
            logits = torch.as_tensor(model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits)
            each = zip(logits.float().cpu().numpy(), rows.cpu().numpy(), strict=True)
            found += [float(token_losses(*window).mean()) for window in each]
    return np.array(found)


def bits_per_byte(each: Losses, tokens: int, byte_counts: Sequence[int]) -> float:
    """
    :param each: Losses of windows.
    :param tokens: Of a window.
    :param byte_counts: From :func:`evidence.text.byte_counts`.
    :return: Comparable across tokenizers.
    """
    return float(each.sum() * (tokens - 1) / math.log(2) / sum(byte_counts))


def interval(statistic: Callable[..., float], *samples: Losses, draws: int = 10_000) -> tuple[float, float, float]:
    """
    Paired bootstrap: every draw takes the same windows of all samples.

    :param statistic: Of the samples.
    :param samples: Losses of the same windows.
    :param draws: How many.
    :return: The statistic, and the ends of its 95 % interval.
    """
    from scipy import stats

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
