"""One weight matrix as plain arrays: what the blobs of all operations hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = {"bf16": 1, "int8": 2, "int4": 3}  # as in support/value_kind.hpp
MAX_SIDE = 2**31 - 1


@dataclass(frozen=True)
class Weight:
    """One weight matrix as plain arrays: what a blob holds.

    :param kind: Value kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
    :param values: ``[N, K]`` (outputs, inputs): uint16 bit patterns for bf16, int8 codes for int8 and int4 (-8..7).
    :param scales: ``[N, G]`` float16 or float32; G is 1 for ``group == 0``, else K / group rounded up. None for bf16.
    :param group: Inputs that share a scale: 64, 128, or 0 for one scale per output.
    :param bias: ``[N]`` float32 or None.
    """

    kind: str
    values: np.ndarray
    scales: np.ndarray | None = None
    group: int = 0
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        dtype = np.dtype(np.uint16 if self.kind == "bf16" else np.int8)
        if self.kind not in KINDS:
            raise ValueError(f"Unknown value kind {self.kind!r}: one of {', '.join(KINDS)} is needed.")
        if self.values.ndim != 2 or 0 in self.values.shape or self.values.dtype != dtype:
            raise ValueError(
                f"A {self.kind} weight needs a non-empty [N, K] array of {dtype}, "
                f"got {self.values.dtype} of shape {list(self.values.shape)}."
            )
        n, k = self.values.shape
        if max(n, k) > MAX_SIDE:  # before anything that takes time or memory
            raise ValueError(f"N and K must lie in 1..2^31-1, got N = {n}, K = {k}.")
        if self.kind == "int4" and (self.values.min() < -8 or self.values.max() > 7):
            raise ValueError("int4 codes must lie in -8..7.")
        if self.group not in ((0,) if self.kind == "bf16" else (0, 64, 128)):
            raise ValueError(
                f"A {self.kind} weight cannot have scale groups of {self.group}: 64, 128 or 0 (per output)."
            )
        if (self.scales is None) != (self.kind == "bf16"):
            raise ValueError("bf16 weights have no scales, int8 and int4 weights need them.")
        if self.scales is not None:
            expected = (n, -(-k // self.group) if self.group else 1)
            if self.scales.shape != expected or self.scales.dtype not in (np.float16, np.float32):
                raise ValueError(
                    f"Scales must be float16 or float32 of shape {list(expected)}, "
                    f"got {self.scales.dtype} of shape {list(self.scales.shape)}."
                )
            if not np.isfinite(self.scales).all():
                raise ValueError("Scales must be finite.")
        if self.bias is not None and (self.bias.shape != (n,) or self.bias.dtype != np.float32):
            raise ValueError(f"The bias must be float32 of shape [{n}], got {self.bias.dtype} {list(self.bias.shape)}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): outputs and inputs."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction 0..1 of elements that are zero (either sign)."""
        stored = self.values & 0x7FFF if self.kind == "bf16" else self.values
        return 1.0 - np.count_nonzero(stored) / stored.size

    def dequantize(self) -> np.ndarray:
        """:return: The weight as float32 ``[N, K]``, without bias."""
        if self.scales is None:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        scales = self.scales.astype(np.float32)
        if self.group:
            scales = np.repeat(scales, self.group, axis=1)[:, : self.values.shape[1]]
        return self.values.astype(np.float32) * scales
