"""Sizes and bytes from strangers: an error, in time and memory that the blob itself pays for, and nothing worse."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.cpu_plugin.sparse_matmul.pack import HEADER
from ov_ext.cpu_plugin.support.native import call
from ov_ext.cpu_plugin.support.weight import KINDS, Weight
from tests.cpu_plugin.conftest import make_weight, with_compensation
from tests.cpu_plugin.test_operation import BLOB, F32, K, N, X, model, operation

HUGE = 2**31 - 1
SIZES = [(1, HUGE), (HUGE, 1), (HUGE, HUGE), (2**16, 2**20), (2**20, 2**16), (HUGE, 64), (64, HUGE)]
OVERFLOWS = [(2**32, 2**32), (2**33 + 1, 2**31), (2**63, 2), (2**64 - 1, 2**64 - 1), (2**31, 1), (0, 5), (2**48, 2**16)]


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def lying_blob(kind: str, n: int, k: int, dense: bool, size: int = 4096, compensated: bool = False) -> np.ndarray:
    """A header in which everything follows from N and K, modulo 2^64, and then nothing but zeros."""
    slice_k = 2 if kind == "bf16" else 4
    n_pad, k_pad = up(n, 64), up(k, 32 if kind == "bf16" else 128)
    sections = [("dir", 8 * (n_pad // 64 * up(k_pad, 512) // 512 + 1))]
    if not dense:
        sections.append(("mask", n_pad * k_pad // 8))
    if kind != "bf16":
        sections.append(("scale", 2 * n_pad))
    if compensated:
        sections.append(("comp", n_pad * (k_pad // 128) * 2))
    flags = 0 if kind == "bf16" else 2 if compensated else 2 | 64
    offsets, end = {}, 128
    for name, length in [*sections, ("val", 0)]:
        offsets[name] = end
        end = up(end + length, 64)
    fields = [
        *(KINDS[kind], slice_k, 16, 4, flags | (16 if dense else 0)),
        *(n, k, n_pad, k_pad, 0, 512, n * k if dense else 0),
        *(offsets.get(name, 0) for name in ("dir", "mask", "val", "scale", "bias")),
        *(size, 0, offsets.get("comp", 0)),
    ]
    header = HEADER.pack(0x31575053, 1, 128, *(field % 2**64 for field in fields))
    return np.frombuffer(header + bytes(size - 128), np.uint8)


def all_lies() -> list[np.ndarray]:
    lies = [lying_blob(kind, n, k, dense) for kind in KINDS for dense in (False, True) for n, k in SIZES + OVERFLOWS]
    lies += [lying_blob("int4", n, k, False, compensated=True) for n, k in SIZES + OVERFLOWS]
    # Every section but the values is there: the longest way to the error that few bytes can buy.
    longest = lying_blob("int8", 1, 2**22, True, compensated=True)
    values = HEADER.unpack_from(longest)[17]
    return [*lies, lying_blob("int8", 1, 2**22, True, values + 64, compensated=True)]


def test_the_lies_are_consistent_where_they_are_affordable() -> None:
    """The header itself is right: with all sections present and empty, such a blob is valid."""
    for kind in KINDS:
        blob = lying_blob(kind, 100, 300, False)
        size = HEADER.unpack_from(blob)[17] + 64
        native.validate(lying_blob(kind, 100, 300, False, size))
    size = HEADER.unpack_from(lying_blob("int4", 100, 300, False, compensated=True))[17] + 64
    native.validate(lying_blob("int4", 100, 300, False, size, compensated=True))


def test_huge_sizes_cost_nothing() -> None:
    """In a process that may grow by 128 MiB and has a minute; the blobs claim up to exbibytes."""
    code = """
import resource, re
import numpy as np
from tests.cpu_plugin import test_untrusted as t
lies = t.all_lies()
t.native.validate(t.BLOB)  # threads and library are there
used = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20),) * 2)
for lie in lies:
    for read in (t.native.validate, t.native.unpack, lambda blob: t.native.matmul(np.zeros((1, 1), np.float32), blob)):
        try:
            read(lie)
        except ValueError as error:
            assert str(error).startswith("SPW1 blob: ") or "x must be" in str(error), error
        else:
            raise AssertionError("accepted")
print(len(lies))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and int(done.stdout) == len(all_lies()) > 80, done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [*SIZES, *OVERFLOWS])
def test_huge_sizes_in_an_operation_are_named(kind: str, n: int, k: int) -> None:
    """Whatever attributes say, and whether they agree with the blob or not."""
    for attributes in ({"n": n, "k": k}, {"n": N, "k": K}):
        if max(attributes.values()) < 2**63:  # an attribute is an i64
            with pytest.raises(RuntimeError, match="SPW1 blob|2\\^31-1|attributes say"):
                model([1, -1], lying_blob(kind, n, k, False), kind=kind, **attributes)


def test_a_blob_input_with_huge_attributes_allocates_nothing() -> None:
    x, blob = opset.parameter([1, -1], np.float32), opset.parameter([-1], np.uint8)
    with pytest.raises(RuntimeError, match="2\\^31-1"):
        operation(x, blob, n=2**60)


@pytest.mark.parametrize("shape", [(2**31, 1), (1, 2**31), (2**40, 2**20)])
def test_packing_refuses_huge_sizes_before_copying(shape: tuple[int, int]) -> None:
    everywhere_the_same = np.broadcast_to(np.uint16(1), shape)
    with pytest.raises(ValueError, match="2\\^31-1"):
        native.pack(Weight("bf16", everywhere_the_same))


@pytest.mark.parametrize("n, k", [(HUGE, HUGE), (-1, 5), (0, 5), (5, 0), (2**31, 5), (5, 2**63 - 1), (2**30, 2**30)])
def test_the_packer_itself_refuses_them_too(n: int, k: int) -> None:
    value, size = ctypes.c_uint64(1), ctypes.c_uint64()
    arguments = native._WeightArguments(KINDS["bf16"], n, k, 0, 0, 0, ctypes.addressof(value), None, None)
    with pytest.raises(ValueError, match="SPW1 blob: "):
        call("ov_ext_packed_bytes", ctypes.byref(arguments), ctypes.byref(size))
    with pytest.raises(ValueError, match="SPW1 blob: "):
        call("ov_ext_pack", ctypes.byref(arguments), ctypes.byref(value), ctypes.c_uint64(8))


def test_errors_of_many_threads_do_not_mix() -> None:
    """Blobs with one damaged block each: every caller gets the error of its own blob, or none."""
    good = with_compensation(make_weight("int8", 640, 600, bias=True))
    offsets = HEADER.unpack_from(good)
    blobs = []
    for at, value, message in (
        (good.nbytes - 1, 1, "slack"),
        (offsets[22] + 3000, good[offsets[22] + 3000] ^ 1, "compensation"),
        (offsets[18] + 2 * 600 + 1, 0x7F, "scale"),
        (56, good[56] ^ 1, "nnz"),
        (112, good[112] ^ 1, None),  # the checksum is for transport
    ):
        blob = good.copy()
        blob[at] = value
        blobs.append((blob, message))

    def outcome(i: int) -> bool:
        blob, message = blobs[i % len(blobs)]
        try:
            native.validate(blob)
        except ValueError as error:
            return message is not None and message in str(error)
        return message is None

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(outcome, range(400)))


def test_a_block_that_lies_outside_is_noticed_by_the_thread_that_checks_it() -> None:
    """All entries of one block moved together: its own lengths are right, and only its neighbours could tell."""
    good = native.pack(make_weight("int8", 640, 600))
    directory, chunks = HEADER.unpack_from(good)[15], 2
    for block in range(1, 9):
        for shift in (2**40, -64, 2**64 - 2**20):
            blob = good.copy()
            entries = blob[directory : directory + 8 * 21].view(np.uint64)
            entries[block * chunks : (block + 1) * chunks + 1] += np.uint64(shift % 2**64)
            with pytest.raises(ValueError, match="SPW1 blob"):
                native.validate(blob)


# ------------------------------------------------------------------------------------------------- inside OpenVINO


@pytest.fixture(scope="module")
def core() -> ov.Core:
    return ov_ext.add_extension(ov.Core())


def test_a_request_works_again_after_a_wrong_shape(core: ov.Core, refused: Any) -> None:
    request = core.compile_model(model([-1, -1]), "CPU", F32).create_infer_request()
    expected = native.matmul(X, BLOB)
    for wrong in (np.zeros((2, K + 1), np.float32), np.zeros((2, 0), np.float32), np.zeros((0, K - 1), np.float32)):
        refused(lambda x=wrong: request.infer([x]), f"last axis of x must be {K}")
        assert np.array_equal(request.infer([X])[0], expected)
    assert request.infer([np.zeros((0, K), np.float32)])[0].shape == (0, N)
    assert np.array_equal(request.infer([X])[0], expected)


def test_regions_of_interest_are_not_read_as_whole_tensors(core: ov.Core) -> None:
    """Their rows have gaps: as input of the plug-in, and of Model.evaluate, which passes them on."""
    wide = np.random.default_rng(0).standard_normal((8, K + 7)).astype(np.float32)
    region = ov.Tensor(ov.Tensor(wide), ov.Coordinate([1, 3]), ov.Coordinate([5, 3 + K]))
    expected = native.matmul(np.ascontiguousarray(wide[1:5, 3 : 3 + K]), BLOB)
    request = core.compile_model(model([-1, K]), "CPU", F32).create_infer_request()
    request.set_input_tensor(region)
    request.infer()
    assert np.array_equal(request.get_output_tensor().data, expected)

    out = ov.Tensor(ov.Type.f32, ov.Shape([4, N]))
    assert model([-1, K]).evaluate([out], [region])
    assert np.array_equal(out.data, expected)


def test_a_blob_in_a_state_is_checked_whenever_it_changes(core: ov.Core, refused: Any) -> None:
    """set_state gives a variable any bytes; the operation must not remember that earlier ones were valid."""
    info = ov.op.util.VariableInfo()
    info.data_shape, info.data_type, info.variable_id = ov.PartialShape([BLOB.nbytes]), ov.Type.u8, "blob"
    variable = ov.op.util.Variable(info)
    x = opset.parameter([6, K], np.float32, name="x")
    read = ov.opset6.read_value(opset.constant(BLOB), variable)
    keep = ov.opset6.assign(read, variable)
    result = opset.result(operation(x, read))
    request = core.compile_model(ov.Model([result], [keep], [x], "m"), "CPU", F32).create_infer_request()
    expected = native.matmul(X, BLOB)
    assert np.array_equal(request.infer([X])[0], expected)
    damaged = BLOB.copy()
    damaged[-70] ^= 0xFF
    [state] = request.query_state()
    for blob in (damaged, BLOB, np.zeros_like(BLOB), BLOB):
        state.state = ov.Tensor(blob)
        if blob is BLOB:
            assert np.array_equal(request.infer([X])[0], expected)
        else:
            refused(lambda: request.infer([X]), "SPW1 blob")
