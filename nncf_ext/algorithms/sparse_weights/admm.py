"""
Zeros found by the alternating direction method of multipliers.

The weight with the smallest output error that has so many zeros is found by taking turns: the best weight near a sparse
one (a linear system, the same for all rows), and the sparse weight nearest to that (the largest entries stay). A third
matrix, the multiplier, remembers what the two could not agree on. SparseGPT decides on a zero once, when its walk comes
by; here every weight is weighed again at each step, and any place of the matrix may have more zeros than another.
"""

import nncf
import torch
from torch import Tensor

from nncf_ext.algorithms.sparse_weights.solver import NOT_INVERTIBLE
from nncf_ext.importance.weights import pattern_mask, smallest_mask

_STEPS = 16
_GROWING_STEPS = 8  # while the number of zeros, anywhere, grows to what was asked for
_PENALTY = 0.5  # on disagreement, beside a Hessian whose diagonal is one


def admm(
    weight: Tensor, hessian: Tensor, zeros: Tensor, ratio: float, pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """
    :param weight: ``[out_features, in_features]``, float32.
    :param hessian: Of the inputs, damped: ``[in_features, in_features]``, float32, positive definite.
    :param zeros: Weights that are zero and stay so ``[out_features, in_features]``, bool. They count.
    :param ratio: Fraction of all weights to zero, 0..1.
    :param pattern: N and M of an N:M pattern, or None.
    :return: The new weight and its zeros, both ``[out_features, in_features]``. The weight is good enough to begin a
        least-squares fit from.
    :raises nncf.ValidationError: The Hessian is not finite.

    Source: Boza, Fast and Effective Weight Update for Pruned Large Language Models, arXiv 2401.02938, algorithms 1 and
    2: columns are scaled to unit norm, and the number of zeros grows with a cubic schedule. Penalty and steps were
    chosen on layers of SmolLM2-135M; zeros are chosen over the whole matrix, not row by row.
    """
    size = hessian.diagonal().sqrt()
    scaled = hessian / size / size[:, None]
    wanted = weight * size
    pull = wanted @ scaled
    scaled.diagonal().add_(_PENALTY)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if failed or not bool(factor.isfinite().all()):
        raise nncf.ValidationError(NOT_INVERTIBLE)
    inverse = torch.cholesky_inverse(factor)
    current, multiplier = wanted, torch.zeros_like(wanted)
    for step in range(1, _STEPS + 1):
        proposal = current + multiplier
        scores = proposal.abs().masked_fill_(zeros, -1.0)
        if pattern is not None and step > _GROWING_STEPS:
            mask = pattern_mask(scores, *pattern) | zeros
        else:
            share = ratio * (1 - max(0.0, 1 - step / _GROWING_STEPS) ** 3)
            mask = smallest_mask(scores.reshape(1, -1), int(scores.numel() * share)).reshape(scores.shape) | zeros
        sparse = proposal.masked_fill(mask, 0.0)
        multiplier = proposal - sparse
        current = (pull + _PENALTY * (sparse - multiplier)) @ inverse
    return sparse / size, mask
