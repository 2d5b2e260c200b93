"""
How stock classes of transformers read a folder on the INT4 grid: a quantizer of the name that its configuration gives.

:mod:`nncf_ext.saving.registration` makes it known to transformers.
"""

import copy
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    HfQuantizer,
    QuantizationConfigMixin,
    register_quantization_config,
    register_quantizer,
)

from nncf_ext.saving.fitting import ALLOWED_MODULES, make_room
from nncf_ext.saving.folder import (
    GRID_VERSION,
    LAST,
    QUANT_METHOD,
    blamed_on,
    check_tensor,
    passing_buffers,
    safetensors_of,
    shared_names,
    stored_tensors,
)
from nncf_ext.saving.grid import CODES, check_grid, check_scales, check_version, each_once, grid_of
from nncf_ext.saving.report_file import restore_records
from nncf_ext.upstream import HOOKS_PREFIX, decode_hook_name
from nncf_ext.weights.sharing import tie


@register_quantization_config(QUANT_METHOD)
class GridConfig(QuantizationConfigMixin):
    """
    ``quantization_config`` of a folder on the INT4 grid.

    :param compression_state: Where the decompressors stand, from ``nncf.torch.get_config``.
    :param version: Version of the folder.
    :param quant_method: Name of the method.
    """

    def __init__(
        self,
        compression_state: list[dict[str, Any]],
        version: int = GRID_VERSION,
        quant_method: str = QUANT_METHOD,
        **_later: Any,
    ) -> None:
        check_version("quantization_config", version)
        self.quant_method: Any = quant_method
        self.version = version
        self.compression_state = compression_state


@register_quantizer(QUANT_METHOD)
class GridQuantizer(HfQuantizer):
    """
    Reads packed codes and scales as they are, in whatever floating type the rest of the model is loaded.

    Codes are loaded by transformers in place of floating weights. Everything else of the grid follows when the weights
    are there: decompressors with their scales, buffers that are no part of a state dict, ties.

    :param quantization_config: A :class:`GridConfig`.
    """

    quantization_config: GridConfig
    requires_calibration = True  # a model is put on the grid by nncf_ext.compress, not while it is loaded
    is_trainable = True  # adapters beside the packed weights are

    def is_serializable(self) -> bool:
        """:return: True: ``model.save_pretrained`` writes a folder that stock classes and this package read."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """
        :param model: The model, as ``save_pretrained`` finds it; its configuration is brought up to date.
        :return: Tensors and metadata of the files; no tensors where nothing is packed any more.
        """
        grid = grid_of(model)
        if grid is None:
            model.config.__dict__.pop("quantization_config", None)
            return None, {}
        model.config.quantization_config = self.quantization_config = GridConfig(**grid)
        return each_once(model)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **_options: Any
    ) -> None:
        if not checkpoint_files:
            msg = "Packed weights are read from the files of their folder; a state_dict is not enough. Pass the folder."
            raise nncf.ValidationError(msg)
        self._files = [Path(file) for file in checkpoint_files]
        stored = stored_tensors(self._files)
        shared = shared_names(self._files, stored)
        self._names = names = _names_in(model, {*stored, *shared})
        found = {names[name]: each for name, each in stored.items() if name in names}
        described = self._files[0].parent / "config.json"
        with blamed_on(described):
            self._hooks, self._commands = _hooks_in(model, self.quantization_config.compression_state, names)
            check_grid(described, {"compression_state": self._commands}, found, model)
        self._types = {}
        buffers = passing_buffers(model)
        for name, each in model.state_dict().items():
            if name in found and found[name].dtype in CODES and each.is_floating_point():
                make_room(model, name, found[name].shape, CODES[found[name].dtype])
            elif name in found:
                check_tensor(name, found[name], each)  # transformers does not look at shapes where there is a quantizer
                self._types[name] = each.dtype
        self._shared = {names[alias]: names[name] for alias, name in shared.items() if {alias, name} <= names.keys()}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **self._shared}
        later = [
            f"{LAST}?{re.escape(HOOKS_PREFIX)}",
            *(f"{re.escape(name)}$" for name in stored if names.get(name) in buffers),
        ]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = [*ignored, *(f"^{each}" for each in later)]

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> Any:
        devices = {each.device for each in model.parameters()}
        if len(devices) > 1:
            msg = f"Packed weights lie on {sorted(map(str, devices))}. Load the model to one device: device_map=None."
            raise nncf.ValidationError(msg)
        kept = "|".join([*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())])
        for name, parameter in model.named_parameters():
            # A base model's weights come in the type of the file.
            if parameter.dtype is not self._types.get(name, parameter.dtype) and not (kept and re.search(kept, name)):
                parameter.data = parameter.data.to(self._types[name])
        dtype = model.dtype
        for command in self._commands:
            if "result_dtype" in command["module_config"]:
                command["module_config"]["result_dtype"] = str(dtype).removeprefix("torch.")
        nncf.torch.load_from_config(model, {"compression_state": self._commands}, allowed_modules=ALLOWED_MODULES)
        hook_state = {}
        buffers = passing_buffers(model)
        for name, tensor in self._rest(buffers.keys()):
            own = self._names.get(name)
            if own in buffers:
                kind = torch.promote_types(tensor.dtype, dtype)  # never shorter than it was saved
                setattr(model.get_submodule(own.rpartition(".")[0]), own.rpartition(".")[2], tensor.to(kind))
            else:
                hook, _, own = _split(name)
                hook_state[f"{HOOKS_PREFIX}{self._hooks[hook]}.{own}"] = tensor
        expected = {name for name in model.state_dict() if name.startswith(HOOKS_PREFIX)}
        if expected != hook_state.keys():
            msg = (
                f"{self._files[0].parent} lacks {sorted(expected - hook_state.keys())[:4]}, or holds too many of them."
            )
            raise nncf.ValidationError(msg)
        model.load_state_dict(hook_state, strict=False, assign=True)
        tie(model, self._shared)
        check_scales(self._files[0].parent, model)
        restore_records(model, self._files[0].parent)
        # The hooks are the description now. OpenVINO's converter would look for patches of its own for the method.
        del model.config.quantization_config
        return model.to(devices.pop())

    def _rest(self, buffers: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """What transformers does not load: the tensors of hooks, and buffers that are no part of a state dict."""
        for file in self._files:
            with safetensors_of(file) as opened:
                for in_file in opened.keys():  # noqa: SIM118  # not a dictionary
                    name = in_file.removeprefix(LAST)
                    if _split(name)[0] in self._hooks or self._names.get(name) in buffers:
                        yield name, opened.get_tensor(in_file).clone()


def _split(name: str) -> tuple[str, str, str]:
    """Hook and tensor of a name in a state dict; no hook where it is none of a hook."""
    if not name.startswith(HOOKS_PREFIX):
        return "", "", name
    parts = name.removeprefix(HOOKS_PREFIX).split(".", 3)
    return ".".join(parts[:3]), ".", ".".join(parts[3:])


def _names_in(model: Any, names: Iterable[str]) -> dict[str, str]:
    """What a model calls the tensors of a file, by their names there: without a head, a prefix is gone, or comes."""
    known = {**model.state_dict(), **passing_buffers(model)}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in names:
        own = next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in known), None)
        if own is not None:
            found[name] = own
    return found


def _hooks_in(
    model: nn.Module, commands: Iterable[Mapping[str, Any]], names: Mapping[str, str]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """
    The hooks behind weights that a model has.

    :return: By a hook's name in the file its name in the model, and the description with names of the model.
    """
    hooks: dict[str, str] = {}
    kept = []
    for command in commands:
        own = {}
        for hook in command["hook_names_in_model"]:
            place = decode_hook_name(hook)[1]
            if place in names:
                own[hook] = hook.replace(place.replace(".", ":"), names[place].replace(".", ":"), 1)
            elif _names_in(model, [place]):
                raise nncf.ValidationError(f"The codes of {place} are in no file of the folder.")
            elif "/" in place:
                msg = f"The hook at {place} is not behind a weight. Read the folder by nncf_ext.load_pretrained."
                raise nncf.ValidationError(msg)
        if own:
            hooks |= own
            kept.append({**copy.deepcopy(command), "hook_names_in_model": [*own.values()]})
    return hooks, kept
