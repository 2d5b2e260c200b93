"""The most important units first: prefixes of a dimension are then its best parts, and the model computes as before."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.importance.blocks import first_order, norm_sum
from nncf_ext.parameters import UnitImportance
from nncf_ext.structure.cutting import staying
from nncf_ext.structure.dimensions import DimensionKind, Dimensions, tensor_at
from nncf_ext.structure.order import by_importance
from nncf_ext.weights.sharing import place_of


def importance_order(
    model: nn.Module,
    dimensions: Dimensions,
    importance: UnitImportance | Callable[[Sequence[Tensor]], Tensor] | Mapping[str, Tensor],
) -> dict[str, list[int]]:
    """
    :param model: The model. For first-order importance, with gradients of a loss in its parameters.
    :param dimensions: Its dimensions.
    :param importance: What scores units, from the weights that write them (sums over all of these); or a function from
        these, ``[units, rows, inputs]`` each, to scores ``[units]``; or scores by name of the width.
    :return: For each width the units, the most important first; where scores were given, of those that have some.
    :raises nncf.ValidationError: Scores are of a width that is not there, or not one for each unit.
    """
    if isinstance(importance, Mapping):
        return _given_order(dimensions, importance)
    found = {}
    for name, each in dimensions.items():
        if each.kind is not DimensionKind.WIDTH:
            continue
        weights = dimensions.unit_weights(model, name)
        if not weights:
            continue
        if importance is UnitImportance.FIRST_ORDER:
            scores = first_order(weights, dimensions.unit_weights(model, name, of=_gradient))
        elif importance in (UnitImportance.L1, UnitImportance.L2):
            scores = norm_sum(weights, 1 if importance is UnitImportance.L1 else 2)
        else:
            scores = importance(weights)
        found[name] = by_importance(scores)
    return found


def reorder(
    model: nn.Module,
    dimensions: Dimensions,
    order: Mapping[str, Sequence[int]],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """
    Puts units into an order, in place: what writes them and what reads them alike, so that the function stays, up to
    the order of sums. Parameters stay the same objects.

    :param model: The model, as it is without slices.
    :param dimensions: Its dimensions.
    :param order: For some dimensions, all of their units in the order in which they shall stand.
    :param optimizer: An optimizer that trains it: what it keeps of each weight (momenta) moves along.
    :raises nncf.UnsupportedModelError: It keeps something of another shape than the weight's; nothing has moved then.
    """
    moved = {name: tuple(units) for name, units in order.items()}
    found = [(path, tensor_at(model, path), axes) for path, axes in staying(model, dimensions, moved).items()]
    states = {} if optimizer is None else {id(tensor): _states(path, tensor, optimizer) for path, tensor, _ in found}
    done: dict[Any, Tensor] = {}  # two parameters may share their numbers, and have momenta and gradients of their own
    for _, tensor, axes in found:
        own = [*states.get(id(tensor), []), *([] if tensor.grad is None else [tensor.grad])]
        for each in (tensor.detach(), *own):
            if place_of(each) in done:
                continue
            done[place_of(each)] = each
            new = each
            for axis, indices in axes.items():
                new = new.index_select(axis, torch.from_numpy(indices).to(each.device))
            each.copy_(new)


def _given_order(dimensions: Dimensions, scores: Mapping[str, Tensor]) -> dict[str, list[int]]:
    for name, each in scores.items():
        if name not in dimensions or tuple(each.shape) != (dimensions[name].size,):
            wanted = f"one for each of {dimensions[name].size} units" if name in dimensions else "not there"
            msg = (
                f"The scores of {name} have shape {tuple(each.shape)}, and this width is {wanted}. Take the scores of "
                "this model before anything is cut from it."
            )
            raise nncf.ValidationError(msg)
    return {name: by_importance(each) for name, each in scores.items()}


def _states(path: str, tensor: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found = {name: each for name, each in optimizer.state.get(tensor, {}).items() if isinstance(each, Tensor)}
    for name, each in found.items():
        if each.shape != tensor.shape and each.numel() > 1:
            msg = (
                f"{type(optimizer).__name__} keeps {name} of shape {tuple(each.shape)} for {path}, of shape "
                f"{tuple(tensor.shape)}: how it would move along is not known. Reorganize before its first step, or "
                "use an optimizer whose state has the shape of the weight, such as SGD or AdamW."
            )
            raise nncf.UnsupportedModelError(msg)
    return [each for each in found.values() if each.shape == tensor.shape]


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
