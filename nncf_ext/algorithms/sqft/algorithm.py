"""Makes the adapters of a PEFT model mergeable: masked by the zeros of their base, on request rounded to its grid."""

from collections.abc import Mapping
from typing import Any

import nncf
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from nncf_ext.algorithms.elastic_lora.inspection import find_adapter, lora_layers
from nncf_ext.algorithms.sqft.layers import MaskedLoraLinear, QuantizedLoraLinear, put_scales
from nncf_ext.algorithms.sqft.parameters import AdvancedSqftParameters
from nncf_ext.algorithms.sqft.partner import Grid, check_partners, into_cells, on_grid, read_grid
from nncf_ext.parameters import MergeMode, parse_choice
from nncf_ext.structure.wrappers import plain_arithmetic, unwrapped
from nncf_ext.weights.activation_sparsity import refuse_sparse_inputs
from nncf_ext.weights.int4 import decompressors
from nncf_ext.weights.records import set_record
from nncf_ext.weights.sharing import names_of_parameters

_REFUSED = {
    "use_dora": "DoRA scales whole rows, base weight included. Use plain LoRA.",
    "bias": "biases stay as they are. Use bias='none'.",
    "lora_bias": "biases stay as they are. Use lora_bias=False.",
    "modules_to_save": "a module trained as a whole keeps no zeros.",
    "trainable_token_indices": "embeddings are not merged here.",
    "init_lora_weights": "it changes the base weight, and with it the zeros. Use init_lora_weights=True.",
    "fan_in_fan_out": "weights are expected as [out, in].",
}
"""Why an adapter with such a setting cannot be merged."""


@plain_arithmetic()
def make_mergeable(
    model: nn.Module,
    mode: MergeMode,
    *,
    grid: nn.Module | None = None,
    advanced_parameters: AdvancedSqftParameters | None = None,
) -> PeftModel:
    """
    Makes the LoRA adapter of a PEFT model one that :func:`nncf_ext.merge` can merge without losing anything.

    SPARSE: the adapter's delta is zero wherever the base weight is. QUANT_AWARE: moreover the layer computes with the
    points of an INT4 grid that are nearest to base plus delta, so that training sees what merging will give. Call it
    once, after ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` and before training; ranks may be elastic,
    before or after. Optimizers must be made afterwards.

    :param model: PEFT model with one LoRA adapter over a sparse floating base. Changed in place.
    :param mode: SPARSE or QUANT_AWARE.
    :param grid: QUANT_AWARE: the model whose INT4 scales are used, layer by layer of the same name: what
        :func:`nncf_ext.compress` made, :func:`nncf_ext.load_gptq` or ``nncf.compress_weights(mode=INT4_SYM)``. Its
        floating partner (:func:`nncf_ext.prerounding`, or the sparse model it was made of) is the base of `model`.
    :param advanced_parameters: Everything else.
    :return: `model`.
    :raises nncf.UnsupportedModelError: Not a PEFT model, not plain LoRA, or an adapter on anything but a linear layer.
    :raises nncf.ValidationError: The base is packed itself, a grid is missing or misfits, a mask has an empty row, or
        the adapter is merged or mergeable already.
    :raises nncf.ParameterNotSupportedError: The mode is unknown, or an option belongs to the other mode.
    """
    mode = parse_choice(mode, MergeMode)
    parameters = advanced_parameters or AdvancedSqftParameters()
    model = unwrapped(model)
    refuse_sparse_inputs(model, "put an adapter on")
    adapter, layers = find_layers(model)
    quantized = mode is MergeMode.QUANT_AWARE
    if not quantized and (grid is not None or parameters != AdvancedSqftParameters()):
        msg = "grid and AdvancedSqftParameters belong to MergeMode.QUANT_AWARE; the mode is SPARSE."
        raise nncf.ParameterNotSupportedError(msg)
    base: nn.Module = model.get_base_model()  # type: ignore[operator]  # find_layers has made sure
    for path, layer in layers.items():
        _check_layer(path, layer)
    check_unshared(base, layers)
    weights: dict[str, Any] = {path: layer.get_base_layer().weight for path, layer in layers.items()}
    if not quantized and not any(bool((weight == 0).any()) for weight in weights.values()):
        msg = (
            f"None of the {len(weights)} adapted weights has a zero, so there is nothing to keep. Prune first "
            "(nncf_ext.compress), or merge with PEFT's merge_and_unload()."
        )
        raise nncf.ValidationError(msg)
    grids: dict[str, Grid] = {}
    if quantized:
        grids = _read(grid, base)
        check_partners(base, weights, grid, grids)  # type: ignore[arg-type]  # _read has made sure
    with torch.no_grad():
        for path, layer in layers.items():
            made: MaskedLoraLinear
            if quantized:
                codes, scales = (part.to(weights[path].device) for part in (grids[path].codes, grids[path].scales))
                if parameters.start == "grid":
                    weights[path].data = into_cells(weights[path].data, codes, scales)
                trained = adapter if parameters.trainable_scales else None
                made = QuantizedLoraLinear.on_grid(layer, scales, trained, parameters.dropout == "input")
            else:
                made = MaskedLoraLinear.around(layer)
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, made)
        for path in (path for path in grids if path not in layers):
            # Without an adapter: computes with what the merged model holds, and is packed when merging.
            linear: Any = base.get_submodule(path)
            linear.weight.data = on_grid(linear.weight, grids[path])
            put_scales(linear, grids[path].scales.to(linear.weight.device))
            set_record(linear, grids[path].record)
    return model  # type: ignore[return-value]


def find_layers(model: nn.Module) -> tuple[str, dict[str, LoraLinear]]:
    """
    Finds the layers of the active adapter, and refuses what cannot be merged.

    :param model: PEFT model.
    :return: The adapter's name, and its layers by path in the base model.
    :raises nncf.UnsupportedModelError: See :func:`make_mergeable`.
    :raises nncf.ValidationError: Several adapters are active.
    """
    model, adapter = find_adapter(model, None, "Only LoRA can be merged into the zeros of its base.", _REFUSED)
    layers: dict[str, LoraLinear] = {}
    for path, module in lora_layers(model, adapter).items():
        if not isinstance(module, LoraLinear) or type(module.get_base_layer()) is not nn.Linear:
            kind = type(module.get_base_layer()).__name__
            parameter = getattr(module, "parameter_name", None)
            what = f"the parameter {parameter!r} of {kind} (target_parameters)" if parameter else f"a {kind}"
            msg = f"{path} adapts {what}. Only adapters of torch.nn.Linear can be merged: choose other target modules."
            raise nncf.UnsupportedModelError(msg)
        layers[path] = module
    if not layers:
        msg = f"Adapter {adapter!r} has no layer in this model."
        raise nncf.ValidationError(msg)
    return adapter, layers


def check_unshared(base: nn.Module, layers: Mapping[str, LoraLinear]) -> None:
    """
    :param base: The base model of an adapter.
    :param layers: Layers with the adapter, by path.
    :raises nncf.ValidationError: A weight is used by another layer, too, which would be changed with it. One layer that
        the model runs in several places is fine.
    """
    names = names_of_parameters(base)
    for path, layer in layers.items():
        weight: Any = layer.get_base_layer().weight
        users = [name.replace(".base_layer.", ".") for name in names[id(weight)]]
        if len({id(base.get_submodule(name.rpartition(".")[0])) for name in names[id(weight)]}) > 1:
            msg = (
                f"The weight of {path} is shared ({', '.join(users)}): merging would change both. Leave the layer "
                "out of the adapter's target modules, or give it a weight of its own before the adapter is made (a "
                "tied head needs config.tie_word_embeddings=False as well)."
            )
            raise nncf.ValidationError(msg)


def _check_layer(path: str, layer: LoraLinear) -> None:
    base: Any = layer.get_base_layer()
    if isinstance(layer, MaskedLoraLinear):
        raise nncf.ValidationError(f"The adapter of {path} is mergeable already.")
    if layer.merged:
        raise nncf.ValidationError(f"The adapter of {path} is merged. Call unmerge_adapter() of the model first.")
    if not base.weight.is_floating_point():
        raise nncf.ValidationError(_packed_base(path))
    if base.weight.is_meta:
        raise nncf.ValidationError(f"{path} has no values (meta device). Load the weights first.")
    if not bool(base.weight.isfinite().all()):
        raise nncf.ValidationError(f"The base weight of {path} holds values that are not finite.")
    empty = int((base.weight == 0).all(dim=1).sum())
    if empty:
        msg = (
            f"{path} has {empty} rows without any weight: their outputs could not be adapted. Prune with rows of equal "
            "sparsity, or leave the layer out of the adapter's target modules."
        )
        raise nncf.ValidationError(msg)


def _read(grid: nn.Module | None, base: nn.Module) -> dict[str, Grid]:
    if grid is None:
        msg = (
            "QUANT_AWARE needs the grid: grid=MODEL with INT4 weights, from nncf_ext.compress, nncf_ext.load_gptq or "
            "nncf.compress_weights(mode=INT4_SYM)."
        )
        raise nncf.ValidationError(msg)
    if packed := sorted(decompressors(base)):
        raise nncf.ValidationError(_packed_base(packed[0].removesuffix(".weight")))
    return read_grid(grid)


def _packed_base(path: str) -> str:
    return (
        f"The base weight of {path} is packed. Adapters are trained on the sparse floating partner of a quantized "
        "base, with the packed model as the grid: nncf_ext.prerounding(packed), or the sparse model that was quantized."
    )
