"""Which weights are packed: the options of ``pack_sparse_weights``."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import Literal

from ov_ext.runtime import TARGETS, InstructionSet
from ov_ext.sparse_weights.workload import Workload

Target = Literal["this-cpu"] | InstructionSet
_TARGETS = ("this-cpu", *reversed(TARGETS))


@dataclass(frozen=True)
class SparsePolicy:
    """What ``pack_sparse_weights`` may replace.

    :param min_sparsity: Fraction 0..1 of zeros that a weight needs to be packed. 0 packs everything that can be packed,
        as far as ``max_growth`` allows; a weight for which a bitmap does not save bytes gets none. None: each layer
        gets the form that is expected to be the fastest for the workload: stock, or, where it is 1.1 times faster, ours
        with or without a bitmap.
    :param target: Instruction set that will run the IR: the fastest form depends on it, the contents of blobs do not.
        It is recorded in the IR, and loading the IR on a weaker CPU warns once. ``"this-cpu"`` takes times that are
        measured on this CPU (see ``calibrate``), a name those that were measured on another CPU.
    :param activation_group: Number of inputs that share one dynamic quantization scale at run time, for int8 and int4
        weights: 128, 64, -1 (one scale per token) or 0 (activations stay in floating point: slower, but exact). A value
        smaller than the group of the weight is raised to that group. For bf16 weights, 0 keeps f32 activations and any
        other value rounds them to bf16. It is fixed in the packed model: OpenVINO shows its settings to built-in
        layers only, so ``EXECUTION_MODE_HINT=ACCURACY`` and ``DYNAMIC_QUANTIZATION_GROUP_SIZE=0`` do not change it.
    :param min_weights: Matrices with fewer elements stay. A call of our operation costs 1 to 7 microseconds more than a
        call of a built-in layer. A matrix of half a million weights at 50 % zeros makes up for that. Smaller ones are
        slower and only save memory; below this number of elements they do not save enough to be worth it.
    :param requantize: Round asymmetric weights that cannot be packed losslessly to a symmetric grid; the report shows
        the relative error of each. Otherwise they stay.
    :param workload: What the model is used for: how much the time of prompts and of tokens counts. By default, one
        token at a time.
    :param calibrate: For ``"this-cpu"``: use what :func:`ov_ext.calibrate` has measured, and measure for ten seconds
        where there is nothing. False, or the environment variable ``OV_EXT_CALIBRATE=0``: use the built-in times of a
        similar CPU, which are the same everywhere.
    :param max_growth: The packed model, all constants together, may be larger than the stock model by this fraction;
        ``math.inf``: by anything. An embedding that is also the head would be stored twice, and INT4 without a bitmap
        takes 3 % more than stock: where it becomes too much, layers stay stock, those first that gain least.
    :param ignored_names: Friendly names of MatMul operations, or of their weights, that stay.
    :param ignored_patterns: The same as shell patterns, such as ``*lm_head*``.
    :raises ValueError: A value outside its range.
    """

    min_sparsity: float | None = None
    target: Target = "this-cpu"
    activation_group: int = 128
    min_weights: int = 1 << 14
    requantize: bool = False
    workload: Workload = Workload()
    calibrate: bool = True
    max_growth: float = 0.02
    ignored_names: tuple[str, ...] = ()
    ignored_patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_sparsity is not None and not 0.0 <= self.min_sparsity <= 1.0:
            raise ValueError(f"min_sparsity is a fraction between 0 and 1, got {self.min_sparsity}.")
        if self.activation_group not in (0, 64, 128, -1):
            raise ValueError(f"activation_group must be 0, 64, 128 or -1 (per token), got {self.activation_group}.")
        if self.target not in _TARGETS:
            raise ValueError(f"target must be one of {', '.join(_TARGETS)}; got {self.target!r}.")
        if self.min_weights < 0:
            raise ValueError(f"min_weights is a number of elements, got {self.min_weights}.")
        if math.isnan(self.max_growth) or self.max_growth < 0:
            raise ValueError(f"max_growth is a fraction from 0, got {self.max_growth}.")

    def ignores(self, *names: str) -> bool:
        """:return: True when one of the names is listed or matches a pattern."""
        return any(
            name in self.ignored_names or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored_patterns)
            for name in names
        )
