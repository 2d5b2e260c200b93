"""One residual branch of a block: where its layers stand, and how it becomes a dimension."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import nncf
from torch import nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import Skipped
from nncf_ext.structure.dimensions import Cut, Dimension, DimensionKind, StandIn

ATTENTION, MLP, MAMBA, SSM = "attention", "mlp", "mamba", "ssm"


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


def heads_of(config: Any) -> Heads:
    """:return: What a configuration says about heads."""
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        return Heads()
    key_value = getattr(config, "num_key_value_heads", None) or heads
    return Heads(getattr(config, "head_dim", None) or config.hidden_size // heads, heads // key_value, key_value)


@dataclass(frozen=True)
class PlacedBranch:
    """
    One branch of one block of a model, to be made a dimension.

    :param branch: What the record says of it.
    :param part: Its name in the record.
    :param block: The block.
    :param path: Path of the block, from the model.
    :param index: Index of the block.
    :param heads: What the configuration says about heads.
    :param uses_cache: The model generates with a cache.
    :param config_keys: The configuration's names for its size, and how many of them one unit is.
    """

    branch: Branch
    part: str
    block: nn.Module
    path: str
    index: int
    heads: Heads
    uses_cache: bool
    config_keys: Mapping[str, int]

    def dimension(self) -> Dimension:
        """
        :return: The dimension.
        :raises nncf.UnsupportedModelError: The block is not built as the record says.
        """
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
                msg = f"{self.path}.{path} should be a torch.nn.Linear to be cut; found {found}."
                raise nncf.UnsupportedModelError(msg)
        for path in (*branch.skip, branch.core):
            if path not in modules:
                msg = f"{self.path} has no {path}, which the architecture's record names."
                raise nncf.UnsupportedModelError(msg)
        replacements: dict[int, Mapping[str, StandIn]] = {0: self._at_place(branch.skip)}
        # Keys and values of a key/value head, each of the head's size, for every token.
        numbers = 2 * self.heads.size if self.part == ATTENTION and self.uses_cache else 0
        if branch.inputs:
            size, cuts = self._cuts(modules)
            named |= {"granularity": self._segment_sizes()[0], "config_keys": self.config_keys}
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
        return {f"{self.path}.{path}": stand_in for path, stand_in in stand_ins.items()}

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

    def _states(self, mixer: Any) -> tuple[int, ...]:
        """Numbers that a Mamba mixer keeps of a sequence: without itself, without its state space, as it is."""
        if not self.branch.without_ssm:
            return ()
        needed = ("in_proj", "conv1d", "out_proj", "intermediate_size", "conv_kernel_size", "layer_idx")
        missing = [name for name in needed if not hasattr(mixer, name)]
        if missing:
            msg = (
                f"{self.path}.{self.branch.core} is a {type(mixer).__name__} without {', '.join(missing)}: its state "
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
        # Rows of the layers that write into the units, u0, u1, .. being units and each letter some rows:
        #   separate     q: q0 q1 ..   k: k0 k1 ..   v: v0 v1 ..      three layers, a segment each
        #   stacked      q0 q1 .. k0 k1 .. v0 v1 ..                   one layer, three segments
        #   interleaved  q0 k0 v0 q1 k1 v1 ..                         one layer, one segment of wider units
        if branch.layout == "interleaved":
            writers = [(branch.inputs[0], ((0, sum(sizes)),))]
        elif branch.layout == "stacked":
            # An MLP's layer holds gates and ups, or ups alone: its rows tell.
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
                    f"{self.path}.{path} has {rows} rows and {self.path}.{branch.output} {width} columns: they do "
                    "not match."
                )
                raise nncf.UnsupportedModelError(msg)
            tensors = ["weight", *(["bias"] if modules[path].bias is not None else [])]
            cuts += [Cut(f"{self.path}.{path}.{tensor}", 0, segments) for tensor in tensors]
        return units, (*cuts, Cut(f"{self.path}.{branch.output}.weight", 1, ((0, channels),)))
