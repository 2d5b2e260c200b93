"""Random weights with a given share of zeros, and the subgraph in which a stock OpenVINO model holds them.

Random is enough: the time of a matrix product depends on where the zeros are (uniformly spread here, the hardest case
for any format), not on the values.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np
import openvino.opset13 as ops
from openvino import Node, Output

from ov_ext.cpu_plugin.support.weight import Weight
from ov_ext.sparse_weights.stock import stock_weight

KINDS = ("bf16", "int8", "int4")
LABELS = {"bf16": "bf16", "int8": "INT8", "int4": "INT4 g128"}  # for tables
GROUP = 128  # scale group of int4, as NNCF's default
_DRAWS = 1 << 16
_CODE_SPREAD = {"int8": 127 / 4, "int4": 7 / 2.7}  # codes per standard deviation: the range holds 4 or 2.7 of them


@cache
def _quantiles(sparsity: float) -> np.ndarray:
    """The values a uniform 16-bit draw stands for: zeros first, then a unit normal distribution without its zero."""
    zeros = round(sparsity * _DRAWS)
    normal, count = NormalDist(), _DRAWS - zeros
    # An odd number of equal slices would put one quantile on zero.
    tail = [normal.inv_cdf((i + 0.5) / count + (1e-9 if 2 * i + 1 == count else 0.0)) for i in range(count)]
    return np.array([0.0] * zeros + tail, np.float32)


def random_weight(kind: str, n: int, k: int, sparsity: float, rng: np.random.Generator, gain: float = 1.0) -> Weight:
    """Draw a weight whose product with unit activations has a standard deviation of about ``gain``.

    :param kind: ``"bf16"``, ``"int8"`` (one scale per output) or ``"int4"`` (groups of 128 inputs).
    :param n: Outputs.
    :param k: Inputs; a multiple of 128 for int4.
    :param sparsity: Fraction 0..1 of zeros, each element independently. No other element is zero.
    :param rng: Source of randomness; one seed gives one weight.
    :param gain: Factor on the weight.
    :return: The weight ``[n, k]``, symmetric, without bias.
    """
    draws = rng.integers(0, _DRAWS, (n, k), dtype=np.uint16)
    normal = _quantiles(sparsity)
    spread = gain / np.sqrt(k * max(1.0 - sparsity, 1.0 / k))
    if kind == "bf16":
        table = (normal * np.float32(spread)).astype(np.float32).view(np.uint32)
        return Weight(kind, ((table + 0x7FFF + ((table >> 16) & 1)) >> 16).astype(np.uint16)[draws])
    limit = 127 if kind == "int8" else 7
    steps = np.clip(np.rint(normal * _CODE_SPREAD[kind]), -limit - (kind == "int4"), limit)
    codes = np.where((steps == 0) & (normal != 0), np.sign(normal), steps).astype(np.int8)
    groups = 1 if kind == "int8" else k // GROUP
    # Scales differ from group to group, so that a kernel which mixes them up is caught.
    scales = rng.uniform(0.5, 1.5, (n, groups)) * spread / _CODE_SPREAD[kind]
    return Weight(kind, codes[draws], scales.astype(np.float16), 0 if kind == "int8" else GROUP)


def stock_bytes(kind: str, n: int, k: int) -> int:
    """:return: Bytes of a stock weight ``[n, k]`` with its f16 scales."""
    scales = {"bf16": 0, "int8": n, "int4": n * (k // GROUP)}[kind]
    return n * k * {"bf16": 16, "int8": 8, "int4": 4}[kind] // 8 + 2 * scales


def linear(x: Output, weight: Weight, name: str) -> Output:
    """:return: ``x[..., K] -> [..., N]`` through a MatMul of that friendly name."""
    node: Node = ops.matmul(x, stock_weight(weight), False, True, name=name)
    return node.output(0)
