"""SPW1: numpy against C++, exact round trips, golden blobs, and rejection of everything malformed."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.cpu_plugin.sparse_matmul.pack import HEADER, pack, unpack
from ov_ext.cpu_plugin.support.weight import KINDS, Weight
from tests.cpu_plugin.conftest import KERNELS, compensation, make_weight, with_compensation

GOLDEN = Path(__file__).parent / "golden"
GROUPS = {"bf16": [0], "int8": [0, 64, 128], "int4": [0, 64, 128]}
KIND_GROUPS = [(kind, group) for kind, groups in GROUPS.items() for group in groups]
SHAPES = [
    (1, 1),
    (15, 2),
    (16, 31),
    (17, 32),
    (63, 33),
    (64, 63),
    (65, 64),
    (100, 100),
    (1000, 512),
    (64, 513),
    (130, 1100),
]


def same(a: Weight, b: Weight) -> bool:
    return (
        (a.kind, a.group) == (b.kind, b.group)
        and np.array_equal(a.values, b.values)
        and (a.scales is None) == (b.scales is None)
        and (a.scales is None or (a.scales.dtype == b.scales.dtype and a.scales.tobytes() == b.scales.tobytes()))
        and (a.bias is None) == (b.bias is None)
        and (a.bias is None or a.bias.tobytes() == b.bias.tobytes())
    )


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind, group", KIND_GROUPS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_numpy_and_cpp_write_the_same_bytes_and_read_them_back(
    n: int, k: int, kind: str, group: int, dense: bool
) -> None:
    for sparsity, f32, bias in ((0.0, False, True), (0.5, True, False), (0.9, False, True), (1.0, True, True)):
        weight = make_weight(kind, n, k, group=group, sparsity=sparsity, f32=f32, bias=bias)
        blob = native.pack(weight, dense)
        assert np.array_equal(blob, pack(weight, dense))
        assert same(native.unpack(blob), weight) and same(unpack(blob), weight)


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
@pytest.mark.parametrize("pattern", ["rows", "columns", "chunk", "checkerboard", "8:16", "corners"])
def test_structured_patterns_round_trip(kind: str, group: int, pattern: str) -> None:
    weight = make_weight(kind, 130, 1100, group=group, sparsity=0.0)
    n, k = np.indices(weight.shape)
    zero = {
        "rows": n % 3 == 0,
        "columns": k % 5 == 0,
        "chunk": (k >= 512) & (k < 1024) & (n < 64),
        "checkerboard": (n + k) % 2 == 0,
        "8:16": k % 16 >= 8,
        "corners": ~(((n == 0) | (n == 129)) & ((k == 0) | (k == 1099))),
    }[pattern]
    weight.values[zero] = 0
    blob = native.pack(weight)
    assert np.array_equal(blob, pack(weight)) and same(native.unpack(blob), weight)


def test_special_bf16_values_survive_and_negative_zero_becomes_positive() -> None:
    bits = np.array([0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F7F, 0x8000], np.uint16)
    values = np.tile(bits, (3, 9))
    blob = native.pack(Weight("bf16", values))
    assert np.array_equal(blob, pack(Weight("bf16", values)))
    assert np.array_equal(native.unpack(blob).values, np.where(values == 0x8000, 0, values))
    dense = native.pack(Weight("bf16", values), dense=True)
    assert np.array_equal(native.unpack(dense).values, values)


def test_size_follows_from_the_number_of_elements() -> None:
    weight = make_weight("int8", 128, 1024, sparsity=0.5)
    stored = sum(-(-int(np.count_nonzero(block)) // 64) * 64 for block in np.split(weight.values, 2))
    directory, masks, scales = 64, 128 * 1024 // 8, 128 * 2
    assert native.pack(weight).nbytes == 128 + directory + masks + scales + stored + 64


def test_packing_does_not_depend_on_strides_or_order() -> None:
    weight = make_weight("int4", 70, 200, group=64)
    fortran = Weight("int4", np.asfortranarray(weight.values), np.asfortranarray(weight.scales), 64)
    assert np.array_equal(native.pack(weight), native.pack(fortran))


GOLDEN_CASES = {
    f"{kind}-{group}-{'dense' if dense else 'sparse'}": (kind, group, dense)
    for kind, group in KIND_GROUPS
    for dense in (False, True)
}


def golden_weight(kind: str, group: int) -> Weight:
    """Arithmetic, not random: the same values for ever."""
    n, k = np.indices((70, 530))
    code = (n * 37 + k * 101 + n * k * 7) % 256
    zero = (n * 31 + k * 17 + n * k) % 5 < 2
    if kind == "bf16":
        values, scales = (code * 257 % 65536).astype(np.uint16), None
        values[values == 0x8000] = 0
    else:
        values = (code.astype(np.int16) - 128 if kind == "int8" else code % 16 - 8).astype(np.int8)
        groups = -(-530 // group) if group else 1
        scales = ((np.arange(70 * groups) - 50).reshape(70, groups) / 64).astype(np.float16)
    values[zero] = 0
    return Weight(kind, values, scales, group, (np.arange(70) / 8 - 3).astype(np.float32))


def golden_blob(name: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress((GOLDEN / f"{name}.spw1.z").read_bytes()), np.uint8)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_blobs_are_still_read_and_written(name: str) -> None:
    kind, group, dense = GOLDEN_CASES[name]
    blob = golden_blob(name)
    assert same(native.unpack(blob), golden_weight(kind, group))
    assert np.array_equal(native.pack(golden_weight(kind, group), dense), blob)


@pytest.mark.parametrize("name", [name for name in GOLDEN_CASES if not name.startswith("bf16")])
def test_golden_blobs_of_the_older_form_are_still_read(name: str) -> None:
    kind, group, dense = GOLDEN_CASES[name]
    blob, weight = golden_blob(f"compensated/{name}"), golden_weight(kind, group)
    assert np.array_equal(blob, with_compensation(weight, dense))
    assert same(native.unpack(blob), weight) and same(unpack(blob), weight)
    x = np.random.default_rng(0).standard_normal((3, weight.shape[1])).astype(np.float32)
    for kernel in KERNELS:
        for rows in (x[:1], x):
            new = native.matmul(rows, native.pack(weight, dense), isa=kernel)
            assert np.array_equal(native.matmul(rows, blob, isa=kernel), new)
    damaged = blob.copy()
    damaged[HEADER.unpack_from(blob)[22] + 5] ^= 1
    with pytest.raises(ValueError, match="compensation"):
        native.validate(damaged)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind, group", [(kind, group) for kind, group in KIND_GROUPS if kind != "bf16"])
@pytest.mark.parametrize("n, k", SHAPES)
def test_compensation_is_derived(n: int, k: int, kind: str, group: int, dense: bool) -> None:
    weight = make_weight(kind, n, k, group=group)
    assert np.array_equal(native.compensation(native.pack(weight, dense)), compensation(weight))


# ------------------------------------------------------------------------------------------------- malformed blobs


HEADER_LIES = {
    "magic": (0, "<I", 0x31575051, "magic"),
    "newer version": (4, "<H", 2, "version 2"),
    "header size": (6, "<H", 64, "header_bytes"),
    "kind": (8, "<B", 9, "kind"),
    "slice_k": (9, "<B", 2, "constants"),
    "unknown flag": (12, "<I", 4 | 64 | 128, "flags"),
    "huge N": (16, "<Q", 1 << 40, "N or K"),
    "zero K": (24, "<Q", 0, "N or K"),
    "N and K whose product overflows": (16, "<QQQQ", (2**31 - 1, 2**31 - 1, 2**31, 2**31), "offsets|too large"),
    "Npad": (32, "<Q", 192, "Npad"),
    "group": (48, "<I", 32, "group"),
    "offset": (80, "<Q", 192, "offsets"),
    "blob_bytes": (104, "<Q", 1, "bytes"),
    "nnz": (56, "<Q", 3, "nnz"),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_lying_header_is_named(lie: str) -> None:
    offset, layout, value, message = HEADER_LIES[lie]
    blob = native.pack(make_weight("int4", 100, 300, group=64)).copy()
    struct.pack_into(layout, blob, offset, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises(ValueError, match=message):
        native.validate(blob)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_rejected(kind: str) -> None:
    blob = native.pack(make_weight(kind, 65, 130, bias=True))
    for size in {0, 1, 127, 128, blob.nbytes - 1, blob.nbytes - 64, *range(0, blob.nbytes, 97)}:
        with pytest.raises(ValueError):
            native.validate(blob[:size].copy())
    with pytest.raises(ValueError):
        native.validate(np.concatenate([blob, np.zeros(64, np.uint8)]))


MUTATED = [
    (native.pack(make_weight(kind, 70, 530, group=group, bias=True), dense), kind)
    for kind, group in KIND_GROUPS
    for dense in (False, True)
]


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, len(MUTATED) - 1),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from(["set", "xor", "swap"])), min_size=1, max_size=4
    ),
    st.booleans(),
)
def test_a_mutated_blob_is_an_error_or_equals_its_decoded_matrix(which: int, changes: list, in_header: bool) -> None:
    original, kind = MUTATED[which]
    blob = original.copy()
    for where, byte, how in changes:
        at = int(where * ((128 if in_header else blob.nbytes) - 1))
        if how == "swap":
            blob[at], blob[byte] = blob[byte], blob[at]
        else:
            blob[at] = byte if how == "set" else blob[at] ^ byte
    try:
        weight = native.unpack(blob)
    except ValueError:
        with pytest.raises(ValueError):
            native.matmul(np.zeros((1, 530), np.float32), blob)
        return
    x = np.random.default_rng(0).standard_normal((2, weight.shape[1])).astype(np.float32)
    dense = weight.dequantize().astype(np.float64)
    with np.errstate(all="ignore"):
        expected = x @ dense.T + (0 if weight.bias is None else weight.bias.astype(np.float64))
        bound = 2.0**-22 * 530 * (np.abs(x) @ np.abs(dense).T) + 2.0**-20 * np.abs(expected)
        for kernel in KERNELS:
            y = native.matmul(x, blob, activation_group=0, isa=kernel)
            close = np.abs(y - expected) <= bound
            extreme = ~np.isfinite(bound) | (np.abs(expected) > 1e37) | (bound < 1e-37)  # beyond float32, or flushed
            assert (close | extreme | (np.isnan(y) & np.isnan(expected))).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="int2", values=np.zeros((1, 1), np.int8)), "Unknown value kind"),
        (dict(kind="int4", values=np.full((1, 1), 8, np.int8), scales=np.ones((1, 1), np.float16)), r"-8..7"),
        (dict(kind="int8", values=np.zeros((2, 2), np.int8)), "need them"),
        (dict(kind="int8", values=np.zeros((2, 2), np.int8), scales=np.ones((2, 3), np.float16)), "Scales must be"),
        (dict(kind="int8", values=np.zeros((2, 2), np.int8), scales=np.full((2, 1), np.inf, np.float16)), "finite"),
        (
            dict(kind="int8", values=np.zeros((2, 2), np.int8), scales=np.ones((2, 1), np.float16), group=32),
            "groups of 32",
        ),
        (dict(kind="bf16", values=np.zeros((0, 2), np.uint16)), "non-empty"),
        (dict(kind="bf16", values=np.zeros((2, 2), np.uint16), bias=np.zeros(3, np.float32)), "bias"),
    ],
)
def test_impossible_weights_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weight(**arguments)
