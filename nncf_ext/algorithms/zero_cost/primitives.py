"""
What programs over statistics are made of: 33 functions from tensors to a tensor. None changes what it is given. Values
that are no numbers (NaN) stay, except where the source says what takes their place.

Source: EZNAS, NeurIPS 2022 (arXiv 2209.07413), the primitives of its program space.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

Primitive = Callable[..., Tensor]


def _positive_log(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x)).log()


def _normalize(x: Tensor) -> Tensor:
    return ((x - x.mean()) / x.std()).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _logdet(x: Tensor) -> Tensor:
    # Of a negative determinant there is no logarithm: 0 stands for it. Of a determinant 0 it is minus infinity.
    return torch.logdet(x).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype)


def _gram_eigenvalue_ratio(x: Tensor) -> Tensor:
    if not x.isfinite().all():  # not every library of linear algebra comes back from these
        return _scalar(torch.nan, x)
    rows = x.reshape(x.shape[0], -1)
    gram = rows @ rows.T
    values = torch.linalg.eigvalsh(gram + gram.T)
    return values[-1] / values[0]


def _eigenvalue_ratio(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        return _scalar(torch.nan, x)
    sizes = torch.linalg.eigvals(x).abs()
    return sizes.amax(-1) / sizes.amin(-1)


BINARY: dict[str, Primitive] = {
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "matmul": lambda x, y: x @ y,
    "less_than": lambda x, y: (x < y).to(x.dtype),
    "greater_than": lambda x, y: (x > y).to(x.dtype),
    "equal_to": lambda x, y: (x == y).to(x.dtype),
    "hamming_distance": lambda x, y: (_step(x) != _step(y)).sum().to(x.dtype),
    "kl_divergence": lambda x, y: kl_div(x, y, reduction="batchmean"),
    "cosine_similarity": lambda x, y: cosine_similarity(x, y, dim=1).sum(),
}

UNARY: dict[str, Primitive] = {
    "log": _positive_log,
    "absolute_log": lambda x: _positive_log(x).abs(),
    "absolute": torch.abs,
    "square": torch.square,
    "exponential": torch.exp,
    "normalize": _normalize,
    "relu": torch.relu,
    "sign": torch.sign,
    "heaviside": _step,
    "reciprocal": torch.reciprocal,
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "ones_like": torch.ones_like,
    "zeros_like": torch.zeros_like,
    "above_zero": lambda x: (x > 0).to(x.dtype),
    "below_zero": lambda x: (x < 0).to(x.dtype),
    "frobenius_norm": lambda x: torch.linalg.vector_norm(x),
    "determinant": torch.linalg.det,
    "logdet": _logdet,
    "gram_eigenvalue_ratio": _gram_eigenvalue_ratio,
    "eigenvalue_ratio": _eigenvalue_ratio,
    "mean": torch.mean,
    "mean_absolute": lambda x: x.abs().mean(),
    "element_count": lambda x: _scalar(x.numel(), x),
}

PRIMITIVES = {name: (2, function) for name, function in BINARY.items()} | {
    name: (1, function) for name, function in UNARY.items()
}
"""By name, how many tensors a function takes, and the function. Rows of a matrix are the second axis from the end;
batches and channels stand before them, so determinants are those of k x k windows."""
