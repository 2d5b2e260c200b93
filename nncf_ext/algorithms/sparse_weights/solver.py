"""
One weight matrix: zero what matters least, round the rest, and let the columns that follow make up for the error.

SparseGPT and GPTQ are the same walk over columns. They differ in what happens to a column (masked, rounded, or both).

The error to keep small is ``|X (W - R)^T|^2``, X being the inputs and R the new weight. Rows of W do not depend on each
other, and all have the same Hessian H. Say column j of a row changes by d. The error stays smallest if the columns F
from j on change by ``d / [H_F^-1]_jj * [H_F^-1]_j,:`` (optimal brain surgery). With U from ``H^-1 = U^T U``, computed
once, ``[H_F^-1]_j,: = U_jj U_j,:`` for every j. So the change is ``d / U_jj * U_j,:``.
"""

from dataclasses import dataclass
from typing import Protocol

import nncf
import torch
from torch import Tensor

from nncf_ext.importance.weights import optimal_brain_score, pattern_mask, smallest_mask
from nncf_ext.weights.int4 import grid_value, group_scale, nearest_code

_MAX_DAMPING = 1.0
NOT_INVERTIBLE = (
    "The second moments of a layer's inputs cannot be inverted, even strongly damped. They are not finite or far out "
    "of range: check the calibration data, or run the model in float32."
)


@dataclass(frozen=True)
class Solution:
    """
    :param weight: The new weight ``[out_features, in_features]``, float32; on the grid if there are codes.
    :param codes: INT4 codes ``[out_features, in_features]``, int8, or None.
    :param scales: Group scales ``[out_features, groups]``, float16, or None.
    :param prerounding: The weight just before rounding ``[out_features, in_features]``, float32, or None.
    """

    weight: Tensor
    codes: Tensor | None = None
    scales: Tensor | None = None
    prerounding: Tensor | None = None


class MaskChoice(Protocol):
    """Chooses which weights of a block of columns are zeroed, from weights already corrected for the columns before."""

    def __call__(self, block: Tensor, factor_diagonal: Tensor, start: int) -> Tensor:
        """
        :param block: Current weights ``[out_features, columns]``, float32.
        :param factor_diagonal: Diagonal of the inverse Hessian's factor for these columns ``[columns]``.
        :param start: Index of the first of these columns in the whole weight.
        :return: Mask ``[out_features, columns]``, True = zero.
        """


@dataclass(frozen=True)
class FixedMask:
    """
    The mask is known beforehand (magnitude, Wanda, no pruning).

    :param mask: ``[out_features, in_features]``, True = zero.
    """

    mask: Tensor
    run = None

    def __call__(self, block: Tensor, factor_diagonal: Tensor, start: int) -> Tensor:
        return self.mask[:, start : start + block.shape[1]]


@dataclass(frozen=True)
class AdaptiveMask:
    """
    SparseGPT's choice: the weights with the smallest error once later columns have made up for it.

    Without a pattern the mask is chosen for one block of columns over all rows together; with a pattern, for each run
    of M columns when the walk reaches it. Weights that were zero before stay zero, and count among the zeros.

    :param zeros: Zeros of the weight before, ``[out_features, in_features]``.
    :param ratio: Fraction of all weights to zero, 0..1.
    :param keep: N of an N:M pattern; unused without a pattern.
    :param run: M of an N:M pattern, columns; None without a pattern.

    Source: Frantar & Alistarh, SparseGPT, section 3.2.
    """

    zeros: Tensor
    ratio: float
    keep: int = 0
    run: int | None = None

    def __call__(self, block: Tensor, factor_diagonal: Tensor, start: int) -> Tensor:
        rows, columns = block.shape
        zeros = self.zeros[:, start : start + columns]
        # Below every score: what is zero already comes first, whatever corrections have put there.
        scores = optimal_brain_score(block, factor_diagonal).masked_fill(zeros, -1.0)
        if self.run is not None:
            return pattern_mask(scores, self.keep, self.run) | zeros
        # Differences of rounded-down totals, so that the whole weight gets int(size * ratio) zeros.
        count = int(rows * (start + columns) * self.ratio) - int(rows * start * self.ratio)
        return smallest_mask(scores.reshape(1, -1), count).reshape(rows, columns) | zeros


def dead_columns(hessian: Tensor) -> Tensor:
    """
    :param hessian: ``[in_features, in_features]``.
    :return: Inputs that were zero on every calibration token ``[in_features]``, bool. Their weights had no effect on
        this data, and the data says nothing about them.
    """
    return hessian.diagonal() == 0


def revive(hessian: Tensor) -> Tensor:
    """
    Gives dead columns a curvature. They are coupled to nothing, so their own entry is free: with the mean of the
    others, damping by a part of the mean stays what it is.

    :param hessian: ``[in_features, in_features]``. Changed in place.
    :return: The mean of the other diagonal entries, a scalar; 1 if there are none.
    """
    diagonal, dead = hessian.diagonal(), dead_columns(hessian)
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), device=hessian.device)
    diagonal[dead] = mean
    return mean


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """
    Upper Cholesky factor U of the damped inverse Hessian, ``H^-1 = U^T U``. Row j of U, divided by ``U_jj``, says how
    the columns after j make up for a change of column j.

    :param hessian: ``[in_features, in_features]``, float32, positive semi-definite. Overwritten.
    :param damping: Part of the mean diagonal added to the diagonal; raised tenfold while the matrix stays singular.
    :return: ``[in_features, in_features]``, float32.
    :raises nncf.ValidationError: The matrix cannot be factored (not finite, or damping up to 1 did not help).

    Source: Frantar & Alistarh, SparseGPT, section 3.1 and appendix; damping as in GPTQ, section 3.3.
    """
    mean = revive(hessian)
    diagonal = hessian.diagonal()
    original = diagonal.clone()
    while damping <= _MAX_DAMPING:
        diagonal.copy_(original + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(factor.isfinite().all()):
                return factor
        damping *= 10
    raise nncf.ValidationError(NOT_INVERTIBLE)


def solve(
    weight: Tensor,
    factor: Tensor,
    choose_mask: FixedMask | AdaptiveMask,
    *,
    block_size: int,
    group_size: int | None = None,
    column_scales: Tensor | None = None,
    keep_prerounding: bool = False,
) -> Solution:
    """
    Walks over the columns of a weight: mask, round, and pass each column's error on to the columns after it.

    :param weight: ``[out_features, in_features]``, float32, with zeros in dead columns.
    :param factor: From :func:`inverse_factor`, ``[in_features, in_features]``, float32.
    :param choose_mask: Which weights to zero. They are exactly zero in the result, and have code 0 on the grid.
    :param block_size: Columns treated before the error is passed on to all that follow.
    :param group_size: Columns that share a scale; None leaves floating weights. Divides `block_size` and in_features.
        Scales are taken when the walk reaches the group, from weights already corrected and masked.
    :param column_scales: In place of a group size: the scale of every weight ``[out_features, in_features]``, float16.
    :param keep_prerounding: Also return the weight as it was before rounding.
    :return: The new weight; with a group size or scales, its codes; with a group size, its scales.

    Source: Frantar & Alistarh, SparseGPT, algorithm 1; Frantar et al., GPTQ, algorithm 1.
    """
    columns = weight.shape[1]
    # Turned, so that what is treated at a time, a column, lies together in memory.
    turned = weight.T.clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(turned)
    rounds = group_size is not None or column_scales is not None
    codes = torch.empty_like(turned, dtype=torch.int8) if rounds else None
    prerounding = torch.empty_like(turned) if keep_prerounding else None
    scale_of = None if column_scales is None else column_scales.T.contiguous()
    scales: list[Tensor] = []
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = turned[start:stop]
        local = factor[start:stop, start:stop]
        diagonal = local.diagonal()
        mask = choose_mask(block.T, diagonal, start).T.contiguous()
        errors = torch.empty_like(block)
        for column in range(stop - start):
            at = start + column
            if choose_mask.run is not None and column % choose_mask.run == 0:
                ahead = slice(column, column + choose_mask.run)
                mask[ahead] = choose_mask(block[ahead].T, diagonal[ahead], at).T  # corrected by now
            if group_size is not None and at % group_size == 0:
                ahead = slice(column, column + group_size)
                # Later columns of the group will still be corrected, and a pattern may still choose others of them.
                # What then exceeds the grid is clamped to its end.
                scales.append(group_scale(block[ahead].masked_fill(mask[ahead], 0.0).T))
            current = block[column]
            kept = current.masked_fill(mask[column], 0.0)
            if prerounding is not None:
                prerounding[at] = kept
            if codes is not None:
                scale = scales[-1][:, 0] if scale_of is None else scale_of[at]
                code = nearest_code(kept, scale)
                codes[at] = code.to(torch.int8)
                kept = grid_value(code, scale)
            result[at] = kept
            # d / U_jj, to be passed on along U_j,: as above: within the block at once, behind it for all columns of the
            # block in one matrix product, which is much faster and the same sum.
            errors[column] = (current - kept) / diagonal[column]
            block[column + 1 :].addr_(local[column, column + 1 :], errors[column], alpha=-1.0)
        turned[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
    return Solution(
        result.T.contiguous(),
        None if codes is None else codes.T.contiguous(),
        torch.cat(scales, dim=1) if scales else None,
        None if prerounding is None else prerounding.T.contiguous(),
    )
