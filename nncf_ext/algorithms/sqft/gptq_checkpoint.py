"""Reads checkpoints in the format of AutoGPTQ, GPTQModel and Optimum onto the INT4 grid of this package."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nncf
import torch
from safetensors import safe_open
from torch import Tensor, nn

from nncf_ext.structure.grid import check_hookable, pack
from nncf_ext.structure.records import LayerRecord, set_record

_BITS = 4
_ZERO_POINT = 8
_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def load_gptq(folder: str | os.PathLike[str], partner: nn.Module) -> nn.Module:
    """
    Loads the quantized layers of a GPTQ checkpoint: symmetric INT4, groups of 64 or 128 in the order of the columns.

    A code c of 0..15 stands for ``scale * (c - 8)``, which is code ``c - 8`` of NNCF's INT4_SYM on the same scale.

    :param folder: Folder with safetensors files that hold ``qweight`` [in / 8, out] int32 (eight codes in a word, the
        lowest input first), ``qzeros`` [groups, out / 8] int32 (zero points, less 1 unless the checkpoint's format is
        gptq_v2), ``scales`` [groups, out] float16 and optionally ``g_idx`` [in] int32 for each layer.
    :param partner: The floating model that was quantized, such as the sparse float16 partner of an SQFT base; gives
        everything that is not quantized, and the type of weights. Not changed.
    :return: A new model with packed INT4 weights: the grid of :func:`nncf_ext.make_mergeable`.
    :raises nncf.ValidationError: There is no quantized layer, a tensor is missing, or one fits no layer of `partner`.
    :raises nncf.ParameterNotSupportedError: Not symmetric, not 4 bits, other groups, or columns in another order
        (desc_act).
    """
    tensors = _read(Path(folder))
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not layers:
        msg = f"{folder} holds no tensor named *.qweight: it is no GPTQ checkpoint. It holds {list(tensors)[:4]}."
        raise nncf.ValidationError(msg)
    check_hookable(partner)
    less_one = _format_of(Path(folder)) != "gptq_v2"
    grids = {}
    for layer in layers:
        try:
            weight = partner.get_parameter(f"{layer}.weight")
        except AttributeError:
            msg = f"{layer} is quantized in {folder}, and {type(partner).__name__} has no such layer."
            raise nncf.ValidationError(msg) from None
        missing = [suffix for suffix in _SUFFIXES[:3] if f"{layer}.{suffix}" not in tensors]
        if missing:
            raise nncf.ValidationError(f"{folder} lacks {', '.join(missing)} of {layer}.")
        parts = {suffix: tensors.get(f"{layer}.{suffix}") for suffix in _SUFFIXES}
        grids[layer] = _grid(layer, parts, tuple(weight.shape), less_one)
    model = copy.deepcopy(partner)
    for layer, (codes, scales) in grids.items():
        parameter = model.get_parameter(f"{layer}.weight")
        before = parameter.nbytes
        pack(model, f"{layer}.weight", codes.to(parameter.device), scales.to(parameter.device))
        set_record(model.get_submodule(layer), LayerRecord(mode="gptq_checkpoint", bytes_before=before))
    return model


def _read(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        msg = f"{folder} holds no *.safetensors file. Checkpoints in pickle files are not opened: convert them first."
        raise nncf.ValidationError(msg)
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dictionary
                if name.rpartition(".")[2] in _SUFFIXES:
                    tensors[name] = opened.get_tensor(name)
    return tensors


def _format_of(folder: Path) -> str:
    """What the folder says about zero points: ``"gptq"`` stores them less 1."""
    for config in _configs(folder):
        if "checkpoint_format" in config:
            return str(config["checkpoint_format"])
    return "gptq"


def _configs(folder: Path) -> Iterator[dict[str, Any]]:
    for name in ("quantize_config.json", "config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            config = config.get("quantization_config", config) if isinstance(config, dict) else {}
            if int(config.get("bits", _BITS)) != _BITS:
                msg = f"The checkpoint has {config['bits']} bits a weight. Here only 4 are read."
                raise nncf.ParameterNotSupportedError(msg)
            yield config


def _grid(layer: str, parts: dict[str, Tensor | None], shape: tuple[int, ...], less_one: bool) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` int8 and scales ``[out, groups]`` float16 of one layer."""
    qweight, qzeros, scales, order = (parts[suffix] for suffix in _SUFFIXES)
    assert qweight is not None and qzeros is not None and scales is not None  # load_gptq has looked
    rows, columns = shape
    groups = scales.shape[0]
    expected = {
        "qweight": [columns * _BITS // 32, rows],
        "qzeros": [groups, rows * _BITS // 32],
        "scales": [groups, rows],
    }
    for suffix, wanted in expected.items():
        found = list(parts[suffix].shape)  # type: ignore[union-attr]
        if found != wanted:
            msg = f"{layer}.{suffix} is {found}; a weight of {list(shape)} with {groups} groups needs {wanted}."
            raise nncf.ValidationError(msg)
    group = columns // groups
    if columns % groups or (groups > 1 and group not in (64, 128)):
        msg = f"{layer} has {groups} groups for {columns} inputs. Groups of 64 or 128 are read, or one for all inputs."
        raise nncf.ParameterNotSupportedError(msg)
    if order is not None and not torch.equal(order, torch.arange(columns, dtype=order.dtype) // group):
        msg = (
            f"The columns of {layer} are not in their order (desc_act=True), so groups are no runs of columns and the "
            "grid cannot hold them. Quantize with desc_act=False."
        )
        raise nncf.ParameterNotSupportedError(msg)
    zeros = _unpacked(qzeros, dim=1) + int(less_one)
    if bool((zeros != _ZERO_POINT).any()):
        msg = (
            f"{layer} has zero points {sorted(set(zeros.flatten().tolist()))[:4]}, so it is not symmetric; symmetric "
            f"codes have {_ZERO_POINT} (in files less 1 unless the format is gptq_v2). Quantize with sym=True."
        )
        raise nncf.ParameterNotSupportedError(msg)
    codes = (_unpacked(qweight, dim=0) - _ZERO_POINT).T.contiguous().to(torch.int8)
    return codes, scales.T.contiguous().half()


def _unpacked(words: Tensor, dim: int) -> Tensor:
    """Eight numbers of 4 bits from each word, the lowest bits first, along an axis."""
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int64)
    view = [1, 1, 1]
    view[dim + 1] = 8
    numbers = words.long().unsqueeze(dim + 1) >> shifts.reshape(view) & 15
    return numbers.flatten(dim, dim + 1)
