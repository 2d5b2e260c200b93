"""OpenVINO's two arms: a stock model that really runs compressed, and its packed twin with nothing left out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import openvino as ov

import ov_ext
from ov_ext.sparse_weights.report import PackReport

# OpenVINO fuses the linear layers of a stock graph into these.
_LINEAR_TYPES = ("FullyConnected", "LLMMLP", "QKVProjection")
_WEIGHT_TYPE = {"bf16": "bf16", "int8": "i8", "int4": "i4"}

# Instruction sets that OpenVINO can be capped to: oneDNN's name, and the dynamic quantization groups that stock layers
# then run with. 2026.4 still asks for what the CPU has in other settings, and finds no primitive.
CAPS = {
    "avx2": ("AVX2", ("0",)),
    "avx2_vnni": ("AVX2_VNNI", ("0", "128")),
    "avx512_core": ("AVX512_CORE", ("0",)),  # with a group, dot products still run where the CPU has them
    "avx512_core_vnni": ("AVX512_CORE_VNNI", ("0", "128")),
}
_ONEDNN_CAP = "ONEDNN_MAX_CPU_ISA"
_CAPABILITIES = "OPTIMIZATION_CAPABILITIES"


class UnfairComparison(RuntimeError):
    """An arm does not run what it is meant to run, so its times would mean nothing."""


@dataclass(frozen=True)
class Settings:
    """How OpenVINO runs a model.

    :param threads: INFERENCE_NUM_THREADS; 0 = every CPU this process may use.
    :param precision: INFERENCE_PRECISION_HINT: ``"bf16"``, ``"f32"``, or "" for the device's default.
    :param group: DYNAMIC_QUANTIZATION_GROUP_SIZE, or "" for the device's default.
    :param isa: Key of :data:`CAPS` that :func:`cap` was called with, or "".
    """

    threads: int = 0
    precision: str = ""
    group: str = ""
    isa: str = ""

    @property
    def thread_count(self) -> int:
        """Threads of each engine."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def name(self) -> str:
        """What differs from the device's defaults."""
        return " ".join(filter(None, (self.precision, self.group and f"group {self.group}"))) or "default"

    def properties(self) -> dict[str, str]:
        """:return: OpenVINO properties."""
        own = {"INFERENCE_PRECISION_HINT": self.precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.group}
        shared = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(self.thread_count)}
        return shared | {key: value for key, value in own.items() if value}


def cap(isa: str) -> None:
    """Restrict OpenVINO, in this process and in engines that it starts, to an older instruction set: our kernels and
    oneDNN's. What OpenVINO brings besides oneDNN (MLAS, for some layers with f32 weights) is not restricted.

    :param isa: Key of :data:`CAPS`. Nothing may have run on the CPU device before.
    """
    os.environ |= {"OV_EXT_ISA": isa, _ONEDNN_CAP: CAPS[isa][0]}


def candidates(base: Settings, kind: str, stock: bool) -> list[Settings]:
    """Settings to try, of which the fastest counts, so that no default of OpenVINO decides a comparison.

    Where the default hint is bf16, OpenVINO may multiply integer weights without quantizing activations; the f32 hint
    brings its integer kernels back.

    :param base: Threads, and a precision hint when the user asked for one.
    :param kind: Kind of the weights.
    :param stock: Whether the model has stock layers, which the group size of dynamic quantization concerns.
    """
    if base.isa:
        f32 = replace(base, precision="f32")
        return [replace(f32, group=group) for group in CAPS[base.isa][1]] if stock else [f32]
    if kind == "bf16":
        return [base]
    default = core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    hints = [base] if base.precision or default == "f32" else [base, replace(base, precision="f32")]
    return hints + ([replace(hints[-1], group="128")] if stock else [])


def core() -> ov.Core:
    """:return: A Core that knows the packed operations and keeps no model cache."""
    return ov_ext.add_extension(ov.Core())


def pack(model: ov.Model) -> PackReport:
    """Pack every linear layer and lm_head in place, whatever their sparsity: without zeros, without a mask.

    :raises UnfairComparison: A layer was left out.
    """
    policy = ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=0, calibrate=False, max_growth=math.inf)
    _, report = ov_ext.pack_sparse_weights(model, policy)
    left = [layer for layer in report.layers if not layer.replaced]
    if left:
        raise UnfairComparison(f"{left[0].name} was not packed ({left[0].note}), nor were {len(left) - 1} others.")
    return report


def pack_by_default(model: ov.Model) -> PackReport:
    """Pack in place what the default policy packs: by what was measured on this CPU, which may take ten seconds."""
    return ov_ext.pack_sparse_weights(model)[1]


def compile_model(model: ov.Model | Path, settings: Settings) -> ov.CompiledModel:
    """Compile a model.

    :param model: Model, or path of its IR, which is then mapped into memory.
    :param settings: OpenVINO's.
    """
    return core().compile_model(model, "CPU", settings.properties())


def properties(compiled: ov.CompiledModel) -> dict[str, str | int]:
    """:return: What a record says about how a compiled model computes."""
    return {
        "precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
        "dynamic_quantization_group": int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")),
        "kv_cache_precision": compiled.get_property("KV_CACHE_PRECISION").get_type_name(),
    }


def load_plugin() -> None:
    """Load the code of OpenVINO's CPU device."""
    core().get_property("CPU", "FULL_DEVICE_NAME")


def linear_primitives(compiled: ov.CompiledModel) -> dict[str, tuple[str, str, str]]:
    """What became of the linear layers of a stock model.

    :return: By friendly name of the MatMul: layer type, primitive, element type of its weight at run time.
    """
    found = {}
    for node in compiled.get_runtime_model().get_ops():
        layer, primitive, precision = (_info(node, key) for key in ("layerType", "primitiveType", "runtimePrecision"))
        if layer in _LINEAR_TYPES:
            weights = {port.get_node().get_output_element_type(0).get_type_name() for port in node.input_values()[1:]}
            kept = weights & {"i8", "i4", "bf16"} or {precision}
            for name in _info(node, "originalLayersNames").split(","):
                found[name] = (layer, primitive, "+".join(sorted(kept)))
    return found


def check_compressed(compiled: ov.CompiledModel, kind: str, names: Iterable[str]) -> None:
    """Make sure that a stock model multiplies weights in the form it stores them. OpenVINO expands bf16 where it is
    capped, or the CPU has no instructions for it.

    :raises UnfairComparison: A layer is missing among the linear primitives, or its weight was expanded.
    """
    primitives = linear_primitives(compiled)
    fair = {_WEIGHT_TYPE[kind]}
    if kind == "bf16" and (_ONEDNN_CAP in os.environ or "BF16" not in core().get_property("CPU", _CAPABILITIES)):
        fair |= {"f32"}
    for name in names:
        if name not in primitives:
            raise UnfairComparison(f"OpenVINO runs {name} as something else than {', '.join(_LINEAR_TYPES)}.")
        layer, primitive, element = primitives[name]
        if element not in fair:
            raise UnfairComparison(f"OpenVINO holds {name} ({layer}, {primitive}) as {element}, not as {kind}.")


def _info(node: ov.Node, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""
