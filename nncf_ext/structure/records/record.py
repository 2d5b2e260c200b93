"""
What a record of an architecture is: where the branches of a block stand, and how they become dimensions.

Records are frozen data with three duties: which cache slot a block uses, what must not be removed, and what a cut model
still needs (:meth:`Record.finish`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import nncf
from torch import nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import Skipped
from nncf_ext.structure.dimensions import Architecture, Cut, Dimension, DimensionKind, Dimensions, Kept, StandIn

ATTENTION, MLP, MAMBA, SSM = "attention", "mlp", "mamba", "ssm"

_HEAD_COUNTS = ("num_heads", "num_attention_heads")
_KV_HEAD_COUNTS = ("num_key_value_heads",)


@dataclass(frozen=True)
class Branch:
    """
    One residual branch of a block. Paths are seen from the block.

    :param core: Module that keeps head counts, sizes and the index into the cache; empty: the block itself.
    :param skip: What replaces which module when the whole branch is removed.
    :param inputs: Linear layers whose outputs are cut. Attention: query, key, value, or one fused layer. Empty: the
        branch goes as a whole, or loses its state space.
    :param output: Linear layer whose inputs are cut.
    :param layout: Rows of a fused layer: ``"stacked"`` (all queries, all keys, all values; all gates, all ups) or
        ``"interleaved"`` (query, key, value of a head together). ``"separate"``: nothing is fused.
    :param adapters: List of modules whose last linear layers, where they have some, are cut like the inputs.
    :param without_ssm: What replaces which module when a Mamba mixer loses its state space.
    """

    core: str
    skip: Mapping[str, type[Skipped]]
    inputs: tuple[str, ...] = ()
    output: str = ""
    layout: Literal["separate", "stacked", "interleaved"] = "separate"
    adapters: str = ""
    without_ssm: Mapping[str, type[GatedConvMixer]] = field(default_factory=dict)


@dataclass(frozen=True)
class Heads:
    """
    :param size: Size of one head, channels; 0 without attention.
    :param group: Query heads that read one key/value head; 0 without attention.
    :param key_value: Key/value heads that the configuration names; 0 without attention.
    """

    size: int = 0
    group: int = 0
    key_value: int = 0


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
class Record(Architecture, ABC):
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
                reader = _Reader(block, f"{path}.{index}", index, part, branch, self, heads, self.uses_cache(model))
                dimension = reader.dimension()
                found.append(dimension)
                if dimension.cuts:
                    output = block.get_parameter(f"{branch.output}.weight")
                    users.setdefault((part, id(output)), []).append(dimension.name)
        shared = [tuple(names) for names in users.values() if len(names) > 1]
        return Dimensions(found, path, self, shared)

    @abstractmethod
    def check(self, model: nn.Module, dimensions: Dimensions, kept: Kept) -> None: ...

    @abstractmethod
    def cache_slots(self, model: nn.Module, dimensions: Dimensions, kept: Kept) -> dict[str, int]: ...

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


def heads_of(config: Any) -> Heads:
    """:return: What a configuration says about heads."""
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        return Heads()
    key_value = getattr(config, "num_key_value_heads", None) or heads
    return Heads(getattr(config, "head_dim", None) or config.hidden_size // heads, heads // key_value, key_value)


@dataclass(frozen=True)
class _Reader:
    """Reads one branch of one block of a model."""

    block: nn.Module
    place: str
    index: int
    part: str
    branch: Branch
    record: Record
    heads: Heads
    uses_cache: bool

    def dimension(self) -> Dimension:
        branch, modules = self.branch, dict(self.block.named_modules())
        kind = DimensionKind.WIDTH if branch.inputs else DimensionKind.DEPTH
        parts = (self.part, SSM) if branch.without_ssm else (self.part,)
        named: dict[str, Any] = {"name": f"layers.{self.index}.{self.part}", "block": self.index, "parts": parts}
        named |= {"unit": self._unit()}
        if all(isinstance(modules.get(path), stand_in) for path, stand_in in branch.skip.items()):
            return Dimension(kind=kind, size=0, granularity=self._segment_sizes()[0], **named)
        for path in (*branch.inputs, *([branch.output] if branch.inputs else [])):
            if not isinstance(modules.get(path), nn.Linear):
                found = type(modules[path]).__name__ if path in modules else "nothing"
                msg = f"{self.place}.{path} should be a torch.nn.Linear to be cut; found {found}."
                raise nncf.UnsupportedModelError(msg)
        for path in (*branch.skip, branch.core):
            if path not in modules:
                msg = f"{self.place} has no {path}, which the architecture's record names."
                raise nncf.UnsupportedModelError(msg)
        replacements: dict[int, Mapping[str, StandIn]] = {0: self._at_place(branch.skip)}
        numbers = 2 * self.heads.size if self.part == ATTENTION and self.uses_cache else 0
        if branch.inputs:
            size, cuts = self._cuts(modules)
            named |= {"granularity": self._segment_sizes()[0], "config_keys": self._config_keys()}
            return Dimension(kind=kind, size=size, cuts=cuts, replacements=replacements, token_numbers=numbers, **named)
        size, states = 1, self._states(modules[branch.core])
        if branch.without_ssm and not isinstance(modules[branch.core], GatedConvMixer):
            size = 2
            replacements[1] = self._at_place(branch.without_ssm)
        return Dimension(
            kind=kind,
            size=size,
            replacements=replacements,
            token_numbers=numbers * self.heads.key_value,
            state_numbers=states,
            **named,
        )

    def _at_place(self, stand_ins: Mapping[str, StandIn]) -> dict[str, StandIn]:
        return {f"{self.place}.{path}": stand_in for path, stand_in in stand_ins.items()}

    def _segment_sizes(self) -> tuple[int, ...]:
        """Rows of one unit in queries, keys and values; in gates and ups."""
        if self.part == ATTENTION:
            return self.heads.group * self.heads.size, self.heads.size, self.heads.size
        return (1,) * 3

    def _unit(self) -> str:
        if self.part == MAMBA:
            return "Unit 0 is the mixer, unit 1 its state space"
        if self.part != ATTENTION:
            return "A unit is one channel"
        heads = f"{self.heads.group} query heads" if self.heads.group > 1 else "query head"
        return f"A unit is a key/value head with its {heads}, {self._segment_sizes()[0]} channels"

    def _config_keys(self) -> dict[str, int]:
        if self.part != ATTENTION:
            return {self.record.width_key: 1}
        keys = {"num_attention_heads": self.heads.group}
        return keys | ({"num_key_value_heads": 1} if self.record.head_dim_in_config else {})

    def _states(self, mixer: Any) -> tuple[int, ...]:
        """Numbers that a Mamba mixer keeps of a sequence: without itself, without its state space, as it is."""
        if not self.branch.without_ssm:
            return ()
        needed = ("in_proj", "conv1d", "out_proj", "intermediate_size", "conv_kernel_size", "layer_idx")
        missing = [name for name in needed if not hasattr(mixer, name)]
        if missing:
            msg = (
                f"{self.place}.{self.branch.core} is a {type(mixer).__name__} without {', '.join(missing)}: its state "
                "could not be kept in transformers' cache. The mixers of transformers' own classes work."
            )
            raise nncf.UnsupportedModelError(msg)
        convolved = (0, mixer.intermediate_size * mixer.conv_kernel_size)
        if isinstance(mixer, GatedConvMixer):
            return convolved
        whole = mixer.conv1d.in_channels * mixer.conv_kernel_size + mixer.intermediate_size * mixer.ssm_state_size
        return (*convolved, whole)

    def _cuts(self, modules: Mapping[str, Any]) -> tuple[int, tuple[Cut, ...]]:
        """The number of units, and what moves together."""
        branch, sizes = self.branch, self._segment_sizes()
        channels, width = sizes[0], modules[branch.output].in_features
        units = width // channels
        writers: list[tuple[str, tuple[tuple[int, int], ...]]]
        if branch.layout == "interleaved":
            writers = [(branch.inputs[0], ((0, sum(sizes)),))]
        elif branch.layout == "stacked":
            count = len(sizes) if channels > 1 else modules[branch.inputs[0]].out_features // width
            offsets = [units * sum(sizes[:part]) for part in range(count)]
            writers = [(branch.inputs[0], tuple(zip(offsets, sizes[:count], strict=True)))]
        else:
            writers = [(path, ((0, size),)) for path, size in zip(branch.inputs, sizes, strict=False)]
        if branch.adapters:
            adapters: Any = modules[branch.adapters]
            ends = [index for index, adapter in enumerate(adapters) if isinstance(adapter, nn.Sequential)]
            writers += [(f"{branch.adapters}.{index}.1", writers[0][1]) for index in ends]
        cuts: list[Cut] = []
        for path, segments in writers:
            rows, expected = modules[path].out_features, units * sum(size for _, size in segments)
            if rows != expected or units * channels != width:
                msg = (
                    f"{self.place}.{path} has {rows} rows and {self.place}.{branch.output} {width} columns: they do "
                    "not match."
                )
                raise nncf.UnsupportedModelError(msg)
            tensors = ["weight", *(["bias"] if modules[path].bias is not None else [])]
            cuts += [Cut(f"{self.place}.{path}.{tensor}", 0, segments) for tensor in tensors]
        return units, (*cuts, Cut(f"{self.place}.{branch.output}.weight", 1, ((0, channels),)))


def sizes_of(dimensions: Sequence[Dimension]) -> dict[str, int]:
    """
    :param dimensions: The dimensions of one block.
    :return: Its sizes by the configuration's names; what is gone has none.
    """
    return {key: each.size * count for each in dimensions if each.size for key, count in each.config_keys.items()}
