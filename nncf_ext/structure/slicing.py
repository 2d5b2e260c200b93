"""
A model that computes with parts of its tensors, as long as it is told to: nothing is copied, and gradients reach the
whole tensors.

While a module runs, its attribute ``weight`` is a slice of its parameter ``weight``; the parameter itself stays where
it was, for optimizers, state dicts and copies. Modules that are left out give what their stand-ins give.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nncf_ext.structure.cutting import Staying, kept_numbers, sizes_of_layer, staying
from nncf_ext.structure.dimensions import Dimensions, Kept, tensor_at

_BYPASSED = "nncf_ext_forward"
Run = tuple[int, int]
"""Indices ``[first, length]`` that stand one after the other."""


class _Part:
    """What one module sees of some tensors and numbers while it runs: a pre-hook and a hook of it."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: list[tuple[nn.Module, str, dict[int, list[Run] | Tensor]]] = []
        self.numbers: list[tuple[nn.Module, str, Any]] = []
        self._undo: list[tuple[nn.Module, str, Any]] = []
        self._copies: list[tuple[Tensor, dict[int, Any], Tensor]] = []
        # What other hooks of the module do to its weight, they do to the slice.
        before = module.register_forward_pre_hook(self.before, prepend=True)
        after = module.register_forward_hook(self.after, always_call=True)
        self._handles = before, after

    def before(self, _module: nn.Module, _args: Any) -> None:
        if self._undo:  # a run that was broken off
            self.after(_module, _args, None)
        for owner, name, runs in self.tensors:
            whole: Any = owner._parameters.get(name)
            is_buffer = whole is None
            if is_buffer:
                whole = owner._buffers[name]
            piece = _slice(whole, runs)
            if piece.ndim > 2 and not is_buffer:
                # A convolution lays its weight out anew anyway; so it takes the same way as with a weight of that size.
                piece = piece.contiguous()
            if is_buffer and piece._base is None:
                self._copies.append((whole, runs, piece))
            self._undo.append((owner, name, None))
            owner.__dict__[name] = piece
        for owner, name, value in self.numbers:
            self._undo.append((owner, name, owner.__dict__[name]))
            owner.__dict__[name] = value

    def after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        for owner, name, value in reversed(self._undo):
            if value is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
        for whole, runs, piece in self._copies:
            _write_back(whole, runs, piece)
        self._undo, self._copies = [], []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Slices:
    """
    Lets a model compute with the units that are kept. Everything is kept at first.

    :param model: The model; its modules get hooks, which follow it through copies and devices.
    :param dimensions: Its dimensions.
    """

    def __init__(self, model: nn.Module, dimensions: Dimensions) -> None:
        self._model = model
        self._dimensions = dimensions
        self._parts: dict[str, _Part] = {}
        self._bypassed: list[nn.Module] = []

    def keep(self, kept: Kept) -> None:
        """
        :param kept: Units that stay, for some dimensions; the others keep all.
        """
        for part in self._parts.values():
            part.tensors, part.numbers = [], []
        for module in self._bypassed:
            _run_again(module)
        numbers: dict[str, Any] = {}
        for path, axes in staying(self._model, self._dimensions, kept).items():
            owner_path, _, name = path.rpartition(".")
            owner, tensor = self._model.get_submodule(owner_path), tensor_at(self._model, path)
            part = self._part(self._dimensions.scopes.get(path, owner_path))
            part.tensors.append((owner, name, _runs(axes, tensor.device)))
            if name == "weight":
                shape = [len(axes[axis]) if axis in axes else size for axis, size in enumerate(tensor.shape)]
                for attribute, value in sizes_of_layer(owner, shape).items():
                    part.numbers.append((owner, attribute, value))
        numbers |= kept_numbers(self._dimensions, kept)
        for path, value in numbers.items():
            owner_path, _, name = path.rpartition(".")
            self._part(owner_path).numbers.append((self._model.get_submodule(owner_path), name, value))
        self._bypassed = []
        for name, units in kept.items():
            for path, stand_in in self._dimensions[name].replaced(units).items():
                module = self._model.get_submodule(path)
                if _BYPASSED not in module.__dict__:
                    _bypass(module, stand_in.standing_for(module))
                    self._bypassed.append(module)

    def remove(self) -> None:
        """Takes all hooks off: the model is as it was."""
        self.keep({})
        for part in self._parts.values():
            part.remove()
        self._parts = {}

    def _part(self, path: str) -> _Part:
        if path not in self._parts:
            self._parts[path] = _Part(self._model.get_submodule(path))
        return self._parts[path]


@contextmanager
def sliced(model: nn.Module, dimensions: Dimensions, kept: Kept) -> Iterator[None]:
    """
    Within the context the model computes with the units that are kept, and tensors are smaller while it does.

    :param model: The model.
    :param dimensions: Its dimensions.
    :param kept: Units that stay, for some dimensions.
    """
    slices = Slices(model, dimensions)
    slices.keep(kept)
    try:
        yield
    finally:
        slices.remove()


def remove_slices(model: nn.Module) -> None:
    """
    :param model: A copy of a model that computes with parts of its tensors; it computes with all of them afterwards.
    """
    for module in model.modules():
        _run_again(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for part in [getattr(hook, "__self__", None) for hook in hooks.values()]:
                if isinstance(part, _Part):
                    part.remove()


def _bypass(module: nn.Module, stand_in: nn.Module) -> None:
    module.__dict__[_BYPASSED] = module.__dict__.get("forward")
    module.__dict__["forward"] = stand_in.forward


def _run_again(module: nn.Module) -> None:
    if _BYPASSED not in module.__dict__:
        return
    original = module.__dict__.pop(_BYPASSED)
    if original is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = original


def _runs(axes: Staying, device: torch.device) -> dict[int, list[Run] | Tensor]:
    """Few runs are sliced, which is a view where it is one; many are gathered."""
    found: dict[int, list[Run] | Tensor] = {}
    for axis, indices in axes.items():
        starts = np.flatnonzero(np.diff(indices, prepend=indices[:1] - 2) != 1)
        ends = np.append(starts[1:], len(indices))
        if len(starts) > 16:
            found[axis] = torch.from_numpy(indices).to(device)
        else:
            found[axis] = [(int(indices[start]), int(end - start)) for start, end in zip(starts, ends, strict=True)]
    return found


def _slice(whole: Tensor, axes: Mapping[int, list[Run] | Tensor]) -> Tensor:
    for axis, runs in axes.items():
        if isinstance(runs, Tensor):
            whole = whole.index_select(axis, runs.to(whole.device))
        else:
            pieces = [whole.narrow(axis, first, length) for first, length in runs]
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
    return whole


def _write_back(whole: Tensor, axes: Mapping[int, list[Run] | Tensor], piece: Tensor) -> None:
    """Of a buffer that was gathered, what changed."""
    ((axis, runs),) = axes.items()
    indices = (
        runs if isinstance(runs, Tensor) else torch.cat([torch.arange(first, first + length) for first, length in runs])
    )
    with torch.no_grad():
        whole.index_copy_(axis, indices.to(whole.device), piece.detach())


def prefix(dimensions: Dimensions, sizes: Mapping[str, int]) -> dict[str, Sequence[int]]:
    """
    :param dimensions: Dimensions of a model.
    :param sizes: For some of them, how many units stay.
    :return: The first units of each.
    """
    return {name: range(size) for name, size in sizes.items() if name in dimensions}
