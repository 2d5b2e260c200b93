"""Many requests at once on changing shapes: every row of every answer is the one that the row gets alone."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset
from openvino.utils.node_factory import NodeFactory

import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from tests.cpu_plugin.conftest import make_weight

pytestmark = pytest.mark.slow

K = 1100
SIDES = {"int4": (640, 128), "int8": (200, 0), "bf16": (330, 0)}  # outputs, group
REQUESTS, STREAMS = 8, 2
SECONDS = float(os.environ.get("OV_EXT_SOAK_SECONDS", "8"))  # `make soak`: a minute


def test_concurrent_requests_streams_and_changing_shapes(core: ov.Core) -> None:
    rows = np.random.default_rng(0).standard_normal((97, K)).astype(np.float32)
    x = opset.parameter(ov.PartialShape([-1, -1, K]), np.float32, name="x")
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    expected, results = [], []
    for kind, (n, group) in SIDES.items():
        blob = native.pack(make_weight(kind, n, K, group=group, bias=True))
        attributes = {"n": n, "k": K, "kind": kind, "activation_group": 128, "epilogue": "", "source": ""}
        operation = factory.create("SparseMatMul", [x.output(0), opset.constant(blob).output(0)], attributes)
        results.append(opset.result(operation))
        expected.append(np.concatenate([native.matmul(row[None], blob) for row in rows]))
    compiled = core.compile_model(
        ov.Model(results, [x], "soak"), "CPU", {"NUM_STREAMS": STREAMS, "INFERENCE_PRECISION_HINT": "f32"}
    )
    # float32 sums of K products may be added in another order where other rows come along
    loose = 1e-5 * np.abs(expected[-1]).max()
    end = time.monotonic() + SECONDS

    def soak(seed: int) -> int:
        rng, request, done = np.random.default_rng(seed), compiled.create_infer_request(), 0
        while time.monotonic() < end:
            shape = rng.choice([0, 1, 1, 1, 2, 3]), rng.choice([1, 1, 2, 5, 9, 16, 33])
            chosen = rng.integers(0, len(rows), shape)
            request.start_async([rows[chosen].reshape(*shape, K)], share_inputs=True)
            request.wait()
            for kind, values, output in zip(SIDES, expected, compiled.outputs, strict=True):
                y, correct = request.get_tensor(output).data, values[chosen]
                if kind == "bf16":
                    assert y.shape == correct.shape and (np.abs(y - correct) <= loose).all()
                else:
                    assert np.array_equal(y, correct), (kind, shape)
            done += 1
        return done

    with ThreadPoolExecutor(REQUESTS) as pool:
        counts = [future.result() for future in [pool.submit(soak, seed) for seed in range(REQUESTS)]]
    assert min(counts) > 0
    print(f"{sum(counts)} inferences in {SECONDS:.0f} s")


@pytest.mark.parametrize("streams", [1, 2])
def test_a_failing_request_disturbs_no_other(core: ov.Core, streams: int) -> None:
    """One stream of requests with damaged blobs beside one with good ones, through the same compiled model."""
    good = native.pack(make_weight("int8", 640, 600))
    bad = good.copy()
    bad[-1] = 1
    x, blob = opset.parameter([-1, 600], np.float32, name="x"), opset.parameter([good.nbytes], np.uint8, name="blob")
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    attributes = {"n": 640, "k": 600, "kind": "int8", "activation_group": 128, "epilogue": "", "source": ""}
    operation = factory.create("SparseMatMul", [x.output(0), blob.output(0)], attributes)
    compiled = core.compile_model(ov.Model([opset.result(operation)], [x, blob], "m"), "CPU", {"NUM_STREAMS": streams})
    data = np.random.default_rng(1).standard_normal((4, 600)).astype(np.float32)
    expected = native.matmul(data, good)

    def infer(i: int) -> bool:
        request = compiled.create_infer_request()
        if i % 2:
            with pytest.raises(RuntimeError, match="slack"):
                request.infer([data, bad])
            return True
        return np.array_equal(request.infer([data, good])[0], expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(infer, range(80)))
