"""The operation from Python, without OpenVINO: pack, unpack, check and run a blob. pack.py at full speed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ov_ext.cpu_plugin.support.native import blob_arguments, call, library, pointer, read_json, rows_of
from ov_ext.cpu_plugin.support.weight import KINDS, Weight


class _WeightArguments(ctypes.Structure):  # OvExtWeight of capi.cpp
    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "n", "k", "group", "dense", "scales_f32")] + [
        (name, ctypes.c_void_p) for name in ("values", "scales", "bias")
    ]


class _BlobDescription(ctypes.Structure):  # OvExtBlob of capi.cpp
    _fields_ = [
        (name, ctypes.c_int64) for name in ("kind", "n", "k", "group", "dense", "scales_f32", "groups", "has_bias")
    ]


def packed_bytes(weight: Weight, dense: bool = False) -> int:
    """:return: Bytes of the blob that :func:`pack` would write."""
    arguments, _alive = _arguments(weight, dense)  # the call reads the matrix: it counts its zeros
    size = ctypes.c_uint64()
    call("ov_ext_packed_bytes", ctypes.byref(arguments), ctypes.byref(size))
    return size.value


def pack(weight: Weight, dense: bool = False) -> np.ndarray:
    """Write a weight as an SPW1 blob, in parallel.

    :param weight: The matrix, its scales and bias.
    :param dense: Store every element and no mask.
    :return: ``[blob_bytes]`` uint8, equal to ``pack.pack(weight, dense)``.
    """
    arguments, _alive = _arguments(weight, dense)
    blob = np.empty(packed_bytes(weight, dense), np.uint8)
    call("ov_ext_pack", ctypes.byref(arguments), pointer(blob), ctypes.c_uint64(blob.nbytes))
    return blob


def _arguments(weight: Weight, dense: bool) -> tuple[_WeightArguments, list[np.ndarray | None]]:
    """:return: The weight for the C interface, and the arrays that must live as long."""
    arrays = [
        None if each is None else np.ascontiguousarray(each) for each in (weight.values, weight.scales, weight.bias)
    ]
    is_f32 = weight.scales is not None and weight.scales.dtype == np.float32
    fields = (KINDS[weight.kind], *weight.shape, weight.group, dense, is_f32)
    return _WeightArguments(*fields, *map(pointer, arrays)), arrays


def validate(blob: np.ndarray) -> None:
    """Check a blob completely, as the operation does when a model is compiled.

    :param blob: ``[blob_bytes]`` uint8, untrusted.
    :raises ValueError: What is wrong with it.
    """
    _, data, size = blob_arguments(blob)
    call("ov_ext_validate", data, size)


def verify(wanted: bool) -> None:
    """Set for the process whether compiling a model compares checksums, too; at first OV_EXT_VERIFY=1 says so.

    :param wanted: Whether to compare.
    """
    call("ov_ext_verify", int(wanted))


def unpack(blob: np.ndarray) -> Weight:
    """Read an SPW1 blob back, after checking it.

    :param blob: ``[blob_bytes]`` uint8, untrusted.
    :return: The weight, bit for bit.
    :raises ValueError: The blob is malformed.
    """
    blob, data, size = blob_arguments(blob)
    call("ov_ext_validate", data, size)  # before memory is allocated for sizes that a small file may claim
    about = _BlobDescription()
    call("ov_ext_describe", data, size, ctypes.byref(about))
    kind = {number: name for name, number in KINDS.items()}[about.kind]
    values = np.empty((about.n, about.k), np.uint16 if kind == "bf16" else np.int8)
    scales = np.empty((about.n, about.groups), np.float32 if about.scales_f32 else np.float16) if about.groups else None
    bias = np.empty(about.n, np.float32) if about.has_bias else None
    call("ov_ext_unpack", data, size, pointer(values), pointer(scales), pointer(bias))
    return Weight(kind, values, scales, about.group, bias)


def expand(blob: np.ndarray) -> np.ndarray:
    """Give a sparse blob its dense form, as the operation does in memory where the CPU is faster with that one.

    :param blob: ``[blob_bytes]`` uint8, sparse, untrusted.
    :return: ``[dense_bytes]`` uint8, equal to ``pack(unpack(blob), dense=True)`` but for the checksum, which is 0.
    :raises ValueError: The blob is malformed, or dense.
    """
    blob, data, size = blob_arguments(blob)
    call("ov_ext_validate", data, size)
    dense_size = ctypes.c_uint64()
    call("ov_ext_dense_bytes", data, size, ctypes.byref(dense_size))
    dense = np.empty(dense_size.value, np.uint8)
    call("ov_ext_expand", data, size, pointer(dense))
    return dense


def compensation(blob: np.ndarray) -> np.ndarray:
    """What the operation derives from a blob for kernels that multiply unsigned activations.

    :param blob: ``[blob_bytes]`` uint8 of an integer weight, untrusted.
    :return: int16 ``[blocks of 64 outputs, segments, 64]``: the sum of the codes of each segment.
    :raises ValueError: The blob is malformed.
    """
    weight = unpack(blob)
    n, k = weight.shape
    sums = np.empty((-(-n // 64), -(-k // (weight.group or 128)), 64), np.int16)
    blob, data, size = blob_arguments(blob)
    call("ov_ext_compensation", data, size, pointer(sums), ctypes.c_uint64(sums.size))
    return sums


def bytes_of_dense_copies() -> int:
    """:return: Bytes of memory that dense copies of sparse weights take in this process now."""
    function = library().ov_ext_bytes_of_dense_copies
    function.restype = ctypes.c_uint64
    return int(function())


@contextmanager
def no_dense_copies() -> Iterator[None]:
    """Models that the process compiles meanwhile keep the weights in the form they have, also where the CPU would be
    faster with dense copies: to time the forms apart."""
    function = library().ov_ext_limit_dense_copies
    function.restype = ctypes.c_uint64
    before = function(ctypes.c_uint64(0))
    try:
        yield
    finally:
        function(ctypes.c_uint64(before))


def matmul(
    x: np.ndarray,
    blob: np.ndarray,
    activation_group: int = 128,
    isa: str | None = None,
    threads: int = 0,
    checked: bool = False,
) -> np.ndarray:
    """Multiply with a packed weight.

    :param x: ``[M, K]`` float32, or uint16 holding bf16 bits.
    :param blob: ``[blob_bytes]`` uint8 at any alignment.
    :param activation_group: 0 = full-precision activations, -1 = 8 bits per row, 64 or 128 = 8 bits per row and group.
    :param isa: Kernel by name (``support.native.cpu_info()["kernels"]``); None = the one OpenVINO would use.
    :param threads: 0 = all of the calling arena.
    :param checked: The blob was validated before: skip it, as the operation does from its second call on. Kernels that
        need sums of the weights, which the operation keeps, get them from another check all the same.
    :return: ``[M, N]`` of x's dtype.
    :raises ValueError: The blob is malformed, or does not fit x or the activation group.
    """
    blob, data, size = blob_arguments(blob)
    about = _BlobDescription()
    call("ov_ext_describe", data, size, ctypes.byref(about))
    x = rows_of(x, about.k)
    y = np.empty((x.shape[0], about.n), x.dtype)
    call(
        "ov_ext_matmul",
        *(pointer(x), int(x.dtype == np.uint16), ctypes.c_uint64(x.shape[0]), data, size),
        *(ctypes.c_int64(activation_group), isa.encode() if isa else None, threads, int(checked), pointer(y)),
    )
    return y


def kernel_choice() -> dict[str, list[list[Any]]]:
    """Which kernel runs for how many rows of x, with quantized (bf16: rounded) activations.

    :return: For each value kind a list of [number of rows from which it runs, kernel].
    :raises ValueError: OV_EXT_ISA names a kernel that does not exist or cannot run here.
    """
    choice: dict[str, list[list[Any]]] = read_json("ov_ext_kernel_choice")
    return choice
