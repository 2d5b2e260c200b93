"""
Loads a model whose layers differ in size or lack a branch. Needs torch, transformers and safetensors only.

This file and those that it imports from its folder lie beside the weights and are run by
``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)``.
``config.json`` says in ``structure_edits`` how the model differs from the one that its other entries describe.
"""

import copy
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from .gated_convolution import GatedConvMixer
from .skipping import Skipped, keep_ties, tied_names

WEIGHTS = "nncf_model.safetensors"
_OWN = ("model_type", "base_model_type", "per_layer_config", "structure_version", "structure_edits", "auto_map")

_OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


class StructuredConfig(transformers.PretrainedConfig):
    """What ``config.json`` says, as it is."""

    model_type = "nncf_structured"

    def base(self) -> Any:
        """:return: Configuration of the stock class that the model is built from."""
        entries = {key: value for key, value in self.to_dict().items() if key not in _OWN}
        return transformers.AutoConfig.for_model(self.base_model_type, **entries)


class StructuredModel:
    """Stands where transformers wants a class; what it loads is a stock model with other layers."""

    config_class = StructuredConfig

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to remember: a loaded model is saved by the package that made it."""

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """
        :param options: Of ``from_pretrained``.
        :raises ValueError: One is not supported.
        """
        for name in ("device_map", "quantization_config", "state_dict"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is not supported for a model whose layers differ. Load it, then move it.")

    @classmethod
    def from_pretrained(cls, folder: str, *_args: Any, config: StructuredConfig, **options: Any) -> Any:
        """
        :param folder: Folder or repository.
        :param config: Its configuration.
        :param options: ``dtype``, and what finds a file of a repository; nothing that splits or quantizes a model.
        :return: The model, in evaluation mode.
        :raises ValueError: An option is not supported, or the weights do not fit.
        """
        dtype = options.get("dtype") or config.dtype  # transformers writes the caller's choice into the configuration
        cls.check_options(options)
        names = ("cache_dir", "revision", "token", "local_files_only", "subfolder", "force_download")
        settings = {name: options[name] for name in names if name in options}
        path: Any = cached_file(folder, WEIGHTS, **settings)
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shared = {name: first for name, first in (file.metadata() or {}).items() if first in state}
        state |= {name: state[first] for name, first in shared.items()}
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        architecture: str = config.architectures[0]  # type: ignore[index]
        model = getattr(transformers, architecture)(config.base())
        edit(model, config.structure_edits)
        # Frequencies of position embeddings, as they were saved: no part of a state dict, and never made shorter.
        buffers = {name: state.pop(name) for name, _ in model.named_non_persistent_buffers() if name in state}
        if isinstance(dtype, torch.dtype):
            state = {name: each.to(dtype) if each.is_floating_point() else each for name, each in state.items()}
            buffers = {name: each.to(torch.promote_types(each.dtype, dtype)) for name, each in buffers.items()}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        ties = {name: parameters[first] for name, first in shared.items() if name in parameters and first in parameters}
        for name, each in (ties | buffers).items():
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], each)
        loaded = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in state}
        tied = {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in loaded}
        missing = [name for name in missing if name not in tied]
        if missing or unexpected:
            raise ValueError(f"The weights do not fit: missing {missing[:4]}, unexpected {unexpected[:4]}.")
        if model.can_generate() and cached_file(folder, "generation_config.json", **_OPTIONAL, **settings) is not None:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, **settings)
        return model.eval()


def edit(model: Any, edits: dict[str, Any]) -> None:
    """
    :param model: What the configuration describes; changed in place.
    :param edits: From ``config.json``: path of the blocks, and for each block the stand-ins of removed modules, the
        sizes of linear layers, and numbers that modules keep.
    """
    base = model.get_submodule(edits["blocks"].rpartition(".")[0])
    ties = tied_names(base)
    stand_ins: dict[str, Any] = {each.__name__: each for each in Skipped.__subclasses__()}
    stand_ins["GatedConvMixer"] = GatedConvMixer
    for block, each in zip(model.get_submodule(edits["blocks"]), edits["layers"], strict=True):
        for path, name in each.get("skip", {}).items():
            block.set_submodule(path, stand_ins[name].standing_for(block.get_submodule(path)))
        for path, (rows, columns) in each.get("linear", {}).items():
            bias = block.get_submodule(path).bias is not None
            block.set_submodule(path, nn.Linear(columns, rows, bias=bias, device="meta"))
        for path, numbers in each.get("numbers", {}).items():
            for name, number in numbers.items():
                setattr(block.get_submodule(path), name, number)
        for path, numbers in each.get("config", {}).items():
            core = block.get_submodule(path)
            core.config = copy.copy(core.config)
            for name, number in numbers.items():
                setattr(core.config, name, number)
    keep_ties(base, ties)
