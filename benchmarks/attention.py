"""Time of one token in one layer of attention: stock OpenVINO's caches against pruned keys and values.

``python -m benchmarks.attention --context 4096 --head-dim 128 --rounds 60``: arms take turns in every round.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

import ov_ext

HEADS, GROUP = 8, 4  # of keys and values; query heads of each


def _i64(value: Any) -> ov.Node:
    node: ov.Node = ops.constant(value, ov.Type.i64)
    return node


def layer(head_dim: int) -> ov.Model:
    """:return: Stateful attention of 32 query heads and 8 heads of keys and values, as Optimum-Intel exports it."""
    sizes = {"q": HEADS * GROUP, "k": HEADS, "v": HEADS}
    inputs = {name: ops.parameter([-1, size, -1, head_dim], np.float32) for name, size in sizes.items()}
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


def tokens(rng: np.random.Generator, head_dim: int, count: int, past: int) -> dict[str, np.ndarray]:
    """:return: Inputs of :func:`layer`: ``count`` new tokens behind ``past`` others."""
    sizes = {"q": HEADS * GROUP, "k": HEADS, "v": HEADS}
    new = {name: rng.standard_normal((1, size, count, head_dim), np.float32) for name, size in sizes.items()}
    future = np.arange(past + count) > past + np.arange(count)[:, None]
    mask = np.where(future, np.float32(-65504), np.float32(0))[None, None]
    return {**new, "beam_idx": np.zeros(1, np.int32), "mask": mask}


def main() -> None:
    """Fill every arm's cache with one prompt, then time single tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096, help="tokens of the past")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    core, rng = ov_ext.add_extension(ov.Core()), np.random.default_rng(0)
    arms: dict[str, ov.InferRequest] = {}
    for kind in ("u8", "u4"):
        compiled = core.compile_model(layer(options.head_dim), "CPU", {"KV_CACHE_PRECISION": kind})
        arms[f"stock {kind}"] = compiled.create_infer_request()
    policies = [ov_ext.SparseAttentionPolicy(k=level, v=level) for level in (0.5, 0.7)]
    policies.append(ov_ext.SparseAttentionPolicy(values="int4"))
    for policy in policies:
        model = ov_ext.sparsify_attention(layer(options.head_dim), policy)[0]
        arms[f"ours {policy.k:.0%} {policy.values}"] = core.compile_model(model, "CPU").create_infer_request()
    prompt = tokens(rng, options.head_dim, options.context, 0)
    for request in arms.values():
        request.infer(prompt)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for step in range(options.rounds):
        token = tokens(rng, options.head_dim, 1, options.context + step)
        for name, request in arms.items():
            begin = time.perf_counter()
            request.infer(token)
            seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        print(f"{name:14} least {1e6 * min(times):7.0f} us, median {1e6 * float(np.median(times)):7.0f} us")


if __name__ == "__main__":
    main()
