"""
The weights that stay, fitted to what the layer gave before.

With W the weight before, R the one with zeros and H the Hessian of the layer's inputs, the error of the outputs is the
trace of ``(R - W) H (R - W)^T``. Rows of R do not depend on each other; each has its own zeros, and so its own system
of equations. Conjugate gradients solve all of them at once: a step is one product of R's size with H.
"""

import torch
from torch import Tensor


def fit_kept(start: Tensor, target: Tensor, hessian: Tensor, zeros: Tensor, steps: int) -> Tensor:
    """
    Moves the weights that stay towards the least squared error of the layer's outputs, and leaves the zeros.

    :param start: Where to begin, ``[out_features, in_features]``, float32; zero at the zeros.
    :param target: The weight before ``[out_features, in_features]``, float32.
    :param hessian: Of the inputs, damped: ``[in_features, in_features]``, float32, positive definite.
    :param zeros: Which weights are zero ``[out_features, in_features]``, bool.
    :param steps: Steps of conjugate gradients, preconditioned by the diagonal. The error never grows from one to the
        next, but for rounding.
    :return: The new weight ``[out_features, in_features]``, float32.

    Source: Meng et al., ALPS, arXiv 2406.07831, section 3.3.
    """
    diagonal = hessian.diagonal()
    weight = start.clone()
    residual = ((target - weight) @ hessian).masked_fill_(zeros, 0.0)
    direction = residual / diagonal
    size = (residual * direction).sum(dim=1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(steps):
        change = (direction @ hessian).masked_fill_(zeros, 0.0)
        bend = (direction * change).sum(dim=1, keepdim=True)
        length = torch.where(bend > tiny, size / bend, 0.0)  # a row that is done, or a Hessian at the end of float32
        weight.addcmul_(length, direction)
        residual.addcmul_(length, change, value=-1.0)
        preconditioned = residual / diagonal
        new_size = (residual * preconditioned).sum(dim=1, keepdim=True)
        direction = preconditioned.addcmul_(new_size / size.clamp(min=tiny), direction)
        size = new_size
    return weight
