"""The most important units first: prefixes of a dimension are then its best parts, and the model computes as before."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nncf_ext.importance.blocks import first_order, norm_sum
from nncf_ext.parameters import UnitImportance
from nncf_ext.structure.cutting import staying
from nncf_ext.structure.dimensions import DimensionKind, Dimensions, tensor_at
from nncf_ext.structure.order import by_importance


def importance_order(
    model: nn.Module, dimensions: Dimensions, importance: UnitImportance | Callable[[Sequence[Tensor]], Tensor]
) -> dict[str, list[int]]:
    """
    :param model: The model. For first-order importance, with gradients of a loss in its parameters.
    :param dimensions: Its dimensions.
    :param importance: What scores units, from the weights that write them (sums over all of these); or a function from
        these, ``[units, rows, inputs]`` each, to scores ``[units]``.
    :return: For each width the units, the most important first.
    """
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
    """
    moved = {name: tuple(units) for name, units in order.items()}
    done: set[int] = set()
    for path, axes in staying(model, dimensions, moved).items():
        tensor = tensor_at(model, path)
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        kept = [] if optimizer is None else optimizer.state.get(tensor, {}).values()
        alike = [each for each in kept if isinstance(each, Tensor) and each.shape == tensor.shape]
        gradients = [] if tensor.grad is None else [tensor.grad]
        for each in (tensor.detach(), *alike, *gradients):
            new = each
            for axis, indices in axes.items():
                new = new.index_select(axis, torch.from_numpy(indices).to(each.device))
            each.copy_(new)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
