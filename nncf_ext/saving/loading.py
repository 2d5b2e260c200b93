"""
Folders of models, read strictly: every tensor comes from the files, in the shape and kind of number of the model.

A folder that is damaged, or whose configuration and tensors do not belong together, is an error that names the file and
the tensor.
"""

import copy
import inspect
import logging
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.saving.fitting import load_compressed, load_strictly
from nncf_ext.saving.folder import (
    GRID_WEIGHTS,
    QUANT_METHOD,
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
    shared_names,
    stored_tensors,
)
from nncf_ext.saving.grid import CODES, check_grid, check_scales, grid_in
from nncf_ext.saving.layers import apply_overrides
from nncf_ext.saving.report_file import restore_records
from nncf_ext.saving.thresholds import THRESHOLDS, load_thresholds
from nncf_ext.upstream import HOOKS_PREFIX
from nncf_ext.weights.sharing import tie

_RUN_CODE = "If you trust it, pass trust_remote_code=True (--trust-remote-code), and it is run."
_FLOATS = ("F32", "BF16", "F16")
_OF_TRAINING = ("masked_spec_embed",)  # last parts of names that evaluation does not use, and folders often lack

logger = logging.getLogger("nncf_ext")


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
    grid = grid_in(source, content)
    structured = content.get("model_type") == STRUCTURED
    if structured:
        _check_structure(source, content)
    if grid is None and not structured:
        model = _load_stock(source, content, dtype, trust_remote_code)
    else:
        model = _load_own(source, content, grid, dtype, trust_remote_code)
    if (source / THRESHOLDS).is_file():
        load_thresholds(model, source / THRESHOLDS)
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
    read = partial(
        architecture.from_pretrained,
        source,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
    )
    with blamed_on(source):
        model, info = read()
        if _only_a_pooler(info["missing_keys"], type(model)):
            model, info = read(add_pooling_layer=False)
    files = {each.file for each in stored.values()}
    weights = files.pop() if len(files) == 1 else source / "model.safetensors.index.json"
    for name, found, wanted in sorted(info["mismatched_keys"]):
        where = stored[name].file if name in stored else weights
        msg = f"{where}: {name} is {list(found)}; the configuration describes {list(wanted)}."
        raise nncf.ValidationError(msg)
    unused = [name for name in info["missing_keys"] if name.rpartition(".")[2] in _OF_TRAINING]
    for name in unused:
        model.get_parameter(name).data.zero_()
    if missing := sorted({*info["missing_keys"]} - {*unused}):
        msg = (
            f"{weights} lacks {', '.join(missing[:4])}{' and more' * (len(missing) > 4)}, which {type(model).__name__} "
            "needs. Weights are not made up: name the class that was saved under 'architectures' in config.json."
        )
        raise nncf.ValidationError(msg)
    if getattr(config, "quantization_config", None) is None:
        _check_kinds(model, stored)
    return model


def _only_a_pooler(missing: Collection[str], kind: type[nn.Module]) -> bool:
    """Whether files lack nothing but the layer behind an encoder that its class can be made without."""
    only = bool(missing) and all(name.startswith("pooler.") for name in missing)
    return only and "add_pooling_layer" in inspect.signature(kind.__init__).parameters


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
    source: Path,
    content: dict[str, Any],
    grid: tuple[Path, dict[str, Any]] | None,
    dtype: torch.dtype | None,
    trust: bool,
) -> nn.Module:
    """A model on the grid, with layers of different sizes, or both."""
    described = source / "config.json"
    files = [source / GRID_WEIGHTS] if (source / GRID_WEIGHTS).is_file() else check_weight_files(source)
    stored = stored_tensors(files)
    check_counts(described, {key: each for key, each in content.items() if key != "quantization_config"}, stored)
    make = _maker(source, content, trust)
    with bounded_construction(described, stored):
        outline = _on_meta(make)
    check_size(described, outline, stored)
    _check_tensors(stored, outline, grid is not None)
    if grid is not None:
        with blamed_on(grid[0]):
            check_grid(*grid, stored, outline)
    from accelerate import init_empty_weights

    # Buffers that no file holds are computed by the constructor; parameters stay empty.
    with bounded_construction(described, stored), init_empty_weights(include_buffers=False):
        model = make()
    state = {name: each for file in files for name, each in read_tensors(file).items()}
    shared = shared_names(files, state)
    state |= {alias: state[name] for alias, name in shared.items()}
    buffers = {name: state.pop(name) for name in passing_buffers(model) if name in state}
    if dtype is not None:
        state = {name: _as(dtype, each) if not name.startswith(HOOKS_PREFIX) else each for name, each in state.items()}
        # Position embeddings lose more by a short type than weights do.
        buffers = {name: _as(torch.promote_types(each.dtype, dtype), each) for name, each in buffers.items()}
    weights = files[0] if len(files) == 1 else source
    with blamed_on(source):
        try:
            if grid is None:
                load_strictly(model, state)
            else:
                for command in grid[1]["compression_state"] if dtype is not None else ():
                    command["module_config"]["result_dtype"] = str(dtype).removeprefix("torch.")
                model = load_compressed(model, grid[1], state)
        except nncf.ValidationError as error:
            raise nncf.ValidationError(f"{weights}: {error}") from error
    tie(model, shared)
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, buffer)
    check_scales(weights, model)
    if grid is not None and content.get("model_type") != STRUCTURED:
        from nncf_ext.saving.quantizer import GridConfig, GridQuantizer

        own: Any = model
        own.hf_quantizer = GridQuantizer(GridConfig(grid[1]["compression_state"]))  # for model.save_pretrained
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
    own = {"model_type", "base_model_type", "per_layer_config", "structure_version", "structure_edits", "auto_map"}
    own |= {"quantization_config"}
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
    quantization = getattr(config, "quantization_config", {})
    if quantization is None or quantization.get("quant_method") == QUANT_METHOD:
        # "null" says that nothing is quantized; transformers takes it for a method. Of the grid, the hooks tell.
        del config.quantization_config
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
    name = names[0] if isinstance(names, list) else None
    if isinstance(name, str) and not own and not hasattr(transformers, name):
        # A subclass, or an old spelling. What its files lack is refused, so a head is never made up.
        auto = f"AutoModel{''.join(name.partition('For')[1:]) or 'ForCausalLM'}"
        if hasattr(transformers, auto):
            logger.warning("transformers has no class %s, which %s names: %s reads it.", name, source, auto)
            return getattr(transformers, auto)
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
        if on_grid and each.dtype in CODES and name in expected and expected[name].is_floating_point():
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
