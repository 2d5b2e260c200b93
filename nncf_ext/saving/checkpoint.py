"""
Compressed models as folders.

A model with zeros is saved as an ordinary Hugging Face folder. A model on the INT4 grid is saved as the same folder
with two files in place of the weights: ``nncf_model.safetensors`` (the state dict: packed codes, scales and everything
floating) and ``nncf_config.json`` (what ``nncf.torch.get_config`` returns: where the decompressors stand).

A model whose layers differ in size, or lack a branch, is saved as ``nncf_model.safetensors``, too, in true shapes. Its
``config.json`` tells in ``per_layer_config`` what is special about a layer, in transformers' words, and bears a
``model_type`` of its own: stock classes, which would fill missing weights with random numbers, refuse the folder. Files
of code beside it read it where this package is not installed, by ``trust_remote_code=True``.
"""

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import nncf
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nncf_ext.files import write_whole
from nncf_ext.saving.layers import apply_overrides, edits_from_config, layer_overrides
from nncf_ext.structure.wrappers import unwrapped
from nncf_ext.upstream import HOOKS_PREFIX, decode_hook_name, is_wrapped
from nncf_ext.weights.sharing import names_of_parameters

GRID_WEIGHTS = "nncf_model.safetensors"
GRID_CONFIG = "nncf_config.json"
STRUCTURED = "nncf_structured"
STRUCTURE_VERSION = 1
REMOTE_CODE = Path(__file__).parent.parent / "standalone" / "modeling_nncf_structured.py"
REMOTE_FILES = (REMOTE_CODE, *(REMOTE_CODE.with_name(f"{name}.py") for name in ("gated_convolution", "skipping")))

_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

TModel = TypeVar("TModel", bound=nn.Module)


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """
    Writes a compressed Hugging Face model. Weights go into safetensors files only.

    :param model: A Hugging Face model, with zeros, on the INT4 grid, with layers of different sizes, or plain.
    :param folder: Where to; made if it does not exist. Files in it may be replaced.
    :raises nncf.UnsupportedModelError: The model is not a Hugging Face model.
    """
    model = unwrapped(model)
    if not callable(getattr(model, "save_pretrained", None)):
        msg = (
            f"{type(model).__name__} is not a Hugging Face model. Keep its state_dict() and "
            "nncf.torch.get_config(model) instead, and put them together again with nncf_ext.load_compressed()."
        )
        raise nncf.UnsupportedModelError(msg)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    overrides = _overrides(model)
    if not is_wrapped(model):
        (target / GRID_CONFIG).unlink(missing_ok=True)
        if not overrides:
            for file in REMOTE_FILES:
                (target / file.name).unlink(missing_ok=True)
            (target / GRID_WEIGHTS).unlink(missing_ok=True)
            model.save_pretrained(target, safe_serialization=True)  # type: ignore[operator]
            return
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        # Tied weights are stored once; loading ties them again.
        if tensor.untyped_storage().data_ptr() not in stored or tensor.numel() == 0:
            tensors[name] = tensor.contiguous()
        stored.add(tensor.untyped_storage().data_ptr())
    _save_config(model, target, overrides)
    write_whole(target / GRID_WEIGHTS, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    if overrides:
        # Stock classes that are named explicitly would read weights that were here before.
        for name in ("model.safetensors", "model.safetensors.index.json"):
            (target / name).unlink(missing_ok=True)
    if is_wrapped(model):
        config = json.dumps(nncf.torch.get_config(model), indent=1)
        write_whole(target / GRID_CONFIG, lambda aside: aside.write_text(config))


def _overrides(model: nn.Module) -> dict[str, dict[str, Any]]:
    try:
        return layer_overrides(model)
    except nncf.UnsupportedModelError:
        return {}  # nothing was extracted from a model whose structure is unknown


def _save_config(model: nn.Module, target: Path, overrides: Mapping[str, Any]) -> None:
    config: Any = model.config
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(target)
    if not overrides:
        config.save_pretrained(target)
        return
    content = json.loads(config.to_json_string())
    content |= {
        "model_type": STRUCTURED,
        "base_model_type": config.model_type,
        "architectures": [type(model).__name__],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "per_layer_config": overrides,
        "structure_version": STRUCTURE_VERSION,
    }
    if not is_wrapped(model):
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            stock = type(model)(config)
        content["structure_edits"] = edits_from_config(model, stock)
        content["auto_map"] = {
            "AutoConfig": f"{REMOTE_CODE.stem}.StructuredConfig",
            **dict.fromkeys(_AUTO_CLASSES, f"{REMOTE_CODE.stem}.StructuredModel"),
        }
        for file in REMOTE_FILES:
            write_whole(target / file.name, partial(shutil.copyfile, file))
    write_whole(target / "config.json", lambda aside: aside.write_text(json.dumps(content, indent=2)))


def check_weight_files(folder: Path) -> None:
    """
    Checks that a Hugging Face folder can be read without trusting it: safetensors only, and only files of its own.

    :param folder: The folder.
    :raises nncf.ValidationError: There is no model, its weights are pickled, or its index names a file elsewhere.
    """
    if not (folder / "config.json").is_file():
        msg = f"{folder} holds no config.json, so it is not a Hugging Face model folder."
        raise nncf.ValidationError(msg)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"{index} is no index of safetensors files ({type(error).__name__}: {error})."
            raise nncf.ValidationError(msg) from error
        for shard in sorted(map(str, shards)):
            if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
                msg = f"{index} names the shard {shard!r}. Shards must be .safetensors files of the folder itself."
                raise nncf.ValidationError(msg)
            if not (folder / shard).is_file():
                msg = f"{index} names the shard {shard!r}, which is missing."
                raise nncf.ValidationError(msg)
    elif not (folder / "model.safetensors").is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        found = f"only pickled files ({', '.join(pickled)}), which can run code when read" if pickled else "no weights"
        msg = f"{folder} holds {found}. Convert the weights to model.safetensors first; only safetensors are read."
        raise nncf.ValidationError(msg)


def load_pretrained(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """
    Reads what :func:`save_pretrained` wrote.

    :param folder: A folder with a causal language model.
    :param dtype: Floating type of the weights that the forward sees; None keeps that of the file. Codes and scales on
        the grid are the same in every type. OpenVINO's converter needs ``torch.float32`` for a model on the grid.
    :param trust_remote_code: Run model code that lies in the folder.
    :return: The model, in evaluation mode.
    :raises nncf.ValidationError: The folder holds no such model.
    """
    source = Path(folder)
    on_grid = (source / GRID_CONFIG).is_file() and (source / GRID_WEIGHTS).is_file()
    structure = _read_structure(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if not on_grid and structure is None:
        from transformers import AutoModelForCausalLM

        check_weight_files(source)
        options |= {"dtype": dtype or "auto", "use_safetensors": True}
        return AutoModelForCausalLM.from_pretrained(source, **options).eval()
    model = _empty_model(source, structure, options)
    if not on_grid:
        return _load_strictly(model, source, dtype).eval()
    state = load_file(source / GRID_WEIGHTS)
    config = json.loads((source / GRID_CONFIG).read_text())
    if dtype is not None:
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() and not name.startswith(HOOKS_PREFIX) else tensor
            for name, tensor in state.items()
        }
        for command in config["compression_state"]:
            command["module_config"]["result_dtype"] = str(dtype).removeprefix("torch.")
    return load_compressed(model, config, state).eval()


def _read_structure(source: Path) -> dict[str, Any] | None:
    """The configuration of a folder whose layers differ; None for any other."""
    try:
        content = json.loads((source / "config.json").read_text(), object_hook=_special_float)
    except (OSError, ValueError):
        return None  # the caller reads the folder as an ordinary one and says what is wrong
    if not isinstance(content, dict) or content.get("model_type") != STRUCTURED:
        return None
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
    return content


def _special_float(content: dict[str, Any]) -> Any:
    """Numbers that JSON lacks, as transformers writes them: ``{"__float__": "Infinity"}``."""
    return float(content["__float__"]) if set(content) == {"__float__"} else content


def _empty_model(source: Path, structure: Mapping[str, Any] | None, options: Mapping[str, Any]) -> nn.Module:
    """The model of a folder, without its weights."""
    import transformers
    from accelerate import init_empty_weights

    if structure is None:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        with init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=options["trust_remote_code"])
    own = ("model_type", "base_model_type", "per_layer_config", "structure_version", "structure_edits", "auto_map")
    try:
        config = transformers.AutoConfig.for_model(
            structure["base_model_type"], **{key: value for key, value in structure.items() if key not in own}
        )
        architecture = getattr(transformers, structure["architectures"][0])
        if not issubclass(architecture, transformers.PreTrainedModel):
            raise TypeError(structure["architectures"][0])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        msg = f"{source / 'config.json'} describes no model that transformers knows ({type(error).__name__}: {error})."
        raise nncf.ValidationError(msg) from error
    # Buffers that no file holds (rotary frequencies) are computed by the constructor; parameters stay empty.
    with init_empty_weights(include_buffers=False):
        model = architecture(config)
    apply_overrides(model, structure["per_layer_config"])
    if (source / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    return model


def _load_strictly(model: nn.Module, source: Path, dtype: torch.dtype | None) -> nn.Module:
    state = load_file(source / GRID_WEIGHTS)
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        msg = f"The weights in {source} do not fit its configuration: {error}"
        raise nncf.ValidationError(msg) from error
    model.tie_weights()  # type: ignore[operator]
    present = _tied_names(model, state)
    missing = [name for name in missing if name not in present]
    if missing or unexpected:
        msg = (
            f"The weights in {source} do not fit its configuration: missing {missing[:4]}, unexpected {unexpected[:4]}."
        )
        raise nncf.ValidationError(msg)
    return model


def _tied_names(model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Names of parameters that are in the state, under this name or that of a parameter they are tied to."""
    return {
        name for names in names_of_parameters(model).values() if not state.keys().isdisjoint(names) for name in names
    }


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
        if callable(getattr(model, "tie_weights", None)):
            model.tie_weights()  # type: ignore[operator]
        present = _tied_names(model, own_state)
        missing = [name for name in missing if name not in present]
        model = nncf.torch.load_from_config(model, dict(config), allowed_modules=("nncf.*", "nncf_ext.*"))
        missing += [name for name in model.state_dict() if name.startswith(HOOKS_PREFIX) and name not in hook_state]
        unexpected += model.load_state_dict(hook_state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        msg = f"The state dict does not fit {type(model).__name__}: {error}"
        raise nncf.ValidationError(msg) from error
    if unexpected or missing:
        msg = f"The state dict does not fit {type(model).__name__}: missing {missing[:4]}, unexpected {unexpected[:4]}."
        raise nncf.ValidationError(msg)
    return model
