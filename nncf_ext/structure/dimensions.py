"""
The one description of what can change its size in a model: named dimensions, and the axes of tensors that go with each.

A dimension has units: what can be removed exactly, and one by one. Data only, by paths from the model: what is true of
a model is true of its copies. Records (:mod:`nncf_ext.structure.records`) make dimensions of known architectures;
masks, surgery and counts need nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import Skipped

Kept = Mapping[str, Sequence[int]]
"""For each dimension, by name, the units that stay, in the order in which they shall stand."""


class DimensionKind(StrEnum):
    """
    What of a network changes with a dimension.

    :param WIDTH: Channels or heads: axes of tensors are cut.
    :param DEPTH: Whole branches or parts of them: modules are replaced. The units that stay are the first ones.
    :param KERNEL: The window of a convolution.
    :param RANK: Ranks of a low-rank adapter.
    """

    WIDTH = "width"
    DEPTH = "depth"
    KERNEL = "kernel"
    RANK = "rank"


@dataclass(frozen=True)
class Cut:
    """
    One axis of one tensor that is cut with a dimension.

    :param tensor: Path of a parameter or buffer, from the model.
    :param axis: The axis. Of the weight of a linear layer or convolution, 0 are its outputs and 1 its inputs.
    :param segments: ``(offset, size)``: unit u owns the indices ``offset + u * size .. offset + (u + 1) * size - 1``.
    """

    tensor: str
    axis: int
    segments: tuple[tuple[int, int], ...] = ((0, 1),)

    @property
    def module(self) -> str:
        """:return: Path of the module that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def indices_per_unit(self) -> int:
        """:return: How many indices along the axis belong to one unit."""
        return sum(size for _, size in self.segments)

    def indices(self, kept: Sequence[int], device: torch.device | None = None) -> Tensor:
        """
        :param kept: Units to keep, in the order in which they shall stand.
        :param device: Where to make the result.
        :return: Indices along the axis, ``[kept indices]`` int64.
        """
        units = torch.tensor(kept, dtype=torch.int64, device=device).unsqueeze(1)
        return torch.cat(
            [(offset + units * size + torch.arange(size, device=device)).flatten() for offset, size in self.segments]
        )


StandIn = type[Skipped] | type[GatedConvMixer]


@dataclass(frozen=True)
class Dimension:
    """
    Something of a model that can be smaller.

    :param name: Its name, such as ``"layers.3.attention"``.
    :param kind: What changes with it.
    :param size: Number of units that are there; 0 if it was removed before.
    :param granularity: Channels that one unit stands for.
    :param cuts: Axes that are cut together, those that write into the units before those that read them. Empty where
        units have no channels of their own.
    :param replacements: By number of units that stay: what replaces which module, by path from the model. With such a
        number nothing is cut.
    :param block: Index of the repeated block it lies in, in the order in which blocks run.
    :param parts: What of the block it is, in the words of configurations: ``("attention",)``, ``("mlp",)``,
        ``("mamba", "ssm")``. Without any unit the first part is gone, with one unit the second.
    :param unit: What a unit is, in words; a sentence without its full stop.
    :param config_keys: The configuration's names for its size, and how many of them one unit is.
    :param token_numbers: Numbers that one unit keeps in the cache of every token (keys and values).
    :param state_numbers: Numbers kept of a whole sequence with 0, 1, .. units; empty: none.
    :param numbers: Numbers that modules keep about it, such as head counts: paths of attributes, and how many of them
        one unit is.
    """

    name: str
    kind: DimensionKind
    size: int
    granularity: int = 1
    cuts: tuple[Cut, ...] = ()
    replacements: Mapping[int, Mapping[str, StandIn]] = field(default_factory=dict)
    block: int = 0
    parts: tuple[str, ...] = ("",)
    unit: str = "A unit is one channel"
    config_keys: Mapping[str, int] = field(default_factory=dict)
    token_numbers: int = 0
    state_numbers: tuple[int, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """:return: What of the block it is."""
        return self.parts[0]

    @property
    def gone(self) -> str | None:
        """:return: The part that was removed before, if any."""
        return self.parts[self.size] if self.size < len(self.parts) else None

    @property
    def all_units(self) -> tuple[int, ...]:
        """:return: All units, in order."""
        return tuple(range(self.size))

    @property
    def readers(self) -> tuple[Cut, ...]:
        """:return: Cuts of the layers that read the units: where units end, a mask on their inputs removes them."""
        return tuple(cut for cut in self.cuts if cut.axis == 1)

    def replaced(self, kept: Sequence[int]) -> Mapping[str, StandIn]:
        """
        :param kept: Units that stay.
        :return: What replaces which module; nothing where tensors are cut, or all stays.
        """
        return self.replacements.get(len(kept), {}) if len(kept) < self.size else {}

    def touched(self, kept: Sequence[int]) -> list[str]:
        """
        :param kept: Units that stay.
        :return: Paths of the modules that change; none where all units stay as they are.
        """
        if tuple(kept) == self.all_units:
            return []
        return list(self.replaced(kept) or dict.fromkeys(cut.module for cut in self.cuts))


class Architecture:
    """
    What an architecture asks for beyond its dimensions. This one asks for nothing; that of a known architecture is its
    record (:class:`nncf_ext.structure.records.record.Record`).
    """

    def uses_cache(self, model: nn.Module) -> bool:
        """
        :param model: The model.
        :return: Whether it generates tokens with a cache.
        """
        return False

    def check(self, model: nn.Module, dimensions: "Dimensions", kept: Kept) -> None:
        """
        :param model: The model.
        :param dimensions: Its dimensions.
        :param kept: Units that would stay.
        :raises nncf.ValidationError: The model could not run with those alone.
        """

    def cache_slots(self, model: nn.Module, dimensions: "Dimensions", kept: Kept) -> dict[str, int]:
        """
        :param model: The model.
        :param dimensions: Its dimensions.
        :param kept: Units that stay.
        :return: By path of the modules that know their slot in the cache (``layer_idx``): the slot they use then.
        """
        return {}

    def uniform_sizes(self, model: nn.Module, dimension: Dimension) -> list[int]:
        """
        :param model: The model.
        :param dimension: One of its dimensions.
        :return: Numbers of units, the same in all blocks, that the architecture's configuration can express.
        """
        return list(range(1, dimension.size + 1)) if dimension.cuts else [dimension.size]

    def finish(self, model: nn.Module) -> None:
        """
        What a cut model still needs: blocks without anything left are dropped, cache slots, head counts and the
        configuration follow. In place.

        :param model: A model whose tensors were cut and modules replaced.
        """


class Dimensions(Mapping[str, Dimension]):
    """
    The dimensions of one model by name, in the order of its blocks.

    Two dimensions may cut one tensor on different axes, or one axis at different places; what one replaces, another may
    cut inside.

    :param dimensions: The dimensions.
    :param blocks: Path of the list of repeated blocks, from the model.
    :param record: What the architecture asks for beyond; None: nothing.
    :param shared: Names of dimensions that cut the very same tensors, group by group.
    :param scopes: By path of a tensor, the module while which runs it is read, where that is not the one that holds it.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        blocks: str = "",
        record: Architecture | None = None,
        shared: Sequence[tuple[str, ...]] = (),
        scopes: Mapping[str, str] | None = None,
    ) -> None:
        self._by_name = {each.name: each for each in dimensions}
        self.blocks = blocks
        self.record = Architecture() if record is None else record
        self._users = {name: names for names in shared for name in names}
        self.scopes = {} if scopes is None else dict(scopes)

    def __getitem__(self, name: str) -> Dimension:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    @cached_property
    def by_block(self) -> list[list[Dimension]]:
        """:return: The dimensions of each block."""
        blocks: list[list[Dimension]] = [[] for _ in range(1 + max((each.block for each in self.values()), default=-1))]
        for each in self.values():
            blocks[each.block].append(each)
        return blocks

    def of_part(self, *parts: str) -> list[Dimension]:
        """
        :param parts: Parts of blocks.
        :return: The dimensions that are one of them, part by part and in the order of blocks.
        """
        return [each for part in parts for each in self.values() if each.part == part]

    def users(self, name: str) -> tuple[str, ...]:
        """
        :param name: Name of a dimension.
        :return: All dimensions that cut the same tensors, itself included, in order.
        """
        return self._users.get(name, (name,))

    def all_units(self) -> dict[str, tuple[int, ...]]:
        """:return: Every unit of every dimension: what a dense model keeps."""
        return {name: each.all_units for name, each in self.items()}

    def unit_weights(self, model: nn.Module, name: str, of: Callable[[Tensor], Tensor] = Tensor.detach) -> list[Tensor]:
        """
        The weights that write into a dimension's units, cut up by unit: what scores of units are computed from.

        :param model: The model, or a copy of it.
        :param name: Name of a dimension.
        :param of: What of each weight to take, of its shape: its numbers, its gradient.
        :return: For each segment ``[units, rows of the segment, inputs of a row]``. Layers that read the units are not
            among them, and no biases.
        """
        dimension, found = self[name], []
        for cut in dimension.cuts:
            weight = tensor_at(model, cut.tensor)
            if cut.axis or weight.ndim < 2:
                continue
            for offset, size in cut.segments:
                rows = of(weight)[offset : offset + dimension.size * size]
                found.append(rows.reshape(dimension.size, size, -1))
        return found


def axis_length(model: nn.Module, cut: Cut) -> int:
    """
    :param model: A model.
    :param cut: One axis of one of its tensors.
    :return: How long the axis is. Of a linear layer as the layer says: on a grid its weight is stored in another shape.
    """
    module = model.get_submodule(cut.module)
    if isinstance(module, nn.Linear):
        return module.in_features if cut.axis else module.out_features
    return tensor_at(model, cut.tensor).shape[cut.axis]


def tensor_at(model: nn.Module, path: str) -> Any:
    """
    :param model: A model.
    :param path: Path of a parameter or buffer.
    :return: The tensor.
    """
    module, _, name = path.rpartition(".")
    return getattr(model.get_submodule(module), name)
