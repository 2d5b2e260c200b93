"""SAM1: the layout by hand, kernels against float64 and each other, untrusted blobs."""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ov_ext.cpu_plugin.sparse_activation import native
from ov_ext.cpu_plugin.sparse_activation.pack import HEADER, Rule, pack
from ov_ext.cpu_plugin.support.weight import Weight
from tests.cpu_plugin.conftest import KERNELS, make_weight
from tests.cpu_plugin.test_kernels import bf16, quantized
from tests.cpu_plugin.test_memory import between_forbidden_pages

GOLDEN = Path(__file__).parent / "golden"
KINDS = [("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 0), ("int4", 64), ("int4", 128)]
OWN = [name for name in ("avx512_core_vnni", "avx512_core", "avx2", "reference") if name in KERNELS]
SIDES = (1, 31, 128, 129)
NEVER, ALWAYS = np.float32(-1), np.float32(np.inf)  # replaced


def rule(threshold: Any, centre: float = 0.0, replacement: Any = 0.0) -> Rule:
    return Rule(np.atleast_1d(np.float32(threshold)), centre, np.atleast_1d(np.float32(replacement)))


def segment_of(weight: Weight) -> int:
    return weight.group or 128


def oracle(x: np.ndarray, weight: Weight, by: Rule, quantize: bool) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, as the pattern in a stock graph has it, and a bound on the error of float32 sums."""
    dense, bias = weight.dequantize().astype(np.float64), 0.0 if weight.bias is None else weight.bias.astype(np.float64)
    replaced = np.abs(x - np.float32(by.centre)) <= by.threshold
    replacement = np.broadcast_to(by.replacement, x.shape)
    rest = np.where(replaced, np.float32(0), x - replacement)
    used = rest.astype(np.float64)
    if quantize:
        codes, factors = quantized(rest, segment_of(weight))
        used = codes * factors.astype(np.float64)
    constant = np.broadcast_to(by.replacement.astype(np.float64), x.shape[1]) @ dense.T
    y = used @ dense.T + constant + bias
    if not quantize:  # the same thing said as the stock graph says it
        stock = np.where(replaced, replacement, x).astype(np.float64) @ dense.T + bias
        np.testing.assert_allclose(y, stock, rtol=1e-5, atol=1e-4 * (1 + np.abs(stock).max(initial=0)))
    size = np.abs(used) @ np.abs(dense).T + np.abs(constant) + np.abs(bias)
    return y, (x.shape[1] + 16) * 2.0**-23 * size + 1e-30


# The layout


def test_a_blob_by_hand() -> None:
    """Two outputs, three inputs: where each number lies, from the words of format.md alone."""
    weight = Weight("int4", np.array([[1, -8, 0], [7, 2, -1]], np.int8), np.array([[0.5], [2.0]], np.float16), 0)
    blob = pack(weight, rule([0.5], centre=0.25)).tobytes()
    assert struct.unpack_from("<IHHB", blob) == (int.from_bytes(b"SAM1", "little"), 1, 128, 3)
    assert struct.unpack_from("<IQQQIf", blob, 12) == (0, 2, 3, 256, 0, 0.25)
    assert struct.unpack_from("<8Q", blob, 48)[:7] == (128, 0, 0, 256, 0, 768, 768 + 3 * 128)
    assert struct.unpack_from("<Q", blob, 104) == (zlib.crc32(blob[128:]),)
    assert struct.unpack_from("<f", blob, 128) == (0.5,) and not any(blob[132:256])
    assert np.frombuffer(blob, np.float16, 256, 256).tolist() == [0.5, 2.0] + [0.0] * 254
    rows = np.frombuffer(blob, np.uint8, offset=768).reshape(3, 128)
    # Output 0 lies in the low half of byte 0, output 1 in that of byte 2. Codes are stored with 8 added.
    assert rows[:, 0].tolist() == [0x89, 0x80, 0x88] and rows[:, 2].tolist() == [0x8F, 0x8A, 0x87]
    assert (np.delete(rows, [0, 2], axis=1) == 0x88).all()


@pytest.mark.parametrize(
    "kind, output, byte, shift",
    [
        *[("int4", 4, 16, 0), ("int4", 8, 1, 0), ("int4", 16, 8, 0), ("int4", 32, 0, 4), ("int4", 64, 32, 0)],
        *[("int4", 255, 127, 4), ("int8", 4, 16, 0), ("int8", 8, 1, 0), ("int8", 16, 8, 0), ("int8", 127, 127, 0)],
        *[("bf16", 1, 4, 0), ("bf16", 8, 2, 0), ("bf16", 16, 32, 0), ("bf16", 63, 126, 0)],
    ],
)
def test_the_place_of_an_output(kind: str, output: int, byte: int, shift: int) -> None:
    values = np.zeros((output + 1, 1), np.uint16 if kind == "bf16" else np.int8)
    values[output] = 1
    scales = None if kind == "bf16" else np.ones((output + 1, 1), np.float16)
    blob = pack(Weight(kind, values, scales), rule(0.5))
    row = blob[-128:].astype(int) - (0x88 if kind == "int4" else 0)
    assert np.flatnonzero(row).tolist() == [byte] and row[byte] == 1 << shift


@pytest.mark.parametrize("kind, group", KINDS)
@pytest.mark.parametrize("n, k", [(1, 1), (31, 129), (129, 31), (300, 513)])
def test_unpack_gives_back_what_was_packed(kind: str, group: int, n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    for bias in (False, True):
        weight = make_weight(kind, n, k, group=group, bias=bias, f32=bias)
        per_input = rule(rng.random(k), 0.5, rng.random(k))
        for by in (rule(0.25), rule(0.25, -1.0, -1.0), per_input):
            blob = pack(weight, by)
            native.validate(blob)
            again, found = native.unpack(blob)
            for name in ("values", "scales", "bias"):
                one, other = getattr(weight, name), getattr(again, name)
                assert (one is None) == (other is None) and (one is None or np.array_equal(one, other))
            assert (again.kind, again.group) == (kind, group) and found.centre == by.centre
            assert np.array_equal(found.threshold, by.threshold) and np.array_equal(found.replacement, by.replacement)


def golden(kind: str, group: int) -> tuple[Weight, Rule]:
    rng = np.random.default_rng(0)
    values = rng.random(300).astype(np.float32)
    return make_weight(kind, 70, 300, group=group, bias=True), rule(values, 0.25, values / 2)


@pytest.mark.parametrize("kind, group", KINDS)
def test_files_of_version_1_stay_readable(kind: str, group: int) -> None:
    blob = np.frombuffer(zlib.decompress((GOLDEN / f"{kind}-{group}.sam1.z").read_bytes()), np.uint8)
    weight, by = golden(kind, group)
    again, found = native.unpack(blob)
    assert np.array_equal(again.values, weight.values) and np.array_equal(found.threshold, by.threshold)
    assert np.array_equal(found.replacement, by.replacement) and blob.size == pack(weight, by).size
    x = np.ones((1, 300), np.float32)
    expected, bound = oracle(x, weight, by, False)
    assert (np.abs(native.matmul(x, blob) - expected) <= bound).all()


# Kernels


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("kind, group", KINDS)
@pytest.mark.parametrize("n", SIDES)
@pytest.mark.parametrize("k", SIDES)
def test_product(isa: str, n: int, k: int, kind: str, group: int) -> None:
    rng = np.random.default_rng([n, k])
    weight = make_weight(kind, n, k, group=group, sparsity=0.1, bias=k > n)
    for by in (rule(0.7), rule(0.4, 0.2, 0.2), rule(rng.random(k), -0.1, rng.standard_normal(k))):
        blob = pack(weight, by)
        for rows in (0, 1, 2, 5):
            x = rng.standard_normal((rows, k)).astype(np.float32)
            for activation_group in (0,) if kind == "bf16" else (0, segment_of(weight)):
                y = native.matmul(x, blob, activation_group, isa=isa)
                expected, bound = oracle(x, weight, by, activation_group != 0)
                assert y.shape == (rows, n) and (np.abs(y - expected) <= bound).all()
                assert np.array_equal(y, native.matmul(x, blob, activation_group, isa="reference"))


@pytest.mark.slow
@pytest.mark.parametrize("kind, group", KINDS)
@pytest.mark.parametrize("n, k", [(4096, 1), (4096, 31), (1, 4096), (129, 4096), (4096, 129), (4096, 4096)])
def test_large_sides(kind: str, group: int, n: int, k: int) -> None:
    weight = make_weight(kind, n, k, group=group, sparsity=0.0)
    x = np.random.default_rng(0).standard_normal((64, k)).astype(np.float32)
    for threshold in (0.0, 0.7):
        blob = pack(weight, rule(threshold))
        for activation_group in (0,) if kind == "bf16" else (0, segment_of(weight)):
            expected, bound = oracle(x, weight, rule(threshold), activation_group != 0)
            y = native.matmul(x, blob, activation_group)
            assert (np.abs(y - expected) <= bound).all()
            assert np.array_equal(y[:1], native.matmul(x[:1], blob, activation_group))


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("kind, group", KINDS)
def test_every_number_of_kept_inputs(isa: str, kind: str, group: int) -> None:
    """0 ... K of K inputs, of which pairs, batches, segments and chunks are full or not."""
    k = 140
    weight = make_weight(kind, 70, k, group=group)
    blob, order = pack(weight, rule(0.5)), np.random.default_rng(0).permutation(k)
    x = np.full((k + 1, k), 0.25, np.float32)
    for kept in range(k + 1):
        x[kept, order[:kept]] = np.linspace(-3, 3, 140, dtype=np.float32)[order[:kept]] + np.float32(4)
    for activation_group in (0,) if kind == "bf16" else (0, segment_of(weight)):
        y = native.matmul(x, blob, activation_group, isa=isa)
        expected, bound = oracle(x, weight, rule(0.5), activation_group != 0)
        assert (np.abs(y - expected) <= bound).all() and (y[0] == 0).all()


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("kind, group", [("int8", 0), ("int4", 64), ("int4", 128)])
def test_reading_all_inputs_gives_the_same_bits(isa: str, kind: str, group: int) -> None:
    """Where few inputs are left out, their rows are read with the others, and they are zeros."""
    x = np.random.default_rng(1).standard_normal((2, 700)).astype(np.float32)
    x[:, 256:384] = 0.1  # a segment in which nothing stays
    for skipped in (0.05, 0.1, 0.7, 1.5):
        weight = make_weight(kind, 300, 700, group=group)
        blob = pack(weight, rule(skipped, 0.05, 0.05))
        together = native.matmul(x, blob, segment_of(weight), isa=isa)
        assert np.array_equal(together[:1], native.matmul(x[:1], blob, segment_of(weight), isa=isa))
        expected, bound = oracle(x, weight, rule(skipped, 0.05, 0.05), True)
        assert (np.abs(together - expected) <= bound).all()


@pytest.mark.parametrize("kind, group", KINDS)
@pytest.mark.parametrize("n", [64, 200, 2000])
def test_any_number_of_threads_gives_the_same_bits(kind: str, group: int, n: int) -> None:
    weight = make_weight(kind, n, 1100, group=group, bias=True)
    for rows, skipped in ((1, 0.1), (1, 0.6), (3, 0.1), (3, 1.2), (40, 0.1), (40, 1.2)):
        blob = pack(weight, rule(skipped))
        x = np.random.default_rng(rows).standard_normal((rows, 1100)).astype(np.float32)
        group_of_x = 0 if kind == "bf16" else segment_of(weight)
        results = [native.matmul(x, blob, group_of_x, threads=threads) for threads in (1, 2, 3, 7, 16)]
        assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("kind, group", KINDS)
@pytest.mark.parametrize("skipped", [0.05, 1.2])
def test_many_rows_and_chunks(isa: str, kind: str, group: int, skipped: float) -> None:
    """Few inputs are skipped, and all are multiplied, or most. Rows by fours and not, spans of chunks full and not."""
    weight = make_weight(kind, 300, 2700, group=group)
    blob, rng = pack(weight, rule(skipped, 0.05, 0.05)), np.random.default_rng(9)
    for rows in (2, 3, 5, 9, 35):
        x = rng.standard_normal((rows, 2700)).astype(np.float32)
        x[-1, 256:384] = 0.05  # a segment in which nothing stays
        activation_group = 0 if kind == "bf16" else segment_of(weight)
        y = native.matmul(x, blob, activation_group, isa=isa)
        expected, bound = oracle(x, weight, rule(skipped, 0.05, 0.05), kind != "bf16")
        assert (np.abs(y - expected) <= bound).all()
        few = slice(rows - 2, rows)  # the reference kernel is slow
        assert np.array_equal(y[few], native.matmul(x[few], blob, activation_group, isa="reference"))


@pytest.mark.parametrize("kind, group", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind: str, group: int) -> None:
    weight = make_weight(kind, 300, 600, group=group)
    x = np.random.default_rng(3).standard_normal((70, 600)).astype(np.float32)
    for activation_group in (0,) if kind == "bf16" else (0, segment_of(weight)):
        blob = pack(weight, rule(0.6))
        alone = [native.matmul(row[None], blob, activation_group) for row in x]
        assert np.array_equal(native.matmul(x, blob, activation_group), np.concatenate(alone))


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("at_the_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("kind, group", KINDS)
def test_nothing_outside_is_touched(isa: str, kind: str, group: int, at_the_end: bool) -> None:
    weight = make_weight(kind, 65, 133, group=group, bias=True)
    by = rule(np.full(133, 0.3), 0.1, np.full(133, 0.1))
    blob = pack(weight, by)
    for rows in (1, 3):
        wide = np.random.default_rng(rows).standard_normal((rows, 133)).astype(np.float32)
        for x in (wide, (wide.view(np.uint32) >> 16).astype(np.uint16)):
            for activation_group in (0,) if kind == "bf16" else (0, segment_of(weight)):
                with between_forbidden_pages(blob, at_the_end) as b, between_forbidden_pages(x, at_the_end) as a:
                    y = native.matmul(a, b, activation_group, isa=isa)
                assert np.array_equal(y, native.matmul(x, blob, activation_group, isa=isa))


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("kind, group", KINDS)
def test_every_address_gives_the_same_bits(isa: str, kind: str, group: int) -> None:
    weight, rng = make_weight(kind, 70, 203, group=group, bias=True), np.random.default_rng(4)
    blob = pack(weight, rule(rng.random(203), 0.1, rng.random(203)))
    x = rng.standard_normal((2, 203)).astype(np.float32)
    room = np.zeros(blob.nbytes + 64, np.uint8)
    for activation_group in (0,) if kind == "bf16" else (0, segment_of(weight)):
        expected = native.matmul(x, blob, activation_group, isa=isa)
        for shift in range(0, 64, 3):
            at = room[shift : shift + blob.nbytes]
            at[:] = blob
            assert np.array_equal(native.matmul(x, at, activation_group, isa=isa), expected)


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("kind, group", KINDS)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_survive_as_in_the_pattern(isa: str, kind: str, group: int, special: float) -> None:
    """NaN is not below any threshold. Under a threshold of infinity only NaN stays."""
    weight = make_weight(kind, 20, 300, group=group, sparsity=0.3)
    x = np.random.default_rng(5).standard_normal((3, 300)).astype(np.float32)
    x[1, 7] = special
    for threshold in (np.float32(0.5), ALWAYS):
        blob = pack(weight, rule(threshold))
        with np.errstate(invalid="ignore"):
            kept = np.where(np.abs(x) <= threshold, 0, x).astype(np.float64) @ weight.dequantize().T.astype(np.float64)
            exact = native.matmul(x, blob, 0, isa=isa)
            assert np.array_equal(np.isnan(exact), np.isnan(kept))
            infinite = np.isinf(kept)
            assert np.array_equal(exact[infinite], kept[infinite]) and np.isfinite(exact[[0, 2]]).all()
            if kind != "bf16":  # quantized activations: the whole row, if the value stays
                y = native.matmul(x, blob, segment_of(weight), isa=isa)
                stays = not abs(special) <= threshold
                assert np.isnan(y[1]).all() == stays and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("kind, lowest, highest", [("int8", -128, 127), ("int4", -8, 7)])
def test_the_largest_sums_do_not_saturate(isa: str, kind: str, lowest: int, highest: int) -> None:
    rng = np.random.default_rng(8)
    columns = [np.full(512, lowest), np.full(512, highest), np.tile([lowest, highest], 256)]
    columns += [rng.choice([lowest, highest], 512) for _ in range(14)]
    values = np.array(columns, np.int8)
    signs = [np.ones(512), -np.ones(512), *np.sign(values[2:4]), *rng.choice([-1, 1], (7, 512))]
    q = 127 * np.array(signs, np.int64)
    blob = pack(Weight(kind, values, np.ones((17, 1), np.float32), 0), rule(NEVER))
    expected = (q @ values.T.astype(np.int64)).astype(np.float32)  # below 2^24: exact
    assert np.array_equal(native.matmul(q.astype(np.float32), blob, 128, isa=isa), expected)


@pytest.mark.parametrize("isa", OWN)
def test_every_code(isa: str) -> None:
    for kind, codes in (("int4", range(-8, 8)), ("int8", range(-128, 128))):
        values = np.resize(np.array(list(codes), np.int8), (300, 256))
        blob = pack(Weight(kind, values, np.ones((300, 1), np.float16), 0), rule(0.5))
        for activation_group in (0, 128):
            y = native.matmul(np.eye(256, dtype=np.float32), blob, activation_group, isa=isa)
            assert np.array_equal(y, values.T.astype(np.float32))


@pytest.mark.parametrize("kind, group", KINDS)
def test_bf16_activations(kind: str, group: int) -> None:
    weight = make_weight(kind, 100, 333, group=group, bias=True)
    blob = pack(weight, rule(0.5, 0.25, 0.25))
    x = bf16(np.random.default_rng(6).standard_normal((5, 333)).astype(np.float32))
    narrow = (x.view(np.uint32) >> 16).astype(np.uint16)
    for activation_group in (0,) if kind == "bf16" else (0, segment_of(weight)):
        y = (native.matmul(narrow, blob, activation_group).astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(y, bf16(native.matmul(x, blob, activation_group)))


def test_concurrent_callers_get_the_same_bits() -> None:
    blob = pack(make_weight("int4", 500, 700, group=128), rule(0.5))
    x = np.random.default_rng(7).standard_normal((3, 700)).astype(np.float32)
    alone = native.matmul(x, blob, 128)
    with ThreadPoolExecutor(6) as pool:
        for y in pool.map(lambda _: native.matmul(x, blob, 128), range(24)):
            assert np.array_equal(alone, y)


# What is refused


def test_wrong_arguments_are_named() -> None:
    weight = make_weight("int4", 10, 128, group=64)
    blob = pack(weight, rule(0.5))
    with pytest.raises(ValueError, match="activation_group 128 does not fit: it must be 0 .* or 64"):
        native.matmul(np.zeros((1, 128), np.float32), blob, 128)
    with pytest.raises(ValueError, match="activation_group 128 .* for bf16"):
        native.matmul(np.zeros((1, 2), np.float32), pack(make_weight("bf16", 1, 2), rule(0.5)), 128)
    with pytest.raises(ValueError, match=r"x must be \[M, 128\]"):
        native.matmul(np.zeros((1, 127), np.float32), blob)
    with pytest.raises(ValueError, match="'sse2'"):
        native.matmul(np.zeros((1, 128), np.float32), blob, isa="sse2")
    for by in (rule(np.ones(127)), rule(0.5, 0, np.ones(2))):
        with pytest.raises(ValueError, match="has 128 inputs"):
            pack(weight, by)
    for wrong in ((np.nan, 0.0, 0.0), (0.5, np.inf, 0.0), (0.5, 0.0, np.nan)):
        with pytest.raises(ValueError, match="must be numbers"):
            rule(*wrong)


BLOB = pack(
    make_weight("int4", 100, 200, group=64, bias=True, f32=True), rule(np.full(200, 0.5), 0.25, np.full(200, 0.1))
)
FIELDS = [
    *[(0, "I", 1, "magic"), (4, "H", 2, "version 2"), (6, "H", 64, "header_bytes"), (8, "B", 4, "kind")],
    *[
        (9, "B", 1, "reserved"),
        (12, "I", 63, "unknown flags"),
        (12, "I", 15, "replacements"),
        (16, "Q", 99, "padding|not zero"),
    ],
    *[(16, "Q", 2**31, "1..2"), (24, "Q", 0, "1..2"), (24, "Q", 201, "offsets|needs"), (32, "Q", 512, "Npad")],
    *[(40, "I", 32, "group"), (44, "f", np.nan, "centre"), (96, "Q", 128, "needs"), (112, "Q", 1, "reserved")],
    *[(at, "Q", 256 + 128 * 999, "offsets") for at in range(48, 96, 8)],
]


@pytest.mark.parametrize("at, form, value, message", FIELDS)
def test_a_wrong_header_is_refused(at: int, form: str, value: Any, message: str) -> None:
    blob = bytearray(BLOB.tobytes())
    struct.pack_into(f"<{form}", blob, at, value)
    with pytest.raises(ValueError, match=message):
        native.validate(np.frombuffer(bytes(blob), np.uint8))


def test_every_shorter_or_longer_blob_is_refused() -> None:
    for size in [*range(0, 200, 7), BLOB.nbytes - 1]:
        with pytest.raises(ValueError, match="SAM1 blob"):
            native.validate(BLOB[:size])
    with pytest.raises(ValueError, match="needs"):
        native.validate(np.append(BLOB, np.zeros(128, np.uint8)))


def test_wrong_content_is_refused() -> None:
    offsets = HEADER.unpack_from(BLOB.tobytes())[10:16]
    threshold, replacement, offset, scale, bias, values = offsets
    nan, infinite = struct.pack("<f", np.nan), struct.pack("<f", np.inf)
    cases = [
        *[(threshold, nan, "threshold"), (replacement, infinite, "replacement"), (scale, nan, "scale")],
        *[(scale + 4 * 100, struct.pack("<f", 1), "padding"), (values + 127, b"\0", "padding")],
        *[
            (threshold + 4 * 200, b"\1", "not zero"),
            (offset + 4 * 100, b"\1", "not zero"),
            (bias + 4 * 100, b"\1", "not zero"),
        ],
    ]
    for at, content, message in cases:
        blob = BLOB.copy()
        blob[at : at + len(content)] = np.frombuffer(content, np.uint8)
        with pytest.raises(ValueError, match=message):
            native.validate(blob)


def test_damage_that_leaves_a_blob_valid_is_found_by_its_checksum() -> None:
    blob = BLOB.copy()
    blob[HEADER.unpack_from(BLOB.tobytes())[15]] ^= 1  # a weight
    native.validate(blob)
    with pytest.raises(ValueError, match="damaged"):
        native.unpack(blob)


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_end_in_an_error_or_a_result(seed: int) -> None:
    """Mutated blobs, in memory of exactly their size, never crash; what is accepted can be multiplied with."""
    rng = np.random.default_rng(seed)
    accepted = 0
    for _ in range(150):
        blob = BLOB.copy()
        where = rng.integers(0, 160 if rng.random() < 0.5 else blob.nbytes, rng.integers(1, 4))
        blob[where] = rng.integers(0, 256, len(where))
        try:
            native.validate(blob)
        except ValueError as error:
            assert "SAM1 blob" in str(error)
            continue
        accepted += 1
        with between_forbidden_pages(blob, True) as at:
            assert native.matmul(np.ones((1, 200), np.float32), at, 64).shape == (1, 100)
    assert accepted
