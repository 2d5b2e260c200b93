"""Runs of a model that leave no trace: on a copy of the example, in evaluation mode, with its buffers put back."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.structure.modes import evaluation_mode
from nncf_ext.structure.tracing.rules import outputs_of, tensors_of
from nncf_ext.weights.sharing import place_of


def call_of(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    :param example_input: A tensor, a tuple or list of arguments, or a mapping of named ones.
    :return: The arguments of a call, and its named ones.
    """
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, tuple | list):
        return tuple(example_input), {}
    return (example_input,), {}


class Example:
    """
    What a model is called with.

    :param example_input: A tensor, a tuple of arguments, or a dictionary of named ones.
    """

    def __init__(self, example_input: Any) -> None:
        self._call = call_of(example_input)

    def run(self, model: nn.Module, forward: Callable[..., Any] | None = None) -> Any:
        """
        :param model: The model; its buffers are put back.
        :param forward: What to call in its place.
        :return: What it gives for a copy of the example, without gradients.
        """
        # Tensors may be inside a graph, where they cannot be copied as they are.
        memo: dict[int, Any] = {id(each): each.detach().clone() for each in tensors_of(self._call)}
        args, kwargs = copy.deepcopy(self._call, memo)
        with torch.no_grad(), _kept_buffers(model):
            return (model if forward is None else forward)(*args, **kwargs)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    before = [
        (module, name, tensor, tensor.clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    try:
        yield
    finally:
        for module, name, tensor, numbers in before:
            module._buffers[name] = tensor
            if not torch.equal(tensor, numbers):
                tensor.copy_(numbers)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; numbers that the model draws all the same are not missed by others."""
    devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
    with evaluation_mode(model), torch.random.fork_rng(sorted(each.index for each in devices)):
        yield


def perturbed(model: nn.Module, example: Example) -> nn.Module:
    """
    A copy with other numbers, for trials: a scale that is still zero would hide what goes on behind it.

    :param model: The model.
    :param example: What it is called with.
    :return: A copy with noise in all parameters and buffers; the model itself where no copy can be made, or where one
        gives no finite numbers.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    by_place: dict[Any, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and type(tensor) in (Tensor, nn.Parameter):
            place = place_of(tensor)
            if place not in by_place:
                by_place[place] = _noisy(tensor, generator)
            memo[id(tensor)] = by_place[place]
    try:
        twin = copy.deepcopy(model, memo)
        if all(bool(each.isfinite().all()) for each in outputs_of(example.run(twin))):
            return twin
    except Exception:  # noqa: BLE001 - whatever a copy cannot do, the model can
        return model
    return model


def _noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    numbers = tensor.detach().float()
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    size = float(numbers.square().mean().sqrt()) if tensor.numel() else 0.0
    is_vector = sum(length > 1 for length in tensor.shape) < 2
    if size < (1e-2 if is_vector else 1e-4):
        numbers = numbers + 0.2 * noise  # scales and adapters that begin at nearly zero
    elif isinstance(tensor, nn.Parameter):
        numbers = numbers + 0.2 * size * noise
    else:
        numbers = numbers * (1 + 0.2 * noise.clamp(-2, 2))  # variances stay positive, zeros in masks zero
    numbers = numbers.to(tensor.dtype)
    return nn.Parameter(numbers, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else numbers
