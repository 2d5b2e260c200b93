"""A weight as a stock model holds it."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino import Node, Output

from ov_ext.cpu_plugin.support.weight import Weight


def stock_weight(weight: Weight) -> Output:
    """Build what a stock model holds instead of an f32 constant ``[N, K]``: the subgraph NNCF writes.

    bf16: ``Constant -> Convert(f32)``. int8: ``Constant(i8) -> Convert(f16) -> Multiply(scale) -> Convert(f32)``. int4:
    the same on ``Constant(i4)[N, G, 128]`` with a Reshape to ``[N, K]`` before the last Convert.

    :param weight: Symmetric weight.
    :return: Output that yields f32 ``[N, K]``.
    """
    n, k = weight.shape
    if weight.scales is None:
        return ops.convert(_constant(weight.values, [n, k], ov.Type.bf16), "f32").output(0)
    scales = weight.scales
    if weight.kind == "int8":
        scaled = ops.multiply(ops.convert(_constant(weight.values, [n, k], ov.Type.i8), "f16"), ov.op.Constant(scales))
        return ops.convert(scaled, "f32").output(0)
    nibbles = weight.values.view(np.uint8) & 15
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    codes = _constant(packed, [n, k // weight.group, weight.group], ov.Type.i4)
    scaled = ops.multiply(ops.convert(codes, "f16"), ov.op.Constant(scales[:, :, None]))
    merged = ops.reshape(scaled, ov.op.Constant(np.array([n, k], np.int64)), False)
    return ops.convert(merged, "f32").output(0)


def _constant(raw: np.ndarray, shape: list[int], element: ov.Type) -> Node:
    """:return: A Constant that owns a copy of raw bytes; numpy has no bf16 and no 4-bit types."""
    return ov.op.Constant(ov.Tensor(np.ascontiguousarray(raw), shape, element), shared_memory=False)
