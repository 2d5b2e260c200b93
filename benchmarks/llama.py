"""Llama graphs built directly as OpenVINO models: the linear layers alone, and the whole decoder with its KV cache.

Built here rather than exported, so that 850 million parameters need neither PyTorch nor its memory. The decoder follows
the graph which Optimum-Intel exports, operation by operation where OpenVINO fuses: RMSNorm, rotary embedding, grouped
attention with a cache in variables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino import Node, Output

from benchmarks.weights import linear, random_weight, stock_weight
from ov_ext.cpu_plugin.support.weight import Weight

EPSILON, ROPE_BASE = 1e-5, 10000.0
HEAD = "lm_head"
ALL = "all"
T = TypeVar("T")
_GAIN = {"o_proj": 0.25, "down_proj": 0.25}  # small branches keep the residual stream bounded, with and without norms


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model, all in elements.

    :param hidden: Width of the residual stream.
    :param mlp: Width of gate and up.
    :param heads: Query heads.
    :param kv_heads: Key and value heads, a divisor of ``heads``.
    :param head_dim: Width of a head.
    :param vocab: Rows of the embedding and of lm_head, which are not tied.
    :param layers: Decoder layers.
    """

    hidden: int = 2048
    mlp: int = 5632
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 32000
    layers: int = 16

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the linear layers of one decoder layer, by name, in the order of use."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.mlp, self.hidden),
            "up_proj": (self.mlp, self.hidden),
            "down_proj": (self.hidden, self.mlp),
        }


LLAMA_1B = LlamaShape()
TINY = LlamaShape(hidden=256, mlp=768, heads=4, kv_heads=2, head_dim=64, vocab=512, layers=2)


@dataclass(frozen=True)
class RandomLlama:
    """A model's weights as a function: each is drawn again when asked for, none is kept.

    :param shape: Sizes.
    :param kind: Value kind of all matrices.
    :param sparsity: Fraction 0..1 of zeros in the linear layers. Embedding and lm_head are dense.
    :param sparse_head: lm_head has zeros, too.
    :param seed: Two models with equal fields have equal weights.
    """

    shape: LlamaShape
    kind: str
    sparsity: float
    sparse_head: bool = False
    seed: int = 0

    def weight(self, layer: int, name: str) -> Weight:
        """:return: One linear layer's weight ``[N, K]``."""
        linears = self.shape.linears
        rng = np.random.default_rng([self.seed, layer, list(linears).index(name)])
        return random_weight(self.kind, *linears[name], self.sparsity, rng, _GAIN.get(name, 1.0))

    def head(self) -> Weight:
        """:return: lm_head ``[vocab, hidden]``."""
        rng = np.random.default_rng([self.seed, self.shape.layers])
        sparsity = self.sparsity if self.sparse_head else 0.0
        return random_weight(self.kind, self.shape.vocab, self.shape.hidden, sparsity, rng)

    def embedding(self) -> Weight:
        """:return: ``[vocab, hidden]``, bf16 or, as NNCF leaves it under int4, too, int8."""
        rng = np.random.default_rng([self.seed, self.shape.layers + 1])
        kind = "bf16" if self.kind == "bf16" else "int8"
        return random_weight(kind, self.shape.vocab, self.shape.hidden, 0.0, rng)

    def norm(self, index: int) -> np.ndarray:
        """:return: Weight of one RMSNorm, float32 ``[hidden]``, exact in bf16; two a layer, then the last one."""
        rng = np.random.default_rng([self.seed, self.shape.layers + 2, index])
        return (1 + rng.integers(-24, 25, self.shape.hidden) / 128).astype(np.float32)


def linear_model(weight: Weight, name: str) -> ov.Model:
    """:return: One linear layer alone, ``x [1, rows, K]`` to ``[1, rows, N]``."""
    x = ops.parameter([1, -1, weight.shape[1]], np.float32, name="x")
    return ov.Model([ops.result(linear(x.output(0), weight, name))], [x], name)


def network(
    shape: LlamaShape,
    part: str,
    x: T,
    linear: Callable[[T, int, str], T],
    add: Callable[[T, T], T],
    gated: Callable[[T, T], T],
) -> list[T]:
    """Linear layers without attention, norms and lm_head, in any framework.

    :param shape: Sizes.
    :param part: ``"all"``: the layers in the order a decoder runs them; o_proj reads q. Or a key of
        ``LlamaShape.linears``: this layer, as often as the model has it, each reading ``x``.
    :param x: ``[..., K]`` of the first layer.
    :param linear: Applies a layer, named by decoder layer and key.
    :param add: Sum.
    :param gated: ``silu(gate) * up`` of its two arguments.
    :return: ``"all"``: the hidden state after the last layer, then k and v of every layer; else every layer's output.
    """
    if part != ALL:
        return [linear(x, i, part) for i in range(shape.layers)]
    h, results = x, []
    for i in range(shape.layers):
        q, k, v = (linear(h, i, name) for name in ("q_proj", "k_proj", "v_proj"))
        results += [k, v]
        h = add(h, linear(q, i, "o_proj"))
        h = add(h, linear(gated(linear(h, i, "gate_proj"), linear(h, i, "up_proj")), i, "down_proj"))
    return [h, *results]


def matrices(shape: LlamaShape, part: str) -> list[tuple[int, str]]:
    """:return: The layers of :func:`network` in the order of use: decoder layer and key."""
    return [(i, name) for i in range(shape.layers) for name in shape.linears if part in (ALL, name)]


def stack(llama: RandomLlama, part: str = ALL) -> ov.Model:
    """:func:`network` as a model: ``x [1, rows, K]`` to results ``[1, rows, N]``."""
    name = "q_proj" if part == ALL else part
    x = ops.parameter([1, -1, llama.shape.linears[name][1]], np.float32, name="x")
    outputs = network(llama.shape, part, x.output(0), partial(_layer, llama), _sum, _gated)
    return ov.Model([ops.result(port) for port in outputs], [x], "stack")


def decoder(llama: RandomLlama) -> ov.Model:
    """The whole model, with the inputs and outputs of an Optimum-Intel export.

    input_ids, attention_mask, position_ids (i64 ``[batch, tokens]``, the mask with past tokens), beam_idx (i32
    ``[batch]``) to logits (f32 ``[batch, tokens, vocab]``). Keys and values live in variables.
    """
    shape = llama.shape
    ids, mask, positions = (
        ops.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "attention_mask", "position_ids")
    )
    beam = ops.parameter([-1], np.int32, name="beam_idx")
    inputs = [ids, mask, positions, beam]
    for parameter in inputs:
        parameter.output(0).set_names({parameter.get_friendly_name()})
    indices = ops.convert(ids, "i32")
    h = ops.gather(stock_weight(llama.embedding()), indices, _ints(0)).output(0)
    attention = _Attention(shape, ids, mask, positions, beam)
    for i in range(shape.layers):
        normed = _rms_norm(h, llama.norm(2 * i))
        q, k, v = (_layer(llama, normed, i, name) for name in ("q_proj", "k_proj", "v_proj"))
        h = _sum(h, _layer(llama, attention(i, q, k, v), i, "o_proj"))
        normed = _rms_norm(h, llama.norm(2 * i + 1))
        gate, up = (_layer(llama, normed, i, name) for name in ("gate_proj", "up_proj"))
        h = _sum(h, _layer(llama, _gated(gate, up), i, "down_proj"))
    logits = linear(_rms_norm(h, llama.norm(2 * shape.layers)), llama.head(), HEAD)
    logits.set_names({"logits"})
    return ov.Model([ops.result(logits)], attention.assigns, inputs, "decoder")


def _layer(llama: RandomLlama, x: Output, layer: int, name: str) -> Output:
    return linear(x, llama.weight(layer, name), f"{layer}.{name}")


def _gated(gate: Output, up: Output) -> Output:
    return ops.multiply(ops.swish(gate), up).output(0)


def _rms_norm(x: Output, weight: np.ndarray) -> Output:
    mean = ops.reduce_mean(ops.power(x, _floats(2.0)), _ints([-1]), True)
    inverse = ops.divide(_floats(1.0), ops.sqrt(ops.add(mean, _floats(EPSILON))))
    return ops.multiply(_floats(weight), ops.multiply(x, inverse)).output(0)


class _Attention:
    """Grouped-query attention over a growing cache; what all layers share is built once."""

    def __init__(self, shape: LlamaShape, ids: Node, mask: Node, positions: Node, beam: Node) -> None:
        self.shape, self.beam = shape, beam
        self.assigns: list[Node] = []
        self.batch = ops.gather(ops.shape_of(ids), _ints([0]), _ints(0))
        frequencies = ROPE_BASE ** (-np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
        # [batch, head_dim / 2, 1] x [batch, 1, tokens] -> [batch, tokens, head_dim]
        column = ops.broadcast(
            _floats(frequencies[None, :, None]), ops.concat([self.batch, _ints([shape.head_dim // 2, 1])], 0)
        )
        angles = ops.matmul(column, ops.convert(ops.unsqueeze(positions, _ints(1)), "f32"), False, False)
        angles = ops.transpose(angles, _ints([0, 2, 1]))
        angles = ops.concat([angles, angles], -1)
        self.cosine = ops.unsqueeze(ops.cos(angles), _ints(1))
        self.sine = ops.unsqueeze(ops.sin(angles), _ints(1))
        # A key is seen when it is no later than the query and not padding.
        length = ops.gather(ops.shape_of(mask), _ints(1), _ints(0))
        keys = ops.unsqueeze(ops.range(_ints(0), length, _ints(1), "i64"), _ints([0, 1, 2]))
        causal = ops.less_equal(keys, ops.unsqueeze(positions, _ints([1, 3])))
        seen = ops.logical_and(causal, ops.unsqueeze(ops.convert(mask, "boolean"), _ints([1, 2])))
        self.mask = ops.select(seen, _floats(0.0), _floats(float(np.finfo(np.float32).min)))

    def __call__(self, layer: int, q: Output, k: Output, v: Output) -> Output:
        """:return: ``[batch, tokens, heads * head_dim]``; q, k, v are the projections of one layer."""
        shape = self.shape
        q = self._rotated(self._by_head(q, shape.heads))
        k = self._cached(f"{layer}.key", self._rotated(self._by_head(k, shape.kv_heads)))
        v = self._cached(f"{layer}.value", self._by_head(v, shape.kv_heads))
        context = ops.scaled_dot_product_attention(
            q, self._repeated(k), self._repeated(v), self.mask, _floats(shape.head_dim**-0.5), False
        )
        merged = ops.transpose(context, _ints([0, 2, 1, 3]))
        return ops.reshape(merged, _ints([0, 0, shape.heads * shape.head_dim]), True).output(0)

    def _by_head(self, x: Output, heads: int) -> Output:
        split = ops.reshape(x, _ints([0, 0, heads, self.shape.head_dim]), True)
        return ops.transpose(split, _ints([0, 2, 1, 3])).output(0)

    def _rotated(self, x: Output) -> Output:
        half = self.shape.head_dim // 2
        low, high = (
            ops.slice(x, _ints([start]), _ints([stop]), _ints([1]), _ints([3]))
            for start, stop in ((0, half), (half, np.iinfo(np.int64).max))
        )
        turned = ops.concat([ops.multiply(high, _floats(-1.0)), low], -1)
        return ops.add(ops.multiply(x, self.cosine), ops.multiply(turned, self.sine)).output(0)

    def _cached(self, name: str, new: Output) -> Output:
        shape = self.shape
        sizes = ops.concat([self.batch, _ints([shape.kv_heads, 0, shape.head_dim])], 0)
        empty = ops.broadcast(_floats(0.0), sizes)
        variable = [-1, shape.kv_heads, -1, shape.head_dim]
        past = ops.gather(ops.read_value(empty, name, ov.Type.f32, ov.PartialShape(variable)), self.beam, _ints(0))
        cache = ops.concat([past, new], 2)
        self.assigns.append(ops.assign(cache, name))
        return cache.output(0)

    def _repeated(self, x: Output) -> Output:
        """Each key and value head serves heads / kv_heads query heads."""
        shape, copies = self.shape, self.shape.heads // self.shape.kv_heads
        if copies == 1:
            return x
        sizes = _ints([1, 1, copies, 1, 1])
        many = ops.broadcast(ops.unsqueeze(x, _ints(2)), sizes, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(many, _ints([0, shape.heads, -1, shape.head_dim]), True).output(0)


def matmul_names(shape: LlamaShape, part: str = ALL) -> list[str]:
    """:return: Friendly names of the linear layers of :func:`stack` and :func:`decoder`, without lm_head."""
    return [f"{i}.{name}" for i, name in matrices(shape, part)]


def _sum(a: Output, b: Output) -> Output:
    return ops.add(a, b).output(0)


def _ints(values: int | list[int]) -> Node:
    return ov.op.Constant(np.array(values, np.int64))


def _floats(values: float | np.ndarray) -> Node:
    return ov.op.Constant(np.array(values, np.float32))
