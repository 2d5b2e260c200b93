"""The extension: found, matched with OpenVINO, explained when absent; no torch needed; portable between processes."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

import ov_ext
from ov_ext import extension, runtime
from tests.ov_ext.ir_forms import Form, build

FORM = Form("i4", 128, bias="f32")
X = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)


def packed() -> ov.Model:
    return ov_ext.pack_sparse_weights(build(FORM).model, ov_ext.SparsePolicy(min_weights=0, max_growth=999))[0]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], check=False
    )


def test_versions_must_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "built_for", lambda: "2025.9.9-1-abc")
    with pytest.raises(
        ov_ext.ExtensionUnavailableError, match=r"built for OpenVINO 2025\.9\.9.*Install openvino==2025\.9\.9"
    ):
        ov_ext.add_extension(ov.Core())
    monkeypatch.setattr(extension, "built_for", lambda: ov.get_version().split("-")[0] + "-another-commit")
    assert ov_ext.extension_path().is_file()  # a rebuild of the same release is the same interface


@pytest.mark.parametrize("what", ["_LIBRARY", "built_for"])
def test_a_missing_build_is_explained(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(extension, what, "no_such_library.so" if what == "_LIBRARY" else lambda: None)
    for use in (ov_ext.extension_path, ov_ext.cpu_info, packed):
        with pytest.raises(ov_ext.ExtensionUnavailableError, match="pip install --no-deps -e"):
            use()


def test_adding_twice_is_harmless() -> None:
    core = ov.Core()
    assert ov_ext.add_extension(ov_ext.add_extension(core)) is core
    assert core.compile_model(packed(), "CPU")(X)[0].shape == (4, 70)


def test_cpu_info() -> None:
    info = ov_ext.cpu_info()
    assert info["kernels"][-1] == "reference" and info["selected"] in info["kernels"]
    assert info["built_for"].split("-")[0] == info["openvino"].split("-")[0] and Path(info["library"]).is_file()


def test_a_model_for_a_stronger_cpu_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "this_cpu", lambda: "avx2")
    monkeypatch.setattr(runtime, "_warned_targets", set())
    model = packed()
    with caplog.at_level(logging.WARNING, "ov_ext"):
        for target, fits in (("avx512", False), ("avx512", False), ("avx2", True), ("reference", True)):
            model.set_rt_info(target, ["ov_ext", "target"])
            assert ov_ext.check_target(model) is fits
        assert ov_ext.check_target(build(FORM).model)
    (record,) = caplog.records
    assert "packed for avx512" in record.message and "avx2" in record.message


def test_this_cpu_names_the_best_kernel() -> None:
    assert ov_ext.cpu_info()["kernels"][0].startswith(runtime.this_cpu())


SERVE = """
import sys, numpy as np, openvino as ov, ov_ext
core = ov_ext.add_extension(ov.Core())
compiled = core.compile_model(core.read_model(sys.argv[1]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(sys.argv[3], compiled(np.load(sys.argv[2]))[0])
"""


def test_saved_and_loaded_in_a_fresh_process(tmp_path: Path, core: ov.Core) -> None:
    model = packed()
    here = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(X)[0]
    ov_ext.save_model(model, tmp_path / "m.xml")
    np.save(tmp_path / "x.npy", X)
    done = run(SERVE, tmp_path / "m.xml", tmp_path / "x.npy", tmp_path / "y.npy")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "y.npy"), here)


def test_without_the_extension_openvino_says_what_is_missing(tmp_path: Path) -> None:
    ov_ext.save_model(packed(), tmp_path / "m.xml")
    done = run("import sys, openvino as ov; ov.Core().read_model(sys.argv[1])", tmp_path / "m.xml")
    assert done.returncode != 0 and "SparseMatMul" in done.stderr and "ov_ext" in done.stderr


BARE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "nncf", "transformers", "optimum", "onnx", "safetensors", "openvino_genai"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import numpy as np, openvino as ov
import ov_ext, ov_ext.cli, ov_ext.decode, ov_ext.genai, ov_ext.optimum
[getattr(ov_ext, name) for name in ov_ext.__all__]
from tests.ov_ext.ir_forms import Form, build
policy = ov_ext.SparsePolicy(min_weights=0, max_growth=999)
model, report = ov_ext.pack_sparse_weights(build(Form("i4", 128)).model, policy)
assert report.layers[0].replaced and str(report)
assert ov_ext.convert_model(model) is model
ov_ext.add_extension(ov.Core()).compile_model(model, "CPU")(np.zeros((1, 256), np.float32))
assert "MatMul" in [node.get_type_name() for node in ov_ext.unpack_sparse_weights(model).get_ops()]
"""


def test_a_serving_container_needs_no_torch() -> None:
    done = run(BARE)
    assert done.returncode == 0, done.stderr


def test_model_cache(tmp_path: Path) -> None:
    ov_ext.save_model(packed(), tmp_path / "m.xml")
    results, cached = [], []
    for _ in range(2):
        core = ov_ext.add_extension(ov.Core())
        core.set_property({"CACHE_DIR": str(tmp_path / "cache")})
        compiled = core.compile_model(tmp_path / "m.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        cached.append(compiled.get_property("LOADED_FROM_CACHE"))
        results.append(compiled(X)[0])
    assert cached == [False, True] and np.array_equal(*results)


@pytest.mark.parametrize("mode", [{"CACHE_MODE": "OPTIMIZE_SIZE"}, {"ENABLE_WEIGHTLESS": True}])
def test_caches_without_weights_give_the_same_results(tmp_path: Path, mode: dict[str, Any]) -> None:
    """OpenVINO 2026.4 compiles anew each time, as it reads such a cache without the operations of extensions."""
    ov_ext.save_model(packed(), tmp_path / "m.xml")
    results = []
    for cache in ({}, mode, mode):
        core = ov_ext.add_extension(ov.Core())
        if cache:
            core.set_property({"CACHE_DIR": str(tmp_path / "cache")})
        config = {"INFERENCE_PRECISION_HINT": "f32", **cache}
        results.append(core.compile_model(tmp_path / "m.xml", "CPU", config)(X)[0])
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("streams, threads", [(1, 1), (1, 2), (2, 2), (4, 4)])
def test_streams_and_concurrent_requests_give_the_same_bits(core: ov.Core, streams: int, threads: int) -> None:
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    expected = core.compile_model(packed(), "CPU", config)
    inputs = [X * (i + 1) for i in range(12)]
    truth = [expected(x)[0].copy() for x in inputs]
    compiled = core.compile_model(packed(), "CPU", config | {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads})
    queue = ov.AsyncInferQueue(compiled, 2 * streams)
    found: dict[int, np.ndarray] = {}
    queue.set_callback(lambda request, i: found.__setitem__(i, request.get_output_tensor().data.copy()))
    for turn in range(3):
        for i, x in enumerate(inputs):
            queue.start_async([x], 100 * turn + i)
    queue.wait_all()
    assert len(found) == 36 and all(np.array_equal(y, truth[i % 100]) for i, y in found.items())


def test_bf16_activations(core: ov.Core) -> None:
    """OpenVINO's default precision on CPUs with bf16: the operation sits between bf16 layers and stays close to f32."""
    built = build(FORM)
    expected = X @ built.weight.T + built.bias
    found = core.compile_model(packed(), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})(X)[0]
    # Activations: 8 bits per group of 128 (1/254 of the group's peak) and bf16 (2^-8) at both ends.
    peak = np.abs(X).reshape(4, 2, 128).max(axis=2).repeat(128, axis=1)
    bound = (peak / 254 + np.abs(X) * 2.0**-8) @ np.abs(built.weight).T + np.abs(expected) * 2.0**-7 + 1e-3
    assert (np.abs(found - expected) <= bound).all()


def test_saving_is_exact_and_leaves_mapped_files_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NAME.xml"):
        ov_ext.save_model(packed(), tmp_path / "m.bin")
    model = build(Form("f32")).model
    ov_ext.save_model(model, tmp_path / "m.xml")
    read = ov.Core().read_model(tmp_path / "m.xml")
    ov_ext.save_model(packed(), tmp_path / "m.xml")  # over the file that `read` still maps
    weight = next(node for node in read.get_ops() if node.get_friendly_name() == "weight")
    assert weight.get_output_element_type(0) == ov.Type.f32
    assert np.array_equal(weight.get_data(), build(Form("f32")).weight.astype(np.float32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml"]
