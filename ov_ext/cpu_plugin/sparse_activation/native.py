"""The operation from Python, without OpenVINO: check, read and run a blob."""

from __future__ import annotations

import ctypes

import numpy as np

from ov_ext.cpu_plugin.sparse_activation import pack
from ov_ext.cpu_plugin.support.native import blob_arguments, call, pointer, rows_of
from ov_ext.cpu_plugin.support.weight import Weight


def validate(blob: np.ndarray) -> None:
    """Check a blob completely, as the operation does when a model is compiled.

    :param blob: ``[blob_bytes]`` uint8, untrusted.
    :raises ValueError: What is wrong with it.
    """
    _, data, size = blob_arguments(blob)
    call("ov_ext_activation_validate", data, size)


def unpack(blob: np.ndarray) -> tuple[Weight, pack.Rule]:
    """Read a SAM1 blob back, after checking it.

    :param blob: ``[blob_bytes]`` uint8, untrusted.
    :return: The weight, bit for bit, and the rule of its inputs.
    :raises ValueError: The blob is malformed or damaged.
    """
    validate(blob)  # before memory is allocated for sizes that a small file may claim
    return pack.unpack(blob)


def matmul(
    x: np.ndarray,
    blob: np.ndarray,
    activation_group: int = 0,
    isa: str | None = None,
    threads: int = 0,
    checked: bool = False,
) -> np.ndarray:
    """Multiply with a packed weight, by the rule of its inputs.

    :param x: ``[M, K]`` float32, or uint16 holding bf16 bits.
    :param blob: ``[blob_bytes]`` uint8 at any alignment.
    :param activation_group: 0 = f32 activations; the blob's segment (its group, or 128) = 8 bits per row and segment.
    :param isa: Kernel by name (``support.native.cpu_info()["kernels"]``), or the best one that is not newer; None = the
        one OpenVINO would use.
    :param threads: 0 = all of the calling arena.
    :param checked: The blob was validated before: skip it, as the operation does from its second call on.
    :return: ``[M, N]`` of x's dtype.
    :raises ValueError: The blob is malformed, or does not fit x or the activation group.
    """
    blob, data, size = blob_arguments(blob)
    n, k = ctypes.c_uint64(), ctypes.c_uint64()
    call("ov_ext_activation_describe", data, size, ctypes.byref(n), ctypes.byref(k))
    x = rows_of(x, k.value)
    y = np.empty((x.shape[0], n.value), x.dtype)
    call(
        "ov_ext_activation_matmul",
        *(pointer(x), int(x.dtype == np.uint16), ctypes.c_uint64(x.shape[0]), data, size),
        *(ctypes.c_int64(activation_group), isa.encode() if isa else None, threads, int(checked), pointer(y)),
    )
    return y
