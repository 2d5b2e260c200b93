"""Which units of a branch (heads, channels) matter least? Scores ``[units]``, float32, high = keep."""

from collections.abc import Sequence

import torch
from torch import Tensor


def l1_norm(parts: Sequence[Tensor]) -> Tensor:
    """
    Sum over the projections that write into a unit of the mean L1 norm of the unit's rows.

    For a group of heads the rows are its query, key and value rows. Because of the mean, key and value rows that
    several query heads share count as if each query head had its own. An MLP channel has one row in gate, one in up.

    :param parts: For each projection ``[units, rows, in_features]``, any floating type.
    :return: Score ``[units]``, float32.

    Source: Munoz et al., MultiPruner: Balanced Structure Removal in Foundation Models (weight reordering).
    """
    total = sum(part.float().abs().sum(dim=2).mean(dim=1) for part in parts)
    assert isinstance(total, Tensor)
    return total


def norm_sum(parts: Sequence[Tensor], power: int) -> Tensor:
    """
    Sum over all weights that write into a unit of the norm of the unit's part: ``sum |w|``, or ``sqrt(sum w^2)``.

    :param parts: For each weight ``[units, rows, inputs]``, any floating type.
    :param power: 1 or 2.
    :return: Score ``[units]``, float32 or as precise as the weights.
    Source: BootstrapNAS, arXiv 2112.10878 (filter importance); its rules in NNCF up to 2.19.
    """
    total = sum(torch.linalg.vector_norm(part.flatten(1).to(_precise(part)), power, dim=1) for part in parts)
    assert isinstance(total, Tensor)
    return total


def first_order(parts: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """
    What the loss would lose with a unit, to first order: ``sum |w * dL/dw|`` over all weights that write into it.

    :param parts: For each weight ``[units, rows, inputs]``, any floating type.
    :param gradients: The gradients of the loss by them, likewise.
    :return: Score ``[units]``, float32 or as precise as the weights.
    Source: EFTNAS, LREC-COLING 2024 (first-order weight importance).
    """
    products = (one.to(_precise(one)) * other for one, other in zip(parts, gradients, strict=True))
    total = sum(each.abs().flatten(1).sum(dim=1) for each in products)
    assert isinstance(total, Tensor)
    return total


def _precise(part: Tensor) -> torch.dtype:
    return torch.promote_types(part.dtype, torch.float32)


def activation_norm(mean_square: Tensor, weight: Tensor, units: int) -> Tensor:
    """
    How much a unit writes to the residual stream: the root of the sum over its channels c of
    ``mean(a_c^2) * |W[:, c]|^2``, a_c being the input of the output projection in that channel.

    :param mean_square: Mean square of each input of the output projection, ``[in_features]`` float32.
    :param weight: Of the output projection, ``[out_features, in_features]``, any floating type.
    :param units: Number of units, which share the input features evenly and in order.
    :return: Score ``[units]``, float32.

    Source: Sun et al., Wanda (arXiv 2306.11695), section 3, applied to whole columns.
    """
    energy = mean_square * weight.float().square().sum(dim=0)
    return energy.view(units, -1).sum(dim=1).sqrt()
