"""The SparseActivationMatMul operation inside OpenVINO: shapes, attributes, untrusted blobs, streams."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset
from openvino.utils.node_factory import NodeFactory

import ov_ext
from ov_ext.cpu_plugin.sparse_activation import native
from tests.cpu_plugin.test_sparse_activation import BLOB

X = np.random.default_rng(0).standard_normal((6, 200)).astype(np.float32)
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def core() -> ov.Core:
    return ov_ext.add_extension(ov.Core())


def operation(x: Any, blob: Any, **attributes: Any) -> ov.Node:
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    known = {"n": 100, "k": 200, "kind": "int4", "activation_group": 64, "source": ""}
    return factory.create("SparseActivationMatMul", [x.output(0), blob.output(0)], known | attributes)


def model(shape: Any, blob: np.ndarray = BLOB, dtype: Any = np.float32, **attributes: Any) -> ov.Model:
    x = opset.parameter(ov.PartialShape(shape), dtype, name="x")
    return ov.Model([opset.result(operation(x, opset.constant(blob), **attributes))], [x], "m")


@pytest.mark.parametrize("shape", [[200], [6, 200], [-1, 200], [2, 3, 200], [-1, -1, -1]])
def test_any_rank_and_dynamic_axes(core: ov.Core, shape: list[int]) -> None:
    lead = {1: [], 2: [6], 3: [2, 3]}[len(shape)]
    x = X[: int(np.prod(lead))].reshape([*lead, 200])
    y = core.compile_model(model(shape), "CPU", F32)(x)[0]
    assert y.shape == (*lead, 100)
    assert np.array_equal(y.reshape(-1, 100), native.matmul(x.reshape(-1, 200), BLOB, 64))


def test_no_rows(core: ov.Core) -> None:
    assert core.compile_model(model([-1, 200]), "CPU", F32)(np.zeros((0, 200), np.float32))[0].shape == (0, 100)


@pytest.mark.parametrize(
    "attributes, message",
    [
        *[({"n": 101}, "attributes say"), ({"k": 199}, "attributes say"), ({"kind": "int8"}, "attributes say")],
        *[({"activation_group": 128}, "activation_group 128"), ({"n": 0}, r"1\.\.2\^31-1")],
    ],
)
def test_attributes_that_do_not_fit_are_named(attributes: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        model([1, 200], **attributes)


def test_wrong_activations_are_named() -> None:
    with pytest.raises(RuntimeError, match="last axis of x must be 200"):
        model([1, 201])
    with pytest.raises(RuntimeError, match="f32 or bf16"):
        model([1, 200], dtype=np.float16)


def test_malformed_content_stops_compiling(core: ov.Core) -> None:
    blob = BLOB.copy()
    blob[128:132] = np.frombuffer(struct.pack("<f", np.nan), np.uint8)
    with pytest.raises(RuntimeError, match="SparseActivationMatMul '.*SAM1 blob: a threshold"):
        core.compile_model(model([1, 200], blob), "CPU")


def test_a_blob_that_arrives_as_data_is_checked_at_every_call(core: ov.Core, refused: Any) -> None:
    x, blob = opset.parameter([6, 200], np.float32, name="x"), opset.parameter([BLOB.nbytes], np.uint8, name="blob")
    compiled = core.compile_model(ov.Model([opset.result(operation(x, blob))], [x, blob], "m"), "CPU", F32)
    data = BLOB.copy()
    expected = native.matmul(X, BLOB, 64)
    assert np.array_equal(compiled([X, data])[0], expected)
    data[4] = 9
    refused(lambda: compiled([X, data]), "version 9")


def test_concurrent_requests(core: ov.Core) -> None:
    compiled = core.compile_model(model([-1, 200]), "CPU", F32 | {"NUM_STREAMS": 2})
    expected = native.matmul(X, BLOB, 64)
    requests = [compiled.create_infer_request() for _ in range(4)]
    for _ in range(5):
        for request in requests:
            request.start_async(X)
        for request in requests:
            request.wait()
            assert np.array_equal(request.get_output_tensor().data, expected)
