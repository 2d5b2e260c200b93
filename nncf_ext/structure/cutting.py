"""Which indices of each tensor stay, and which numbers do modules keep about that? For surgery and for slices alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from nncf_ext.structure.dimensions import Cut, Dimensions, Kept, axis_length

Staying = dict[int, NDArray[np.int64]]
"""For each axis that is cut, the indices that stay, in the order in which they shall stand."""


def staying(model: nn.Module, dimensions: Dimensions, kept: Kept) -> dict[str, Staying]:
    """
    Several dimensions may cut one axis of a tensor at different places. What none of them owns stays.

    :param model: The model.
    :param dimensions: Its dimensions.
    :param kept: Units that stay; a dimension that is not named, or whose modules are replaced, keeps its tensors.
    :return: What stays of each tensor that is cut, by its path.
    """
    owners: dict[tuple[str, int], list[tuple[Cut, int, Sequence[int]]]] = {}
    for name, units in kept.items():
        dimension = dimensions[name]
        if tuple(units) != dimension.all_units and not dimension.replaced(units):
            for cut in dimension.cuts:
                owners.setdefault((cut.tensor, cut.axis), []).append((cut, dimension.size, units))
    found: dict[str, Staying] = {}
    for (tensor, axis), several in owners.items():
        found.setdefault(tensor, {})[axis] = _indices(axis_length(model, several[0][0]), several)
    return found


def _indices(length: int, several: Sequence[tuple[Cut, int, Sequence[int]]]) -> NDArray[np.int64]:
    pieces = sorted(
        (offset, offset + units * size, size, kept) for cut, units, kept in several for offset, size in cut.segments
    )
    found, at = [], 0
    for start, end, size, kept in pieces:
        found.append(np.arange(at, start))
        found.append((start + np.asarray(kept, np.int64)[:, None] * size + np.arange(size)).ravel())
        at = end
    return np.concatenate([*found, np.arange(at, length)])


def kept_numbers(dimensions: Dimensions, kept: Kept) -> dict[str, int]:
    """
    :param dimensions: The dimensions of a model.
    :param kept: Units that stay.
    :return: The numbers that modules then keep about their dimensions, by path.
    """
    return {
        path: len(units) * each
        for name, units in kept.items()
        if len(units) < dimensions[name].size and not dimensions[name].replaced(units)
        for path, each in dimensions[name].numbers.items()
    }


def sizes_of_layer(module: Any, shape: Sequence[int]) -> dict[str, Any]:
    """
    :param module: A layer.
    :param shape: The shape that its weight gets.
    :return: The numbers that it then keeps about its shape, by attribute; none for a module that is no layer of torch.
    """
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # Convolutions in groups lose whole groups.
        groups = module.groups if module.groups == 1 else shape[0] * module.groups // module.out_channels
        return {"groups": groups, "out_channels": shape[0], "in_channels": shape[1] * groups}
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": tuple(shape)}
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups if module.num_groups == 1 else module.num_groups * shape[0] // module.num_channels
        return {"num_groups": groups, "num_channels": shape[0]}
    if isinstance(module, _NormBase):
        return {"num_features": shape[0]}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers
        return {"nf": shape[1], "nx": shape[0]}
    return {}
