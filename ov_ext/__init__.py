"""Sparse weights in OpenVINO: pack an IR, load it, run it.

The package needs openvino, numpy, rich, typer and platformdirs. A function that needs torch, NNCF, Optimum or GenAI as
well imports it when it is called. Public names are loaded on first use, so that ``import ov_ext`` is fast and needs no
torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if os.environ.get("NNCF_EXT_NO_TELEMETRY", "0") not in ("", "0"):
    # openvino and nncf send messages by means of this package, and do without where it is not installed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from ov_ext.convert import convert_model, save_model
    from ov_ext.deployment import convert_packed
    from ov_ext.extension import ExtensionUnavailableError, extension_path
    from ov_ext.graphs import RecordError
    from ov_ext.runtime import NewerFormatError, add_extension, check_target, cpu_info
    from ov_ext.sparse_activation.passes import pack_sparse_activations, unpack_sparse_activations
    from ov_ext.sparse_activation.policy import SparseActivationPolicy
    from ov_ext.sparse_activation.report import ActivationReport
    from ov_ext.sparse_attention.calibration import calibrate_attention
    from ov_ext.sparse_attention.passes import restore_attention, sparsify_attention
    from ov_ext.sparse_attention.policy import SparseAttentionPolicy
    from ov_ext.sparse_attention.report import AttentionReport
    from ov_ext.sparse_weights.calibration import calibrate
    from ov_ext.sparse_weights.passes import AlreadyPackedError, pack_sparse_weights, unpack_sparse_weights
    from ov_ext.sparse_weights.policy import SparsePolicy
    from ov_ext.sparse_weights.report import PackReport
    from ov_ext.sparse_weights.workload import Workload

_HOME = {
    "ActivationReport": "sparse_activation.report",
    "AlreadyPackedError": "sparse_weights.passes",
    "AttentionReport": "sparse_attention.report",
    "ExtensionUnavailableError": "extension",
    "NewerFormatError": "runtime",
    "PackReport": "sparse_weights.report",
    "RecordError": "graphs",
    "SparseActivationPolicy": "sparse_activation.policy",
    "SparseAttentionPolicy": "sparse_attention.policy",
    "SparsePolicy": "sparse_weights.policy",
    "Workload": "sparse_weights.workload",
    "add_extension": "runtime",
    "calibrate": "sparse_weights.calibration",
    "calibrate_attention": "sparse_attention.calibration",
    "check_target": "runtime",
    "convert_model": "convert",
    "convert_packed": "deployment",
    "cpu_info": "runtime",
    "extension_path": "extension",
    "pack_sparse_activations": "sparse_activation.passes",
    "pack_sparse_weights": "sparse_weights.passes",
    "restore_attention": "sparse_attention.passes",
    "save_model": "convert",
    "sparsify_attention": "sparse_attention.passes",
    "unpack_sparse_activations": "sparse_activation.passes",
    "unpack_sparse_weights": "sparse_weights.passes",
}

__all__ = [
    "ActivationReport",
    "AlreadyPackedError",
    "AttentionReport",
    "ExtensionUnavailableError",
    "NewerFormatError",
    "PackReport",
    "RecordError",
    "SparseActivationPolicy",
    "SparseAttentionPolicy",
    "SparsePolicy",
    "Workload",
    "add_extension",
    "calibrate",
    "calibrate_attention",
    "check_target",
    "convert_model",
    "convert_packed",
    "cpu_info",
    "extension_path",
    "pack_sparse_activations",
    "pack_sparse_weights",
    "restore_attention",
    "save_model",
    "sparsify_attention",
    "unpack_sparse_activations",
    "unpack_sparse_weights",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(f"{__name__}.extension").package_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
