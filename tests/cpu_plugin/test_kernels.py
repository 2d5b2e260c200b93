"""Every kernel against an oracle written here in float64; integer kinds also bit for bit against each other."""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.cpu_plugin.support.weight import Weight
from tests.cpu_plugin.conftest import KERNELS, make_weight

KIND_GROUPS = [("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 0), ("int4", 64), ("int4", 128)]
SHAPES = [(1, 1), (15, 2), (16, 31), (17, 33), (63, 64), (64, 100), (65, 512), (1000, 513), (200, 1536)]
ROWS = [0, 1, 2, 3, 4, 5, 15, 33]


def bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bf16 (nearest, ties to even), as float32."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def quantized(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Integer activations and their factors, both [M, K], by the rule of format.md."""
    codes, factors = np.zeros(x.shape, np.int64), np.zeros(x.shape, np.float32)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        peak = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
        codes[:, start : start + group] = np.rint(part * inverse)
        factors[:, start : start + group] = peak / np.float32(127)
    return codes, factors


def oracle(x: np.ndarray, weight: Weight, activation_group: int) -> tuple[np.ndarray, np.ndarray]:
    """Product in float64 and a bound on the float32 error of any order of summation."""
    dense = weight.dequantize().astype(np.float64)
    if weight.kind == "bf16":
        used = bf16(x).astype(np.float64) if activation_group else x.astype(np.float64)
        roundings = x.shape[1] + 8
    elif activation_group:
        codes, factors = quantized(x, x.shape[1] if activation_group < 0 else activation_group)
        used = codes * factors.astype(np.float64)
        roundings = 3 * (-(-x.shape[1] // 64)) + 12  # sums within a segment are exact integers
    else:
        used = x.astype(np.float64)
        roundings = x.shape[1] + 8
    bias = 0.0 if weight.bias is None else weight.bias.astype(np.float64)
    y = used @ dense.T + bias
    return y, roundings * 2.0**-23 * (np.abs(used) @ np.abs(dense).T + np.abs(bias)) + 1e-30


@pytest.mark.parametrize("activation_group", [0, 128, -1])
@pytest.mark.parametrize("kind, group", KIND_GROUPS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_product(kernel: str, n: int, k: int, kind: str, group: int, activation_group: int) -> None:
    rng = np.random.default_rng(n * k)
    for dense, sparsity, bias, f32 in ((False, 0.5, True, False), (True, 0.3, False, True), (False, 0.9, False, True)):
        weight = make_weight(kind, n, k, group=group, sparsity=sparsity, bias=bias, f32=f32)
        blob = native.pack(weight, dense)
        for rows in ROWS if n * k < 40000 else (1, 6) if kernel != "reference" else (1,):
            x = rng.standard_normal((rows, k)).astype(np.float32)
            y = native.matmul(x, blob, activation_group, isa=kernel)
            expected, bound = oracle(x, weight, activation_group)
            assert y.shape == (rows, n) and (np.abs(y - expected) <= bound).all()
            if kind != "bf16" and activation_group and n * k < 40000:
                assert np.array_equal(y, native.matmul(x, blob, activation_group, isa="reference"))


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.7, 1.0])
def test_a_language_model_layer(kind: str, group: int, sparsity: float) -> None:
    weight = make_weight(kind, 1536, 4096, group=group, sparsity=sparsity)
    x = np.random.default_rng(1).standard_normal((5, 4096)).astype(np.float32)
    expected, bound = oracle(x, weight, 128)
    for kernel in KERNELS[:-1]:
        assert (np.abs(native.matmul(x, native.pack(weight), isa=kernel) - expected) <= bound).all()


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_sparse_and_dense_blobs_give_the_same_bits(kernel: str, kind: str, group: int) -> None:
    weight = make_weight(kind, 150, 700, group=group)
    x = np.random.default_rng(2).standard_normal((3, 700)).astype(np.float32)
    for activation_group in (0, 128):
        results = [
            native.matmul(x, native.pack(weight, dense), activation_group, isa=kernel) for dense in (False, True)
        ]
        assert np.array_equal(*results)


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
@pytest.mark.parametrize("n", [64, 200, 2000])
def test_any_number_of_threads_gives_the_same_bits(kernel: str, kind: str, group: int, n: int) -> None:
    blob = native.pack(make_weight(kind, n, 1100, group=group, bias=True))
    for rows in (1, 5, 40):
        x = np.random.default_rng(rows).standard_normal((rows, 1100)).astype(np.float32)
        if kernel == "reference" and n * rows > 10000:
            continue
        results = [native.matmul(x, blob, isa=kernel, threads=t) for t in (1, 2, 3, 7, 16)]
        assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
@pytest.mark.parametrize("activation_group", [0, 128])
def test_a_row_does_not_depend_on_the_rows_beside_it(kernel: str, kind: str, group: int, activation_group: int) -> None:
    blob = native.pack(make_weight(kind, 20, 300, group=group))
    x = np.random.default_rng(3).standard_normal((143, 300)).astype(np.float32)  # strips of 64, runs of 8, 4 and 3
    together = native.matmul(x, blob, activation_group, isa=kernel)
    alone = [native.matmul(row[None], blob, activation_group, isa=kernel) for row in x]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_all_64_base_addresses(kernel: str, kind: str, group: int) -> None:
    blob = native.pack(make_weight(kind, 70, 200, group=group, bias=True))
    x = np.random.default_rng(4).standard_normal((2, 200)).astype(np.float32)
    room = np.zeros(blob.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64
    results = []
    for shift in range(64):
        at = room[start + shift : start + shift + blob.nbytes]
        at[:] = blob
        assert at.ctypes.data % 64 == shift
        results.append(native.matmul(x, at, isa=kernel))
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_nothing_is_read_beyond_the_blob(kernel: str, kind: str, group: int, dense: bool) -> None:
    """The blob ends where an inaccessible page begins."""
    blob = native.pack(make_weight(kind, 65, 513, group=group, sparsity=0.2, bias=True), dense)
    x = np.ones((3, 513), np.float32)
    size = -(-blob.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    guard = ctypes.c_void_p(whole.ctypes.data + size)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    at = whole[size - blob.nbytes : size]
    at[:] = blob
    result = native.matmul(x, at, isa=kernel)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) == 0
    assert np.array_equal(result, native.matmul(x, blob, isa=kernel))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_a_row_with_nan_or_infinity(kernel: str, kind: str, group: int, special: float) -> None:
    weight = make_weight(kind, 20, 300, group=group)
    x = np.random.default_rng(5).standard_normal((3, 300)).astype(np.float32)
    x[1, 7] = special
    blob = native.pack(weight)
    with np.errstate(invalid="ignore"):
        y, exact = native.matmul(x, blob, isa=kernel), native.matmul(x, blob, activation_group=0, isa=kernel)
        expected = x.astype(np.float64) @ weight.dequantize().T.astype(np.float64)
    assert np.isfinite(y[[0, 2]]).all() and np.isfinite(exact[[0, 2]]).all()
    if kind != "bf16":
        assert np.isnan(y[1]).all()  # quantized activations: the whole row
    assert np.array_equal(
        np.isnan(exact[1]), np.isnan(expected[1])
    )  # a pruned weight times infinity is NaN, as in a dense product
    assert np.array_equal(exact[1][np.isinf(expected[1])], expected[1][np.isinf(expected[1])])


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_zero_and_tiny_activations(kernel: str, kind: str, group: int) -> None:
    weight = make_weight(kind, 20, 300, group=group, bias=True)
    blob = native.pack(weight)
    for x in (
        np.zeros((1, 300), np.float32),
        np.full((1, 300), 1e-42, np.float32),
        np.full((1, 300), 1e-37, np.float32),
    ):
        assert np.allclose(native.matmul(x, blob, isa=kernel), weight.bias, atol=1e-32, rtol=0)
    huge = np.full((1, 300), 3e38, np.float32)
    assert not np.isnan(
        native.matmul(huge, native.pack(make_weight(kind, 1, 300, group=group, sparsity=1.0)), isa=kernel)
    ).any()


def test_special_bf16_weights(kernel: str) -> None:
    bits = np.array([[0x7F80, 0, 0x3F80], [0x7FC0, 0, 0x3F80], [0x0001, 0, 0], [0x7F7F, 0, 0]], np.uint16)
    y = native.matmul(np.ones((1, 3), np.float32), native.pack(Weight("bf16", bits)), activation_group=0, isa=kernel)[0]
    assert np.isposinf(y[0]) and np.isnan(y[1]) and y[2] == np.float32(2.0**-133) and y[3] == np.float32(3.3895314e38)


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_bf16_activations(kernel: str, kind: str, group: int) -> None:
    blob = native.pack(make_weight(kind, 100, 333, group=group, bias=True))
    x = bf16(np.random.default_rng(6).standard_normal((5, 333)).astype(np.float32))
    narrow = (x.view(np.uint32) >> 16).astype(np.uint16)
    for activation_group in (0, 128):
        wide = native.matmul(x, blob, activation_group, isa=kernel)
        y = (native.matmul(narrow, blob, activation_group, isa=kernel).astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(y, bf16(wide))


def test_every_int4_code_and_extreme_int8_codes(kernel: str) -> None:
    for kind, codes in (("int4", range(-8, 8)), ("int8", (-128, -127, -1, 1, 127))):
        values = np.tile(np.array(list(codes), np.int8), (3, 40))[:, :128]
        weight = Weight(kind, values, np.ones((3, 1), np.float16), 0)
        x = np.eye(128, dtype=np.float32)
        for dense in (False, True):
            assert np.array_equal(native.matmul(x, native.pack(weight, dense), isa=kernel), values.T.astype(np.float32))
    extreme = Weight("int8", np.full((1, 4096), -128, np.int8), np.ones((1, 1), np.float32), 0)
    assert (
        native.matmul(np.full((1, 4096), 127, np.float32), native.pack(extreme), isa=kernel)[0, 0] == -128 * 127 * 4096
    )


@pytest.mark.parametrize("kind, lowest, highest", [("int8", -128, 127), ("int4", -8, 7)])
def test_the_largest_sums_do_not_saturate(kernel: str, kind: str, lowest: int, highest: int) -> None:
    """Neighbouring products of equal sign are the largest sums that 16-bit steps on the way could meet."""
    rng = np.random.default_rng(8)
    columns = [np.full(512, lowest), np.full(512, highest), np.tile([lowest, highest], 256)]
    columns += [rng.choice([lowest, highest], 512) for _ in range(14)]
    values = np.array(columns, np.int8)
    signs = [np.ones(512), -np.ones(512), *np.sign(values[2:4]), *rng.choice([-1, 1], (7, 512))]
    q = 127 * np.array(signs, np.int64)
    expected = (q @ values.T.astype(np.int64)).astype(np.float32)  # below 2^24: exact
    for dense in (False, True):
        blob = native.pack(Weight(kind, values, np.ones((17, 1), np.float32), 0), dense)
        assert np.array_equal(native.matmul(q.astype(np.float32), blob, isa=kernel), expected)


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_avx2_adds_floats_in_the_order_of_the_reference(kind: str, group: int) -> None:
    blob = native.pack(make_weight(kind, 70, 700, group=group, bias=True))
    x = np.random.default_rng(9).standard_normal((9, 700)).astype(np.float32)
    expected = native.matmul(x, blob, activation_group=0, isa="reference")
    names = [name for name in KERNELS if name.startswith("avx2")]
    if not names:
        pytest.skip("this CPU has no AVX2")
    for name in names:
        assert np.array_equal(native.matmul(x, blob, activation_group=0, isa=name), expected)


def test_a_kernel_is_offered_when_the_cpu_has_its_instructions() -> None:
    features = ov_ext.cpu_info()["features"]
    assert ("avx2" in KERNELS) == features["avx2"] and ("avx2_vnni" in KERNELS) == features["avx_vnni"]
    assert features["avx2"] or not features["avx_vnni"]


def test_concurrent_callers_get_the_same_bits(kernel: str) -> None:
    blob = native.pack(make_weight("int4", 500, 700, group=128))
    x = np.random.default_rng(7).standard_normal((3, 700)).astype(np.float32)
    alone = native.matmul(x, blob, isa=kernel)
    with ThreadPoolExecutor(6) as pool:
        for y in pool.map(lambda _: native.matmul(x, blob, isa=kernel), range(24)):
            assert np.array_equal(alone, y)


def test_wrong_arguments_are_named() -> None:
    blob = native.pack(make_weight("int4", 10, 128, group=128))
    with pytest.raises(ValueError, match="activation_group 64"):
        native.matmul(np.zeros((1, 128), np.float32), blob, activation_group=64)
    with pytest.raises(ValueError, match=r"x must be \[M, 128\]"):
        native.matmul(np.zeros((1, 127), np.float32), blob)
    with pytest.raises(ValueError, match="'sse2'"):
        native.matmul(np.zeros((1, 128), np.float32), blob, isa="sse2")
