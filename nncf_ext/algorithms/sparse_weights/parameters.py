"""What can be asked of the sparse-weights modes beyond the ratio."""

from collections.abc import Sequence
from dataclasses import dataclass

import nncf

from nncf_ext.parameters import SparsityAllocation, parse_choice

GROUP_SIZES = (64, 128)
QUANTIZATIONS = (nncf.CompressWeightsMode.INT4_SYM,)


def smaller_groups(group_size: int) -> tuple[int, ...]:
    """
    :param group_size: A group size.
    :return: The supported ones below it, largest first.
    """
    return tuple(sorted((size for size in GROUP_SIZES if size < group_size), reverse=True))


@dataclass
class AdvancedSparseWeightsParameters:
    """
    Parameters of the modes SPARSE_MAGNITUDE, SPARSE_WANDA, SPARSE_GPT and SPARSE_ADMM.

    The published SparseGPT and GPTQ, in one walk over the columns, are ``least_squares_steps=0, activation_order=False,
    scale_search=False, rounding_passes=0``.

    :param pattern: None zeros weights wherever they matter least. ``"N:M"`` keeps N of every M consecutive input
        columns (``"2:4"``, ``"4:8"``); the ratio must then be ``1 - N / M``.
    :param allocation: How many zeros each layer gets: UNIFORM, as many as asked for; SENSITIVITY, fewer where the
        model's output suffers more; OUTLIERS, fewer where more inputs stand out. The ratio of all layers together is
        the one asked for. SENSITIVITY runs the model once for each part of each block (attention, MLP), on two to eight
        calibration items, about 512 tokens.
    :param allocation_spread: How far a layer's ratio may be from the one asked for, 0..1. With OUTLIERS, half of the
        range of all ratios, as in the paper.
    :param quantization: None leaves floating weights. ``nncf.CompressWeightsMode.INT4_SYM`` puts them on NNCF's
        symmetric INT4 grid by GPTQ, which keeps every zero; it needs a dataset in every mode.
    :param group_size: Input columns that share one scale: 64 or 128.
    :param group_size_fallback_mode: What to do with a layer whose `in_features` is no multiple of `group_size`.
        ERROR (as in NNCF) refuses before any work; ADJUST takes the largest smaller group that divides them, which is
        64; IGNORE leaves the layer floating, and so does ADJUST where 64 does not divide them either. The layer is
        sparse all the same, and the report says what was done.
    :param keep_prerounding: Keep, per layer, the masked and error-compensated weight as it was just before rounding:
        ``nncf_ext.weights.records.record_of(layer).prerounding``. Costs 4 bytes a weight.
    :param block_size: Columns that SparseGPT and GPTQ treat together; SparseGPT chooses its mask for one such block at
        a time. A multiple of M and, with quantization, of the group size.
    :param damping: Part of the Hessian's mean diagonal that is added to the diagonal, above 0.
    :param least_squares_steps: SPARSE_GPT and SPARSE_ADMM, and every mode with quantization: once the zeros are found,
        the weights that stay are fitted to the layer's outputs by so many steps of conjugate gradients. 0: what the
        walk over columns gives.
    :param activation_order: Quantization: columns are rounded from the most to the least active input. Groups stay
        those of neighbouring columns.
    :param scale_search: Quantization: of several scales of a group the one that rounds best, an error in a column
        counting as the Hessian's diagonal says. False: the one that just covers the group.
    :param rounding_passes: Quantization: how often, after rounding, the scales are fitted to the codes, and the codes
        chosen anew one by one given all others.
    :param reconstruction_epochs: After the layers of a block are solved one by one, its weights that stay are trained
        together to give what the dense model gave behind the block: so often on each calibration item, and as often
        again on the grid. 0: not at all.
    :param reconstruction_learning_rate: The highest; Adam, a short warm-up, a cosine to zero.
    :param include: Regular expressions, from the start of a path, for layers that are left alone by default and shall
        be treated: routers of experts and gates of one output, such as ``r".*shared_expert_gate$"``.
    """

    pattern: str | None = None
    allocation: SparsityAllocation = SparsityAllocation.UNIFORM
    allocation_spread: float = 0.1
    quantization: nncf.CompressWeightsMode | None = None
    group_size: int = 128
    group_size_fallback_mode: nncf.GroupSizeFallbackMode = nncf.GroupSizeFallbackMode.ERROR
    keep_prerounding: bool = False
    block_size: int = 128
    damping: float = 0.01
    least_squares_steps: int = 10
    activation_order: bool = True
    scale_search: bool = True
    rounding_passes: int = 2
    reconstruction_epochs: int = 0
    reconstruction_learning_rate: float = 6e-4
    include: Sequence[str] = ()

    @property
    def keep_and_run(self) -> tuple[int, int] | None:
        """
        :return: N and M of the pattern, or None without a pattern.
        :raises nncf.ValidationError: The pattern is not ``"N:M"`` with ``0 < N < M``.
        """
        if self.pattern is None:
            return None
        parts = self.pattern.split(":")
        if len(parts) == 2 and all(part.isdecimal() for part in parts) and 0 < int(parts[0]) < int(parts[1]):
            return int(parts[0]), int(parts[1])
        msg = f"Asked for pattern {self.pattern!r}. It must be 'N:M' with 0 < N < M, as '2:4': N of M stay."
        raise nncf.ValidationError(msg)

    def group_of(self, in_features: int) -> int | None:
        """
        :param in_features: Inputs of a layer.
        :return: Its input columns that share a scale; None if it is not to be quantized.
        """
        if self.quantization is None:
            return None
        adjusts = self.group_size_fallback_mode == nncf.GroupSizeFallbackMode.ADJUST
        sizes = (self.group_size, *(size for size in smaller_groups(self.group_size) if adjusts))
        return next((size for size in sizes if in_features % size == 0), None)

    def refines(self, group_size: int | None) -> bool:
        """
        :param group_size: Of a layer; None if it is not to be quantized.
        :return: Whether anything is asked for beyond the walk of the papers, which zeros and rounds in one.
        """
        rounding = self.activation_order or self.scale_search or self.rounding_passes > 0
        return self.least_squares_steps > 0 or (group_size is not None and rounding)

    def check(self, ratio: float) -> None:
        """
        Checks what can be checked without a model.

        :param ratio: Fraction of weights to zero, 0..1.
        :raises nncf.ValidationError: A value is out of range or contradicts another.
        :raises nncf.ParameterNotSupportedError: A value is legal in NNCF and not here.
        """
        pattern = self.keep_and_run
        if pattern is not None and abs(ratio - (1 - pattern[0] / pattern[1])) > 1e-6:
            msg = (
                f"Pattern {self.pattern} keeps {pattern[0]} of {pattern[1]} weights, so the ratio must be "
                f"{1 - pattern[0] / pattern[1]:g}; got {ratio:g}."
            )
            raise nncf.ValidationError(msg)
        allocation = parse_choice(self.allocation, SparsityAllocation, "allocation")
        if allocation is not SparsityAllocation.UNIFORM and pattern is not None:
            msg = f"Pattern {self.pattern} gives every layer the same zeros; leave allocation at uniform."
            raise nncf.ValidationError(msg)
        if not 0 < self.allocation_spread < 1:
            msg = f"allocation_spread is between 0 and 1 (0.1 is usual); got {self.allocation_spread}."
            raise nncf.ValidationError(msg)
        if self.quantization is not None:
            parse_choice(self.quantization, QUANTIZATIONS, "quantization")
        if self.group_size not in GROUP_SIZES:
            msg = f"Asked for group size {self.group_size}; use one of {GROUP_SIZES}."
            raise nncf.ValidationError(msg)
        parse_choice(self.group_size_fallback_mode, nncf.GroupSizeFallbackMode, "group_size_fallback_mode")
        if self.keep_prerounding and self.quantization is None:
            msg = "keep_prerounding=True keeps the weight from before rounding, and no quantization was asked for."
            raise nncf.ValidationError(msg)
        if isinstance(self.include, str):
            msg = f"include is a list of patterns; got the text {self.include!r}: write [{self.include!r}]."
            raise nncf.ValidationError(msg)
        if self.damping <= 0:
            msg = f"damping must be above 0 (0.01 is usual); got {self.damping}."
            raise nncf.ValidationError(msg)
        for name in ("least_squares_steps", "rounding_passes", "reconstruction_epochs"):
            if getattr(self, name) < 0:
                msg = f"{name} is a whole number, 0 or more; got {getattr(self, name)}."
                raise nncf.ValidationError(msg)
        if not 0 < self.reconstruction_learning_rate < 1:
            rate = self.reconstruction_learning_rate
            msg = f"reconstruction_learning_rate is between 0 and 1 (6e-4 is usual); got {rate}."
            raise nncf.ValidationError(msg)
        unit = max(pattern[1] if pattern else 1, self.group_size if self.quantization else 1)
        if self.block_size < 1 or self.block_size % unit:
            msg = f"block_size must be a positive multiple of {unit} (pattern and group size); got {self.block_size}."
            raise nncf.ValidationError(msg)
