"""The records of both programs: one flat record for each combination, complete, written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as everything
from benchmarks import decode, drift, ir_cache, matmul, prefill
from benchmarks.arms import Settings
from benchmarks.comparison import OURS, STOCK
from benchmarks.llama import TINY, RandomLlama
from benchmarks.results import write_json

pytestmark = pytest.mark.slow

SURROUNDINGS = {"threads", "openvino", "cpu", "last_level_cache_mib", "git_commit", "settings", "kernel"}
EVERY = {"engine", "kind", "weights", "sparsity", "setting", "fastest", "beside", "rows"}
TIMED = {"ms", "ms_min", "ms_max", "ratio", "ratio_min", "ratio_max", "ratio_int4", "gbps", "weights_mib"}
TIMED |= {"bandwidth_share", "bandwidth_gbps", "bandwidth_min", "bandwidth_max", "rounds", "calls"}
DECODE = {"tokens_per_s", "prefill_ms", "prefill_ratio", "prompt_tokens", "resident_mib", "peak_mib"}


def load(path: Path) -> list[dict]:
    records = json.loads(path.read_text())
    assert isinstance(records, list)
    for record in records:
        assert all(value is None or isinstance(value, str | int | float) for value in record.values()), "not flat"
    return records


def timed(records: list[dict]) -> list[dict]:
    """Engines that are installed; the others have a row that says so."""
    for record in records:
        assert EVERY | SURROUNDINGS <= record.keys()
        assert ("ms" in record) != ("installed" in record["setting"] or "crashed" in record["setting"])
    return [record for record in records if "ms" in record]


def test_matmul_writes_a_record_for_each_engine_and_setting(tmp_path: Path) -> None:
    path = tmp_path / "new" / "matmul.json"
    matmul.main(["--quick", "--sparsity", "0.5", "0", "--rows", "1", "3", "--kinds", "int4", "--json", str(path)])
    records = load(path)
    assert {record["engine"] for record in records} == {STOCK, OURS, "ONNX Runtime"}
    assert len({(r["engine"], r["sparsity"], r["setting"], r["rows"]) for r in records}) == len(records)
    for rows in (1, 3):
        best = [r for r in timed(records) if r["fastest"] and r["rows"] == rows]
        ours = {r["sparsity"]: r for r in best if r["engine"] == OURS}
        [stock] = [r for r in best if r["engine"] == STOCK]
        assert list(ours) == [0.5, 0.0]
        assert ours[0.5]["weights_mib"] < stock["weights_mib"] < ours[0.0]["weights_mib"] * 1.1
        assert stock["ratio"] == 1.0
    for record in timed(records):
        assert TIMED <= record.keys() and record["layer"] == "all"
        assert record["ratio_min"] <= record["ratio"] <= record["ratio_max"]
        assert record["ms_min"] <= record["ms"] <= record["ms_max"]
        assert record["gbps"] == pytest.approx(record["weights_mib"] * 2**20 / record["ms"] / 1e6)
        assert record["weights_per_ns"] == pytest.approx(record["weight_count"] * record["rows"] / record["ms"] / 1e6)


def test_matmul_adds_layers_on_request(tmp_path: Path) -> None:
    path = tmp_path / "matmul.json"
    matmul.main(["--quick", "--kinds", "int4", "--precision", "f32", "--layers", "--json", str(path)])
    stock = [r for r in load(path) if r["engine"] == STOCK and r["setting"] == "f32"]
    assert [r["layer"] for r in stock] == ["all", *TINY.linears]
    sizes = {r["layer"]: r["weights_mib"] for r in stock}
    assert sizes.pop("all") == pytest.approx(sum(sizes.values()))


@pytest.mark.parametrize(("kind", "peers"), [("bf16", ["PyTorch"]), ("int8", []), ("int4", ["ONNX Runtime"])])
def test_every_kind_races_with_stock_int4_and_its_peers(kind: str, peers: list[str]) -> None:
    entrants = matmul.linear_entrants(TINY, kind, [0.5, 0.9], "all", Settings(threads=1), seed=0)
    groups = list(dict.fromkeys(entrant.group for entrant in entrants))
    expected = [(STOCK, kind, 0.5), (OURS, kind, 0.5), (OURS, kind, 0.9), *((peer, kind, 0.5) for peer in peers)]
    assert groups == expected + ([(STOCK, "int4", 0.5)] if kind != "int4" else [])
    assert len(set(entrants)) == len(entrants)


def test_decode_writes_a_record_for_each_engine(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    arguments = ["--quick", "--kinds", "int4", "--sparse-head", "--work-dir", str(tmp_path / "work")]
    decode.main([*arguments, "--json", str(path)])
    records = load(path)
    best = {record["engine"]: record for record in timed(records) if record["fastest"]}
    assert {STOCK, OURS} <= best.keys()
    assert "llama.cpp" in {record["engine"] for record in records}
    for record in best.values():
        assert TIMED | DECODE <= record.keys()
        assert record["ratio_min"] <= record["ratio"] <= record["ratio_max"]
        assert 0 < record["resident_mib"] <= record["peak_mib"]
        assert record["tokens_per_s"] == pytest.approx(1e3 / record["ms"])
    assert best[STOCK]["ratio"] == 1.0
    assert best[STOCK]["weights_mib"] > best[OURS]["weights_mib"]


def test_prefill_adds_memory_to_speed(tmp_path: Path) -> None:
    path = tmp_path / "prefill.json"
    arguments = ["--quick", "--kinds", "int8", "--rows", "40", "--work-dir", str(tmp_path / "work")]
    prefill.main([*arguments, "--json", str(path)])
    records = load(path)
    assert {r["rows"] for r in records if "ratio" in r} == {40}
    stock, ours = (r for r in records if r.get("what") == "memory")
    assert (stock["engine"], ours["engine"]) == (STOCK, OURS) and SURROUNDINGS <= ours.keys()
    for record in (stock, ours):
        growth = record["resident_anonymous_mib"] - record["resident_anonymous_before_mib"]
        assert record["growth_mib"] == pytest.approx(growth) and record["prompt_tokens"] == 40
    assert ours["growth_over_stock_mib"] == pytest.approx(ours["growth_mib"] - stock["growth_mib"])


def test_drift_is_a_slope_after_the_tenth_generation(tmp_path: Path) -> None:
    noise = [5.0 * i for i in range(10)]
    assert drift.slope([*noise, *(100 + 0.5 * i for i in range(20))]) == pytest.approx(0.5)
    path = tmp_path / "drift.json"
    arguments = ["--quick", "--kinds", "int4", "--generations", "13", "--tokens", "2", "--arms", "stock", "sparse"]
    drift.main([*arguments, "--work-dir", str(tmp_path / "work"), "--json", str(path)])
    stock, ours = load(path)
    assert (stock["engine"], ours["engine"]) == (STOCK, OURS)
    assert ours["generations"] == 13 and {"slope_mib", "anonymous_slope_mib", "last_mib"} | SURROUNDINGS <= ours.keys()


def test_everything_in_one_table_with_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    everything.main(["--quick", "--kinds", "int4", "--out", str(out), "--work-dir", str(tmp_path / "work")])
    records = load(out / "bench.json")
    assert {record["what"] for record in records} == {"linear layers", "whole model"}
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG") and (out / "roofline.png").stat().st_size > 20000
    assert {path.name for path in out.iterdir()} == {"bench.json", "linears.json", "roofline.png"}
    printed = capsys.readouterr().out
    assert printed.count("┏") == 1  # one table
    for text in ("ONNX Runtime", "llama.cpp", "G weights a second", "64 tokens at a time"):
        assert text in printed


def test_findings_follow_from_the_records() -> None:
    def record(rows: int, sparsity: float, ms: float, ratio: float) -> dict:
        fields = {"engine": OURS, "kind": "int4", "beside": "int4", "fastest": True, "weights_per_ns": 60 / ms}
        return fields | {"rows": rows, "sparsity": sparsity, "ms": ms, "ratio": ratio}

    records = [record(1, 0.0, 4, 0.9), record(1, 0.5, 3, 1.2), record(1, 0.9, 2, 1.8)]
    records += [record(64, 0.0, 4, 0.9), record(64, 0.5, 5, 0.8), record(64, 0.9, 5, 0.7)]
    rate, one, many = everything.findings(records)
    assert rate.endswith("15 at 0%, 20 at 50%, 30 at 90%.")
    assert "1 token at a time: faster than stock at 50% zeros and more, not below" in one
    assert "dense kernel at every measured share" in one
    assert "64 tokens at a time: faster than stock at no measured share" in many
    assert "dense kernel at no measured share" in many


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (matmul, ["--sparsity", "1"], "fraction"),
        (matmul, ["--rows", "0"], "positive"),
        (matmul, ["--kinds", "int2"], "invalid choice"),
        (decode, ["--sparsity", "-0.1"], "fraction"),
        (drift, ["--generations", "11"], "at least 12"),
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
