"""How well can counting alone predict the text? An interpolated, modified Kneser-Ney n-gram model in numpy.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BITS = 12  # of one token in a packed n-gram; 5 tokens fill 60 bits of a uint64


@dataclass(frozen=True)
class _Level:
    """
    Counts of one n-gram length. An n-gram is packed with its last token in the lowest bits, so the n-grams of one
    context are neighbours in sorted order.

    :param grams: uint64 [grams], sorted.
    :param discounted: float64 [grams], counts (of continuations below the highest level) less their discount.
    :param contexts: uint64 [contexts], sorted: the n-grams without their last token.
    :param totals: float64 [contexts], sum of undiscounted counts.
    :param backoff: float64 [contexts], share of probability that was discounted: the weight of the level below.
    """

    grams: NDArray[np.uint64]
    discounted: NDArray[np.float64]
    contexts: NDArray[np.uint64]
    totals: NDArray[np.float64]
    backoff: NDArray[np.float64]


class KneserNey:
    """
    An n-gram model of a token stream.

    :param tokens: uint16 [tokens], the training stream, taken as one sequence.
    :param vocab_size: number of different tokens, at most 4096.
    :param order: tokens in the longest n-gram, 1 to 5.
    :raises ValueError: if a limit is exceeded, or the stream is shorter than one n-gram.
    """

    def __init__(self, tokens: NDArray[np.uint16], vocab_size: int, order: int = 5) -> None:
        if not 1 <= vocab_size <= 1 << _BITS or not 1 <= order <= 5:
            raise ValueError(f"Got vocabulary {vocab_size} and order {order}; packing allows 1..4096 and 1..5.")
        if len(tokens) < order or tokens.max() >= vocab_size:
            raise ValueError(f"Expected at least {order} tokens below {vocab_size}, got {len(tokens)}.")
        self.vocab_size = vocab_size
        self.order = order
        grams, counts = np.unique(_pack(tokens, order), return_counts=True)
        levels = [_discount(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Below the highest level a gram counts once for each different token seen in front of it.
            suffixes = grams & np.uint64((1 << _BITS * length) - 1)
            grams, counts = np.unique(suffixes, return_counts=True)
            levels.append(_discount(grams, counts))
        self._levels = levels[::-1]

    def probabilities(self, tokens: NDArray[np.uint16]) -> NDArray[np.float64]:
        """
        :param tokens: uint16 [tokens], one sequence.
        :return: float64 [tokens], probability of each token given up to ``order - 1`` tokens before it.
        """
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        for length, level in enumerate(self._levels, start=1):
            if len(tokens) < length:
                break
            grams = _pack(tokens, length)
            context, known = _find(level.contexts, grams >> np.uint64(_BITS))
            gram, seen = _find(level.grams, grams)
            higher = np.where(seen, level.discounted[gram], 0.0) / level.totals[context]
            lower = probability[length - 1 :]
            probability[length - 1 :] = np.where(known, higher + level.backoff[context] * lower, lower)
        return probability


def _pack(tokens: NDArray[np.uint16], length: int) -> NDArray[np.uint64]:
    grams = np.zeros(len(tokens) - length + 1, dtype=np.uint64)
    for offset in range(length):
        grams <<= np.uint64(_BITS)
        grams |= tokens[offset : offset + len(grams)]
    return grams


def _find(keys: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, keys[index] == wanted


def _discount(grams: NDArray[np.uint64], counts: NDArray[np.intp]) -> _Level:
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    contexts, starts = np.unique(grams >> np.uint64(_BITS), return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    backoff = np.add.reduceat(discounts, starts) / totals
    return _Level(grams, counts - discounts, contexts, totals, backoff)


def _discounts(counts: NDArray[np.intp]) -> NDArray[np.float64]:
    """
    :param counts: int [grams].
    :return: float64 [4], the discounts of counts 0, 1, 2 and 3 or more (equation 26 of the paper). Where a text is so
        short that the estimate is undefined or out of range, half of the count is taken.
    """
    n1, n2, n3, n4 = (float(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
    discounts = np.array([0.0, 0.5, 1.0, 1.5])
    y = n1 / (n1 + 2 * n2) if n1 else 0.0
    for k, (n, following) in enumerate(((n1, n2), (n2, n3), (n3, n4)), start=1):
        if n and following and 0 < (estimate := k - (k + 1) * y * following / n) < k:
            discounts[k] = estimate
    return discounts
