"""The engines of linear layers compute the same network from the same weights, and notice when they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ov_ext
from benchmarks.arms import Settings, UnfairComparison, candidates
from benchmarks.check import WrongResult
from benchmarks.comparison import OURS, STOCK
from benchmarks.linears import Linears, OnnxLinears, OpenVinoLinears, TorchLinears
from benchmarks.llama import ALL, LlamaShape, RandomLlama
from benchmarks.weights import KINDS, random_weight, stock_bytes, stock_weight

pytestmark = pytest.mark.slow

ODD = LlamaShape(hidden=256, mlp=384, heads=6, kv_heads=2, head_dim=64, vocab=64, layers=2)


def bytes_of(kind: str, part: str) -> float:
    width = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128}[kind]
    per_output = {"int8": 2}.get(kind, 0)
    linears = [shape for name, shape in ODD.linears.items() if part in (ALL, name)]
    return ODD.layers * sum(n * k * width + n * per_output for n, k in linears)


@pytest.mark.parametrize("part", [ALL, "down_proj"])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_openvino_passes_the_check(kind: str, rows: int, part: str) -> None:
    llama = RandomLlama(ODD, kind, 0.5)
    stock, ours = (OpenVinoLinears(llama, part, Settings(threads=1), packed) for packed in (False, True))
    stock.check(rows)
    ours.check(rows)
    assert stock.weight_bytes == bytes_of(kind, part) > ours.weight_bytes
    count = ODD.layers * sum(n * k for name, (n, k) in ODD.linears.items() if part in (ALL, name))
    assert stock.about()["weight_count"] == count
    assert len(ours.seconds(rows, 2)) == 2


@pytest.mark.parametrize("part", [ALL, "q_proj"])
@pytest.mark.parametrize(("make", "kind"), [(TorchLinears, "bf16"), (OnnxLinears, "int4")])
def test_peers_pass_the_check(make: type, kind: str, part: str) -> None:
    engine = make(RandomLlama(ODD, kind, 0.5), part, 1)
    engine.check(1)
    engine.check(33)
    # ONNX Runtime's scales are f32: two bytes more for each group of 128.
    extra = bytes_of("int4", part) - bytes_of("int4", part) / (0.5 + 2 / 128) * 0.5 if kind == "int4" else 0
    assert engine.weight_bytes == bytes_of(kind, part) + extra


class Spoiled(Linears):
    """Right but for one thing."""

    def __init__(self, spoil) -> None:
        super().__init__(RandomLlama(ODD, "bf16", 0.5), ALL)
        self.right = OpenVinoLinears(self.llama, ALL, Settings(threads=1), False)
        self.spoil = spoil

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        return self.spoil([y.copy() for y in self.right.run(x)])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda outputs: [outputs[0], outputs[2], outputs[1], *outputs[3:]],  # k and v exchanged
        lambda outputs: [outputs[0] * 0.5, *outputs[1:]],
        lambda outputs: [np.roll(y, 1, axis=1) for y in outputs],  # rows exchanged
        lambda outputs: [np.concatenate([y[:, :-1], np.zeros_like(y[:, -1:])], axis=1) for y in outputs],  # no tail
    ],
)
def test_a_wrong_engine_fails(spoil) -> None:
    Spoiled(lambda outputs: outputs).check(9)
    with pytest.raises(WrongResult, match="9 rows"):
        Spoiled(spoil).check(9)


def test_missing_output_fails() -> None:
    with pytest.raises(ValueError):
        Spoiled(lambda outputs: outputs[:-1]).check(2)


def test_stock_layers_must_run_compressed() -> None:
    engine = OpenVinoLinears(RandomLlama(ODD, "int8", 0.5), ALL, Settings(threads=1), True)
    engine._packed = False  # as if stock had turned out to be something else
    with pytest.raises(UnfairComparison, match="something else"):
        engine.check(1)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_bytes_are_those_of_the_constants(kind: str) -> None:
    weight = random_weight(kind, 200, 384, 0.5, np.random.default_rng(1))
    pending, sizes = [stock_weight(weight).get_node()], []
    while pending:
        node = pending.pop()
        is_weight = node.get_type_name() == "Constant" and node.get_element_type().get_type_name() != "i64"
        sizes += [node.get_byte_size()] if is_weight else []
        pending += [port.get_node() for port in node.input_values()]
    assert sum(sizes) == stock_bytes(kind, 200, 384)


def test_settings_to_try() -> None:
    base = Settings(threads=2)
    assert candidates(base, "bf16", stock=True) == [base]
    tried = [s.properties() for s in candidates(base, "int4", stock=True)]
    assert all(s["INFERENCE_NUM_THREADS"] == "2" for s in tried)
    assert "INFERENCE_PRECISION_HINT" not in tried[0] and tried[-1]["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "128"
    names = [s.name for s in candidates(base, "int4", stock=True)]
    assert len(set(names)) == len(names) and names[0] == "default"
    ours = candidates(Settings(precision="f32"), "int8", stock=False)
    assert [s.name for s in ours] == ["f32"]  # what the user asked for, only
    assert candidates(base, "int8", stock=False) == candidates(base, "int8", stock=True)[:-1]


@pytest.mark.parametrize("isa", ["avx2", "avx2_vnni", "avx512_core", "avx512_core_vnni"])
def test_a_capped_run_uses_the_older_kernels(isa: str, tmp_path: Path) -> None:
    """In a process of its own: the cap counts before the first use of the CPU device."""
    if isa not in ov_ext.cpu_info()["kernels"]:
        pytest.skip(f"this CPU has no {isa}")
    path = tmp_path / "matmul.json"
    options = ["--quick", "--isa", isa, "--rows", "3", "--kinds", "bf16", "--json", str(path)]
    subprocess.run([sys.executable, "-m", "benchmarks.matmul", *options], check=True, capture_output=True)
    records = [r for r in json.loads(path.read_text()) if r["engine"] in (STOCK, OURS)]
    assert {r["kernel"] for r in records} == {isa} and {r["precision"] for r in records} == {"f32"}
    assert {r["kind"] for r in records} == {"bf16", "int4"}  # stock INT4 takes part beside every kind
