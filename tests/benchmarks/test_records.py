"""The records of both programs: one flat record for each combination, complete, written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import decode, ir_cache, matmul
from benchmarks.llama import TINY, RandomLlama
from benchmarks.results import write_json

SURROUNDINGS = {"threads", "openvino", "cpu", "last_level_cache_mib", "git_commit", "settings", "kernel", "precision"}
MATMUL = {"kind", "rows", "sparsity", "ours_ms", "stock_ms", "ratio", "ratio_min", "ratio_max", "gbps"}
MATMUL |= {"bandwidth_share", "bandwidth_gbps", "ours_mib", "stock_mib", "stock_dynamic_quantization_group"}
DECODE = {"variant", "kind", "sparsity", "lm_head", "ms_per_token", "ratio_to_stock", "ratio_min", "ratio_max"}
DECODE |= {"prefill_ms", "weights_mib", "resident_mib", "peak_mib", "kv_cache_precision"}


def load(path: Path) -> list[dict]:
    records = json.loads(path.read_text())
    assert isinstance(records, list)
    for record in records:
        assert all(value is None or isinstance(value, str | int | float) for value in record.values()), "not flat"
    return records


def test_matmul_writes_one_record_for_each_combination(tmp_path: Path) -> None:
    path = tmp_path / "new" / "matmul.json"
    matmul.main(["--quick", "--sparsity", "0.5", "0.7", "--rows", "1", "3", "--kinds", "int4", "--json", str(path)])
    records = load(path)
    assert [(r["kind"], r["rows"], r["sparsity"]) for r in records] == [
        ("int4", 1, 0.5),
        ("int4", 3, 0.5),
        ("int4", 1, 0.7),
        ("int4", 3, 0.7),
    ]
    for record in records:
        assert MATMUL | SURROUNDINGS <= record.keys()
        assert record["ratio_min"] <= record["ratio"] <= record["ratio_max"]
        assert record["gbps"] == pytest.approx(record["ours_mib"] * 2**20 / record["ours_ms"] / 1e6)
        assert record["ours_mib"] < record["stock_mib"]
        assert record["layer"] == "all"


def test_matmul_adds_layers_on_request(tmp_path: Path) -> None:
    path = tmp_path / "matmul.json"
    matmul.main(["--quick", "--kinds", "bf16", "int8", "--layers", "--json", str(path)])
    records = load(path)
    layers = ["all", *TINY.linears]
    assert [(r["kind"], r["layer"]) for r in records] == [(k, layer) for k in ("bf16", "int8") for layer in layers]
    for kind in ("bf16", "int8"):
        sizes = {r["layer"]: r["stock_mib"] for r in records if r["kind"] == kind}
        assert sizes.pop("all") == pytest.approx(sum(sizes.values()))


def test_decode_writes_a_record_for_each_variant(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    arguments = ["--quick", "--kinds", "int4", "--sparse-head", "--work-dir", str(tmp_path / "work")]
    decode.main([*arguments, "--json", str(path)])
    records = {record["variant"]: record for record in load(path)}
    assert list(records) == ["stock-int4", "sparse-int4", "sparse-int4+head"]
    for record in records.values():
        assert DECODE | SURROUNDINGS <= record.keys()
        assert record["ratio_min"] <= record["ratio_to_stock"] <= record["ratio_max"]
        assert 0 < record["resident_mib"] <= record["peak_mib"]
    assert records["stock-int4"]["ratio_to_stock"] == 1.0 and records["stock-int4"]["kernel"] is None
    heads = [record["lm_head"] for record in records.values()]
    assert heads == ["dense", "dense", "sparse"]
    weights = [record["weights_mib"] for record in records.values()]
    assert weights[0] > weights[1] > weights[2]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (matmul, ["--sparsity", "1"], "fraction"),
        (matmul, ["--rows", "0"], "positive"),
        (matmul, ["--kinds", "int2"], "invalid choice"),
        (decode, ["--sparsity", "-0.1"], "fraction"),
    ],
)
def test_bad_options_are_refused(program, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert message in capsys.readouterr().err


def test_models_are_built_once_and_appear_whole(tmp_path: Path) -> None:
    llama, builds = RandomLlama(TINY, "int8", 0.5), []
    first = ir_cache.model_files(llama, tmp_path, lambda: builds.append(1))
    again = ir_cache.model_files(llama, tmp_path, lambda: builds.append(1))
    assert first == again and builds == [1]
    assert first.weight_bytes["sparse"] < first.weight_bytes["stock"]
    other = ir_cache.model_files(RandomLlama(TINY, "int8", 0.6), tmp_path, lambda: builds.append(1))
    assert other.paths["stock"].parent != first.paths["stock"].parent and len(builds) == 2
    assert len(list(tmp_path.iterdir())) == 2

    class Interrupted(RandomLlama):
        def head(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ir_cache.model_files(Interrupted(TINY, "int8", 0.7), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_keeps_the_old_records(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    write_json(path, [{"kind": "int4"}])
    with pytest.raises(TypeError):
        write_json(path, [{"kind": object()}])
    assert json.loads(path.read_text()) == [{"kind": "int4"}]
    assert list(tmp_path.iterdir()) == [path]
