"""Which units of a dimension are the most important ones, and which stay at a size?"""

from collections.abc import Callable, Mapping, Sequence

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.structure.dimensions import Dimensions

Score = Callable[[Sequence[Tensor]], Tensor]
"""Importance of the units of a dimension, ``[units]``, from their weights
(:meth:`nncf_ext.structure.dimensions.Dimensions.unit_weights`)."""


def units_by_score(model: nn.Module, dimensions: Dimensions, name: str, score: Score | None) -> list[int]:
    """
    :param model: The dense model.
    :param dimensions: Its dimensions.
    :param name: Name of a dimension.
    :param score: Importance of its units from their weights; None: the first are the most important.
    :return: Units of the dimension, the most important first.
    """
    dimension = dimensions[name]
    if score is None or not dimension.cuts:
        return list(dimension.all_units)
    return by_importance(score(dimensions.unit_weights(model, name)))


def by_importance(scores: Tensor) -> list[int]:
    """
    :param scores: Importance of units, ``[units]``.
    :return: The units, the most important first; among equals, the lower.
    """
    return torch.argsort(scores, descending=True, stable=True).tolist()


def units_at(
    units: Mapping[str, Sequence[int]], point: Mapping[str, int], order: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """
    From sizes to units: of every dimension the most important ones stay, in the places they have.

    :param units: The units of each dimension, in their places.
    :param point: For some dimensions, how many units stay.
    :param order: For some dimensions, all of its units, the most important first; for the others, and with None,
        importance falls with their place.
    :return: The units of each dimension that stay.
    :raises nncf.ValidationError: A dimension is unknown, a size out of range, or an order is no permutation.
    """
    kept = {name: tuple(each) for name, each in units.items()}
    for name, size in point.items():
        if name not in kept:
            msg = f"The point names {name!r}; there are {', '.join(list(units)[:4])}, ..."
            raise nncf.ValidationError(msg)
        own = kept[name]
        ordered = own if order is None else order.get(name, own)
        if sorted(ordered) != sorted(own):
            msg = f"The order of {name} must name each of its {len(own)} units once; got {list(ordered)[:8]}."
            raise nncf.ValidationError(msg)
        if not 0 <= size <= len(own):
            msg = f"Asked for {size} units of {name}; 0 to {len(own)} are possible."
            raise nncf.ValidationError(msg)
        most = set(ordered[:size])
        kept[name] = tuple(unit for unit in own if unit in most)
    return kept
