"""Which layers of a PEFT model carry a LoRA adapter, what are its A and B, and is it plain LoRA?"""

from collections.abc import Iterator, Mapping
from typing import Any

import nncf
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nncf_ext.algorithms.elastic_lora.adapter import active_rank
from nncf_ext.structure.wrappers import unwrapped

# Initializations that leave the base weight as it is; the others move a part of it into A and B.
HARMLESS_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


def find_adapter(model: nn.Module, adapter: str | None, only: str, refused: Mapping[str, str]) -> tuple[PeftModel, str]:
    """
    Finds an adapter and makes sure that it is LoRA without what the caller cannot take.

    :param model: PEFT model.
    :param adapter: Name of the adapter; None for the active one.
    :param only: A sentence that says that only LoRA will do, and for what.
    :param refused: Names of settings of ``LoraConfig`` that go beyond plain LoRA and cannot be taken, each with the
        sentences that say why and what would work.
    :return: The model, known to be one of PEFT, and the adapter's name.
    :raises nncf.UnsupportedModelError: The model is not a PeftModel, the adapter is not LoRA, or has a refused setting.
    :raises nncf.ValidationError: There is no such adapter, or several are active and none is named.
    """
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        msg = f"A model from peft.get_peft_model or PeftModel.from_pretrained is needed; got a {type(model).__name__}."
        raise nncf.UnsupportedModelError(msg)
    active = list(model.active_adapters)
    if adapter is None and len(active) != 1:
        msg = f"Active adapters are {active}. Name one, so that exactly one is active: model.set_adapter(name)."
        raise nncf.ValidationError(msg)
    name = active[0] if adapter is None else adapter
    if name not in model.peft_config:
        msg = f"Asked for adapter {name!r}; the model has {list(model.peft_config)}."
        raise nncf.ValidationError(msg)
    config = model.peft_config[name]
    if type(config) is not LoraConfig:
        msg = f"Adapter {name!r} is {config.peft_type}. {only}"
        raise nncf.UnsupportedModelError(msg)
    for setting, shown in _beyond_plain(config):
        if setting in refused:
            raise nncf.UnsupportedModelError(f"Adapter {name!r} has {shown}: {refused[setting]}")
    return model, name


def _beyond_plain(config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Settings that make more of an adapter than A and B, with their values as a user would write them."""
    if config.use_dora:
        yield "use_dora", "use_dora=True"
    if config.bias != "none":
        yield "bias", f"bias={config.bias!r}"
    if config.lora_bias:
        yield "lora_bias", "lora_bias=True"
    if config.modules_to_save:
        yield "modules_to_save", f"modules_to_save={list(config.modules_to_save)}"
    if getattr(config, "trainable_token_indices", None):
        yield "trainable_token_indices", "trainable_token_indices"
    if getattr(config, "ensure_weight_tying", False):
        yield "ensure_weight_tying", "ensure_weight_tying=True"
    if config.init_lora_weights not in HARMLESS_INITIALIZATIONS:
        yield "init_lora_weights", f"init_lora_weights={config.init_lora_weights!r}"
    if config.fan_in_fan_out:
        yield "fan_in_fan_out", "fan_in_fan_out=True"


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


def active_factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """
    :param layer: A layer that carries the adapter, linear.
    :param adapter: Name of the adapter.
    :return: What of A and B takes part: ``A[:rank]`` ``[rank, in]`` and ``B[:, :rank]`` ``[out, rank]``.
    """
    lora_A, lora_B = factors(layer, adapter)
    rank = active_rank(layer.lora_A[adapter])
    return lora_A[:rank], lora_B[:, :rank]
