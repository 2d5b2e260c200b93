"""From one point of an elastic network to an ordinary adapter that stock PEFT loads."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper

from nncf_ext.algorithms.elastic_lora.adapter import detach_rank
from nncf_ext.algorithms.elastic_lora.inspection import lora_layers
from nncf_ext.structure.dimensions import Dimensions, Kept
from nncf_ext.structure.surgery import cut_tensors


def extract_ranks(
    model: PeftModel, adapter: str, dimensions: Dimensions, kept: Kept, layers_of: Mapping[str, Sequence[str]]
) -> PeftModel:
    """
    Cuts every adapter to its rank: ``A[:rank]``, ``B[:, :rank]``, with the scaling it had.

    :param model: PEFT model; not changed.
    :param adapter: Name of the adapter.
    :param dimensions: Its ranks, by path from the base model.
    :param kept: The ranks that stay, leading ones.
    :param layers_of: For each dimension the paths of its layers in the base model.
    :return: A new model, base included, on the same devices. Ranks and scalings stand in the ``rank_pattern`` and
        ``alpha_pattern`` of its configuration, so that ``save_pretrained`` writes an adapter for stock PEFT.
    """
    model = copy.deepcopy(model)
    # A forward that was wrapped on the one model object, by compilation or a trainer, would run the original.
    model.__dict__.pop("forward", None)
    layers = lora_layers(model, adapter)
    for name, paths in layers_of.items():
        for path in paths:
            detach_rank(layers[path].lora_A[adapter])
            layers[path].r[adapter] = len(kept[name])
    cut_tensors(model.get_base_model(), kept, dimensions)
    _describe(model, adapter, layers)
    return model


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
