"""One layer of stateful attention, as Optimum-Intel exports it, and its inputs: what is timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

HEADS, GROUP = 8, 4  # of keys and values; query heads of each
SIZES = {"q": HEADS * GROUP, "k": HEADS, "v": HEADS}


def layer(head_dim: int) -> ov.Model:
    """:return: Stateful attention of 32 query heads and 8 heads of keys and values, as Optimum-Intel exports it."""
    inputs = {name: ops.parameter([-1, size, -1, head_dim], np.float32) for name, size in SIZES.items()}
    inputs["beam_idx"] = ops.parameter([-1], np.int32)
    inputs["mask"] = ops.parameter([-1, 1, -1, -1], np.float32)
    for name, node in inputs.items():
        node.output(0).set_names({name})
    operands, sinks = [], []
    for name in ("k", "v"):
        sequences = ops.gather(ops.shape_of(inputs["q"]), _i64([0]), _i64(0))
        empty = ops.concat([sequences, _i64([HEADS]), _i64([0]), _i64([head_dim])], 0)
        info = ov.op.util.VariableInfo()
        info.variable_id, info.data_type = name, ov.Type.f32
        info.data_shape = ov.PartialShape([-1, HEADS, -1, head_dim])
        variable = ov.op.util.Variable(info)
        read = ops.read_value(ops.broadcast(ops.constant(0.0, ov.Type.f32), empty), variable)
        whole = ops.concat([ops.gather(read, inputs["beam_idx"], _i64(0)), inputs[name]], 2)
        sinks.append(ops.assign(whole, variable))
        shape = ops.shape_of(whole)
        front, back = (ops.gather(shape, _i64(axes), _i64(0)) for axes in ([0, 1], [2, 3]))
        target = ops.concat([front, _i64([GROUP]), back], 0)
        many = ops.broadcast(ops.unsqueeze(whole, _i64(2)), target, broadcast_spec="BIDIRECTIONAL")
        operands.append(ops.reshape(many, _i64([0, HEADS * GROUP, -1, head_dim]), True))
    scale = ops.constant(head_dim**-0.5, ov.Type.f32)
    y = ops.scaled_dot_product_attention(inputs["q"], *operands, inputs["mask"], scale)
    return ov.Model([ops.result(y)], sinks, list(inputs.values()), "attention")


def tokens(
    rng: np.random.Generator, head_dim: int, count: int, past: int, causal: bool = True
) -> dict[str, np.ndarray]:
    """:return: Inputs of :func:`layer`: ``count`` new tokens behind ``past`` others."""
    new = {name: rng.standard_normal((1, size, count, head_dim), np.float32) for name, size in SIZES.items()}
    future = np.arange(past + count) > past + np.arange(count if causal else 1)[:, None]
    mask = np.where(future & causal, np.float32(-65504), np.float32(0))[None, None]
    return {**new, "beam_idx": np.zeros(1, np.int32), "mask": mask}


def _i64(value: Any) -> ov.Node:
    node: ov.Node = ops.constant(value, ov.Type.i64)
    return node
