"""State dicts that are put into models: all of them, and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.memory import is_out_of_memory
from nncf_ext.upstream import HOOKS_PREFIX, decode_hook_name
from nncf_ext.weights.sharing import names_of_parameters

ALLOWED_MODULES = ("nncf.*", "nncf_ext.*")

TModel = TypeVar("TModel", bound=nn.Module)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """
    :param model: A model whose parameters may be empty; changed in place.
    :param state: Its tensors.
    :raises nncf.ValidationError: Tensors are missing, are too many, or have other shapes.
    """
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
    Puts a model with INT4 or INT8 codes together again from what NNCF's own functions gave.

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
        if name in state_dict and state_dict[name].dtype in (torch.uint8, torch.int8):
            make_room(model, name, state_dict[name].shape, state_dict[name].dtype)
    hook_state = {name: value for name, value in state_dict.items() if name.startswith(HOOKS_PREFIX)}
    own_state = {name: value for name, value in state_dict.items() if name not in hook_state}
    try:
        missing, unexpected = model.load_state_dict(own_state, strict=False, assign=True)
        missing = _left_out(model, missing, own_state)
        model = nncf.torch.load_from_config(model, dict(config), allowed_modules=ALLOWED_MODULES)
        missing += [name for name in model.state_dict() if name.startswith(HOOKS_PREFIX) and name not in hook_state]
        unexpected += model.load_state_dict(hook_state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise nncf.ValidationError(f"The weights do not fit {type(model).__name__}: {error}") from error
    _refuse_misfits(model, missing, unexpected)
    return model


def make_room(model: nn.Module, name: str, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> None:
    """
    Gives a parameter the shape and type of codes.

    :param model: The model, changed in place.
    :param name: Path of the parameter.
    :param shape: Shape of the codes.
    :param dtype: uint8 of INT4, two in a byte; int8 of INT8.
    """
    module, _, own_name = name.rpartition(".")
    empty = torch.empty(*shape, dtype=dtype, device=model.get_parameter(name).device)
    setattr(model.get_submodule(module), own_name, nn.Parameter(empty, requires_grad=False))
