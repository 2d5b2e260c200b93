"""
Compressed models as folders, written. :mod:`nncf_ext.saving.loading` reads them.

A model with zeros is saved as an ordinary Hugging Face folder. Of a model on the INT4 grid, ``model.safetensors`` holds
the state dict (packed codes, scales and everything floating), floating buffers that are no part of it, and in its
metadata the other names of tied weights. ``quantization_config`` in ``config.json`` holds what
``nncf.torch.get_config`` returns: where the decompressors stand. Stock classes read the folder by the quantizer of
:mod:`nncf_ext.saving.quantizer`.

A model whose layers differ in size, or lack a branch, is saved as ``nncf_model.safetensors``, too, in true shapes. Its
``config.json`` tells in ``per_layer_config`` what is special about a layer, in transformers' words, and bears a
``model_type`` of its own: stock classes, which would fill missing weights with random numbers, refuse the folder. Files
of code beside it read it where this package is not installed, by ``trust_remote_code=True``.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nncf
from safetensors.torch import save_file
from torch import Tensor, nn

from nncf_ext.drafts import whole_folder
from nncf_ext.files import let_others_read
from nncf_ext.report import compression_report
from nncf_ext.saving.card import CARD, is_ours, write_card
from nncf_ext.saving.folder import (
    ADAPTER_CONFIG,
    GRID_CONFIG,
    GRID_WEIGHTS,
    STRUCTURE_VERSION,
    STRUCTURED,
)
from nncf_ext.saving.grid import each_once, grid_of
from nncf_ext.saving.layers import edits_from_config, layer_overrides
from nncf_ext.saving.registration import AUTO_CLASSES
from nncf_ext.saving.report_file import REPORT, write_report
from nncf_ext.saving.thresholds import THRESHOLDS, has_thresholds, save_thresholds
from nncf_ext.structure.wrappers import unwrapped
from nncf_ext.upstream import is_wrapped
from nncf_ext.weights.sharing import place_of

REMOTE_CODE = Path(__file__).parent.parent / "standalone" / "modeling_nncf_structured.py"
REMOTE_FILES = (REMOTE_CODE, *(REMOTE_CODE.with_name(f"{name}.py") for name in ("gated_convolution", "skipping")))

# Names of files that transformers, or this module, takes for a part of a model: all shards, indexes and variants. And
# of those that say how it was made smaller: read beside another model, they would be believed.
_OF_A_MODEL = re.compile(
    r"(model|pytorch_model|tf_model|flax_model|nncf_model)([.-].*)?\.(safetensors|bin|h5|msgpack)"
    r"|(model|pytorch_model|tf_model|flax_model)\..*index.*\.json"
    rf"|(generation_)?config\.json|{re.escape(GRID_CONFIG)}|{re.escape(REPORT)}|{re.escape(THRESHOLDS)}"
    r"|structure_plan\.json|quantize_config\.json|quant_config\.json|"
    + "|".join(re.escape(file.name) for file in REMOTE_FILES)
)


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """
    Writes a compressed Hugging Face model. Weights go into safetensors files only; what compression noted about the
    layers goes into ``compression_report.json`` (weights from before rounding do not), in short into the model card
    (README.md) where there is none by somebody else. Thresholds for the inputs of layers go into
    ``calibrated_thresholds.json``, which :func:`load_pretrained` reads; stock classes load the model without them.

    A folder that is there already is the old one until the new one is complete, and needs the disk space of both. Of
    its files, those of another model (weights of any format and name that transformers reads, their indexes,
    configurations, ``structure_plan.json`` and the like) go; the others stay: a tokenizer, notes, logs.

    :param model: A Hugging Face model, with zeros, on the INT4 grid, with layers of different sizes, or plain.
    :param folder: Where to; made if it does not exist.
    :raises nncf.UnsupportedModelError: The model is not a Hugging Face model, or a part of it is wrapped, sharded or
        masked, so that its state dict is not that of its class.
    :raises nncf.ValidationError: The folder holds an adapter, which loaders would put on the model.
    :raises OSError: The folder cannot be written; of a full disk the message says what to do.
    """
    model = unwrapped(model)
    if not callable(getattr(model, "save_pretrained", None)):
        msg = (
            f"{type(model).__name__} is not a Hugging Face model. Keep its state_dict() and "
            "nncf.torch.get_config(model) instead, and put them together again with nncf_ext.load_compressed()."
        )
        raise nncf.UnsupportedModelError(msg)
    is_adapter = hasattr(model, "peft_config")
    if not is_adapter and (Path(folder) / ADAPTER_CONFIG).exists():
        msg = (
            f"{folder} holds an adapter ({ADAPTER_CONFIG}), which transformers would put on a model that is saved "
            "there. Name another folder."
        )
        raise nncf.ValidationError(msg)
    carded = not is_adapter and is_ours(Path(folder))

    def keeps(name: str) -> bool:
        return is_adapter or not (_OF_A_MODEL.fullmatch(name) or (carded and name == CARD))

    with whole_folder(folder, keeps=keeps) as draft:
        _save(model, draft)
        if not is_adapter:
            if has_thresholds(model):
                save_thresholds(model, draft / THRESHOLDS)
            report = compression_report(model)
            write_report(report, draft)
            if carded:
                write_card(model, draft, report, cut=bool(_overrides(model)))
        let_others_read(draft)


def _save(model: Any, target: Path) -> None:
    overrides = _overrides(model)
    if not is_wrapped(model) and not overrides:
        model.save_pretrained(target, safe_serialization=True, **_copied_apart(model))
        return
    tensors, shared = each_once(model)
    _save_config(model, target, overrides)
    weights = target / (GRID_WEIGHTS if overrides else "model.safetensors")
    save_file(tensors, weights, metadata={"format": "pt", **shared})


def _copied_apart(model: Any) -> dict[str, dict[str, Tensor]]:
    """
    What transformers is to save in place of a state dict that it refuses, or takes names from: tensors in one memory
    that the configuration does not tie. All but the first of them become copies.
    """
    if hasattr(model, "peft_config") or not callable(getattr(model, "get_expanded_tied_weights_keys", None)):
        return {}
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    state: dict[str, Tensor] = model.state_dict()
    first: dict[Hashable, str] = {}
    copies = {}
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.numel() or type(tensor) is not Tensor:
            continue
        known = first.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), name)
        tied = (name in ties or known in ties) and place_of(tensor) == place_of(state[known])
        if known != name and not tied:
            copies[name] = tensor.clone()
    return {"state_dict": state | copies} if copies else {}


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
    if getattr(model, "_auto_class", None) is not None:
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, target, config=config)
    grid, dtype = grid_of(model), next(each.dtype for each in model.parameters() if each.is_floating_point())
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # of the model as it was once
    if grid is not None:
        config.quantization_config = grid
    if not overrides:
        config.architectures, config.dtype = [type(model).__name__], dtype
        config.save_pretrained(target)
        return
    content = json.loads(config.to_json_string())
    content |= {
        "model_type": STRUCTURED,
        "base_model_type": config.model_type,
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "per_layer_config": overrides,
        "structure_version": STRUCTURE_VERSION,
    }
    if not is_wrapped(model):
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            stock = type(model)(model.config)
        content["structure_edits"] = edits_from_config(model, stock)
        content["auto_map"] = {
            "AutoConfig": f"{REMOTE_CODE.stem}.StructuredConfig",
            **dict.fromkeys(AUTO_CLASSES, f"{REMOTE_CODE.stem}.StructuredModel"),
        }
        for file in REMOTE_FILES:
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(content, indent=2))
