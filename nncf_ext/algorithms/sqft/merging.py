"""Merges adapters into sparse weights, and makes sure that nothing was lost."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import nncf
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from nncf_ext.algorithms.elastic_lora.inspection import active_factors, factors
from nncf_ext.algorithms.sqft.algorithm import check_unshared, find_layers
from nncf_ext.algorithms.sqft.delta import MergedWeight, pack_mask
from nncf_ext.algorithms.sqft.layers import MaskedLoraLinear, QuantizedLoraLinear, put_scales, scales_on
from nncf_ext.parameters import MergeMode, parse_choice
from nncf_ext.structure.wrappers import plain_arithmetic, unwrapped
from nncf_ext.weights.activation_sparsity import refuse_sparse_inputs
from nncf_ext.weights.int4 import (
    check_hookable,
    codes_and_scales,
    decompressors,
    dequantize,
    pack,
    round_to_grid,
)
from nncf_ext.weights.records import LayerRecord, set_record


@plain_arithmetic()
def merge(model: nn.Module, mode: MergeMode) -> nn.Module:
    """
    Merges the active adapter into its base, or raises an error if something would be lost. With elastic ranks, the
    active ranks are merged.

    SPARSE: zeros stay zeros. The adapter may come from :func:`nncf_ext.make_mergeable`, or be any LoRA adapter trained
    on a sparse base: its delta is masked then, and the report (:func:`nncf_ext.compression_report`) tells the relative
    error of each weight that this makes. QUANT_AWARE: weights become INT4 codes, those of the training forward bit for
    bit, on its scales, in NNCF's torch form; zeros stay zeros.

    :param model: PEFT model; not changed.
    :param mode: SPARSE or QUANT_AWARE; the latter needs an adapter made mergeable in this mode.
    :return: A new model of the base's class, without adapters.
    :raises nncf.UnsupportedModelError: Not a PEFT model, or an adapter of another kind.
    :raises nncf.ValidationError: The adapter was not made for this mode, is merged already, adapts a weight that
        another layer uses, too (a tied head), or a layer would break the contract; the first such layer is named.
    :raises nncf.ParameterNotSupportedError: The mode is unknown.
    """
    mode = parse_choice(mode, MergeMode)
    model = unwrapped(model)
    adapter, layers = find_layers(model)
    quantized = mode is MergeMode.QUANT_AWARE
    for path, layer in layers.items():
        if isinstance(layer, QuantizedLoraLinear) != quantized:
            msg = f"Asked to merge with {mode.name}; the adapter of {path} is a {type(layer).__name__}. " + (
                "Train it with nncf_ext.make_mergeable(..., QUANT_AWARE)." if quantized else "Use QUANT_AWARE."
            )
            raise nncf.ValidationError(msg)
        if layer.merged:
            raise nncf.ValidationError(f"The adapter of {path} is merged already. Call unmerge_adapter() first.")
    refuse_sparse_inputs(model, "merge the adapter of")
    check_unshared(model.get_base_model(), layers)  # type: ignore[operator]  # a PeftModel: find_layers has made sure
    if quantized:
        check_hookable(model.get_base_model())  # type: ignore[operator]
    copied = copy.deepcopy(model)
    # A trainer in mixed precision wraps the forward of the one model object; its wrapper would run the original.
    copied.__dict__.pop("forward", None)
    _, copies = find_layers(copied)
    grids: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for path, layer in copies.items():
            try:
                if isinstance(layer, QuantizedLoraLinear):
                    grids[path] = _codes(layer, adapter)
                else:
                    _merge_sparse(layer, adapter)
            except nncf.ValidationError as error:
                raise nncf.ValidationError(f"{path} cannot be merged: {error}") from error
        base: nn.Module = copied.unload()  # type: ignore[operator]
        _make_plain(base)
        if quantized:
            grids |= _codes_without_adapter(base, grids.keys())
        for path, (codes, scales) in grids.items():
            pack(base, f"{path}.weight", codes, scales)
        _check(base, layers, adapter, grids)
    return base


def _codes(layer: QuantizedLoraLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """The codes and scales of a layer with its adapter."""
    layer.check_base()
    _check_factors(layer, adapter)
    base: Any = layer.get_base_layer()
    scales, codes = layer.scales_of(adapter).detach().half(), layer.merged_weight(adapter).codes()
    if not bool((scales.isfinite() & (scales != 0)).all()):
        msg = "its trained scales are zero or not finite."
        raise nncf.ValidationError(msg)
    _check_zeros(base.weight, codes)
    put_scales(base, None)
    _note(layer, MergeMode.QUANT_AWARE, None)
    return codes, scales


def _codes_without_adapter(base: nn.Module, adapted: Collection[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The codes and scales of the layers that lie on the grid and have no adapter."""
    found = {}
    for path, module in base.named_modules():
        scales = scales_on(module)
        if scales is None or path in adapted:
            continue
        weight: Any = module.weight
        codes = round_to_grid(weight.float(), scales)
        if not torch.equal(dequantize(codes, scales).to(weight.dtype), weight):
            msg = f"{path} cannot be merged: it has no adapter, and its weight left the grid since make_mergeable."
            raise nncf.ValidationError(msg)
        put_scales(module, None)
        found[path] = codes, scales
    return found


def _make_plain(base: nn.Module) -> None:
    """Undoes what training with gradient checkpointing has set on the model."""
    # disable_input_require_grads() fails where it was never enabled.
    for undo in ("disable_input_require_grads", "gradient_checkpointing_disable"):
        if (undo[0] == "g" or hasattr(base, "_require_grads_hook")) and callable(getattr(base, undo, None)):
            getattr(base, undo)()


def _check(
    base: nn.Module, layers: Mapping[str, LoraLinear], adapter: str, grids: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Compares the weights that the merged model computes with, and those of the original layers' forward."""
    hooks = decompressors(base)
    for path, layer in layers.items():
        parameter = base.get_parameter(f"{path}.weight")
        if path in grids:
            stored, scales = codes_and_scales(parameter, hooks[f"{path}.weight"])
            value = hooks[f"{path}.weight"](parameter)
            same = torch.equal(stored, grids[path][0]) and torch.equal(scales, grids[path][1])
        else:
            value, same = parameter, True
        if isinstance(layer, MaskedLoraLinear):
            same = same and torch.equal(value, layer.merged_weight(adapter).values(value.dtype))
        if not same:
            raise nncf.ValidationError(f"{path} cannot be merged: the result differs from the weight of the forward.")


def _merge_sparse(layer: LoraLinear, adapter: str) -> None:
    weight: Any = layer.get_base_layer().weight
    _check_factors(layer, adapter)
    if isinstance(layer, MaskedLoraLinear):
        layer.check_base()
        merged, error = layer.merged_weight(adapter).values(weight.dtype), None
    else:
        merged, error = _merge_foreign(layer, adapter, weight)
    if not bool(merged.isfinite().all()):
        msg = f"the merged weight is not finite in {weight.dtype}."
        raise nncf.ValidationError(msg)
    _check_zeros(weight, merged)
    weight.data = merged
    _note(layer, MergeMode.SPARSE, error)


def _merge_foreign(layer: LoraLinear, adapter: str, weight: Tensor) -> tuple[Tensor, float]:
    """An adapter that was trained without a mask: its delta is masked; how much of the weight that changes."""
    delta = *active_factors(layer, adapter), layer.scaling[adapter]
    merged = MergedWeight(weight, pack_mask(weight != 0), *delta).values(weight.dtype)
    wanted = MergedWeight(weight, pack_mask(torch.ones_like(weight, dtype=torch.bool)), *delta)
    wanted_values = wanted.values(torch.float32)
    return merged, float((wanted_values - merged.float()).norm() / wanted_values.norm().clamp_min(1e-30))


def _check_factors(layer: LoraLinear, adapter: str) -> None:
    if not all(bool(factor.isfinite().all()) for factor in factors(layer, adapter)):
        msg = "its adapter holds values that are not finite."
        raise nncf.ValidationError(msg)


def _check_zeros(before: Tensor, after: Tensor) -> None:
    regained = int(((before == 0) & (after != 0)).sum())
    if regained:
        msg = f"{regained} zeros of its base would be lost."
        raise nncf.ValidationError(msg)


def _note(layer: LoraLinear, mode: MergeMode, error: float | None) -> None:
    base: Any = layer.get_base_layer()
    record = LayerRecord(mode=f"merge_{mode.value}", bytes_before=base.weight.nbytes)
    if error is not None:
        note = "trained without a mask: its delta was masked"
        record = replace(record, error=error, error_of="weight", note=note)
    set_record(base, record)
