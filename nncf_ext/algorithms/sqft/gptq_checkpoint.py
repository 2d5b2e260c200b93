"""Reads checkpoints in the format of AutoGPTQ, GPTQModel, Optimum and AutoRound onto the INT4 grid of this package."""

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nncf_ext.weights.int4 import check_hookable, dequantize, pack
from nncf_ext.weights.records import LayerRecord, set_record

_BITS = 4
_ZERO_POINT = 8
_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_FORMATS = ("gptq", "gptq_v2")
_AUTOROUND = ("auto-round", "auto_round", "intel/auto-round")
_SAID = ("group_size", "sym", "desc_act")
_WORDS = (torch.int32,)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


def load_gptq(folder: str | os.PathLike[str], partner: nn.Module) -> nn.Module:
    """
    Loads the quantized layers of a GPTQ checkpoint: symmetric INT4, groups of 64 or 128 in the order of the columns.

    A code c of 0..15 stands for ``scale * (c - 8)``, which is code ``c - 8`` of NNCF's INT4_SYM on the same scale.

    :param folder: Folder with safetensors files that hold ``qweight`` [in / 8, out] int32 (eight codes in a word, the
        lowest input first), ``qzeros`` [groups, out / 8] int32 (zero points, less 1 unless the checkpoint's format is
        gptq_v2), ``scales`` [groups, out] float16 and optionally ``g_idx`` [in] int32 for each layer. What
        quantize_config.json and config.json say is compared with the tensors. Their format is a hint: zero points that
        are all 8 as they stand are those of gptq_v2, which some writers do not say.
    :param partner: The floating model that was quantized, such as the sparse float16 partner of an SQFT base; gives
        everything that is not quantized, and the type of weights. Not changed.
    :return: A new model with packed INT4 weights: the grid of :func:`nncf_ext.make_mergeable`. GPTQ knows nothing of
        zeros, so the code of a pruned weight may not be zero. Such codes are set to zero; the report says how many, and
        how far the weights are from the partner's.
    :raises nncf.ValidationError: There is no quantized layer, a file is damaged, a tensor is missing, of another type,
        or not finite, or one fits no layer of `partner` or not what the configuration says.
    :raises nncf.UnsupportedModelError: A quantized layer is no floating ``torch.nn.Linear`` of `partner`, or shares its
        weight with another.
    :raises nncf.ParameterNotSupportedError: Not symmetric, not 4 bits, another format (marlin), other groups, columns
        in another order (desc_act), or scales that are no float16 numbers.
    """
    tensors = _read(Path(folder))
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not layers:
        msg = f"{folder} holds no tensor named *.qweight: it is no GPTQ checkpoint. It holds {list(tensors)[:4]}."
        raise nncf.ValidationError(msg)
    orphans = {name.rpartition(".")[0] for name in tensors.keys() - partner.state_dict().keys()} - {*layers}
    if orphans:
        msg = f"{folder} lacks qweight of {', '.join(sorted(orphans)[:4])}, of which it holds other quantized tensors."
        raise nncf.ValidationError(msg)
    check_hookable(partner)
    config = _config_of(Path(folder))
    grids = {}
    for layer in layers:
        weight = _partner_weight(partner, layer)
        missing = [suffix for suffix in _SUFFIXES[:3] if f"{layer}.{suffix}" not in tensors]
        if missing:
            raise nncf.ValidationError(f"{folder} lacks {', '.join(missing)} of {layer}.")
        parts = {suffix: tensors.get(f"{layer}.{suffix}") for suffix in _SUFFIXES}
        codes, scales = (each.to(weight.device) for each in _grid(layer, parts, tuple(weight.shape), config))
        codes, record = _like_partner(layer, weight.detach(), codes, scales)
        grids[layer] = codes, scales, record
    model = copy.deepcopy(partner)
    for layer, (codes, scales, record) in grids.items():
        pack(model, f"{layer}.weight", codes, scales)
        set_record(model.get_submodule(layer), record)
    return model


def _like_partner(layer: str, weight: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, LayerRecord]:
    """The codes with the zeros of the partner, and what is to be noted on the layer."""
    regained = (weight == 0) & (codes != 0)
    codes = codes.masked_fill(regained, 0)
    error = float((dequantize(codes, scales) - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))
    lost = int(regained.sum())
    note = f"{lost} codes of pruned weights were set to zero" if lost else None
    record = LayerRecord("gptq_checkpoint", None, weight.nbytes, error, "weight", note, prerounding=weight)
    return codes, record


def _partner_weight(partner: nn.Module, layer: str) -> Tensor:
    try:
        module, weight = partner.get_submodule(layer), partner.get_parameter(f"{layer}.weight")
    except AttributeError:
        msg = f"{layer} is quantized in the checkpoint, and {type(partner).__name__} has no such layer."
        raise nncf.ValidationError(msg) from None
    if type(module) is not nn.Linear or not weight.is_floating_point():
        msg = (
            f"{layer} is a {type(module).__name__} with a weight of {weight.dtype} in the partner. Only floating "
            "torch.nn.Linear layers, [out, in], can be put on the grid."
        )
        raise nncf.UnsupportedModelError(msg)
    names = [name for name, each in partner.named_parameters(remove_duplicate=False) if each is weight]
    if len(names) > 1:
        msg = f"{layer} is quantized in the checkpoint; in the partner, {', '.join(names)} are one weight. Untie them."
        raise nncf.UnsupportedModelError(msg)
    return weight


def _read(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        msg = f"{folder} holds no *.safetensors file. Checkpoints in pickle files are not opened: convert them first."
        raise nncf.ValidationError(msg)
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dictionary
                    if name.rpartition(".")[2] in _SUFFIXES:
                        tensors[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise nncf.ValidationError(f"{file} is damaged ({error}). Get it again.") from error
    return tensors


@dataclass(frozen=True)
class _Config:
    """
    What a folder says about its tensors; None: nothing.

    :param format: ``"gptq"`` stores zero points less 1, ``"gptq_v2"`` as they are.
    :param group_size: Inputs that share a scale; -1: all.
    :param sym: Whether all zero points are 8.
    :param desc_act: Whether columns were quantized in another order than theirs.
    """

    format: str | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None


def _config_of(folder: Path) -> _Config:
    """What quantize_config.json says, and of what it is silent about, config.json."""
    known: dict[str, Any] = {}
    for config in _configs(folder):
        if (bits := config.get("bits", _BITS)) != _BITS:
            msg = f"The checkpoint has {bits} bits a weight. Here only 4 are read."
            raise nncf.ParameterNotSupportedError(msg)
        form = config.get("checkpoint_format", config.get("format"))
        told = ["marlin" if config.get("is_marlin_format") else form, config.get("quant_method")]
        if told[1] in _AUTOROUND:
            packing = config.get("packing_format")  # "auto_round:auto_gptq" has the words of "gptq"
            told[1] = "gptq" if str(packing).endswith("gptq") else packing
        if others := [each for each in told if each not in (None, *_FORMATS)]:
            msg = f"The checkpoint's format is {others[0]!r}, whose words are packed in another way. Save it as 'gptq'."
            raise nncf.ParameterNotSupportedError(msg)
        for name, kind in (("group_size", int), ("sym", bool), ("desc_act", bool)):
            value = config.get(name)
            if kind is int and isinstance(value, float) and value.is_integer():
                config[name] = value = int(value)
            if value is not None and type(value) is not kind:
                msg = f"The checkpoint's {name} is {value!r}; it must be of type {kind.__name__}."
                raise nncf.ValidationError(msg)
        known = {"format": form, **{name: config.get(name) for name in _SAID}} | {
            name: value for name, value in known.items() if value is not None
        }
    return _Config(**known)


def _configs(folder: Path) -> Iterator[dict[str, Any]]:
    for name in ("quantize_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise nncf.ValidationError(f"{folder / name} is no JSON ({error}).") from error
        if name == "config.json" and isinstance(config, dict):
            config = config.get("quantization_config") or {}
        if not isinstance(config, dict):
            raise nncf.ValidationError(f"{folder / name} holds a {type(config).__name__} where an object belongs.")
        yield config


def _grid(
    layer: str, parts: dict[str, Tensor | None], shape: tuple[int, ...], config: _Config
) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` int8 and scales ``[out, groups]`` float16 of one layer."""
    qweight, qzeros, scales, order = (parts[suffix] for suffix in _SUFFIXES)
    assert qweight is not None and qzeros is not None and scales is not None  # load_gptq has looked
    rows, columns = shape
    groups = scales.shape[0] if scales.ndim else 0
    expected = {
        "qweight": (_WORDS, [columns * _BITS // 32, rows]),
        "qzeros": (_WORDS, [groups, rows * _BITS // 32]),
        "scales": (_FLOATS, [max(groups, 1), rows]),
        "g_idx": (_INTEGERS, [columns]),
    }
    for suffix, (dtypes, wanted) in expected.items():
        tensor = parts[suffix]
        if tensor is not None and list(tensor.shape) != wanted:
            needed = f"a weight of {list(shape)} with {groups} groups needs {wanted}"
            raise nncf.ValidationError(f"{layer}.{suffix} is {list(tensor.shape)}; {needed}.")
        if tensor is not None and tensor.dtype not in dtypes:
            names = " or ".join(str(dtype) for dtype in dtypes)
            raise nncf.ValidationError(f"{layer}.{suffix} is {tensor.dtype}; it must be {names}.")
    _check_groups(layer, columns, groups, order, config)
    _check_zeros(layer, _unpacked(qzeros, dim=1), config)
    codes = (_unpacked(qweight, dim=0) - _ZERO_POINT).T.contiguous().to(torch.int8)
    stored = scales.T.contiguous()
    if not bool(stored.isfinite().all()):
        raise nncf.ValidationError(f"{layer}.scales holds values that are not finite.")
    if not torch.equal(stored.half().to(stored.dtype), stored):
        msg = f"{layer}.scales is {stored.dtype} with values that float16, the type of the grid's scales, cannot hold."
        raise nncf.ParameterNotSupportedError(msg)
    return codes, stored.half()


def _check_groups(layer: str, columns: int, groups: int, order: Tensor | None, config: _Config) -> None:
    group = columns // groups
    if columns % groups or (groups > 1 and group not in (64, 128)):
        msg = f"{layer} has {groups} groups for {columns} inputs. Groups of 64 or 128 are read, or one for all inputs."
        raise nncf.ParameterNotSupportedError(msg)
    said = config.group_size
    if said is not None and said != -1 and (said < 1 or -(-columns // said) != groups) or (said == -1 and groups > 1):
        msg = (
            f"{layer} has {groups} groups for {columns} inputs, and the configuration says group_size={said}. One of "
            "them is of another checkpoint."
        )
        raise nncf.ValidationError(msg)
    if order is None and config.desc_act and groups > 1:
        msg = f"The configuration says desc_act=True, and the order of the columns, {layer}.g_idx, is missing."
        raise nncf.ValidationError(msg)
    if order is not None and not torch.equal(order, torch.arange(columns, dtype=order.dtype) // group):
        msg = (
            f"The columns of {layer} are not in their order (desc_act=True), so groups are no runs of columns and the "
            "grid cannot hold them. Quantize with desc_act=False."
        )
        raise nncf.ParameterNotSupportedError(msg)


def _check_zeros(layer: str, stored: Tensor, config: _Config) -> None:
    """Refuses zero points other than 8."""
    if config.format != "gptq_v2" and config.sym is not False and bool((stored == _ZERO_POINT).all()):
        return  # as gptq_v2 stores them, whatever the file calls itself
    zeros = stored + int(config.format != "gptq_v2")
    if bool((zeros != _ZERO_POINT).any()):
        msg = (
            f"{layer} has zero points {sorted(set(zeros.flatten().tolist()))[:4]}, so it is not symmetric; symmetric "
            f"codes have {_ZERO_POINT} (in files less 1 unless the format is gptq_v2). Quantize with sym=True."
        )
        raise nncf.ParameterNotSupportedError(msg)


def _unpacked(words: Tensor, dim: int) -> Tensor:
    """Eight numbers of 4 bits from each word, the lowest bits first, along an axis."""
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int64)
    view = [1, 1, 1]
    view[dim + 1] = 8
    numbers = words.long().unsqueeze(dim + 1) >> shifts.reshape(view) & 15
    return numbers.flatten(dim, dim + 1)
