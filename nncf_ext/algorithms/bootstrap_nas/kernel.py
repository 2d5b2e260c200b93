"""Elastic kernels: a smaller kernel is the centre of the larger one, times a matrix that is learned."""

from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "elastic_kernel"


class ElasticKernel(nn.Module):
    """
    The kernels of one convolution: one pair of hooks, and a matrix from each size to the next smaller one.

    From size a to b = a - 2 the centre b x b of every filter is multiplied by a matrix ``[b * b, b * b]`` that all
    filters share. It begins as the identity. The padding shrinks with the kernel, so outputs keep their size. The
    matrices are parameters of the model as long as the kernel is elastic.

    :param convolution: ``Conv2d`` with a square odd kernel; gets this module as its child ``elastic_kernel``.
    :param sizes: The sizes to choose from, the largest first.
    Source: Once-for-all, arXiv 1908.09791, section 3 (elastic kernel size).
    """

    def __init__(self, convolution: nn.Conv2d, sizes: list[int]) -> None:
        super().__init__()
        self.active = self.maximum = sizes[0]
        weight = convolution.weight
        for size in sizes[1:]:
            self.register_parameter(f"to_{size}", nn.Parameter(torch.eye(size**2).to(weight)))
        convolution.add_module(_ATTRIBUTE, self)
        before = convolution.register_forward_pre_hook(self.before)
        after = convolution.register_forward_hook(self.after, always_call=True)
        self._handles = [before, after]

    def weight_of(self, weight: Tensor, size: int) -> Tensor:
        """
        :param weight: ``[outputs, inputs of a group, kernel, kernel]``, all or some of the filters.
        :param size: Size of a kernel to choose from.
        :return: The weight of that size.
        """
        for smaller in range(weight.shape[-1] - 2, size - 1, -2):
            centre = weight[..., 1:-1, 1:-1].flatten(2)
            weight = (centre @ getattr(self, f"to_{smaller}").T).unflatten(2, (smaller, smaller))
        return weight

    def before(self, convolution: nn.Conv2d, _args: Any) -> None:
        if self.active < self.maximum:
            # What a slice of the channels has put there is what gets smaller.
            convolution.__dict__["weight"] = self.weight_of(convolution.weight, self.active)
            self._padding = convolution.padding
            convolution.padding = self.padding_of(convolution, self.active)

    def after(self, convolution: nn.Conv2d, _args: Any, _output: Any) -> None:
        if "_padding" in self.__dict__:
            convolution.padding = self.__dict__.pop("_padding")
            convolution.__dict__.pop("weight", None)

    def padding_of(self, convolution: nn.Conv2d, size: int) -> tuple[int, int]:
        """
        :param convolution: The convolution.
        :param size: Size of a kernel.
        :return: The padding with which outputs keep their size.
        """
        less = (self.maximum - size) // 2
        return tuple(int(each) - less for each in convolution.padding)  # type: ignore[return-value]

    def remove(self, convolution: nn.Conv2d) -> None:
        """
        :param convolution: The convolution, whose kernel has one size again.
        """
        for handle in self._handles:
            handle.remove()
        del convolution._modules[_ATTRIBUTE]


def elastic_kernel(module: nn.Module) -> ElasticKernel | None:
    """
    :param module: A module, or a copy of one.
    :return: Its elastic kernel, if it has one.
    """
    return module._modules.get(_ATTRIBUTE)  # type: ignore[return-value]


def fix_kernel(convolution: nn.Conv2d, size: int) -> None:
    """
    Makes one size of an elastic kernel the only one.

    :param convolution: The convolution, changed in place.
    :param size: The size.
    """
    elastic = elastic_kernel(convolution)
    assert elastic is not None
    if size < elastic.maximum:
        with torch.no_grad():
            weight = elastic.weight_of(convolution.weight, size).contiguous()
        convolution.weight = nn.Parameter(weight, convolution.weight.requires_grad)
        convolution.padding = elastic.padding_of(convolution, size)
        convolution.kernel_size = (size, size)
    elastic.remove(convolution)


def why_not(module: nn.Module) -> str | None:
    """
    :param module: A module.
    :return: Why its kernel cannot be elastic; None where it can.
    """
    if type(module) is not nn.Conv2d:
        return f"a {type(module).__name__} is no torch.nn.Conv2d"
    height, width = module.kernel_size
    if height != width or height % 2 == 0:
        return f"its kernel is {height} x {width}; square odd kernels get smaller around their centre"
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or module.padding[0] != module.padding[1]:
        return f"its padding is {module.padding!r} ({module.padding_mode}); the same number of zeros on all sides works"
    if module.dilation != (1, 1):
        return "it is dilated"
    return None
