"""
Folders of models, read strictly: every tensor comes from the files, in the shape and kind of number of the model.

A folder that is damaged, or whose configuration and tensors do not belong together, is an error that names the file and
the tensor.
"""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.memory import is_out_of_memory
from nncf_ext.saving.folder import (
    GRID_CONFIG,
    GRID_WEIGHTS,
    STRUCTURE_VERSION,
    STRUCTURED,
    Stored,
    blamed_on,
    bounded_construction,
    check_counts,
    check_floating,
    check_size,
    check_tensor,
    check_weight_files,
    passing_buffers,
    read_config,
    read_object,
    read_tensors,
    safetensors_of,
    stored_tensors,
)
from nncf_ext.saving.layers import apply_overrides
from nncf_ext.saving.report_file import restore_records
from nncf_ext.upstream import HOOKS_PREFIX, decode_hook_name, scale_of
from nncf_ext.weights.int4 import PackedInt4Weight, decompressors
from nncf_ext.weights.sharing import names_of_parameters, tie

_RUN_CODE = "If you trust it, pass trust_remote_code=True (--trust-remote-code), and it is run."
_FLOATS = ("F32", "BF16", "F16")

TModel = TypeVar("TModel", bound=nn.Module)


def load_pretrained(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """
    Reads what :func:`save_pretrained` wrote, or any Hugging Face folder with safetensors weights.

    The model is of the class that the folder's configuration names under ``architectures``; a causal language model
    where it names none. Buffers that an ordinary folder does not hold (frequencies of position embeddings) are those
    that transformers makes, in float32. Folders of models on the grid, or with layers of different sizes, hold them.
    ``compression_report(model)`` tells of each layer what it told before the model was saved.

    :param folder: The folder.
    :param dtype: Floating type of the weights that the forward sees; None keeps that of the file. Codes and scales on
        the grid are the same in every type. OpenVINO's converter needs ``torch.float32`` for a model on the grid.
    :param trust_remote_code: Run model code that lies in the folder.
    :return: The model, in evaluation mode.
    :raises nncf.ValidationError: The folder holds no such model, a file is damaged, or a tensor is missing, of another
        shape, or of integers where the model has floating numbers.
    :raises nncf.UnsupportedModelError: The weights were quantized by another tool.
    """
    source = Path(folder)
    content = read_config(source)
    on_grid = (source / GRID_CONFIG).is_file() and (source / GRID_WEIGHTS).is_file()
    structured = content.get("model_type") == STRUCTURED
    if structured:
        _check_structure(source, content)
    if not on_grid and not structured:
        model = _load_stock(source, content, dtype, trust_remote_code)
    else:
        model = _load_own(source, content, dtype, trust_remote_code, on_grid)
    restore_records(model, source)
    return model.eval()


def _load_stock(source: Path, content: Mapping[str, Any], dtype: torch.dtype | None, trust: bool) -> nn.Module:
    check_floating(source, content)
    stored = stored_tensors(check_weight_files(source))
    check_counts(source / "config.json", content, stored)
    config = _read_config_object(source, trust)
    architecture = _architecture(source, config, trust)
    if not trust or not hasattr(architecture, "from_config"):  # an auto class may run code of the folder
        with bounded_construction(source / "config.json", stored):
            outline = _on_meta(lambda: _make(architecture, config))
        check_size(source / "config.json", outline, stored)
    with blamed_on(source):
        model, info = architecture.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    files = {each.file for each in stored.values()}
    weights = files.pop() if len(files) == 1 else source / "model.safetensors.index.json"
    for name, found, wanted in sorted(info["mismatched_keys"]):
        where = stored[name].file if name in stored else weights
        msg = f"{where}: {name} is {list(found)}; the configuration describes {list(wanted)}."
        raise nncf.ValidationError(msg)
    if missing := sorted(info["missing_keys"]):
        msg = (
            f"{weights} lacks {', '.join(missing[:4])}{' and more' * (len(missing) > 4)}, which {type(model).__name__} "
            "needs. Weights are not made up: name the class that was saved under 'architectures' in config.json."
        )
        raise nncf.ValidationError(msg)
    if getattr(config, "quantization_config", None) is None:
        _check_kinds(model, stored)
    return model


def _check_kinds(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """No integers were turned into weights."""
    state = model.state_dict()
    for name, each in stored.items():
        if each.floating:
            continue
        # transformers may have put the name of the base model before a name, or taken it away.
        known = next((key for key in state if f".{key}".endswith(f".{name}") or name.endswith(f".{key}")), None)
        if name.endswith(".weight") if known is None else state[known].is_floating_point():
            msg = f"{each.file}: {name} is {each.dtype}; {type(model).__name__} has floating numbers there."
            raise nncf.ValidationError(msg)


def _load_own(
    source: Path, content: dict[str, Any], dtype: torch.dtype | None, trust: bool, on_grid: bool
) -> nn.Module:
    """A model on the grid, with layers of different sizes, or both."""
    weights, described = source / GRID_WEIGHTS, source / "config.json"
    stored = stored_tensors([weights])
    check_counts(described, content, stored)
    make = _maker(source, content, trust)
    with bounded_construction(described, stored):
        outline = _on_meta(make)
    check_size(described, outline, stored)
    _check_tensors(stored, outline, on_grid)
    grid = read_object(source / GRID_CONFIG) if on_grid else None
    if grid is not None:
        with blamed_on(source / GRID_CONFIG):
            _check_grid(source / GRID_CONFIG, grid, stored, outline)
    from accelerate import init_empty_weights

    # Buffers that no file holds are computed by the constructor; parameters stay empty.
    with bounded_construction(described, stored), init_empty_weights(include_buffers=False):
        model = make()
    state = read_tensors(weights)
    with safetensors_of(weights) as opened:
        shared = {alias: name for alias, name in (opened.metadata() or {}).items() if name in state}
    state |= {alias: state[name] for alias, name in shared.items()}
    buffers = {name: state.pop(name) for name in passing_buffers(model) if name in state}
    if dtype is not None:
        state = {name: _as(dtype, each) if not name.startswith(HOOKS_PREFIX) else each for name, each in state.items()}
        # Position embeddings lose more by a short type than weights do.
        buffers = {name: _as(torch.promote_types(each.dtype, dtype), each) for name, each in buffers.items()}
    with blamed_on(source):
        try:
            if grid is None:
                _load_strictly(model, state)
            else:
                for command in grid["compression_state"] if dtype is not None else ():
                    command["module_config"]["result_dtype"] = str(dtype).removeprefix("torch.")
                model = load_compressed(model, grid, state)
        except nncf.ValidationError as error:
            raise nncf.ValidationError(f"{weights}: {error}") from error
    tie(model, shared)
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, buffer)
    _check_scales(weights, model)
    _load_generation_config(source, model)
    return model


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _load_generation_config(source: Path, model: Any) -> None:
    from transformers import GenerationConfig

    if (source / "generation_config.json").is_file() and model.can_generate():
        with blamed_on(source / "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(source, local_files_only=True)


def _check_structure(source: Path, content: Mapping[str, Any]) -> None:
    version = content.get("structure_version")
    if not isinstance(version, int) or version > STRUCTURE_VERSION:
        msg = (
            f"{source} holds layers of different sizes in version {version}; this release reads versions up to "
            f"{STRUCTURE_VERSION}. Upgrade nncf-ext."
        )
        raise nncf.ValidationError(msg)
    overrides = content.get("per_layer_config")
    if not isinstance(overrides, dict) or not all(isinstance(each, dict) for each in overrides.values()):
        msg = f"{source / 'config.json'} names {STRUCTURED!r} as model type, but per_layer_config is no map of layers."
        raise nncf.ValidationError(msg)
    if not (source / GRID_WEIGHTS).is_file():
        msg = f"{source} has layers of different sizes, whose weights belong in {GRID_WEIGHTS}. It is missing."
        raise nncf.ValidationError(msg)


def _maker(source: Path, content: Mapping[str, Any], trust: bool) -> Callable[[], nn.Module]:
    """What makes the model of a folder, without its weights."""
    import transformers

    if content.get("model_type") != STRUCTURED:
        config = _read_config_object(source, trust)
        architecture = _architecture(source, config, trust)
        return lambda: _make(architecture, config, trust)
    own = ("model_type", "base_model_type", "per_layer_config", "structure_version", "structure_edits", "auto_map")
    with blamed_on(source / "config.json"):
        config = transformers.AutoConfig.for_model(
            content["base_model_type"], **{key: value for key, value in content.items() if key not in own}
        )
        architecture = _architecture(source, config, trust=False)

    def make() -> nn.Module:
        model = _make(architecture, config)
        apply_overrides(model, content["per_layer_config"])
        return model

    return make


def _read_config_object(source: Path, trust: bool) -> Any:
    import transformers

    described = source / "config.json"
    with blamed_on(described):
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust, local_files_only=True)
        except ValueError as error:
            if trust or "auto_map" not in read_object(described):
                raise
            raise nncf.ValidationError(f"{described} needs code of the folder. {_RUN_CODE}") from error
    if getattr(config, "quantization_config", "") is None:
        del config.quantization_config  # "null" says that nothing is quantized; transformers takes it for a method
    return config


def _architecture(source: Path, config: Any, trust: bool) -> Any:
    """The class of transformers that makes the model: by name where the folder gives one, else an auto class."""
    import transformers

    names = getattr(config, "architectures", None) or []
    remote = getattr(config, "auto_map", None) or {}
    own = {auto: str(place).rpartition(".")[2] for auto, place in remote.items() if auto.startswith("AutoModel")}
    if own and trust:
        auto = next((auto for auto, name in own.items() if name in names), "AutoModelForCausalLM")
        return getattr(transformers, auto)
    if not names:
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, str(names[0]), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    remedy = _RUN_CODE if own else "Name the saved class."
    msg = f"{source / 'config.json'} names {names[0]!r}, which is no model that transformers knows. {remedy}"
    raise nncf.ValidationError(msg)


def _make(architecture: Any, config: Any, trust: bool = False) -> nn.Module:
    config = copy.deepcopy(config)  # a constructor may write into it
    if hasattr(architecture, "from_config"):  # an auto class
        return architecture.from_config(config, trust_remote_code=trust)
    return architecture(config)


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without memory: names and shapes."""
    import transformers

    with ExitStack() as stack:
        for context in transformers.PreTrainedModel.get_init_context(torch.float32, False, False, None):
            stack.enter_context(context)
        model: Any = make()
    model.tie_weights()
    return model


def _check_tensors(stored: Mapping[str, Stored], outline: nn.Module, on_grid: bool) -> None:
    """What is stored has the shapes of the model, and numbers of its kind; packed codes are looked at elsewhere."""
    own = {name: each for name, each in stored.items() if not name.startswith(HOOKS_PREFIX)}
    expected, passing = outline.state_dict(), passing_buffers(outline)
    weights = {name: each for name, each in own.items() if each.floating}
    for name, each in own.items():
        if on_grid and each.dtype == "U8" and name in expected and expected[name].is_floating_point():
            continue
        if name in expected:
            check_tensor(name, each, expected[name])
        elif name in passing:
            check_tensor(name, each, passing[name], first_axis=False)  # it may have grown with the longest sequence
        else:
            msg = f"{each.file}: {name} is unexpected; {type(outline).__name__} has no such tensor."
            raise nncf.ValidationError(msg)
    odd = [name for name, each in weights.items() if each.dtype not in _FLOATS]
    if odd and not all(each.dtype == "F64" for each in weights.values()):
        each = weights[odd[0]]
        msg = f"{each.file}: {odd[0]} is {each.dtype}; weights are {', '.join(_FLOATS)}."
        raise nncf.ValidationError(msg)


def _check_grid(path: Path, grid: Mapping[str, Any], stored: Mapping[str, Stored], outline: nn.Module) -> None:
    """Every packed weight has as many codes as the weight that it stands for, and that weight is the model's."""
    expected, packed = outline.state_dict(), set()
    for command in grid["compression_state"]:
        for hook in command["hook_names_in_model"]:
            name = decode_hook_name(hook)[1]
            if command["module_cls_name"] != PackedInt4Weight.__name__ or name not in expected:
                continue
            config, each, shape = command["module_config"], stored[name], tuple(expected[name].shape)
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
        if each.dtype == "U8" and name in expected and expected[name].is_floating_point() and name not in packed:
            msg = f"{each.file}: {name} holds codes, and {path.name} says nothing about them."
            raise nncf.ValidationError(msg)


def _check_scales(weights: Path, model: nn.Module) -> None:
    for name, decompressor in decompressors(model).items():
        scales = scale_of(decompressor)
        if scales.dtype is not torch.float16 or not bool(scales.isfinite().all()):
            msg = f"{weights}: scales of {name} are {scales.dtype}, or not finite. Finite float16 numbers are needed."
            raise nncf.ValidationError(msg)


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        found = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise nncf.ValidationError(f"The weights do not fit {type(model).__name__}: {error}") from error
    _refuse_misfits(model, _left_out(model, found.missing_keys, state), found.unexpected_keys)


def _left_out(model: Any, missing: list[str], state: Mapping[str, Tensor]) -> list[str]:
    """Ties what the configuration ties, and says what is missing even so."""
    left = set(missing)
    if callable(getattr(model, "get_expanded_tied_weights_keys", None)):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        # Knows which of two tied weights is there; two that are there and differ stay two.
        model.tie_weights(missing_keys=left, recompute_mapping=False)
    names = names_of_parameters(model).values()
    present = {name for each in names if not state.keys().isdisjoint(each) for name in each}
    return [name for name in missing if name in left and name not in present]


def _refuse_misfits(model: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    if unexpected or missing:
        msg = f"The weights do not fit {type(model).__name__}: missing {missing[:4]}, unexpected {unexpected[:4]}."
        raise nncf.ValidationError(msg)


def load_compressed(model: TModel, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> TModel:
    """
    Puts a model on the INT4 grid together again from what NNCF's own functions gave.

    ``nncf.torch.load_from_config(model, config, allowed_modules=("nncf.*", "nncf_ext.*"))`` places the decompressors,
    but leaves parameters in their floating shape, into which packed codes cannot be loaded. This gives them the packed
    shape first.

    :param model: A fresh model of the same class; its own weights may be empty (meta device). Changed in place.
    :param config: From ``nncf.torch.get_config``.
    :param state_dict: From ``model.state_dict()``.
    :return: The model.
    :raises nncf.ValidationError: The state dict does not belong to this model.
    """
    commands = config["compression_state"]
    behind = {decode_hook_name(hook)[1] for command in commands for hook in command["hook_names_in_model"]}
    for name in behind:
        if name in state_dict and state_dict[name].dtype is torch.uint8:
            module, _, own_name = name.rpartition(".")
            empty = torch.empty(state_dict[name].shape, dtype=torch.uint8)
            setattr(model.get_submodule(module), own_name, nn.Parameter(empty, requires_grad=False))
    hook_state = {name: value for name, value in state_dict.items() if name.startswith(HOOKS_PREFIX)}
    own_state = {name: value for name, value in state_dict.items() if name not in hook_state}
    try:
        missing, unexpected = model.load_state_dict(own_state, strict=False, assign=True)
        missing = _left_out(model, missing, own_state)
        model = nncf.torch.load_from_config(model, dict(config), allowed_modules=("nncf.*", "nncf_ext.*"))
        missing += [name for name in model.state_dict() if name.startswith(HOOKS_PREFIX) and name not in hook_state]
        unexpected += model.load_state_dict(hook_state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise nncf.ValidationError(f"The weights do not fit {type(model).__name__}: {error}") from error
    _refuse_misfits(model, missing, unexpected)
    return model
