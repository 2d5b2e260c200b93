"""Is a model made of plain modules, or does something stand around it, or around its weights?"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import nncf
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Shells around a model, and the attribute that holds it. By name: importing torch.distributed is slow, and may fail.
_SHELLS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """
    Leaves inference mode and autocast, in which the caller may be: tensors made in the one cannot be changed later, and
    the other computes in a type that the model was not asked for.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def without_shells(model: nn.Module) -> nn.Module:
    """
    Takes off what ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put around a model: for those who
    only read it.

    :param model: Any torch model.
    :return: The model inside, the very object; `model` itself where nothing stands around it.
    """
    while (shell := _shell(model)) is not None:
        model = getattr(model, _SHELLS[shell])
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """
    Takes off shells (:func:`without_shells`) from a model that is to be changed or saved.

    :param model: Any torch model; what is none comes back as it is, for the caller to refuse.
    :return: The model inside, the very object; `model` itself where nothing stands around it. Its state dict is that of
        a plain model.
    :raises nncf.UnsupportedModelError: A part of it is wrapped, sharded, or masked by ``torch.nn.utils.prune``.
    """
    model = without_shells(model)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        shell = _shell(module)
        if shell is not None:
            msg = (
                f"{_place(name)} is wrapped ({shell}). Put {name}.{_SHELLS[shell]} in its place, and wrap the result "
                "instead."
            )
            raise nncf.UnsupportedModelError(msg)
        sharded = _SHARDED.intersection(_bases(module))
        if sharded or any(type(each).__name__ == "DTensor" for each in module.parameters(recurse=False)):
            msg = (
                f"{_place(name)} is sharded over processes ({next(iter(sharded), 'DTensor')}). Gather the full state "
                "dict and load it into a model without sharding."
            )
            raise nncf.UnsupportedModelError(msg)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                msg = (
                    f"{_place(name)} has a mask of torch.nn.utils.prune on its {hook._tensor_name!r}. Make it "
                    f"permanent first: torch.nn.utils.prune.remove(module, {hook._tensor_name!r})."
                )
                raise nncf.UnsupportedModelError(msg)
    return model


def check_not_compiled(model: nn.Module) -> None:
    """
    Refuses a model on whose layers something is to be put that code compiled before would not see.

    :param model: Any torch model.
    :raises nncf.UnsupportedModelError: It stands in what ``torch.compile`` gave.
    """
    while (shell := _shell(model)) is not None:
        inside = getattr(model, _SHELLS[shell])
        if shell == "OptimizedModule":
            msg = (
                "The model is compiled (OptimizedModule), and code that was compiled before does not see what is put "
                f"on its layers. Give the model inside, its attribute {_SHELLS[shell]!r}, and compile the result."
            )
            raise nncf.UnsupportedModelError(msg)
        model = inside


def check_plain(model: nn.Module) -> None:
    """
    Refuses a model whose weights are not where its modules say, or whose forward does not run its modules.

    :param model: Any torch model.
    :raises nncf.UnsupportedModelError: It, or a part of it, is wrapped, compiled, sharded, masked, quantized or
        offloaded; the part is named, with what would work.
    """
    shell = _shell(model)
    if shell is not None:
        msg = f"The model is wrapped ({shell}). Give the model inside, its attribute {_SHELLS[shell]!r}."
        raise nncf.UnsupportedModelError(msg)
    unwrapped(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "another method")
        msg = (
            f"{type(model).__name__} was loaded quantized ({getattr(method, 'value', method)}). Load the floating "
            "model it was made of."
        )
        raise nncf.UnsupportedModelError(msg)
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            msg = (
                f"{_place(name)} is compiled in place (module.compile()), and compiled code does not see how its "
                "modules change. Compile the result instead."
            )
            raise nncf.UnsupportedModelError(msg)
        hooks = getattr(module, "_hf_hook", None)
        if any(getattr(hook, "offload", False) for hook in getattr(hooks, "hooks", (hooks,))):
            msg = (
                f"The weights of {_place(name)} are offloaded by accelerate. Load the model without offloading: with "
                "no device_map, or one that names no 'cpu' or 'disk' beside other devices."
            )
            raise nncf.UnsupportedModelError(msg)
        for own_name, parameter in module.named_parameters(recurse=False):
            # torch calls any tensor a Parameter that is used as one.
            if not issubclass(type(parameter), nn.Parameter):
                msg = (
                    f"The {own_name} of {_place(name)} is a {type(parameter).__name__}, a tensor with a format of its "
                    "own. Load the floating model it was made of."
                )
                raise nncf.UnsupportedModelError(msg)


def leave_inference_mode(model: nn.Module) -> None:
    """
    Puts ordinary tensors in place of those made in inference mode, which nobody may change outside of it.

    :param model: Any torch model; changed in place. Shared tensors stay shared.
    """
    ordinary: dict[int, torch.Tensor] = {}
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, old in tensors.items():
                if old is None or not old.is_inference():
                    continue
                if id(old) not in ordinary:
                    new = old.detach().clone()
                    is_parameter = isinstance(old, nn.Parameter)
                    ordinary[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                tensors[name] = ordinary[id(old)]


def reparametrization(module: nn.Module, own_name: str) -> str | None:
    """
    :param module: The module that holds a parameter.
    :param own_name: Its name there.
    :return: What computes a weight from this parameter, and what undoes that; None where the parameter is a weight.
    """
    if isinstance(module, parametrize.ParametrizationList):
        kinds = ", ".join(type(each).__name__.lstrip("_") for each in module)
        undo = "torch.nn.utils.parametrize.remove_parametrizations"
        return f"computes a weight by a parametrization ({kinds}): undo it by {undo}"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm) and own_name.startswith(f"{hook.name}_"):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return f"computes a weight by torch.nn.utils.{kind}: undo it by torch.nn.utils.remove_{kind}"
    return None


def _shell(module: nn.Module) -> str | None:
    return next((name for name in _bases(module) if name in _SHELLS), None)


def _bases(module: nn.Module) -> list[str]:
    return [each.__name__ for each in type(module).__mro__ if each.__module__.startswith("torch.")]


def _place(name: str) -> str:
    return repr(name) if name else "The model"
