"""Which layers of an adapter share a rank, and why can a rank not be elastic?"""

import re
from collections.abc import Iterator, Mapping, Sequence

import nncf
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from nncf_ext.algorithms.elastic_lora.adapter import elastic_rank, maximum_rank
from nncf_ext.algorithms.elastic_lora.inspection import HARMLESS_INITIALIZATIONS, lora_layers
from nncf_ext.algorithms.elastic_lora.parameters import RankGroup
from nncf_ext.structure.blocks import find_block_lists

_FROZEN = "everything but A and B must stay frozen, because all ranks share it."

REFUSED = {
    "use_dora": "DoRA divides by the norm of W + s B A, which is another one for every rank.",
    "bias": f"{_FROZEN} Use bias='none'.",
    "lora_bias": _FROZEN,
    "modules_to_save": f"{_FROZEN} A task_type may add some modules. Target them instead.",
    "trainable_token_indices": _FROZEN,
    "ensure_weight_tying": "a tied adapter cannot have a rank of its own.",
    "init_lora_weights": "it may put a part of the base weight into A and B, and a lower rank would lose it. "
    f"Use one of {HARMLESS_INITIALIZATIONS}.",
}
"""Why an adapter with such a setting cannot be cut to a lower rank."""


def group_layers(
    model: PeftModel, adapter: str, groups: Sequence[RankGroup]
) -> Iterator[tuple[str, RankGroup, list[str]]]:
    """
    Resolves groups: one dimension for the whole model, or one for each block that has members.

    :param model: PEFT model.
    :param adapter: Name of the adapter.
    :param groups: What shares a rank.
    :return: Name, group, and paths of member layers of every dimension: groups over the whole model first, then block
        by block.
    :raises nncf.ValidationError: There are no groups; a pattern matches nothing; groups overlap; a layer stands in no
        block; ranks do not begin with the rank of the adapters; two dimensions would have the same name.
    :raises nncf.UnsupportedModelError: The rank of a member cannot be elastic.
    """
    if not groups or not all(isinstance(group, RankGroup) for group in groups):
        msg = f"groups must be a list of nncf_ext.RankGroup, at least one; got {groups!r}."
        raise nncf.ValidationError(msg)
    layers = lora_layers(model, adapter)
    taken: dict[str, RankGroup] = {}
    members = {}
    for place, group in enumerate(groups):
        members[place] = _matches(group, layers)
        for path in members[place]:
            _check_member(path, layers[path], adapter, group)
            if path in taken:
                msg = f"{path} is in two groups, {list(taken[path].patterns)} and {list(group.patterns)}."
                raise nncf.ValidationError(msg)
            taken[path] = group
    blocks = [path for each in find_block_lists(model.get_base_model()) for path in each.blocks]
    seen = set()
    for name, place, paths in _dimensions(groups, members, blocks):
        if name in seen:
            msg = f"Two groups would both be named {name}. Give one of them a name: RankGroup(..., name=...)."
            raise nncf.ValidationError(msg)
        seen.add(name)
        yield name, groups[place], paths


def _dimensions(
    groups: Sequence[RankGroup], members: Mapping[int, list[str]], blocks: Sequence[str]
) -> Iterator[tuple[str, int, list[str]]]:
    for place, group in enumerate(groups):
        if group.per == "model":
            yield _name(group, members[place]), place, members[place]
            continue
        outside = [path for path in members[place] if not any(path.startswith(f"{block}.") for block in blocks)]
        if outside:
            msg = (
                f"{outside[0]} stands in none of the model's {len(blocks)} repeated blocks, so it has no rank of its "
                "block. Put it into a RankGroup(..., per='model')."
            )
            raise nncf.ValidationError(msg)
    for block in blocks:
        for place, group in enumerate(groups):
            inside = [path for path in members[place] if group.per == "block" and path.startswith(f"{block}.")]
            if inside:
                yield f"{block}.{_name(group, inside)}", place, inside


def _name(group: RankGroup, paths: Sequence[str]) -> str:
    return group.name or "+".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _matches(group: RankGroup, layers: Mapping[str, LoraLayer]) -> list[str]:
    for pattern in group.patterns:
        if not any(re.match(pattern, path) for path in layers):
            msg = (
                f"Pattern {pattern!r} matches no layer with an adapter. Their paths look like "
                f"{next(iter(layers), 'model.layers.0.self_attn.q_proj')!r}; patterns must match from the start."
            )
            raise nncf.ValidationError(msg)
    return [path for path in layers if any(re.match(pattern, path) for pattern in group.patterns)]


def _check_member(path: str, layer: LoraLayer, adapter: str, group: RankGroup) -> None:
    if reason := _refused_layer(layer, adapter):
        msg = f"The rank of {path} cannot be elastic: {reason} Leave it out of the groups: it keeps its full rank."
        raise nncf.UnsupportedModelError(msg)
    lora_A = layer.lora_A[adapter]
    if elastic_rank(lora_A) is not None:
        msg = f"The rank of {path} is elastic already. Call release() of the network that make_elastic returned."
        raise nncf.ValidationError(msg)
    if layer.merged:
        msg = f"The adapter of {path} is merged into its weight. Call unmerge_adapter() of the model first."
        raise nncf.ValidationError(msg)
    rank = maximum_rank(lora_A)
    if max(group.ranks) != rank:
        msg = (
            f"{path} has rank {rank}; the ranks of its group are {list(group.ranks)}. The largest must be the rank of "
            f"the adapter: make the adapter with r={max(group.ranks)}, or let the list begin with {rank}."
        )
        raise nncf.ValidationError(msg)


def _refused_layer(layer: LoraLayer, adapter: str) -> str | None:
    if isinstance(layer, ParamWrapper):
        return (
            f"the adapter was put on the parameter {layer.parameter_name!r} (target_parameters), of "
            f"{layer.num_experts} experts in one tensor. PEFT adds B A to such a parameter without running A, so there "
            "is no output of A to cut."
        )
    if adapter in layer.lora_embedding_A:
        return "it adapts an embedding, whose A is looked up rather than run."
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention merges its adapter for every forward, so A is never run."
    if adapter in layer.lora_variant:
        return f"it is no plain LoRA ({type(layer.lora_variant[adapter]).__name__})."
    lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(lora_A, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"its A is a {type(lora_A).__name__}, neither Linear nor a convolution."
    if getattr(lora_B, "groups", 1) > 1:
        return "it adapts a convolution in groups, whose B does not see all of A."
    return None
