"""
Which axes of which weights move together when a unit of a block is removed?

Units are what one can remove exactly. ``"attention"``: a key/value head with all query heads that read it, so that
every layer keeps the model's ratio of query to key/value heads; in Zamba2, whose attention has no residual of its own,
the whole of it. ``"mlp"``: one intermediate channel. ``"mamba"`` has two: unit 0 is the mixer as a gated convolution,
unit 1 its state space, which can go alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import Skipped
from nncf_ext.structure.blocks import find_block_lists
from nncf_ext.structure.families import FAMILIES, Branch, Family, blocks_path, family_of


@dataclass(frozen=True)
class Cut:
    """
    One axis of one linear layer.

    :param module: Path of the layer, seen from the block.
    :param axis: 0: rows of the weight, and entries of the bias; 1: columns.
    :param parts: ``(offset, size)``: unit u owns the indices ``offset + u * size .. offset + (u + 1) * size - 1``.
    """

    module: str
    axis: int
    parts: tuple[tuple[int, int], ...]

    def indices(self, kept: Sequence[int], device: torch.device | None = None) -> Tensor:
        """
        :param kept: Units to keep, in the order in which they shall stand.
        :param device: Where to make the result.
        :return: Indices along the axis, ``[kept indices]`` int64.
        """
        units = torch.tensor(kept, dtype=torch.int64, device=device).unsqueeze(1)
        return torch.cat(
            [(offset + units * size + torch.arange(size, device=device)).flatten() for offset, size in self.parts]
        )


@dataclass(frozen=True)
class Coupling:
    """
    :param branch: The branch's record.
    :param units: Number of units that are there; 0 if the branch was removed before.
    :param channels: Input channels of the output projection that belong to one unit.
    :param cuts: What moves together; the output projection last. Empty where units have no channels of their own.
    """

    branch: Branch
    units: int
    channels: int
    cuts: tuple[Cut, ...]

    def stand_ins(self, kept: Sequence[int]) -> Mapping[str, type[Skipped] | type[GatedConvMixer]]:
        """
        :param kept: Units to keep.
        :return: What replaces which module of the block; nothing where weights are cut or all stays.
        """
        if not len(kept):
            return self.branch.skip if self.units else {}
        return self.branch.without_ssm if len(kept) < self.units else {}


@dataclass(frozen=True)
class Layout:
    """
    The removable structure of a model.

    :param family: The architecture's record.
    :param path: Path of the block list in the model.
    :param blocks: The blocks, in order.
    :param couplings: For each block its branches by name.
    :param head_dim: Size of one head of attention, channels; 0 without attention.
    :param group: Query heads that read one key/value head; 0 without attention.
    :param decodes: The model generates with a cache.
    """

    family: Family
    path: str
    blocks: tuple[nn.Module, ...]
    couplings: tuple[Mapping[str, Coupling], ...]
    head_dim: int
    group: int
    decodes: bool

    def users(self, layer: int, branch: str) -> tuple[int, ...]:
        """
        :param layer: Index of a layer.
        :param branch: Name of one of its branches.
        :return: Layers that use the same weights there, itself included, in order.
        """
        coupling = self.couplings[layer][branch]
        if not coupling.cuts:
            return (layer,)
        output = coupling.branch.output
        own = self.blocks[layer].get_parameter(f"{output}.weight")
        return tuple(
            index
            for index, (block, couplings) in enumerate(zip(self.blocks, self.couplings, strict=True))
            if branch in couplings
            and couplings[branch].cuts
            and block.get_parameter(f"{couplings[branch].branch.output}.weight") is own
        )


def layout_of(model: nn.Module) -> Layout:
    """
    Finds what can be removed from a model and checks that the model is built as its family's record says.

    :param model: A Hugging Face model, whole or extracted; meta device will do.
    :return: The layout.
    :raises nncf.UnsupportedModelError: No record fits the architecture, or the model differs from its record.
    """
    family, path = family_of(model), blocks_path(model)
    if family is None or path is None:
        raise nncf.UnsupportedModelError(_no_record(model))
    config: Any = model.config
    if getattr(config, "add_cross_attention", False):
        msg = f"{type(model).__name__} attends to an encoder as well, which no record describes. A plain decoder works."
        raise nncf.UnsupportedModelError(msg)
    head_dim = group = 0
    if heads := getattr(config, "num_attention_heads", 0):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
    block_list: Any = model.get_submodule(path)
    blocks: tuple[nn.Module, ...] = tuple(block_list)  # children() would list a shared block once
    if len({id(block) for block in blocks}) < len(blocks):
        msg = f"{path} of {type(model).__name__} runs the same block several times: its weights cannot be cut apart."
        raise nncf.UnsupportedModelError(msg)
    couplings = []
    for index, block in enumerate(blocks):
        found = {}
        for name, branch in family.branches_of(block).items():
            sizes = (group * head_dim, head_dim, head_dim) if name == "attention" else (1,) * 3
            found[name] = _coupling(block, branch, sizes, f"{path}.{index}")
        couplings.append(found)
    decodes = family.decodes or getattr(config, "is_decoder", False)
    return Layout(family, path, blocks, tuple(couplings), head_dim, group, decodes)


def unit_weights(block: nn.Module, coupling: Coupling) -> list[Tensor]:
    """
    The weights that write into a branch's units, cut up by unit: what scores of units are computed from.

    :param block: The block.
    :param coupling: One of its branches.
    :return: For each part ``[units, rows of the part, in_features]``; the output projection is not among them.
    """
    parts = []
    for cut in coupling.cuts[:-1]:
        weight = block.get_parameter(f"{cut.module}.weight")
        for offset, size in cut.parts:
            rows = weight[offset : offset + coupling.units * size]
            parts.append(rows.detach().reshape(coupling.units, size, -1))
    return parts


def _coupling(block: nn.Module, branch: Branch, sizes: tuple[int, ...], place: str) -> Coupling:
    modules = dict(block.named_modules())
    if all(isinstance(modules.get(path), replacement) for path, replacement in branch.skip.items()):
        return Coupling(branch, 0, sizes[0], ())
    if not branch.inputs:
        for path in (*branch.skip, branch.core):
            if path not in modules:
                msg = f"{place} has no {path}, which the family's record names."
                raise nncf.UnsupportedModelError(msg)
        if branch.without_ssm:
            needed = ("in_proj", "conv1d", "out_proj", "intermediate_size", "conv_kernel_size", "layer_idx")
            missing = [name for name in needed if not hasattr(modules[branch.core], name)]
            if missing:
                kind = type(modules[branch.core]).__name__
                msg = (
                    f"{place}.{branch.core} is a {kind} without {', '.join(missing)}: its state could "
                    "not be kept in transformers' cache. The mixers of transformers' own classes work."
                )
                raise nncf.UnsupportedModelError(msg)
        without_ssm = isinstance(modules[branch.core], GatedConvMixer)
        return Coupling(branch, 2 if branch.without_ssm and not without_ssm else 1, 0, ())
    for path in (*branch.inputs, branch.output):
        if not isinstance(modules.get(path), nn.Linear):
            found = type(modules[path]).__name__ if path in modules else "nothing"
            msg = f"{place}.{path} should be a torch.nn.Linear to be cut; found {found}."
            raise nncf.UnsupportedModelError(msg)
    for path in (*branch.skip, branch.core):
        if path not in modules:
            msg = f"{place} has no {path}, which the family's record names."
            raise nncf.UnsupportedModelError(msg)
    channels = sizes[0]
    width, output = modules[branch.output].in_features, Cut(branch.output, 1, ((0, channels),))
    units = width // channels
    cuts: tuple[Cut, ...]
    if branch.layout == "interleaved":
        cuts = (Cut(branch.inputs[0], 0, ((0, sum(sizes)),)),)
    elif branch.layout == "stacked":
        count = len(sizes) if channels > 1 else modules[branch.inputs[0]].out_features // width
        offsets = [units * sum(sizes[:part]) for part in range(count)]
        cuts = (Cut(branch.inputs[0], 0, tuple(zip(offsets, sizes[:count], strict=True))),)
    else:
        cuts = tuple(
            Cut(path, 0, ((0, size),)) for path, size in zip(branch.inputs, sizes[: len(branch.inputs)], strict=True)
        )
    if branch.adapters:
        adapters: Any = modules[branch.adapters]
        ends = [index for index, adapter in enumerate(adapters) if isinstance(adapter, nn.Sequential)]
        cuts += tuple(Cut(f"{branch.adapters}.{index}.1", 0, cuts[0].parts) for index in ends)
    for cut in cuts:
        rows, expected = modules[cut.module].out_features, units * sum(size for _, size in cut.parts)
        if rows != expected or units * channels != width:
            msg = (
                f"{place}.{cut.module} has {rows} rows and {place}.{branch.output} {width} columns: they do not match."
            )
            raise nncf.UnsupportedModelError(msg)
    return Coupling(branch, units, channels, (*cuts, output))


def _no_record(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    lists = [each.name for each in find_block_lists(model)]
    found = f"Its repeated blocks are {', '.join(lists)}" if lists else "No repeated blocks were found"
    return (
        f"Asked to remove structure from {kind!r}, whose attention and MLP no record describes. {found}; where its "
        f"query, key, value, output and MLP projections stand is missing. Known: {known}. "
        "A record in nncf_ext/structure/families.py adds an architecture."
    )
