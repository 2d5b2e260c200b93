"""
A weight on a grid: INT4 codes with one scale per group of input columns, in the form NNCF gives it in torch.

The weight ``[out_features, in_features]`` is cut along its inputs into groups of 64 or 128. A group has one signed
float16 scale; a code in -8..7 stands for ``float16(code * scale)``. The scale takes the sign that puts the entry of
largest magnitude on code -8, the end of the range that reaches furthest. Code 0 is the number 0 for every scale.

In the model, the parameter holds two codes in a byte and a decompressor hook turns it into the weight whenever the
forward reads it: what ``nncf.compress_weights(mode=INT4_SYM)`` leaves, and what OpenVINO's converter recognizes.
"""

from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.upstream import (
    INT4SymmetricWeightsDecompressor,
    RemovableHookHandle,
    StatefulModuleInterface,
    decode_hook_name,
    get_hook_storage,
    is_wrapped,
    register_post_function_hook,
    scale_of,
    unpack_int4,
    wrap_model,
)

LOWEST_CODE, HIGHEST_CODE = -8, 7


class PackedInt4Weight(INT4SymmetricWeightsDecompressor, StatefulModuleInterface):
    """
    NNCF's INT4 symmetric decompressor that also survives ``nncf.torch.get_config`` and ``load_from_config``.

    NNCF's own class does not (3.4.0): a model it compressed can be exported but not saved. Computation and stored
    tensors are the same.

    :param scale: Scales ``[out_features, groups, 1]``; kept as float16.
    :param compressed_weight_shape: ``(out_features, groups, group_size)``.
    :param result_shape: ``(out_features, in_features)``.
    :param result_dtype: Floating type of the weight that the forward sees.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() and self.result_dtype is not torch.float32 and self._scale.dtype is torch.float32:
            # OpenVINO's patch of 16-bit models has widened the scales, and put zeros in place of the biases.
            msg = (
                f"OpenVINO converts weights on the INT4 grid from a float32 model; this one is {self.result_dtype}. "
                'Load it in float32 (torch_dtype="float32" in OVModelForCausalLM.from_pretrained, dtype=torch.float32 '
                "in nncf_ext.load_pretrained), or export the folder by `nncf-ext export FOLDER OUT`."
            )
            raise nncf.ValidationError(msg)
        decoded: Tensor = super().forward(x)
        return decoded

    def get_config(self) -> dict[str, Any]:
        return {
            "compressed_weight_shape": list(self.compressed_weight_shape),
            "result_shape": list(self.result_shape),
            "result_dtype": str(self.result_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "PackedInt4Weight":
        rows, groups, group_size = state["compressed_weight_shape"]
        dtype = getattr(torch, state["result_dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            msg = f"The decompressor's result type {state['result_dtype']!r} is no floating type of torch."
            raise nncf.ValidationError(msg)
        return cls(
            torch.ones(rows, groups, 1, dtype=torch.float16),
            (rows, groups, group_size),
            tuple(state["result_shape"]),
            dtype,
        )


def group_scale(group: Tensor) -> Tensor:
    """
    The scale of one group of columns by NNCF's rule for INT4_SYM, rounded to the float16 in which it is stored.

    :param group: Weights ``[out_features, group_size]``, float32.
    :return: Scale ``[out_features, 1]``, float16, never zero.
    """
    lowest = group.amin(dim=1, keepdim=True).abs()
    highest = group.amax(dim=1, keepdim=True)
    scale = torch.where(lowest >= highest, lowest, -highest) / -LOWEST_CODE
    tiny = torch.finfo(torch.float32).eps
    return torch.where(scale.abs() < tiny, tiny, scale).half()


def nearest_code(weight: Tensor, scale: Tensor) -> Tensor:
    """
    Rounds to the nearest grid point of a group. Computed in float32.

    :param weight: Weights ``[out_features, columns]`` of one group, or of one column ``[out_features]``, float32.
    :param scale: Scale ``[out_features, 1]``, or ``[out_features]``, float16.
    :return: Codes, float32 holding integers in -8..7, of the weights' shape.
    """
    return (weight / scale.float()).round_().clamp_(LOWEST_CODE, HIGHEST_CODE)


def grid_value(code: Tensor, scale: Tensor) -> Tensor:
    """
    The number a code stands for: the product rounded to float16, as the decompressor computes it.

    :param code: Codes ``[out_features, columns]`` of one group, or of one column ``[out_features]``, any type.
    :param scale: Scale ``[out_features, 1]``, or ``[out_features]``, float16.
    :return: Values of the codes' shape, float32.
    """
    # A 4-bit code times an 11-bit mantissa is exact in float32, so this rounds once, like a float16 multiplication.
    return (code.float() * scale.float()).half().float()


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """
    :param codes: Codes ``[out_features, in_features]``.
    :param scales: Scales ``[out_features, groups]``, float16.
    :return: Weight ``[out_features, in_features]``, float32.
    """
    rows, columns = codes.shape
    grouped = codes.reshape(-1, columns // scales.shape[1])
    return grid_value(grouped, scales.reshape(-1, 1)).reshape(rows, columns)


def round_to_grid(weight: Tensor, scales: Tensor) -> Tensor:
    """
    Round-to-nearest codes of a weight on given scales.

    :param weight: Weight ``[out_features, in_features]``, float32.
    :param scales: Scales ``[out_features, groups]``, float16.
    :return: Codes ``[out_features, in_features]``, int8 in -8..7.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(-1, columns // scales.shape[1])
    return nearest_code(grouped, scales.reshape(-1, 1)).reshape(rows, columns).to(torch.int8)


def check_hookable(model: nn.Module) -> None:
    """
    :param model: A model whose weights are to be packed.
    :raises nncf.UnsupportedModelError: The model's class cannot carry NNCF's function hooks.
    """
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        msg = (
            f"Asked to quantize a bare torch.nn.{type(model).__name__}. NNCF stores its hooks as one more child, which "
            "such a container would run as a layer. Put it inside an nn.Module with a forward of its own."
        )
        raise nncf.UnsupportedModelError(msg)


def pack(model: nn.Module, weight_name: str, codes: Tensor, scales: Tensor) -> RemovableHookHandle:
    """
    Replaces a weight by its packed codes and puts the decompressor behind it.

    :param model: The whole model; wrapped for NNCF's hooks if it is not yet.
    :param weight_name: Path of the parameter, such as ``"model.layers.0.mlp.up_proj.weight"``. Its present floating
        type is what the forward will see.
    :param codes: Codes ``[out_features, in_features]``, int8.
    :param scales: Scales ``[out_features, groups]``, float16.
    :return: Handle that removes the decompressor (not the packed codes).
    """
    parameter = model.get_parameter(weight_name)
    rows, columns = codes.shape
    grouped = (rows, scales.shape[1], columns // scales.shape[1])
    decompressor = PackedInt4Weight(scales.unsqueeze(2), grouped, (rows, columns), parameter.dtype)
    packed = decompressor.pack_weight(codes.reshape(grouped))
    handle = register_post_function_hook(wrap_model(model), weight_name, 0, decompressor.to(codes.device))
    parameter.requires_grad_(False)
    parameter.data = packed
    return handle


def unpack(model: nn.Module, weight_name: str) -> None:
    """
    Undoes :func:`pack`: the parameter becomes the dense floating weight and the decompressor is removed.

    :param model: The whole model.
    :param weight_name: Path of a packed parameter.
    """
    decompressor = decompressors(model)[weight_name]
    parameter = model.get_parameter(weight_name)
    with torch.no_grad():
        parameter.data = decompressor(parameter.data)
    storage = get_hook_storage(model)
    for hook_name, hook in list(storage.named_hooks()):
        if hook is decompressor:
            storage.delete_hook(hook_name)


def decompressors(model: nn.Module) -> dict[str, INT4SymmetricWeightsDecompressor]:
    """
    :param model: Any torch model.
    :return: INT4 symmetric decompressors, ours and NNCF's own, by the path of the parameter they stand behind.
    """
    return {
        name: hook for name, hook in weight_hooks(model).items() if isinstance(hook, INT4SymmetricWeightsDecompressor)
    }


def weight_hooks(model: nn.Module) -> dict[str, nn.Module]:
    """
    :param model: Any torch model.
    :return: NNCF hooks of any kind that stand behind a parameter, by the parameter's path.
    """
    if not is_wrapped(model):
        return {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    hooks = {decode_hook_name(name)[1]: hook for name, hook in get_hook_storage(model).named_hooks()}
    return {name: hook for name, hook in hooks.items() if name in parameters}


def codes_and_scales(parameter: Tensor, decompressor: INT4SymmetricWeightsDecompressor) -> tuple[Tensor, Tensor]:
    """
    Reads a packed weight.

    :param parameter: Packed codes, uint8.
    :param decompressor: The hook behind it.
    :return: Codes ``[out_features, in_features]`` int8 and scales ``[out_features, groups]`` float16. A single group
        spans the whole row in NNCF's per-channel form.
    """
    codes = unpack_int4(parameter).reshape(decompressor.result_shape)
    return codes, scale_of(decompressor).reshape(codes.shape[0], -1)
