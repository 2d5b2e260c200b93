"""
Compression of PyTorch models in the manner of NNCF.

Every public name is loaded on first use, so that ``import nncf_ext`` needs neither torch nor nncf.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nncf_ext.algorithms.sparse_weights.parameters import (
        AdvancedSparseWeightsParameters as AdvancedSparseWeightsParameters,
    )
    from nncf_ext.compression import compress as compress
    from nncf_ext.parameters import CompressMode as CompressMode
    from nncf_ext.report import CompressionReport as CompressionReport
    from nncf_ext.report import compression_report as compression_report
    from nncf_ext.structure.checkpoint import load_compressed as load_compressed
    from nncf_ext.structure.checkpoint import load_pretrained as load_pretrained
    from nncf_ext.structure.checkpoint import save_pretrained as save_pretrained

_HOMES = {
    "AdvancedSparseWeightsParameters": "algorithms.sparse_weights.parameters",
    "CompressMode": "parameters",
    "CompressionReport": "report",
    "compress": "compression",
    "compression_report": "report",
    "load_compressed": "structure.checkpoint",
    "load_pretrained": "structure.checkpoint",
    "save_pretrained": "structure.checkpoint",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
