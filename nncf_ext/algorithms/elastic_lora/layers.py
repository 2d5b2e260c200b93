"""Which layers of a PEFT model carry an adapter, which of them share a rank, and why can a rank not be elastic?"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nncf
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from nncf_ext.algorithms.elastic_lora.adapter import elastic_rank, maximum_rank
from nncf_ext.algorithms.elastic_lora.parameters import Group
from nncf_ext.structure.blocks import find_block_lists

# Initializations that leave the base weight as it is; the others move a part of it into A and B.
_HARMLESS_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


def find_adapter(model: nn.Module, adapter: str | None) -> tuple[PeftModel, str]:
    """
    Finds the adapter and refuses what cannot be cut to a lower rank.

    :param model: PEFT model.
    :param adapter: Name of the adapter; None for the active one.
    :return: The model, known to be one of PEFT, and the adapter's name.
    :raises nncf.UnsupportedModelError: The model is not a PeftModel, or the adapter is not plain LoRA.
    :raises nncf.ValidationError: There is no such adapter, or several are active and none is named.
    """
    if not isinstance(model, PeftModel):
        msg = (
            f"Elastic ranks need a model from peft.get_peft_model or PeftModel.from_pretrained; got a "
            f"{type(model).__name__}."
        )
        raise nncf.UnsupportedModelError(msg)
    active = list(model.active_adapters)
    if adapter is None and len(active) != 1:
        msg = f"Active adapters are {active}. Name one: adapter_name=..."
        raise nncf.ValidationError(msg)
    name = active[0] if adapter is None else adapter
    if name not in model.peft_config:
        msg = f"Asked for adapter {name!r}; the model has {list(model.peft_config)}."
        raise nncf.ValidationError(msg)
    config = model.peft_config[name]
    if type(config) is not LoraConfig:
        msg = f"Adapter {name!r} is {config.peft_type}. Only the rank of LoRA can be elastic."
        raise nncf.UnsupportedModelError(msg)
    if reason := _refused_setting(config):
        raise nncf.UnsupportedModelError(f"Adapter {name!r} has {reason}")
    return model, name


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """
    :param model: PEFT model.
    :param adapter: Name of an adapter.
    :return: The layers that carry it, by path in the base model, in the model's order.
    """
    return {
        path: module
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in (*module.lora_A, *module.lora_embedding_A)
    }


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """
    :param layer: A layer that carries the adapter.
    :param adapter: Name of the adapter.
    :return: Its A and B as PEFT stores them: ``[r, in]`` and ``[out, r]`` of a linear layer.
    """
    if adapter in layer.lora_A:
        lora_A: Any = layer.lora_A[adapter]
        lora_B: Any = layer.lora_B[adapter]
        return lora_A.weight, lora_B.weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def group_layers(model: PeftModel, adapter: str, groups: Sequence[Group]) -> Iterator[tuple[str, Group, list[str]]]:
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
    if not groups or not all(isinstance(group, Group) for group in groups):
        msg = f"spaces must be a list of nncf_ext.Group, at least one; got {groups!r}."
        raise nncf.ValidationError(msg)
    layers = lora_layers(model, adapter)
    taken: dict[str, Group] = {}
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
            msg = f"Two groups would both be named {name}. Give one of them a name: Group(..., name=...)."
            raise nncf.ValidationError(msg)
        seen.add(name)
        yield name, groups[place], paths


def _dimensions(
    groups: Sequence[Group], members: Mapping[int, list[str]], blocks: Sequence[str]
) -> Iterator[tuple[str, int, list[str]]]:
    for place, group in enumerate(groups):
        if group.per == "model":
            yield _name(group, members[place]), place, members[place]
            continue
        outside = [path for path in members[place] if not any(path.startswith(f"{block}.") for block in blocks)]
        if outside:
            msg = (
                f"{outside[0]} stands in none of the model's {len(blocks)} repeated blocks, so it has no rank of its "
                "block. Put it into a Group(..., per='model')."
            )
            raise nncf.ValidationError(msg)
    for block in blocks:
        for place, group in enumerate(groups):
            inside = [path for path in members[place] if group.per == "block" and path.startswith(f"{block}.")]
            if inside:
                yield f"{block}.{_name(group, inside)}", place, inside


def _name(group: Group, paths: Sequence[str]) -> str:
    return group.name or "+".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _matches(group: Group, layers: Mapping[str, LoraLayer]) -> list[str]:
    for pattern in group.patterns:
        if not any(re.match(pattern, path) for path in layers):
            msg = (
                f"Pattern {pattern!r} matches no layer with an adapter. Their paths look like "
                f"{next(iter(layers), 'model.layers.0.self_attn.q_proj')!r}; patterns must match from the start."
            )
            raise nncf.ValidationError(msg)
    return [path for path in layers if any(re.match(pattern, path) for pattern in group.patterns)]


def _check_member(path: str, layer: LoraLayer, adapter: str, group: Group) -> None:
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


def _refused_setting(config: LoraConfig) -> str | None:
    frozen = "Everything but A and B must stay frozen, because all ranks share it."
    if config.use_dora:
        return "use_dora=True. DoRA divides by the norm of W + s B A, which is another one for every rank."
    if config.bias != "none":
        return f"bias={config.bias!r}. {frozen} Use bias='none'."
    if config.lora_bias:
        return f"lora_bias=True. {frozen}"
    if config.modules_to_save:
        return (
            f"modules_to_save={list(config.modules_to_save)} (a task_type may add some). {frozen} Target them instead."
        )
    if getattr(config, "trainable_token_indices", None):
        return f"trainable_token_indices. {frozen}"
    if getattr(config, "ensure_weight_tying", False):
        return "ensure_weight_tying=True. A tied adapter cannot have a rank of its own."
    if config.init_lora_weights not in _HARMLESS_INITIALIZATIONS:
        return (
            f"init_lora_weights={config.init_lora_weights!r}, which may put a part of the base weight into A and B: a "
            f"lower rank would lose it. Use one of {_HARMLESS_INITIALIZATIONS}."
        )
    return None
