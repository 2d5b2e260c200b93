"""Half-precision models on CPUs that have no instructions for half precision."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nncf_ext.upstream import has_fast_products

_PRODUCTS = {
    functional.linear,
    functional.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
}


class FloatProducts(TorchFunctionMode):
    """
    Matrix products of half-precision tensors on the CPU are computed in float32 and rounded once.

    PyTorch has no fast kernels for them where the CPU has no such instructions: a product in bfloat16 then takes six
    times as long as one in float32, and its gradient a hundred times. Results differ by the order of sums only, which
    are in float32 either way.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """:return: What the function returns, in the type it would have without."""
        kwargs = kwargs or {}
        half = next((value.dtype for value in (*args, *kwargs.values()) if _is_half(value)), None)
        if function not in _PRODUCTS or half is None or kwargs.get("out") is not None:
            return function(*args, **kwargs)
        widened = {name: _float(value) for name, value in kwargs.items()}
        return function(*map(_float, args), **widened).to(half)


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """
    Runs a model in :class:`FloatProducts` where that is faster: it is in half precision, which the CPU is not made for.

    :param model: Any torch model.
    """
    dtypes = {value.dtype for value in model.parameters() if value.is_floating_point() and value.device.type == "cpu"}
    if all(has_fast_products(dtype) for dtype in dtypes):
        yield
    else:
        with FloatProducts():
            yield


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) and value.device.type == "cpu"


def _float(value: Any) -> Any:
    return value.float() if _is_half(value) else value
