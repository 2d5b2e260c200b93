"""
The INT4 grid, and INT8, in a folder: which weights are packed, in which groups, and where their decompressors stand.

The description is what ``nncf.torch.get_config`` returns. It stands in ``config.json`` as ``quantization_config``; in
folders of earlier releases it is a file of its own, ``nncf_config.json``, beside ``nncf_model.safetensors``.
"""

from collections.abc import Hashable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.saving.folder import (
    GRID_CONFIG,
    GRID_VERSION,
    GRID_WEIGHTS,
    LAST,
    QUANT_METHOD,
    Stored,
    passing_buffers,
    read_object,
)
from nncf_ext.upstream import HOOKS_PREFIX, decode_hook_name, is_wrapped, scale_of
from nncf_ext.weights.int4 import PackedInt4Weight, weight_hooks
from nncf_ext.weights.int8 import PackedInt8Weight
from nncf_ext.weights.sharing import place_of

CODES = {"U8": torch.uint8, "I8": torch.int8}
"""Types of codes in files: of INT4, two in a byte, and of INT8."""


def grid_of(model: nn.Module) -> dict[str, Any] | None:
    """
    :param model: Any torch model.
    :return: Its ``quantization_config``; None for a model without hooks of NNCF.
    """
    if not is_wrapped(model):
        return None
    return {"quant_method": QUANT_METHOD, "version": GRID_VERSION, **nncf.torch.get_config(model)}


def each_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    :param model: Any torch model.
    :return: Its tensors for a file, each under the first of its names, and by the other names (of tied weights) that
        first one. Among them are floating buffers that are no part of the state dict: they keep the type that the model
        was turned to. Names of hooks' tensors begin with :data:`nncf_ext.saving.folder.LAST`.
    """
    passing = {name: each for name, each in passing_buffers(model).items() if each.is_floating_point()}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for own, tensor in {**model.state_dict(), **passing}.items():
        name = LAST + own if own.startswith(HOOKS_PREFIX) else own
        known = first.setdefault(place_of(tensor), name)
        if known != name:
            shared[name] = known
        elif tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
            tensors[name] = tensor
        else:
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # a view is saved without the rest
    return tensors, shared


def grid_in(source: Path, content: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """
    :param source: A model folder.
    :param content: Its ``config.json``.
    :return: The file that describes the grid, and the description; None where there is no grid.
    :raises nncf.ValidationError: The description is damaged, or of a later release.
    """
    quantization = content.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        check_version(source / "config.json", quantization.get("version"))
        return source / "config.json", quantization
    if (source / GRID_CONFIG).is_file() and (source / GRID_WEIGHTS).is_file():
        return source / GRID_CONFIG, read_object(source / GRID_CONFIG)
    return None


def check_version(path: Path | str, version: Any) -> None:
    """
    :param path: The file with the description.
    :param version: The version that it names.
    :raises nncf.ValidationError: This release does not read it.
    """
    if not isinstance(version, int) or version > GRID_VERSION:
        msg = (
            f"{path} describes weights on the INT4 grid in version {version}; this release reads versions up to "
            f"{GRID_VERSION}. Upgrade nncf-ext."
        )
        raise nncf.ValidationError(msg)


def check_grid(path: Path, grid: Mapping[str, Any], stored: Mapping[str, Stored], outline: nn.Module) -> None:
    """
    Every packed weight has as many codes as the weight that it stands for, and that weight is the model's.

    :param path: The file with the description.
    :param grid: The description.
    :param stored: The tensors beside it, by the names that the model gives them.
    :param outline: The model, in floating shapes; meta device will do.
    :raises nncf.ValidationError: Description, tensors and model do not belong together.
    """
    expected, packed = outline.state_dict(), set()
    for command in grid["compression_state"]:
        for hook in command["hook_names_in_model"]:
            name = decode_hook_name(hook)[1]
            kind = command["module_cls_name"]
            if kind not in (PackedInt4Weight.__name__, PackedInt8Weight.__name__) or name not in expected:
                continue
            if name not in stored:
                msg = f"{path} puts {name} on the grid; no file of the folder holds its codes."
                raise nncf.ValidationError(msg)
            config, each, shape = command["module_config"], stored[name], tuple(expected[name].shape)
            if kind == PackedInt8Weight.__name__:
                if config["rows"] != shape[0] or each.dtype != "I8" or tuple(each.shape) != shape:
                    msg = (
                        f"{path} and {each.file.name} do not fit {name}: {config['rows']} rows, {each.dtype} "
                        f"{list(each.shape)}; the configuration describes {list(shape)}, so as many INT8 codes."
                    )
                    raise nncf.ValidationError(msg)
                packed.add(name)
                continue
            grouped = tuple(config["compressed_weight_shape"])
            fits = tuple(config["result_shape"]) == shape and grouped[0] == shape[0] and prod(grouped) == prod(shape)
            if not fits or each.dtype != "U8" or 2 * prod(each.shape) != prod(shape):
                msg = (
                    f"{path} and {each.file.name} do not fit {name}: {config['result_shape']} in groups of "
                    f"{list(grouped)}, {each.dtype} {list(each.shape)}; the configuration describes {list(shape)}, so "
                    f"{prod(shape) // 2} bytes of codes."
                )
                raise nncf.ValidationError(msg)
            packed.add(name)
    for name, each in stored.items():
        if each.dtype in CODES and name in expected and expected[name].is_floating_point() and name not in packed:
            msg = f"{each.file}: {name} holds codes, and {path.name} says nothing about them."
            raise nncf.ValidationError(msg)


def check_scales(weights: Path, model: nn.Module) -> None:
    """
    :param weights: Where they were read.
    :param model: A model on the grid.
    :raises nncf.ValidationError: A scale is no finite float16 number.
    """
    for name, hook in weight_hooks(model).items():
        if not isinstance(hook, PackedInt4Weight | PackedInt8Weight):
            continue
        scales = scale_of(hook)
        if scales.dtype is not torch.float16 or not bool(scales.isfinite().all()):
            msg = f"{weights}: scales of {name} are {scales.dtype}, or not finite. Finite float16 numbers are needed."
            raise nncf.ValidationError(msg)
