"""A forward of the whole model in which what is removed is zero, and nothing counts it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nncf_ext.structure.tracing.labels import Axis
from nncf_ext.structure.tracing.rules import bind, reduced_axes, tensors_of
from nncf_ext.structure.tracing.run import Run


class MaskedRun(Run):
    """
    Follows a forward as :class:`Run` does, and zeroes every result where its labels are removed.

    :param model: The model.
    :param choices: The choices of the run that gave the labels.
    :param removed: Whether each label is removed, bool ``[labels]``.
    """

    def __init__(self, model: nn.Module, choices: Mapping[int, int], removed: NDArray[np.bool_]) -> None:
        super().__init__(model, choices)
        self._removed = removed

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        bound = bind(func, args, kwargs)
        source = next(iter(tensors_of(list(bound.values()))), None)
        gone = {} if source is None else self._gone(source)
        axes = [axis for axis in reduced_axes(func, bound) if axis in gone]
        if source is None or not axes:
            return func(*args, **kwargs)
        # What counts along a whole axis counts what stays.
        stays = {axis: torch.from_numpy(np.flatnonzero(~gone[axis])).to(source.device) for axis in axes}
        name = func.overloadpacket.__name__

        def part(tensor: Tensor | None, shift: int = 0) -> Tensor | None:
            for axis, indices in stays.items():
                tensor = None if tensor is None else tensor.index_select(axis - shift, indices)
            return tensor

        if name in ("native_layer_norm", "_fused_rms_norm"):
            shift = source.ndim - len(bound["normalized_shape"])
            small = part(source)
            assert small is not None
            affine = [part(bound[key], shift) for key in ("weight", "bias") if key in bound]
            results = func(small, list(small.shape[shift:]), *affine, bound["eps"])
        elif name == "native_group_norm":
            small = part(source)
            assert small is not None
            affine = [part(bound[key], 1) for key in ("weight", "bias")]
            results = func(small, *affine, bound["N"], small.shape[1], bound["HxW"], 1, bound["eps"])
        elif "batch_norm" in name:
            results = func(part(source), *args[1:], **kwargs)
        else:
            return func(part(source), *args[1:], **kwargs)
        whole = torch.zeros_like(source)
        whole[tuple(_grid(source, stays))] = results[0]
        return (whole, *results[1:])

    def finish(self, result: Tensor, axes: list[Axis]) -> None:
        for place, axis in enumerate(axes):
            if axis is not None and self._removed[axis].any():
                gone = torch.from_numpy(np.flatnonzero(self._removed[axis])).to(result.device)
                result.index_fill_(place, gone, 0)

    def without_removed(self, tensor: Tensor) -> Tensor:
        """
        :param tensor: A result.
        :return: What of it is not removed, a copy.
        """
        part = tensor.detach().clone()
        for place, mask in self._gone(tensor).items():
            part = part.index_select(place, torch.from_numpy(np.flatnonzero(~mask)).to(part.device))
        return part

    def _gone(self, tensor: Tensor) -> dict[int, NDArray[np.bool_]]:
        masks = {place: self._removed[axis] for place, axis in enumerate(self.axes(tensor)) if axis is not None}
        return {place: mask for place, mask in masks.items() if mask.any()}


def _grid(tensor: Tensor, stays: Mapping[int, Tensor]) -> list[Tensor]:
    full = [stays.get(axis, torch.arange(size, device=tensor.device)) for axis, size in enumerate(tensor.shape)]
    return list(torch.meshgrid(*full, indexing="ij"))
