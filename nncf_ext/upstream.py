"""
The only file that imports names which NNCF and PyTorch do not document as public.

Checked against NNCF 3.4.0. What each is for:

* the function-hook storage: to put a decompressor behind a packed weight, and to see hooks that are already there;
* ``StatefulModuleInterface``: lets ``nncf.torch.get_config`` and ``load_from_config`` carry our hook modules;
* PyTorch's own questions to oneDNN, whether this CPU multiplies half-precision matrices by instructions of its own;
* ``INT4SymmetricWeightsDecompressor`` and ``unpack_int4``: the module and the byte order that
  ``nncf.compress_weights`` uses for INT4_SYM; ``INT8SymmetricWeightsDecompressor``: the module for INT8_SYM;
* PyTorch's ``TorchDispatchMode``: its manual on extending torch explains it, under this path. To follow a forward.
"""

import torch
from nncf.torch.function_hook import get_hook_storage as get_hook_storage
from nncf.torch.function_hook import is_wrapped as is_wrapped
from nncf.torch.function_hook import register_post_function_hook as register_post_function_hook
from nncf.torch.function_hook import wrap_model as wrap_model
from nncf.torch.function_hook.hook_storage import RemovableHookHandle as RemovableHookHandle
from nncf.torch.function_hook.hook_storage import decode_hook_name as decode_hook_name
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from nncf.torch.layer_utils import StatefulModuleInterface as StatefulModuleInterface
from nncf.torch.quantization.layers import INT4SymmetricWeightsDecompressor as INT4SymmetricWeightsDecompressor
from nncf.torch.quantization.layers import INT8SymmetricWeightsDecompressor as INT8SymmetricWeightsDecompressor
from nncf.torch.quantization.quantize_functions import unpack_int4 as unpack_int4
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

HOOKS_PREFIX = f"{ATR_HOOK_STORAGE}."
"""Begins the names of the hooks' own tensors in a state dict."""


def scale_of(decompressor: INT4SymmetricWeightsDecompressor | INT8SymmetricWeightsDecompressor) -> Tensor:
    """
    :param decompressor: A symmetric decompressor.
    :return: Its scales, float16: ``[out_features, groups, 1]``, or ``[out_features, 1]`` with one group a row.
    """
    return decompressor._scale


def has_fast_products(dtype: torch.dtype) -> bool:
    """
    :param dtype: A floating type.
    :return: Whether PyTorch multiplies matrices of it on this CPU about as fast as in float32, or faster.
    """
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def unwrap_model(model: nn.Module) -> None:
    """
    Undoes ``wrap_model``; nothing where the model is not wrapped.

    :param model: A model whose hooks have all been removed.
    """
    if is_wrapped(model):
        original = model.forward.orig_forward  # type: ignore[attr-defined]
        del model.forward, model._replicate_for_data_parallel
        delattr(model, ATR_HOOK_STORAGE)
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original
