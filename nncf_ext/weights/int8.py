"""
A weight on INT8: codes with one scale for each row, in the form NNCF gives it in torch.

A row of a weight ``[out_features, in_features]`` has one float16 scale; a code in -127..127 stands for
``float16(code * scale)``. Code 0 is the number 0, so zeros stay zeros. It is what
``nncf.compress_weights(mode=INT8_SYM)`` leaves, and what OpenVINO's converter recognizes.
"""

from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.upstream import (
    INT8SymmetricWeightsDecompressor,
    RemovableHookHandle,
    StatefulModuleInterface,
    register_post_function_hook,
    wrap_model,
)

HIGHEST_CODE = 127


class PackedInt8Weight(INT8SymmetricWeightsDecompressor, StatefulModuleInterface):
    """
    NNCF's INT8 symmetric decompressor that also survives ``nncf.torch.get_config`` and ``load_from_config``.

    :param scale: Scales ``[out_features, 1]``; kept as float16.
    :param result_dtype: Floating type of the weight that the forward sees.
    """

    def get_config(self) -> dict[str, Any]:
        return {"rows": len(self._scale), "result_dtype": str(self.result_dtype).removeprefix("torch.")}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "PackedInt8Weight":
        dtype = getattr(torch, state["result_dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            msg = f"The decompressor's result type {state['result_dtype']!r} is no floating type of torch."
            raise nncf.ValidationError(msg)
        return cls(torch.ones(state["rows"], 1, dtype=torch.float16), dtype)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    :param weight: Weight ``[out_features, in_features]``, any floating type.
    :return: Codes, int8, same shape, and scales ``[out_features, 1]``, float16, never zero: the entry of largest
        magnitude of a row has code 127 or -127, in a row of zeros 0.
    """
    weight = weight.detach().float()
    tiny = torch.finfo(torch.float32).eps
    scales = (weight.abs().amax(dim=1, keepdim=True) / HIGHEST_CODE).clamp(min=tiny).half()
    codes = (weight / scales.float()).round_().clamp_(-HIGHEST_CODE, HIGHEST_CODE)
    return codes.to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """
    :param codes: Codes ``[out_features, in_features]``.
    :param scales: Scales ``[out_features, 1]``, float16.
    :return: Weight, same shape, float32: products rounded to float16, as the decompressor computes them.
    """
    return (codes.float() * scales.float()).half().float()


def pack_int8(model: nn.Module, weight_name: str, codes: Tensor, scales: Tensor) -> RemovableHookHandle:
    """
    Replaces a weight by its codes and puts the decompressor behind it.

    :param model: The whole model; wrapped for NNCF's hooks if it is not yet.
    :param weight_name: Path of the parameter. Its present floating type is what the forward will see.
    :param codes: Codes ``[out_features, in_features]``, int8.
    :param scales: Scales ``[out_features, 1]``, float16.
    :return: Handle that removes the decompressor (not the codes).
    """
    parameter = model.get_parameter(weight_name)
    decompressor = PackedInt8Weight(scales, parameter.dtype)
    handle = register_post_function_hook(wrap_model(model), weight_name, 0, decompressor.to(codes.device))
    parameter.requires_grad_(False)
    parameter.data = codes
    return handle
