"""Which layers skip inputs: the options of ``pack_sparse_activations``."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

# Bytes that memory reads in vain for each run of rows that stay: measured on Zen 4 (benchmarks/RESULTS.md).
WASTE = 900


@dataclass(frozen=True)
class SparseActivationPolicy:
    """What ``pack_sparse_activations`` makes of layers that replace small inputs.

    One token at a time counts. Prompts do not: layers that skip multiply most of them more slowly than dense ones of
    ours (benchmarks/RESULTS.md).

    :param skipped: Fraction 0..1 of inputs that a layer is expected to skip, as calibrated. It decides which layers
        gain; all that are packed skip what they can.
    :param min_speedup: Expected gain over the dense layer that a layer needs; 0 packs every layer that can be.
    :param activation_group: 128: activations that stay meet INT8 and INT4 weights as 8-bit integers, with one scale for
        each token and weight group (128 inputs where a weight has none). 0: as f32, slower.
    :param min_weights: Smaller matrices stay.
    :param requantize: Round asymmetric weights to a symmetric grid.
    :param ignored_patterns: Shell patterns of layers that stay.
    :raises ValueError: A value outside its range.
    """

    skipped: float = 0.5
    min_speedup: float = 1.1
    activation_group: int = 128
    min_weights: int = 16384
    requantize: bool = False
    ignored_patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.skipped <= 1.0:
            raise ValueError(f"skipped is a fraction between 0 and 1, got {self.skipped}.")
        if self.activation_group not in (0, 128):
            raise ValueError(f"activation_group is 128 or 0 (f32 activations), got {self.activation_group}.")
        if self.min_speedup < 0 or self.min_weights < 0:
            raise ValueError("min_speedup and min_weights are not negative.")

    def ignores(self, name: str) -> bool:
        """:return: Whether a layer of this name stays."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignored_patterns)

    def speedup(self, row_bytes: int, kind: str) -> float:
        """
        Expected time of the dense layer / of the one that skips, one token at a time. Memory gives whole rows of the
        weight, one for each input, and wastes some time wherever it jumps. Where that is too much, 8-bit activations
        meet all rows.

        :param row_bytes: Bytes of an input's weights.
        :param kind: Of the values: ``"bf16"``, ``"int8"`` or ``"int4"``.
        """
        kept = 1.0 - self.skipped
        time = kept + kept * self.skipped * WASTE / row_bytes
        reads_all = kind != "bf16" and self.activation_group != 0
        return 1.0 / max(0.05, min(1.0, time) if reads_all else time)
