"""Which layers attend over pruned keys and values, and how much is pruned: the options of ``sparsify_attention``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MOST_PRUNED = 0.9
MOST_DENSE = 1 << 20  # tokens: the operation's own limit


@dataclass(frozen=True)
class SparseAttentionPolicy:
    """What ``sparsify_attention`` makes of a model's attention.

    Tokens that have left the window of recent ones are pruned, 64 at a time: of each key and value the elements of the
    largest magnitude stay. Prompts attend to all of their tokens before those are pruned.

    :param k: Fraction 0..0.9 of each key that is pruned.
    :param v: The same of each value.
    :param values: How the elements that stay are stored: ``"int8"`` or ``"int4"``, with one scale for each token and
        head.
    :param sink: First tokens of a sequence that stay dense, f32: many models attend to them always.
    :param recent: Last tokens that stay dense, f32; up to 63 more do.
    :param pack_from: Nothing is pruned while a sequence has fewer tokens: they are dense then, f32. None: where
        ``ov-ext calibrate`` has found that a layer takes longer than with stock's cache of 8 bits; a layer that takes
        longer at every measured length stays stock. 0 where nothing was measured.
    :param layers: Levels of single layers, by the number of the layer (the order in which attention runs, from 0):
        ``(k, v)``, or None for a layer that stays stock.
    :raises ValueError: A value outside its range.
    """

    k: float = 0.5
    v: float = 0.5
    values: Literal["int8", "int4"] = "int8"
    sink: int = 4
    recent: int = 64
    pack_from: int | None = None
    layers: Mapping[int, tuple[float, float] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for level in (self.k, self.v, *(level for pair in self.layers.values() for level in pair or ())):
            if not 0.0 <= level <= MOST_PRUNED:
                raise ValueError(f"A level of pruning is a fraction between 0 and {MOST_PRUNED}, got {level}.")
        if self.values not in ("int8", "int4"):
            raise ValueError(f"values must be int8 or int4, got {self.values!r}.")
        for name, window in (("sink", self.sink), ("recent", self.recent), ("pack_from", self.pack_from or 0)):
            if not 0 <= window <= MOST_DENSE:
                raise ValueError(f"{name} is a number of tokens between 0 and {MOST_DENSE}, got {window}.")

    def levels(self, layer: int) -> tuple[float, float] | None:
        """:return: The levels of a layer's keys and values; None where it stays stock."""
        return self.layers.get(layer, (self.k, self.v))
