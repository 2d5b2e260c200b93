"""Errors reach the user. On one thread OpenVINO loses them: there outputs are NaN, and nothing crashes afterwards."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.cpu_plugin.sparse_matmul.pack import HEADER
from tests.cpu_plugin.conftest import ONE_CPU, make_weight
from tests.cpu_plugin.test_operation import BLOB, F32, K, N, X, model, operation


@pytest.fixture(scope="module")
def core() -> ov.Core:
    return ov_ext.add_extension(ov.Core())


EXPECTED = native.matmul(X, BLOB)
WIDE = np.ones((3, K + 1), np.float32)


def damaged(blob: np.ndarray = BLOB) -> np.ndarray:
    changed = blob.copy()
    changed[-70] ^= 0xFF
    return changed


def without_magic() -> np.ndarray:
    changed = BLOB.copy()
    changed[0] = 0
    return changed


def fed(*blobs: np.ndarray, bf16: bool = False, dynamic: bool = False) -> ov.Model:
    """A model whose blobs arrive as data."""
    x = opset.parameter([-1, -1] if dynamic else [6, K], np.float32, name="x")
    inputs = [opset.parameter([-1 if dynamic else blob.nbytes], np.uint8) for blob in blobs]
    node = operation(opset.convert(x, ov.Type.bf16) if bf16 else x, *inputs, n=N * len(blobs), outputs=[N] * len(blobs))
    outputs = [opset.convert(port, ov.Type.f32) for port in node.outputs()]
    return ov.Model([opset.result(port) for port in outputs], [x, *inputs], "m")


OTHER = native.pack(make_weight("int4", N, K, group=128))
WHEN_COMPILED = {"static": lambda: model([6, K], damaged()), "dynamic": lambda: model([-1, -1], damaged())}
WHEN_RUN: dict[str, tuple[ov.Model, list[np.ndarray], str]] = {
    "inputs": (model([-1, -1]), [WIDE], "last axis of x must be 200, got x of shape [3,201]"),
    "no inputs": (model([-1, -1]), [WIDE[:, :0]], "last axis of x must be 200, got x of shape [3,0]"),
    "blob": (fed(BLOB), [X, damaged()], "SPW1 blob"),
    "header": (fed(BLOB), [X, without_magic()], "magic"),
    "dynamic header": (fed(BLOB, dynamic=True), [X, without_magic()], "magic"),
    "dynamic blob": (fed(BLOB, dynamic=True), [X, damaged()], "SPW1 blob"),
    "no blob": (fed(BLOB, dynamic=True), [X, BLOB[:0]], "only 0 bytes"),
    "bf16": (fed(BLOB, bf16=True), [X, damaged()], "SPW1 blob"),
    "second blob": (fed(BLOB, BLOB), [X, BLOB, damaged()], "SPW1 blob"),
    "groups": (fed(BLOB, OTHER), [X, BLOB, OTHER], "different groups"),
}


def three_rounds(config: dict[str, Any]) -> None:
    """For each error: compile and run a model, destroy it; compile and run a good one, in the same thread.

    Destroyed, because OpenVINO would run a request again whose error it lost.
    """
    core = ov_ext.add_extension(ov.Core())
    for make in WHEN_COMPILED.values():
        for _ in range(3):
            with pytest.raises(RuntimeError, match="SparseMatMul '.*': SPW1 blob"):
                core.compile_model(make(), "CPU", config)
            assert np.array_equal(core.compile_model(model([-1, -1]), "CPU", config)(X)[0], EXPECTED)
    for name, (failing, inputs, _) in WHEN_RUN.items():
        for _ in range(3):
            compiled = core.compile_model(failing, "CPU", config)
            outputs = [y.copy() for y in compiled(inputs).values()]
            assert [y.shape for y in outputs] == [(len(inputs[0]), N)] * len(outputs), name
            assert all(np.isnan(y).all() for y in outputs), name
            del compiled
            gc.collect()
            assert np.array_equal(core.compile_model(model([-1, -1]), "CPU", config)(X)[0], EXPECTED), name
            print(name)


@pytest.mark.parametrize("one", ["CPU", "thread"])
def test_on_one_thread_the_outputs_of_a_failed_inference_are_nan(one: str) -> None:
    code = (
        "import os, sys\n"
        f"if {one == 'CPU'}: os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})\n"
        "from tests.cpu_plugin.test_errors import F32, three_rounds\n"
        f"three_rounds(F32 | {{}} if {one == 'CPU'} else F32 | {{'INFERENCE_NUM_THREADS': 1}})\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert done.stdout.split("\n") == [name for name in WHEN_RUN for _ in range(3)] + [""]
    lines = [line for line in done.stderr.splitlines() if line.startswith("ov_ext: SparseMatMul")]
    expected = [message for _, _, message in WHEN_RUN.values() for _ in range(3)]
    assert len(lines) == len(expected)
    assert all(message in line and "outputs are NaN" in line for message, line in zip(expected, lines, strict=True))


ONE_THREAD, TWO_STREAMS = {"INFERENCE_NUM_THREADS": 1}, {"NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2}
two_cpus = pytest.mark.skipif(ONE_CPU, reason="the CPU has no second core for a second stream")


@pytest.mark.parametrize("name", WHEN_RUN)
@pytest.mark.parametrize(
    "config, wait", [(ONE_THREAD, True), (TWO_STREAMS, True), pytest.param(TWO_STREAMS, False, marks=two_cpus)]
)
def test_streams_of_one_thread_report_errors(core: ov.Core, name: str, config: dict[str, Any], wait: bool) -> None:
    """Several streams, or asynchronous requests of a single one: they run in OpenVINO's own threads."""
    failing, inputs, message = WHEN_RUN[name]
    request = core.compile_model(failing, "CPU", F32 | config).create_infer_request()
    with pytest.raises(RuntimeError) as error:
        if wait:
            request.start_async(inputs)
            request.wait()
        else:
            request.infer(inputs)
    assert message in str(error.value)


def test_an_unknown_kernel_stops_compiling() -> None:
    code = (
        "from tests.cpu_plugin.test_operation import *\n"
        "ov_ext.add_extension(ov.Core()).compile_model(model([1, K]), 'CPU', {'INFERENCE_NUM_THREADS': 1})\n"
    )
    environment = os.environ | {"OV_EXT_ISA": "sse9"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "SparseMatMul '" in done.stderr and "'sse9' (OV_EXT_ISA)" in done.stderr


def test_a_valid_blob_with_other_values_needs_its_checksum(core: ov.Core, tmp_path: Path) -> None:
    """An odd bit of a weight has flipped: well formed, so it runs; found where checksums are compared."""
    weight = make_weight("bf16", N, K)
    blob = native.pack(weight)
    *_, values, _, _, _, _, _ = HEADER.unpack_from(blob)
    blob[values] ^= 4
    rotten = model([6, K], blob, kind="bf16")
    fine = model([6, K], native.pack(weight), kind="bf16")
    assert core.compile_model(rotten, "CPU", F32)(X)[0].shape == (6, N)
    try:
        ov_ext.add_extension(core, verify=True)
        ov_ext.add_extension(core)  # leaves it
        core.compile_model(fine, "CPU", F32)
        with pytest.raises(RuntimeError, match="SparseMatMul '.*checksum does not match"):
            core.compile_model(rotten, "CPU", F32)
    finally:
        ov_ext.add_extension(core, verify=False)
    core.compile_model(rotten, "CPU", F32)

    ov.save_model(rotten, tmp_path / "m.xml", compress_to_fp16=False)
    code = (
        "import sys, openvino as ov, ov_ext\n"
        "core = ov_ext.add_extension(ov.Core())\n"
        "core.compile_model(core.read_model(sys.argv[1]), 'CPU')\n"
    )
    for value in ("", "0", "1"):
        environment = os.environ | {"OV_EXT_VERIFY": value}
        command = [sys.executable, "-c", code, str(tmp_path / "m.xml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ("checksum does not match" in done.stderr) == (done.returncode != 0) == (value == "1"), done.stderr
