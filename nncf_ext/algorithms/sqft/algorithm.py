"""Makes the adapters of a PEFT model mergeable: masked by the zeros of their base, on request rounded to its grid."""

import copy
from collections.abc import Iterator
from typing import Any

import nncf
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nncf_ext.algorithms.sqft.layers import MaskedLoraLinear, QuantizedLoraLinear
from nncf_ext.algorithms.sqft.parameters import AdvancedSqftParameters
from nncf_ext.parameters import MergeMode
from nncf_ext.structure.grid import codes_and_scales, decompressors, unpack, weight_hooks
from nncf_ext.structure.records import record_of, set_record


def prerounding(model: nn.Module) -> nn.Module:
    """
    The floating partner of a model that :func:`nncf_ext.compress` put on the INT4 grid: its weights as they were just
    before rounding, masked and error-compensated. Adapters are trained on it, with the grid of `model`: at their start
    (B = 0), rounding gives the codes of `model`, all of GPTQ's corrections included.

    :param model: Compressed with ``AdvancedSparseWeightsParameters(quantization=INT4_SYM, keep_prerounding=True)``.
    :return: A new model without hooks; `model` is not changed.
    :raises nncf.ValidationError: A packed layer has no record of its weight before rounding, or no layer is packed.
    """
    packed = decompressors(model)
    if not packed:
        msg = (
            f"{type(model).__name__} has no packed INT4 weight, so there is nothing from before rounding to give back."
        )
        raise nncf.ValidationError(msg)
    kept = {path: _prerounding_of(model, path) for path in packed}
    result = copy.deepcopy(model)
    for path, weight in kept.items():
        unpack(result, path)
        parameter = result.get_parameter(path)
        parameter.data = weight.to(parameter)
        set_record(result.get_submodule(path.rpartition(".")[0]), None)
    return result


def _prerounding_of(model: nn.Module, path: str) -> Tensor:
    record = record_of(model.get_submodule(path.rpartition(".")[0]))
    if record is None or record.prerounding is None:
        msg = (
            f"{path} has no record of its weight before rounding (records are not saved with a model). Compress with "
            "AdvancedSparseWeightsParameters(keep_prerounding=True), or train on the sparse floating partner."
        )
        raise nncf.ValidationError(msg)
    return record.prerounding


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
    mode = _mode(mode)
    parameters = advanced_parameters or AdvancedSqftParameters()
    adapter, layers = find_layers(model)
    quantized = mode is MergeMode.QUANT_AWARE
    if not quantized and (grid is not None or parameters != AdvancedSqftParameters()):
        msg = "grid and AdvancedSqftParameters belong to MergeMode.QUANT_AWARE; the mode is SPARSE."
        raise nncf.ParameterNotSupportedError(msg)
    scales = _scales(grid, layers) if quantized else {}
    for path, layer in layers.items():
        _check_layer(path, layer)
    for path, layer in layers.items():
        if quantized:
            trained_with = adapter if parameters.trainable_scales else None
            by_input = parameters.dropout == "input"
            made: MaskedLoraLinear = QuantizedLoraLinear.on_grid(layer, scales[path], trained_with, by_input)
        else:
            made = MaskedLoraLinear.around(layer)
        parent, _, name = path.rpartition(".")
        setattr(model.get_base_model().get_submodule(parent), name, made)  # type: ignore[operator]  # a PeftModel
    return model  # type: ignore[return-value]  # find_layers has made sure


def _mode(mode: MergeMode) -> MergeMode:
    try:
        return MergeMode(mode)
    except ValueError:
        msg = f"Unknown mode {mode!r}. Modes: {', '.join(f'MergeMode.{each.name}' for each in MergeMode)}."
        raise nncf.ParameterNotSupportedError(msg) from None


def find_layers(model: nn.Module) -> tuple[str, dict[str, LoraLinear]]:
    """
    Finds the layers of the active adapter, and refuses what cannot be merged.

    :param model: PEFT model.
    :return: The adapter's name, and its layers by path in the base model.
    :raises nncf.UnsupportedModelError: See :func:`make_mergeable`.
    :raises nncf.ValidationError: Several adapters are active.
    """
    if not isinstance(model, PeftModel):
        msg = f"A model from peft.get_peft_model or PeftModel.from_pretrained is needed; got a {type(model).__name__}."
        raise nncf.UnsupportedModelError(msg)
    active = list(model.active_adapters)
    if len(active) != 1:
        msg = f"Adapters {active} are active; exactly one must be. Use set_adapter(name)."
        raise nncf.ValidationError(msg)
    config: Any = model.peft_config[active[0]]
    if type(config) is not LoraConfig:
        msg = f"Adapter {active[0]!r} is {config.peft_type}. Only LoRA can be merged into the zeros of its base."
        raise nncf.UnsupportedModelError(msg)
    for setting, why in _refused(config):
        raise nncf.UnsupportedModelError(f"Adapter {active[0]!r} has {setting}: {why}")
    layers: dict[str, LoraLinear] = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or active[0] not in (*module.lora_A, *module.lora_embedding_A):
            continue
        if not isinstance(module, LoraLinear) or type(module.get_base_layer()) is not nn.Linear:
            kind = type(module.get_base_layer()).__name__
            parameter = getattr(module, "parameter_name", None)
            what = f"the parameter {parameter!r} of {kind} (target_parameters)" if parameter else f"a {kind}"
            msg = f"{path} adapts {what}. Only adapters of torch.nn.Linear can be merged: choose other target modules."
            raise nncf.UnsupportedModelError(msg)
        layers[path] = module
    if not layers:
        msg = f"Adapter {active[0]!r} has no layer in this model."
        raise nncf.ValidationError(msg)
    return active[0], layers


def _refused(config: LoraConfig) -> Iterator[tuple[str, str]]:
    if config.use_dora:
        yield "use_dora=True", "DoRA scales whole rows, base weight included. Use plain LoRA."
    if config.bias != "none" or config.lora_bias:
        yield f"bias={config.bias!r}, lora_bias={config.lora_bias}", "biases stay as they are. Use bias='none'."
    if config.modules_to_save:
        yield f"modules_to_save={list(config.modules_to_save)}", "a module trained as a whole keeps no zeros."
    if getattr(config, "trainable_token_indices", None):
        yield "trainable_token_indices", "embeddings are not merged here."
    if config.fan_in_fan_out:
        yield "fan_in_fan_out=True", "weights are expected as [out, in]."


def _check_layer(path: str, layer: LoraLinear) -> None:
    base: Any = layer.get_base_layer()
    if isinstance(layer, MaskedLoraLinear):
        raise nncf.ValidationError(f"The adapter of {path} is mergeable already.")
    if layer.merged:
        raise nncf.ValidationError(f"The adapter of {path} is merged. Call unmerge_adapter() of the model first.")
    if not base.weight.is_floating_point():
        msg = (
            f"The base weight of {path} is packed ({base.weight.dtype}). Adapters are trained on its sparse floating "
            "partner, with the packed model as the grid: nncf_ext.prerounding(packed), or the sparse model that was "
            "quantized."
        )
        raise nncf.ValidationError(msg)
    if not bool(base.weight.isfinite().all()):
        raise nncf.ValidationError(f"The base weight of {path} holds values that are not finite.")
    empty = int((base.weight == 0).all(dim=1).sum())
    if empty:
        msg = (
            f"{path} has {empty} rows without any weight: their outputs could not be adapted. Prune with rows of equal "
            "sparsity, or leave the layer out of the adapter's target modules."
        )
        raise nncf.ValidationError(msg)


def _scales(grid: nn.Module | None, layers: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """The scales of every layer, on its device."""
    if grid is None:
        msg = (
            "QUANT_AWARE needs the grid: grid=MODEL with INT4 weights, from nncf_ext.compress, nncf_ext.load_gptq or "
            "nncf.compress_weights(mode=INT4_SYM)."
        )
        raise nncf.ValidationError(msg)
    packed, hooks = decompressors(grid), weight_hooks(grid)
    found = {}
    for path, layer in layers.items():
        name = f"{path}.weight"
        weight: Any = layer.get_base_layer().weight
        if name not in packed:
            kind = f"a {type(hooks[name]).__name__}" if name in hooks else "no symmetric INT4 weight"
            msg = (
                f"The grid has {kind} at {path}, which has an adapter. Every adapted layer needs symmetric INT4 codes, "
                "on which zero is a code; or leave it out of the adapter's target modules."
            )
            raise nncf.ValidationError(msg)
        codes, scales = codes_and_scales(grid.get_parameter(name), packed[name])
        if codes.shape != weight.shape:
            msg = f"{path} is {list(weight.shape)} in the base and {list(codes.shape)} in the grid: not partners."
            raise nncf.ValidationError(msg)
        if not bool((scales.isfinite() & (scales != 0)).all()):
            raise nncf.ValidationError(f"The grid's scales of {path} are zero or not finite.")
        regained = (codes.to(weight.device) != 0) & (weight == 0)
        if bool(regained.any()):
            msg = (
                f"{path} has {int(regained.sum())} zeros whose codes in the grid are not zero: the base is not the "
                "sparse partner of this grid."
            )
            raise nncf.ValidationError(msg)
        found[path] = scales.to(weight.device)
    return found
