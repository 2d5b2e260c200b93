"""The SparseMatMul operation inside OpenVINO: shapes, types, attributes, untrusted blobs, streams, kernel override."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset
from openvino.utils.node_factory import NodeFactory

import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from tests.cpu_plugin.conftest import KERNELS, make_weight

N, K = 100, 200
WEIGHT = make_weight("int4", N, K, group=64, bias=True)
BLOB = native.pack(WEIGHT)
X = np.random.default_rng(0).standard_normal((6, K)).astype(np.float32)
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def core() -> ov.Core:
    return ov_ext.add_extension(ov.Core())


def operation(x: Any, *blobs: Any, **attributes: Any) -> ov.Node:
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    known = {"n": N, "k": K, "kind": "int4", "activation_group": 128, "epilogue": "", "source": ""}
    return factory.create("SparseMatMul", [x.output(0), *(blob.output(0) for blob in blobs)], known | attributes)


def model(shape: Any, blob: np.ndarray = BLOB, dtype: Any = np.float32, **attributes: Any) -> ov.Model:
    x = opset.parameter(ov.PartialShape(shape), dtype, name="x")
    return ov.Model([opset.result(operation(x, opset.constant(blob), **attributes))], [x], "m")


@pytest.mark.parametrize("shape", [[K], [6, K], [-1, K], [2, 3, K], [-1, -1, -1], [1, 2, 1, 3, K]])
def test_any_rank_and_dynamic_axes(core: ov.Core, shape: list[int]) -> None:
    compiled = core.compile_model(model(shape), "CPU", F32)
    lead = {1: [], 2: [6], 3: [2, 3], 5: [1, 2, 1, 3]}[len(shape)]
    x = X[: int(np.prod(lead))].reshape([*lead, K])
    y = compiled(x)[0]
    assert y.shape == (*lead, N)
    assert np.array_equal(y.reshape(-1, N), native.matmul(x.reshape(-1, K), BLOB))


def test_no_rows(core: ov.Core) -> None:
    assert core.compile_model(model([-1, 5, K]), "CPU", F32)(np.zeros((0, 5, K), np.float32))[0].shape == (0, 5, N)


def test_the_output_shape_is_known_before_running() -> None:
    assert model([-1, 7, K]).outputs[0].partial_shape == ov.PartialShape([-1, 7, N])


def test_bf16_activations_stay_bf16_where_the_cpu_has_avx512(core: ov.Core) -> None:
    x = opset.parameter([6, K], np.float32, name="x")
    narrow = opset.convert(x, ov.Type.bf16)
    y = operation(narrow, opset.constant(BLOB))
    assert y.get_output_element_type(0) == ov.Type.bf16
    compiled = core.compile_model(ov.Model([opset.result(opset.convert(y, ov.Type.f32))], [x], "m"), "CPU", F32)
    if ov_ext.cpu_info()["features"]["avx512"]:
        bits = X.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        expected = (native.matmul(rounded, BLOB).astype(np.uint32) << 16).view(np.float32)
    else:
        expected = native.matmul(X, BLOB)  # OpenVINO runs all bf16 of a graph in f32 on such a CPU
    assert np.array_equal(compiled(X)[0], expected)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"n": N + 1}, "attributes say"),
        ({"k": K - 1}, "attributes say"),
        ({"kind": "int8"}, "attributes say"),
        ({"activation_group": 32}, "activation_group 32"),
        ({"epilogue": "swiglu"}, "epilogue"),
        ({"n": 0}, r"1\.\.2\^31-1"),
    ],
)
def test_attributes_that_do_not_fit_are_named(attributes: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        model([1, K], **attributes)


def test_a_wrong_last_axis_is_named() -> None:
    with pytest.raises(RuntimeError, match="last axis of x must be 200"):
        model([1, K + 1])


def test_a_wrong_element_type_is_named() -> None:
    with pytest.raises(RuntimeError, match="f32 or bf16"):
        model([1, K], dtype=np.float16)


def test_a_malformed_header_stops_reading_and_malformed_content_compiling(core: ov.Core, tmp_path: Path) -> None:
    path = tmp_path / "m.xml"
    ov.save_model(model([1, K]), path, compress_to_fp16=False)
    binary = bytearray(path.with_suffix(".bin").read_bytes())
    at = bytes(binary).index(BLOB.tobytes())
    binary[at + 4] = 9  # version
    path.with_suffix(".bin").write_bytes(binary)
    with pytest.raises(RuntimeError, match="version 9"):
        core.read_model(path)
    binary[at + 4] = 1
    binary[at + BLOB.nbytes - 70] ^= 0xFF  # a value or a fill
    path.with_suffix(".bin").write_bytes(binary)
    with pytest.raises(RuntimeError, match="SparseMatMul '.*SPW1 blob"):
        core.compile_model(core.read_model(path), "CPU")


def test_a_blob_that_arrives_as_data_is_checked_at_every_call(core: ov.Core, refused: Any) -> None:
    x, blob = opset.parameter([6, K], np.float32, name="x"), opset.parameter([BLOB.nbytes], np.uint8, name="blob")
    compiled = core.compile_model(ov.Model([opset.result(operation(x, blob))], [x, blob], "m"), "CPU", F32)
    data = BLOB.copy()
    expected = native.matmul(X, BLOB)
    assert np.array_equal(compiled([X, data])[0], expected)
    data[-70] ^= 0xFF
    refused(lambda: compiled([X, data]), "SPW1 blob")
    data[-70] ^= 0xFF
    assert np.array_equal(compiled([X, data])[0], expected)


@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize("kind, group", [("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 64)])
def test_several_weights_give_the_bits_of_each_alone(core: ov.Core, kind: str, group: int, rows: int) -> None:
    """Sizes that fill no block, one without a mask, biases: in one operation, which needs split rows or not."""
    widths, inputs = [100, 1, 64, 300], 1100
    weights = [make_weight(kind, n, inputs, group=group, bias=n != 64) for n in widths]
    blobs = [native.pack(weight, dense=i == 2) for i, weight in enumerate(weights)]
    x = opset.parameter([-1, inputs], np.float32, name="x")
    attributes = {"n": sum(widths), "outputs": widths, "k": inputs, "kind": kind}
    node = operation(x, *map(opset.constant, blobs), **attributes)
    assert [port.partial_shape for port in node.outputs()] == [ov.PartialShape([-1, n]) for n in widths]
    whole = ov.Model([opset.result(port) for port in node.outputs()], [x], "m")
    compiled = core.compile_model(whole, "CPU", F32)
    activations = np.random.default_rng(rows).standard_normal((rows, inputs)).astype(np.float32)
    results = compiled(activations)
    for i, blob in enumerate(blobs):
        assert np.array_equal(results[i], native.matmul(activations, blob))


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"n": 2 * N + 1, "outputs": [N, N]}, "sum of outputs, 200, got 201"),
        ({"n": 3 * N, "outputs": [N, N, N]}, "4 inputs, got 3"),
        ({"n": 2 * N, "outputs": [N - 1, N + 1]}, "attributes say"),
        ({"n": 2 * N, "outputs": [2 * N, 0]}, r"1\.\.2\^31-1"),
        ({"n": 2 * N}, "2 inputs, got 3"),
    ],
)
def test_sizes_of_several_weights_that_do_not_fit_are_named(attributes: dict, message: str) -> None:
    x = opset.parameter([1, K], np.float32, name="x")
    with pytest.raises(RuntimeError, match=message):
        operation(x, opset.constant(BLOB), opset.constant(BLOB), **attributes)


def test_weights_with_different_groups_cannot_share_activations(core: ov.Core) -> None:
    x = opset.parameter([1, K], np.float32, name="x")
    other = native.pack(make_weight("int4", N, K, group=128))
    node = operation(x, opset.constant(BLOB), opset.constant(other), n=2 * N, outputs=[N, N])
    whole = ov.Model([opset.result(port) for port in node.outputs()], [x], "m")
    with pytest.raises(RuntimeError, match="different groups"):
        core.compile_model(whole, "CPU", F32)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_concurrent_requests_and_streams_give_the_same_bits(core: ov.Core, streams: int) -> None:
    blob = native.pack(make_weight("int8", 640, 1024))
    compiled = core.compile_model(
        model([-1, 1024], blob, n=640, k=1024, kind="int8"), "CPU", F32 | {"NUM_STREAMS": streams}
    )
    xs = [np.random.default_rng(i).standard_normal((1 + i % 5, 1024)).astype(np.float32) for i in range(24)]
    expected = [native.matmul(x, blob) for x in xs]

    def infer(x: np.ndarray) -> np.ndarray:
        return compiled.create_infer_request().infer([x])[0].copy()

    with ThreadPoolExecutor(6) as pool:
        for y, correct in zip(pool.map(infer, xs), expected, strict=True):
            assert np.array_equal(y, correct)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_can_be_chosen_by_an_environment_variable(name: str) -> None:
    code = "import ov_ext; print(ov_ext.cpu_info()['choice'])"
    environment = os.environ | {"OV_EXT_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    integers = "avx512" if name == "avx512_bf16" else name  # it has code for bf16 only
    expected = {"bf16": name, "int8": integers, "int4": integers}
    assert ast.literal_eval(done.stdout) == {kind: [[1, kernel]] for kind, kernel in expected.items()}


def test_an_unknown_kernel_is_an_error_not_a_fallback() -> None:
    code = "import ov_ext; ov_ext.cpu_info()"
    environment = os.environ | {"OV_EXT_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode and "'sse9' (OV_EXT_ISA) is not available" in done.stderr
