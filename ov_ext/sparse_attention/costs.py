"""From how many tokens on does attention over pruned keys and values pay? Times, and what follows from them."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from ov_ext.sparse_weights import store
from ov_ext.sparse_weights.tables import SWITCH

_FILE = "attention"
_MOST_LENGTHS, _MOST_TOKENS, _MOST_MICROSECONDS = 16, 1 << 20, 1e9


@dataclass(frozen=True)
class AttentionCosts:
    """Times of one token in one layer, whole, with all threads: stock OpenVINO with its cache of 8 bits, and ours.

    :param elements: Of each layer: heads of keys and values, times elements of a key.
    :param tokens: Lengths of the past, ascending.
    :param stock: Microseconds of stock, for each length.
    :param ours: The same of ours, half of each key and value pruned, int8.
    :param error: Relative error, 0..1, of their ratio, where it is largest.
    """

    elements: int
    tokens: tuple[int, ...]
    stock: tuple[float, ...]
    ours: tuple[float, ...]
    error: float

    def break_even(self, elements: int) -> int | None:
        """Find the length from which on our operation takes no longer than stock.

        Fixed costs of a call and costs of each element of the past make up a time, so other layers come to the same
        ratio at the same number of elements. No further than the longest length: until then tokens are dense, which
        takes more memory, and was not timed.

        :param elements: Of a layer: heads of keys and values, times elements of a key.
        :return: Tokens; 0 where the shortest length pays; None where the longest does not.
        """
        ratios = [stock / ours for stock, ours in zip(self.stock, self.ours, strict=True)]
        if ratios[-1] < 1:
            return None
        below = max((i for i, ratio in enumerate(ratios) if ratio < 1), default=None)
        if below is None:
            return 0
        part = (1 - ratios[below]) / (ratios[below + 1] - ratios[below])
        tokens = self.tokens[below] * (self.tokens[below + 1] / self.tokens[below]) ** part
        return min(round(tokens * self.elements / elements), self.tokens[-1])

    def to_dict(self) -> dict[str, Any]:
        """:return: Plain data for JSON."""
        return asdict(self)


def known_costs() -> AttentionCosts | None:
    """:return: What was measured on this CPU; None where nothing was, or OV_EXT_CALIBRATE=0 forbids its use."""
    return None if os.environ.get(SWITCH) == "0" else store.kept(store.path(_FILE), read_costs)


def keep(costs: AttentionCosts) -> None:
    """Keep what was measured on this CPU."""
    store.keep(store.path(_FILE), costs.to_dict())


def read_costs(data: Any) -> AttentionCosts:
    """Check what a JSON file holds.

    :param data: Untrusted.
    :return: The times.
    :raises ValueError: There are none: what is wrong with it.
    """
    if not isinstance(data, dict) or data.keys() != {"elements", "tokens", "stock", "ours", "error"}:
        raise ValueError("a mapping of elements, tokens, stock, ours, error is needed")
    tokens = data["tokens"]
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= _MOST_LENGTHS:
        raise ValueError(f"tokens is a list of 1 to {_MOST_LENGTHS} lengths")
    if not all(map(_is_count, (data["elements"], *tokens))) or tokens != sorted(set(tokens)):
        raise ValueError("elements is a number from 1, tokens are ascending ones")
    times = (data["stock"], data["ours"])
    if not all(isinstance(each, list) and len(each) == len(tokens) for each in times):
        raise ValueError("stock and ours have a time for each length")
    if not all(_is_number(time) and 0 < time <= _MOST_MICROSECONDS for each in times for time in each):
        raise ValueError(f"times lie above 0 and up to {_MOST_MICROSECONDS:g} microseconds")
    if not _is_number(data["error"]) or not 0 <= data["error"] <= 1:
        raise ValueError("error is a fraction from 0 to 1")
    stock, ours = (tuple(map(float, each)) for each in times)
    return AttentionCosts(data["elements"], tuple(tokens), stock, ours, float(data["error"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_TOKENS
