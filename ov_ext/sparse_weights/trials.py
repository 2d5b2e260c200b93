"""Layers of random weights in each form, as OpenVINO runs them: what calibration times.

All forms of a kind take turns, so that each finds its weights in memory and not in a cache: together they are larger
than the last-level cache, and the others were read in between.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from openvino import Output
from openvino.utils.node_factory import NodeFactory

from ov_ext import machine
from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.cpu_plugin.support.weight import Weight
from ov_ext.extension import extension_path
from ov_ext.sparse_weights.cost import Form
from ov_ext.sparse_weights.packed import OPERATION
from ov_ext.sparse_weights.stock import stock_weight

GROUP = 128  # inputs that share a scale in int4, as NNCF's default; int8 has one scale per output
ACTIVATION_GROUP = 128  # inputs that share a scale at run time, as in SparsePolicy
_SIDE = 4096
_PROMPT_OUTPUTS = 2048  # prompts are bound by arithmetic: fewer weights do, and take less time
PROMPT_ROWS = 64  # from so many rows on
_LAYERS = (4, 12)  # fewest: a call then takes long beside its fixed costs; most: memory and time to make them
_CACHES = 3.0  # so many times the last-level cache are read before a form has its turn again
_MEMORY = 0.1  # of the machine's memory may be taken
_DRAWS = 256


@dataclass(frozen=True)
class Arm:
    """What is timed: a form of a weight.

    :param form: ``"stock"``, ``"dense"`` or ``"sparse"``.
    :param zeros: Fraction 0..1 of zeros.
    :param setting: OpenVINO's properties, as pairs.
    :param activation_group: Of our forms, as in ``SparsePolicy``.
    """

    form: Form
    zeros: float = 0.0
    setting: tuple[tuple[str, str], ...] = ()
    activation_group: int = ACTIVATION_GROUP


class Trial:
    """An arm, compiled for single tokens and for prompts.

    :param kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
    :param arm: The form.
    :param layers: Layers that run one after another for few rows.
    """

    def __init__(self, kind: str, arm: Arm, layers: int) -> None:
        self._layers = layers
        self._tokens = _request(_layer(kind, _SIDE, arm.zeros), layers, arm)
        self._prompts = _request(_layer(kind, _PROMPT_OUTPUTS, arm.zeros), 1, arm)

    def seconds(self, rows: int) -> float:
        """:return: The time of one weight in one call with so many rows."""
        request, weights = self._tokens, self._layers * _SIDE * _SIDE
        if rows >= PROMPT_ROWS:
            request, weights = self._prompts, _PROMPT_OUTPUTS * _SIDE
        x = np.ones((1, rows, _SIDE), np.float32)
        start = time.perf_counter()
        request.infer([x], share_inputs=True, share_outputs=True)
        return (time.perf_counter() - start) / weights


def arms(kind: str, zeros: tuple[float, ...], activation_group: int = ACTIVATION_GROUP) -> list[Arm]:
    """List what to time.

    Stock runs in each of the settings that can be the fastest: with a bf16 hint, where that is the default, OpenVINO
    may multiply integer weights without quantizing activations, and the f32 hint brings its integer kernels back.

    :param kind: Kind of the weights.
    :param zeros: Shares of zeros of the sparse form; the others do not depend on zeros.
    :param activation_group: Of our forms. Stock is compared in its fastest setting whatever they do.
    """
    f32, group = ("INFERENCE_PRECISION_HINT", "f32"), "DYNAMIC_QUANTIZATION_GROUP_SIZE"
    settings: list[tuple[tuple[str, str], ...]] = [()]
    # Where oneDNN is held back, OpenVINO still asks for what the CPU has, and finds a slow primitive, or none.
    capped = bool(os.environ.get("ONEDNN_MAX_CPU_ISA"))
    if kind != "bf16" or capped:
        settings += [(f32,)]
    if kind != "bf16":
        settings += [(f32, (group, "128")), *([(f32, (group, "0"))] if capped else [])]
    ours = [Arm("dense", 0.0, (), activation_group), *(Arm("sparse", z, (), activation_group) for z in zeros)]
    return [Arm("stock", 0.0, setting) for setting in settings] + ours


def layer_count(kind: str, zeros: tuple[float, ...]) -> int:
    """:return: Layers in each arm, so that all arms together are larger than the last-level cache, as far as memory
    allows."""
    value = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}[kind]
    each = _SIDE * _SIDE * (2 * value + sum(1 / 8 + value * (1 - share) for share in zeros))
    fewest, most = _LAYERS
    wanted = math.ceil(_CACHES * machine.last_level_cache() / each)
    return max(fewest, min(most, wanted, int(_MEMORY * machine.memory() / each)))


def _layer(kind: str, outputs: int, zeros: float) -> Weight:
    """:return: Random weights ``[outputs, 4096]`` with zeros at random places; a chain of them keeps its scale."""
    table = np.zeros(_DRAWS, np.int8)
    stored = _DRAWS - round(zeros * _DRAWS)
    highest = 7 if kind == "int4" else 127
    table[:stored] = np.resize([*range(-highest, 0), *range(1, highest + 1)], stored)
    spread = float(np.sqrt(_SIDE * np.mean(np.square(table, dtype=np.float64))))
    draws = np.random.default_rng(0).integers(0, _DRAWS, (outputs, _SIDE), np.uint8)
    if kind == "bf16":
        return Weight(
            kind, ((table / np.float32(spread)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)[draws]
        )
    groups = _SIDE // GROUP if kind == "int4" else 1
    return Weight(kind, table[draws], np.full((outputs, groups), 1 / spread, np.float16), GROUP if groups > 1 else 0)


def _request(weight: Weight, layers: int, arm: Arm) -> ov.InferRequest:
    """:return: For ``x [1, rows, K]`` through equal layers, compiled. Each has a copy of the weight in memory."""
    x = ops.parameter([1, -1, _SIDE], np.float32)
    port = x.output(0)
    factory = NodeFactory()
    factory.add_extension(extension_path())
    blob = None if arm.form == "stock" else native.pack(weight, arm.form == "dense")
    for _ in range(layers):
        port = _stock(port, weight) if blob is None else _ours(port, weight, blob, arm, factory)
    properties = {"PERFORMANCE_HINT": "LATENCY", **dict(arm.setting)}
    with native.no_dense_copies():
        compiled = ov.Core().compile_model(ov.Model([ops.result(port)], [x], "trial"), "CPU", properties)
    return compiled.create_infer_request()


def _ours(x: Output, weight: Weight, blob: np.ndarray, arm: Arm, factory: NodeFactory) -> Output:
    n, k = weight.shape
    attributes = {
        **{"n": n, "outputs": [], "k": k, "kind": weight.kind, "epilogue": "", "source": ""},
        "activation_group": arm.activation_group,
    }
    return factory.create(OPERATION, [x, ov.op.Constant(blob).output(0)], attributes).output(0)


def _stock(x: Output, weight: Weight) -> Output:
    return ops.matmul(x, stock_weight(weight), False, True).output(0)
