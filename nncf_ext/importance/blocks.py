"""Which units of a branch (heads, channels) matter least? Scores ``[units]``, float32, high = keep."""

from collections.abc import Sequence

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
