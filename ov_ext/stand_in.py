"""Stand-ins for torch models: converters patch what they convert, and the user's model must stay as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    TModule = TypeVar("TModule", bound=torch.nn.Module)

_PATCHED = "_openvino_module_extension_patch_orig_forward"  # OpenVINO's name for the forward that a patch replaced
_DECODED = "result_dtype"  # attribute of NNCF's decompressors: the floating type that they return


def stand_in(model: TModule) -> TModule:
    """Copy a model, but not its weights.

    :param model: Any torch module. It is not changed.
    :return: The same modules, hooks and configuration once more, in evaluation mode. Parameters read the memory of the
        model's own, tied ones stay tied; buffers and other tensors are copies. What happens to the stand-in, other than
        writing into its weights in place, does not reach the model.
    :raises ValueError: Weights are offloaded, or the model holds something that cannot be copied.
    """
    import torch

    shared: dict[int, Any] = {}
    for path, module in model.named_modules():
        for name, tensor in (module._parameters | module._buffers | vars(module)).items():
            if not isinstance(tensor, torch.Tensor) or id(tensor) in shared:
                continue
            if tensor.is_meta:
                raise ValueError(
                    f"{path}.{name}".lstrip(".")
                    + " is not in memory (device 'meta'): it was offloaded or never loaded. Load the whole "
                    "model into memory to convert it, without device_map, offload_folder and accelerate's hooks."
                )
            own = tensor.detach()
            shared[id(tensor)] = (
                torch.nn.Parameter(own, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else own.clone()
            )
    try:
        twin = copy.deepcopy(model, shared)
    except Exception as error:  # of whatever the model holds
        msg = f"{type(model).__name__} holds something that cannot be copied ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
    return twin.eval()


@contextmanager
def computing_in_float32(model: torch.nn.Module) -> Iterator[bool]:
    """Make a 16-bit stand-in traceable: activations in float32, as OpenVINO computes them.

    What NNCF's hooks decode comes out as float32. Weights of linear layers and embeddings keep their 16 bits, as far as
    OpenVINO's patch can do that: not where a hook of another kind reads them.

    :param model: A stand-in.
    :return: Context manager. It tells whether OpenVINO's 16-bit patch is needed; who applies it need not undo it where
        an error comes in between.
    """
    import torch
    from openvino.frontend.pytorch.patch_model import unpatch_model

    bmm = torch.bmm
    try:
        yield _in_float32(model)
    finally:
        if torch.bmm is not bmm:  # part of the patch, and the sign that it was not undone
            unpatch_model(model, _PATCHED)


def patch_16bit(model: torch.nn.Module) -> None:
    """Apply OpenVINO's 16-bit patch, inside of :func:`computing_in_float32`.

    :param model: A stand-in.
    """
    from openvino.frontend.pytorch.patch_model import __make_16bit_traceable

    __make_16bit_traceable(model, _PATCHED)


def _in_float32(model: torch.nn.Module) -> bool:
    import torch

    half = (torch.float16, torch.bfloat16)
    decoders: list[Any] = [module for module in model.modules() if hasattr(module, _DECODED)]
    for decoder in decoders:
        if decoder.result_dtype in half:
            decoder.result_dtype = torch.float32
    if not any(parameter.dtype in half for parameter in model.parameters()):
        return False
    for decoder in decoders:  # the patch would widen scales; it does not see tensors that are no buffers
        for name in list(decoder._buffers):
            tensor = decoder._buffers.pop(name)
            object.__setattr__(decoder, name, tensor)
    hooks = model._modules.get("__nncf_hooks")
    others = hooks is not None and any(
        not hasattr(module, _DECODED) and (module._parameters or module._buffers) for module in hooks.modules()
    )
    for module in model.modules():
        weight = getattr(module, "weight", None)
        # The patch replaces a layer that holds codes only by half: it would lose the bias.
        if others or (isinstance(weight, torch.Tensor) and not weight.is_floating_point()):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.float() if tensor.dtype in half else tensor.data
    return not others
