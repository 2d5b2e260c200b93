"""The C++ library from Python: the one place that loads it, and what it says about this machine."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from typing import Any

import numpy as np

from ov_ext.extension import extension_path


@functools.cache
def library() -> ctypes.CDLL:
    """:return: The compiled extension, loaded at the first call.

    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    """
    loaded = ctypes.CDLL(str(extension_path()))
    loaded.ov_ext_last_error.restype = ctypes.c_char_p
    return loaded


def call(function: str, *arguments: Any) -> None:
    """Call a function of the C interface, which returns 0 or leaves a message.

    :param function: Its name.
    :param arguments: What ctypes can pass; pointers from :func:`pointer`.
    :raises ValueError: The function failed; the message is its own.
    """
    if getattr(library(), function)(*arguments):
        raise ValueError(library().ov_ext_last_error().decode())


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    """:return: The address of an array's first element, which must stay alive; null for None."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def blob_arguments(blob: np.ndarray) -> tuple[np.ndarray, ctypes.c_void_p, ctypes.c_uint64]:
    """:return: A blob, which must stay alive, its address and its size."""
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise ValueError(f"A blob is a one-dimensional uint8 array, got {blob.dtype} of shape {list(blob.shape)}.")
    blob = np.ascontiguousarray(blob)
    return blob, pointer(blob), ctypes.c_uint64(blob.nbytes)


def rows_of(x: np.ndarray, k: int) -> np.ndarray:
    """Activations as an operation takes them.

    :param x: ``[M, k]`` float32, or uint16 holding bf16 bits.
    :param k: Inputs of the weight.
    :return: The same, contiguous.
    :raises ValueError: Another shape or dtype.
    """
    if x.ndim != 2 or x.shape[1] != k or x.dtype not in (np.float32, np.uint16):
        raise ValueError(f"x must be [M, {k}] float32 or uint16 (bf16), got {list(x.shape)} {x.dtype}.")
    return np.require(x, requirements=["C", "ALIGNED"])


def read_json(function: str) -> Any:
    """:return: What a function of the C interface writes as JSON text into a buffer."""
    text = ctypes.create_string_buffer(4096)
    call(function, text, ctypes.c_uint64(len(text)))
    return json.loads(text.value)


def read_bandwidth(size: int = 512 << 20, threads: int = 0, repeats: int = 7) -> tuple[float, float]:
    """Measure how fast this machine reads memory: the ceiling of every kernel at one row.

    :param size: Bytes of the buffer; several times the last-level cache for a figure about memory.
    :param threads: 0 = all of the calling arena.
    :param repeats: Readings, at least 1.
    :return: Best and median GB/s (10^9 bytes per second).
    :raises ValueError: Fewer than 4096 bytes or no reading asked for.
    """
    best, median = ctypes.c_double(), ctypes.c_double()
    call("ov_ext_read_bandwidth", ctypes.c_uint64(size), threads, repeats, ctypes.byref(best), ctypes.byref(median))
    return best.value, median.value


def cpu_info() -> dict[str, Any]:
    """What this CPU and operating system offer.

    :return: ``features`` (name: bool), ``amx_permission``, ``kernels`` (instruction sets that can run, best first),
        ``override`` (OV_EXT_ISA or None).
    """
    return read_json("ov_ext_cpu_info") | {"override": os.environ.get("OV_EXT_ISA") or None}
