"""Which units of a branch (heads, channels) matter least? Scores ``[units]``, float32, high = keep."""

from collections.abc import Sequence

from torch import Tensor


def l1_norm(parts: Sequence[Tensor]) -> Tensor:
    """
    Sum over the projections that write into a unit of the mean L1 norm of the unit's rows.

    For a head group the rows are its query, key and value rows: key and value rows that several query heads share
    count as if repeated. For an MLP channel it is one row each of gate and up.

    :param parts: For each projection ``[units, rows, in_features]``, any floating type.
    :return: Score ``[units]``, float32.

    Source: Munoz et al., MultiPruner: Balanced Structure Removal in Foundation Models (weight reordering).
    """
    total = sum(part.float().abs().sum(dim=2).mean(dim=1) for part in parts)
    assert isinstance(total, Tensor)
    return total
