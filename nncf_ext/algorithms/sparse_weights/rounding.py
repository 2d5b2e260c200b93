"""
Better scales and codes of an INT4 weight than the walk over its columns gives by itself.

All of it makes the error of the layer's outputs smaller, the trace of ``(Q - W) H (Q - W)^T``: W is the weight before,
Q the one on the grid, H the Hessian of the layer's inputs. Zeros of the mask have code 0 and keep it.
"""

import torch
from torch import Tensor

from nncf_ext.weights.int4 import LOWEST_CODE, dequantize, grid_value, nearest_code

# Of the scale that puts a group's largest magnitude on code -8; up to what puts it on code 7.
_SHRINKING = [each / 40 for each in range(25, 47)]
_TINY = torch.finfo(torch.float32).eps
_ROWS = 4096  # treated at once: each has a matrix of groups by groups
_BLOCK = 64  # columns between updates of the whole gradient
_DAMPING = 1e-3


def search_scales(weight: Tensor, importance: Tensor, group_size: int) -> Tensor:
    """
    For each group, of the scales around the one that just covers it, of both signs, the one that rounds best.

    :param weight: ``[out_features, in_features]``, float32.
    :param importance: What an error in a column costs ``[in_features]``: the Hessian's diagonal.
    :param group_size: Columns that share a scale.
    :return: Scales ``[out_features, groups]``, float16, never zero. The sign says whether the group's range reaches
        further down (positive) or up (negative).
    """
    rows = len(weight)
    groups = weight.reshape(rows, -1, group_size)
    costs = importance.reshape(-1, group_size)
    extent = groups.abs().amax(dim=2) / -LOWEST_CODE
    best = torch.full((rows, groups.shape[1]), torch.inf, device=weight.device)
    found = torch.empty_like(best, dtype=torch.float16)
    for sign in (1.0, -1.0):
        for shrinking in _SHRINKING:
            scale = _storable(sign * extent * shrinking)
            rounded = grid_value(nearest_code(groups, scale.unsqueeze(2)), scale.unsqueeze(2))
            error = ((rounded - groups).square_() * costs).sum(dim=2)
            found = torch.where(error < best, scale, found)
            best = torch.minimum(error, best)
    return found


def fit_scales(codes: Tensor, scales: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """
    The scales with the smallest output error for given codes: for each row a small system of least squares.

    :param codes: ``[out_features, in_features]``, int8.
    :param scales: The present scales ``[out_features, groups]``, float16. A scale whose fit has another sign, or whose
        codes are all zero, stays.
    :param target: The weight before ``[out_features, in_features]``, float32.
    :param hessian: Of the inputs, damped: ``[in_features, in_features]``, float32.
    :return: The new scales ``[out_features, groups]``, float16.
    """
    parts = zip(codes.split(_ROWS), scales.split(_ROWS), target.split(_ROWS), strict=True)
    return torch.cat([_fitted(*part, hessian) for part in parts])


def _fitted(codes: Tensor, scales: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    rows, groups = scales.shape
    values, old = codes.float(), scales.float()
    group_size = values.shape[1] // groups

    def by_group(matrix: Tensor) -> Tensor:
        return (matrix * values).reshape(rows, groups, group_size).sum(dim=2)

    right = by_group(target @ hessian)
    parts = zip(values.split(group_size, dim=1), hessian.split(group_size), strict=True)
    left = torch.stack([by_group(part @ curvature) for part, curvature in parts], dim=1)
    diagonal = left.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    damping = _DAMPING * diagonal.mean(dim=1, keepdim=True) + empty
    fitted = torch.linalg.solve(left + torch.diag_embed(damping), right + damping * old)
    usable = (fitted.sign() == old.sign()) & fitted.isfinite() & ~empty
    return torch.where(usable, _storable(fitted), scales)


def descend(codes: Tensor, scales: Tensor, target: Tensor, hessian: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """
    One pass of coordinate descent: column by column, the codes with the smallest output error given all others.

    :param codes: ``[out_features, in_features]``, int8.
    :param scales: ``[out_features, groups]``, float16.
    :param target: The weight before ``[out_features, in_features]``, float32.
    :param hessian: Of the inputs, damped: ``[in_features, in_features]``, float32, positive definite.
    :param zeros: Weights whose code stays 0 ``[out_features, in_features]``, bool.
    :return: The new codes, int8, and what was rounded to them, float32; both ``[out_features, in_features]``.

    Source: Behdin et al., QuantEase, arXiv 2309.01885, section 3.
    """
    columns = codes.shape[1]
    group_size = columns // scales.shape[1]
    # Turned, so that what is treated at a time, a column, lies together in memory.
    weight, code_of, gone = (
        each.T.clone(memory_format=torch.contiguous_format) for each in (dequantize(codes, scales), codes, zeros)
    )
    scale_of = scales.T.contiguous()
    before = torch.empty_like(weight)
    gradient = hessian @ (weight - target.T)  # half of it, as in all that follows
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        local, curvature = gradient[start:stop], hessian[start:stop, start:stop]
        changes = torch.empty_like(local)
        for column in range(stop - start):
            at = start + column
            scale = scale_of[at // group_size]
            best = (weight[at] - local[column] / curvature[column, column]).masked_fill_(gone[at], 0.0)
            code = nearest_code(best, scale)
            changes[column] = grid_value(code, scale) - weight[at]
            before[at], code_of[at] = best, code.to(torch.int8)
            local[column + 1 :].addr_(curvature[column, column + 1 :], changes[column])
        gradient[stop:].addmm_(hessian[stop:, start:stop], changes)
    return code_of.T.contiguous(), before.T.contiguous()


def _storable(scale: Tensor) -> Tensor:
    """As float16, and never zero."""
    return torch.where(scale.abs() < _TINY, torch.full_like(scale, _TINY).copysign_(scale), scale).half()
