"""From one point of an elastic network to an ordinary adapter that stock PEFT loads."""

import copy
import math
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from nncf_ext.algorithms.elastic_lora.adapter import detach_rank
from nncf_ext.algorithms.elastic_lora.algorithm import ElasticNetwork
from nncf_ext.algorithms.elastic_lora.inspection import lora_layers


def extract_ranks(net: ElasticNetwork, point: Mapping[str, int]) -> PeftModel:
    """
    Cuts every adapter to its rank: ``A[:rank]``, ``B[:, :rank]``, with the scaling it had.

    :param net: Elastic network; not changed.
    :param point: A rank for every dimension.
    :return: A new model, base included, on the same devices. Ranks and scalings stand in the ``rank_pattern`` and
        ``alpha_pattern`` of its configuration, so that ``save_pretrained`` writes an adapter for stock PEFT.
    :raises nncf.ValidationError: It is not a point of the space.
    """
    point = net.space.check(point)
    model = copy.deepcopy(net.model)
    # A forward that was wrapped on the one model object, by compilation or a trainer, would run the original.
    model.__dict__.pop("forward", None)
    layers = lora_layers(model, net.adapter_name)
    for name, paths in net.layers.items():
        for path in paths:
            detach_rank(layers[path].lora_A[net.adapter_name])
            _cut(layers[path], net.adapter_name, point[name])
    _describe(model, net.adapter_name, layers)
    return model


def _cut(layer: LoraLayer, adapter: str, rank: int) -> None:
    lora_A: Any = layer.lora_A[adapter]
    lora_B: Any = layer.lora_B[adapter]
    lora_A.weight = _parameter(lora_A.weight, lora_A.weight[:rank])
    lora_B.weight = _parameter(lora_B.weight, lora_B.weight[:, :rank])
    if isinstance(lora_A, nn.Linear):
        lora_A.out_features = lora_B.in_features = rank
    else:
        lora_A.out_channels = lora_B.in_channels = rank
    layer.r[adapter] = rank


def _parameter(old: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad)


def _describe(model: PeftModel, adapter: str, layers: Mapping[str, LoraLayer]) -> None:
    """Writes the rank and the scaling of every layer into the configuration, where they differ from its defaults."""
    config: Any = model.peft_config[adapter]
    ranks, alphas = {}, {}
    for path, layer in layers.items():
        # PEFT takes such a key as a regular expression from the start of the path.
        key = f"^{_target(path, layer)}"
        alpha = _alpha(layer.scaling[adapter], layer.r[adapter], config.use_rslora)
        layer.lora_alpha[adapter] = alpha
        if layer.r[adapter] != config.r:
            ranks[key] = layer.r[adapter]
        if alpha != config.lora_alpha:
            alphas[key] = alpha
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    # How A and B began does not matter any more, and some initializations refuse some ranks.
    config.init_lora_weights = True


def _target(path: str, layer: LoraLayer) -> str:
    """The name by which PEFT looks up the rank of a layer."""
    if isinstance(layer, ParamWrapper):
        # Several parameters of one module are wrapped one around the other.
        return f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
    return path


def _alpha(scaling: float, rank: int, rslora: bool) -> float:
    """The alpha of which PEFT computes this scaling: exactly if any double does, else within the last bit."""
    # scaling * divisor is rounded, so dividing it again may miss by a bit; a neighbour, or an integer, may hit.
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scaling * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(near, key=lambda each: abs(each / divisor - scaling))
