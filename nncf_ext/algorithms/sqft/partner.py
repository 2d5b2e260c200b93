"""The floating model that adapters are trained on, and the grid that belongs to it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.upstream import unwrap_model
from nncf_ext.weights.int4 import (
    codes_and_scales,
    decompressors,
    dequantize,
    round_to_grid,
    unpack,
    weight_hooks,
)
from nncf_ext.weights.records import LayerRecord, record_of, set_record

# A weight that is moved into the cell of its code ends at most so far from the middle, in steps of the grid. The border
# is at 0.5. Rounding to bfloat16 moves a weight of 8 steps by 0.02 steps at most, so it stays inside.
_REACH = 0.4


@dataclass(frozen=True)
class Grid:
    """
    One weight of the grid.

    :param codes: ``[out, in]`` int8.
    :param scales: ``[out, groups]`` float16.
    :param record: What was noted on the layer, without the weight before rounding.
    """

    codes: Tensor
    scales: Tensor
    record: LayerRecord | None


def prerounding(model: nn.Module) -> nn.Module:
    """
    The floating partner of a model that :func:`nncf_ext.compress` put on the INT4 grid: its weights as they were just
    before rounding, masked and error-compensated. Adapters are trained on it, with the grid of `model`: at their start
    (B = 0), rounding gives the codes of `model`, all of GPTQ's corrections included.

    :param model: Compressed with ``AdvancedSparseWeightsParameters(quantization=INT4_SYM, keep_prerounding=True)``, or
        read by :func:`nncf_ext.load_gptq`, whose partner it gives back then.
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
    unwrap_model(result)
    return result


def _prerounding_of(model: nn.Module, path: str) -> Tensor:
    record = record_of(model.get_submodule(path.rpartition(".")[0]))
    if record is None or record.prerounding is None:
        msg = (
            f"{path} has no record of its weight before rounding (it is not saved with a model). Compress with "
            "AdvancedSparseWeightsParameters(keep_prerounding=True), or train on the sparse floating partner."
        )
        raise nncf.ValidationError(msg)
    return record.prerounding


def read_grid(model: nn.Module) -> dict[str, Grid]:
    """
    :param model: Model with packed INT4 weights.
    :return: Its grid, by the path of the layer.
    :raises nncf.ValidationError: Scales are zero or not finite.
    """
    found = {}
    for name, decompressor in decompressors(model).items():
        path = name.removesuffix(".weight")
        codes, scales = codes_and_scales(model.get_parameter(name), decompressor)
        if not bool((scales.isfinite() & (scales != 0)).all()):
            raise nncf.ValidationError(f"The grid's scales of {path} are zero or not finite.")
        record = record_of(model.get_submodule(path))
        found[path] = Grid(codes, scales, None if record is None else replace(record, prerounding=None))
    return found


def check_partners(base: nn.Module, weights: Mapping[str, Tensor], grid: nn.Module, grids: Mapping[str, Grid]) -> None:
    """
    :param base: The floating model.
    :param weights: Its weights with an adapter, by the path of the layer.
    :param grid: The packed model.
    :param grids: What was read from it.
    :raises nncf.ValidationError: The two models do not belong together.
    """
    hooks = weight_hooks(grid)
    for path, weight in weights.items():
        if path not in grids:
            raise nncf.ValidationError(_missing(path, grid, hooks.get(f"{path}.weight")))
        codes = grids[path].codes.to(weight.device)
        _check_shape(path, weight, codes)
        regained = int(((codes != 0) & (weight == 0)).sum())
        if regained:
            msg = (
                f"{path} has {regained} zeros whose codes in the grid are not zero: the base is not the sparse partner "
                "of this grid, or quantization lost zeros. nncf_ext.compress keeps them; nncf_ext.load_gptq sets "
                "such codes to zero."
            )
            raise nncf.ValidationError(msg)
    for path in (path for path in grids if path not in weights):
        try:
            _check_shape(path, base.get_parameter(f"{path}.weight"), grids[path].codes)
        except AttributeError:
            msg = f"The grid has a layer {path}, and the base, a {type(base).__name__}, has none: not partners."
            raise nncf.ValidationError(msg) from None


def _check_shape(path: str, weight: Tensor, codes: Tensor) -> None:
    if codes.shape != weight.shape:
        msg = f"{path} is {list(weight.shape)} in the base and {list(codes.shape)} in the grid: not partners."
        raise nncf.ValidationError(msg)


def _missing(path: str, grid: nn.Module, hook: nn.Module | None) -> str:
    found = "no packed weight" if hook is None else f"a {type(hook).__name__}"
    advice = "Every adapted layer needs symmetric INT4 codes; or leave it out of the adapter's target modules."
    modules = dict(grid.named_modules())
    record = record_of(modules[path]) if path in modules else None
    if path not in modules:
        found = "no such layer"
    elif record is not None and record.note is not None:
        advice = f"Compression noted there: {record.note}. {advice}"
    elif hook is not None and "Lora" in type(hook).__name__:
        advice = (
            "That is NNCF's FQ_LORA in training. nncf.strip(grid, strip_format=nncf.StripFormat.DQ) packs it; INT4_SYM "
            "becomes a grid, other modes do not."
        )
    elif hook is not None and "Asymmetric" in type(hook).__name__:
        advice = f"Asymmetric grids are not supported: codes have no sign and every group a zero point. {advice}"
    return f"The grid has {found} at {path}, which has an adapter. {advice}"


def into_cells(weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """
    Moves weights that would round to another code just far enough to round to their own. The cell of a code are the
    numbers that round to it.

    :param weight: ``[out, in]``, floating.
    :param codes: ``[out, in]`` int8; zero where the weight is.
    :param scales: ``[out, groups]`` float16.
    :return: ``[out, in]`` of the type of `weight`. Rounding it to the grid gives the codes.
    """
    wrong = round_to_grid(weight.float(), scales) != codes
    if not bool(wrong.any()):
        return weight
    steps = scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    center = codes.float()
    moved = (weight.float() / steps).clamp(center - _REACH, center + _REACH) * steps
    return torch.where(wrong, moved.to(weight.dtype), weight)


def on_grid(weight: Tensor, grid: Grid) -> Tensor:
    """
    :param weight: Tells type and device.
    :param grid: Codes and scales.
    :return: The numbers that the codes stand for, as the packed layer computes with them.
    """
    values: Any = dequantize(grid.codes, grid.scales)
    return values.to(weight)
