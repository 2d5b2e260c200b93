"""
Which weights of a layer matter least?

Scores are float32 matrices ``[out_features, in_features]``, high = keep. Masks are boolean matrices of the same shape,
True = zero this weight. All functions work on the device of their inputs.
"""

import torch
from torch import Tensor


def magnitude_score(weight: Tensor) -> Tensor:
    """
    The absolute value of a weight.

    :param weight: Weight ``[out_features, in_features]``, any floating type.
    :return: Score ``[out_features, in_features]``, float32.
    """
    return weight.float().abs()


def wanda_score(weight: Tensor, mean_square: Tensor) -> Tensor:
    """
    Weight magnitude times the norm of the input it is multiplied with: ``|W_ij| * sqrt(n_j)``.

    :param weight: Weight ``[out_features, in_features]``, any floating type.
    :param mean_square: ``n_j``, the sum over tokens of the squared input, averaged over sequences. ``[in_features]``,
        float32.
    :return: Score ``[out_features, in_features]``, float32.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), section 3.
    """
    return weight.float().abs() * mean_square.float().sqrt()


def optimal_brain_score(weight: Tensor, factor_diagonal: Tensor) -> Tensor:
    """
    The increase of the layer's squared output error when one weight is zeroed and all later columns of its row may
    correct for it, up to a constant factor: ``W_ij^2 / U_jj^2``.

    Optimal brain surgery gives ``W_ij^2 / [H_F^-1]_jj``, H_F being the rows and columns of H from j on. The Cholesky
    factor of the whole inverse holds all of these at once: ``[H_F^-1]_jj = U_jj^2``.

    :param weight: Weight ``[out_features, columns]``, float32, already corrected for the columns before.
    :param factor_diagonal: Diagonal of U, the upper Cholesky factor of the inverse Hessian. ``[columns]``, float32.
    :return: Score ``[out_features, columns]``, float32.

    Source: Frantar & Alistarh, SparseGPT, section 3.2 (adaptive mask selection).
    """
    return (weight / factor_diagonal).square()


def smallest_mask(scores: Tensor, count: int) -> Tensor:
    """
    Marks the `count` smallest scores of each row; of equal scores the leftmost are marked first.

    That is the result of a stable ascending sort of each row, found by selection in linear time.

    :param scores: Scores ``[rows, columns]``.
    :param count: How many to mark in each row, ``0 <= count <= columns``.
    :return: Mask ``[rows, columns]`` with exactly `count` True in each row.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below = scores < threshold
    equal = scores == threshold
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (equal & (equal.cumsum(dim=1) <= missing))


def pattern_mask(scores: Tensor, keep: int, run: int) -> Tensor:
    """
    N:M pattern: in each run of `run` consecutive columns all but the `keep` highest scores are marked.

    :param scores: Scores ``[rows, columns]``, columns a multiple of `run`.
    :param keep: N, how many weights of a run stay.
    :param run: M, the length of a run in columns.
    :return: Mask ``[rows, columns]``.
    """
    return smallest_mask(scores.reshape(-1, run), run - keep).reshape(scores.shape)
