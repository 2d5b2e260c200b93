"""Which units of a dimension are the most important ones?"""

from collections.abc import Callable, Sequence

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
