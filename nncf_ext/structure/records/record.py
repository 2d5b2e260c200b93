"""
What a record of an architecture is: where its blocks stand, and what their branches are.

Records are frozen data with three duties beyond dimensions: which cache slot a block uses, what must not be removed,
and what a cut model still needs (:meth:`Record.finish`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nncf
from torch import nn

from nncf_ext.structure.dimensions import Architecture, Dimension, Dimensions
from nncf_ext.structure.records.branch import ATTENTION, Branch, Heads, PlacedBranch, heads_of

_HEAD_COUNTS = ("num_heads", "num_attention_heads")
_KV_HEAD_COUNTS = ("num_key_value_heads",)


class LayerConfig:
    """
    The model's configuration as one attention sees it: the same, live, but for its own number of heads.

    :param base: The model's configuration.
    :param num_attention_heads: Query heads of this attention.
    """

    def __init__(self, base: Any, num_attention_heads: int) -> None:
        self.base = base
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)


@dataclass(frozen=True)
class Record(Architecture):
    """
    :param name: Name for messages.
    :param model_types: Values of ``model.config.model_type`` that share this structure.
    :param blocks: Path of the list of equal blocks, seen from the model without its head.
    :param branches: The residual branches of a block by name: ``"attention"`` and ``"mlp"``, or ``"mamba"``.
    :param hybrids: The branches of other kinds of blocks, by the name of the block's class.
    :param decodes: Generates with a cache, whatever the configuration says.
    :param drops_blocks: A block without any branch can vanish; else it stays as one that does nothing.
    :param width_key: The configuration's name for the number of MLP channels.
    :param head_dim_in_config: The configuration can state the head size, so that the number of heads may change.
    :param heads_from_config: The attention's forward reads the number of heads from its configuration.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    branches: Mapping[str, Branch]
    hybrids: Mapping[str, Mapping[str, Branch]] = field(default_factory=dict)
    decodes: bool = True
    drops_blocks: bool = True
    width_key: str = "intermediate_size"
    head_dim_in_config: bool = True
    heads_from_config: bool = False

    def branches_of(self, block: nn.Module) -> Mapping[str, Branch]:
        """:return: The branches of one block."""
        return self.hybrids.get(type(block).__name__, self.branches)

    def config_keys(self, part: str, heads: Heads) -> dict[str, int]:
        """:return: The configuration's names for the size of a part, and how many of them one unit is."""
        if part != ATTENTION:
            return {self.width_key: 1}
        keys = {"num_attention_heads": heads.group}
        return keys | ({"num_key_value_heads": 1} if self.head_dim_in_config else {})

    def uses_cache(self, model: nn.Module) -> bool:
        return self.decodes or getattr(model.config, "is_decoder", False)

    def blocks_path(self, model: nn.Module) -> str | None:
        """
        :param model: A model of this architecture, with or without a head.
        :return: Path of the block list in this very model; None if it is not where the record says.
        """
        prefixes = (getattr(model, "base_model_prefix", ""), "")
        paths = [f"{prefix}.{self.blocks}" if prefix else self.blocks for prefix in prefixes]
        names = dict(model.named_modules())
        return next((path for path in paths if path in names), None)

    def dimensions(self, model: nn.Module, path: str) -> Dimensions:
        """
        Checks that a model is built as the record says.

        :param model: A Hugging Face model, whole or cut; meta device will do.
        :param path: Path of its block list.
        :return: Its dimensions.
        :raises nncf.UnsupportedModelError: The model differs from its record.
        """
        config: Any = model.config
        if getattr(config, "add_cross_attention", False):
            msg = (
                f"{type(model).__name__} attends to an encoder as well, which no record describes. A plain decoder "
                "works."
            )
            raise nncf.UnsupportedModelError(msg)
        heads = heads_of(config)
        block_list: Any = model.get_submodule(path)
        blocks = tuple(block_list)  # children() would list a shared block once
        if len({id(block) for block in blocks}) < len(blocks):
            msg = (
                f"{path} of {type(model).__name__} runs the same block several times: its weights cannot be cut apart."
            )
            raise nncf.UnsupportedModelError(msg)
        found: list[Dimension] = []
        users: dict[tuple[str, int], list[str]] = {}
        for index, block in enumerate(blocks):
            for part, branch in self.branches_of(block).items():
                place = PlacedBranch(
                    branch,
                    part,
                    block,
                    path=f"{path}.{index}",
                    index=index,
                    heads=heads,
                    uses_cache=self.uses_cache(model),
                    config_keys=self.config_keys(part, heads),
                )
                dimension = place.dimension()
                found.append(dimension)
                if dimension.cuts:
                    output = block.get_parameter(f"{branch.output}.weight")
                    users.setdefault((part, id(output)), []).append(dimension.name)
        shared = [tuple(names) for names in users.values() if len(names) > 1]
        return Dimensions(found, path, self, shared)

    def finish(self, model: nn.Module) -> None:
        path = self.blocks_path(model)
        assert path is not None, "the model had dimensions before it was cut"
        dimensions = self.dimensions(model, path)
        config: Any = model.config
        staying = [index for index, parts in enumerate(dimensions.by_block) if any(each.size for each in parts)]
        if len(staying) < len(dimensions.by_block) and self.drops_blocks:
            blocks: Any = model.get_submodule(path)
            left = nn.ModuleList(blocks[index] for index in staying)
            left.training = blocks.training
            model.set_submodule(path, left)
            config.num_hidden_layers = len(staying)
            if ATTENTION in self.branches and getattr(config, "layer_types", None):
                config.layer_types = [config.layer_types[index] for index in staying]
            dimensions = self.dimensions(model, path)
        for owner, slot in self.cache_slots(model, dimensions, dimensions.all_units()).items():
            model.get_submodule(owner).layer_idx = slot  # type: ignore[assignment]
        self.write_sizes(model, dimensions)

    def write_sizes(self, model: nn.Module, dimensions: Dimensions) -> None:
        """
        Writes sizes into the modules' attributes and, where all blocks agree, into the configuration.

        :param model: A cut model.
        :param dimensions: Its dimensions.
        """
        config: Any = model.config
        heads = heads_of(config)
        for each in dimensions.values():
            if each.cuts:
                block = model.get_submodule(f"{dimensions.blocks}.{each.block}")
                core: Any = block.get_submodule(self.branches_of(block)[each.part].core)
                if each.part == ATTENTION:
                    self._write_heads(core, each, heads)
                elif isinstance(getattr(core, "intermediate_size", None), int):
                    core.intermediate_size = each.size
        sizes = [sizes_of(parts) for parts in dimensions.by_block]
        for key in {key for each in sizes for key in each}:
            values = {each[key] for each in sizes if key in each}
            if len(values) == 1 and getattr(config, key) not in values:
                if key in ("num_attention_heads", "num_key_value_heads"):
                    # transformers refuses a configuration whose heads do not divide the hidden size.
                    most = max(each.get("num_attention_heads", 1) for each in sizes)
                    if not self.head_dim_in_config or config.hidden_size % most:
                        continue
                    config.head_dim = heads.size
                setattr(config, key, values.pop())

    def _write_heads(self, core: Any, attention: Dimension, heads: Heads) -> None:
        queries = attention.size * heads.group
        counts = {
            **dict.fromkeys(_HEAD_COUNTS, queries),
            **dict.fromkeys(_KV_HEAD_COUNTS, attention.size),
            "all_head_size": queries * heads.size,
        }
        for name, count in counts.items():
            if isinstance(getattr(core, name, None), int):
                setattr(core, name, count)
        if self.heads_from_config:
            base = core.config.base if isinstance(core.config, LayerConfig) else core.config
            core.config = LayerConfig(base, queries)


def sizes_of(dimensions: Sequence[Dimension]) -> dict[str, int]:
    """
    :param dimensions: The dimensions of one block.
    :return: Its sizes by the configuration's names; what is gone has none.
    """
    return {key: each.size * count for each in dimensions if each.size for key, count in each.config_keys.items()}
