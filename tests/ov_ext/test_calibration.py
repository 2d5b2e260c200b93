"""Times are measured where they are used, believed only when they are certain, and kept for this machine alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ov_ext
from ov_ext import cli, machine
from ov_ext.sparse_weights import calibration, store, tables, trials
from ov_ext.sparse_weights.cost import CostTable, KindCosts
from ov_ext.sparse_weights.policy import SparsePolicy
from ov_ext.sparse_weights.trials import Arm
from tests.ov_ext.test_policy_report import layers

COSTS = KindCosts((1, 512), (0.5,), (10.0, 900.0), (8.0, 950.0), ((5.0, 990.0),), 0.01)
TABLE = CostTable("this one", machine.cpu_count(), {"bf16": COSTS})
F32, GROUPS = ("INFERENCE_PRECISION_HINT", "f32"), ("DYNAMIC_QUANTIZATION_GROUP_SIZE", "128")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no calibration unless a test allows it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setattr(calibration, "_given_up", set())
    return tmp_path / "cache"


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake(clock: Clock, cost: Callable[[Arm, int, int], float], seconds: float = 0.01) -> Any:
    """Arms whose times, in picoseconds, are a function of arm, rows and number of the call."""

    class Timed:
        def __init__(self, kind: str, arm: Arm, layers: int) -> None:
            self.arm, self.calls = arm, 0

        def seconds(self, rows: int) -> float:
            clock.now += seconds
            self.calls += 1
            picoseconds = cost(self.arm, rows, self.calls)
            if picoseconds == "refused":
                raise RuntimeError("no primitive")
            return float(picoseconds) * 1e-12

    return Timed


def speed(arm: Arm, rows: int, call: int) -> float:
    """Stock is fastest in f32 with groups of 128 for few rows, in f32 for many. Noise comes to all arms alike."""
    if arm.form == "stock":
        own = 30.0 if not arm.setting else 20 if arm.setting == (F32, GROUPS) or rows > 16 else 25
        own = 22.0 if arm.setting == (F32, GROUPS) and rows > 16 else own
    else:
        own = 16.0 if arm.form == "dense" else 18 - 10 * arm.zeros
    return own * rows * (1 + call % 7)


REAL_MEASURED = calibration._measured


def quiet(text: str, done: float) -> None:
    assert 0 <= done <= 1


def test_medians_of_paired_ratios_against_the_fastest_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    clock = Clock()
    costs = calibration.measure("int4", 1000, quiet, fake(clock, speed), clock)
    assert costs is not None and costs.error == 0  # the speed of the machine changed by a factor of 7, ratios did not
    stock = np.array(costs.stock)
    scale = stock[0] / 20
    np.testing.assert_allclose(stock, 20 * scale * np.array(calibration.ROWS), rtol=1e-3)
    np.testing.assert_allclose(costs.dense, 16 * scale * np.array(calibration.ROWS), rtol=1e-3)
    assert costs.zeros == (0.0, 0.5, 0.8)
    for zeros, times in zip(costs.zeros, costs.sparse, strict=True):
        np.testing.assert_allclose(times, (18 - 10 * zeros) * scale * np.array(calibration.ROWS), rtol=1e-3)


def test_settings_in_which_stock_does_not_run_are_left_out() -> None:
    clock = Clock()

    def cost(arm: Arm, rows: int, call: int) -> Any:
        return "refused" if arm.form == "stock" and arm.setting else 10.0

    costs = calibration.measure("int8", 1000, quiet, fake(clock, cost), clock)
    assert costs is not None and set(costs.stock) == {10.0}

    def never(arm: Arm, rows: int, call: int) -> Any:
        return "refused" if arm.form == "stock" else 10.0

    assert calibration.measure("int8", 1000, quiet, fake(clock, never), clock) is None


def test_noise_that_looks_like_gain_from_fewer_zeros_is_levelled() -> None:
    clock = Clock()

    def cost(arm: Arm, rows: int, call: int) -> float:
        return {0.0: 12.0, 0.5: 8.0, 0.8: 8.4}[arm.zeros] if arm.form == "sparse" else 10.0

    costs = calibration.measure("int8", 1000, quiet, fake(clock, cost), clock)
    assert costs is not None and [times[0] for times in costs.sparse] == [12.0, 8.0, 8.0]


def test_a_busy_machine_is_said_tried_again_and_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    clock, rng = Clock(), np.random.default_rng(0)
    busy = fake(clock, lambda arm, rows, call: float(rng.choice([1.0, 5.0])), 0.05)
    assert calibration.measure("int8", 100, quiet, busy, clock) is None
    again, given_up = (record.getMessage() for record in caplog.records)
    assert "busy" in again and "Measuring again" in again
    assert "too busy" in given_up and "times of another CPU" in given_up
    assert 95 < clock.now <= 105  # the time that it was given, and the round it was in


def test_a_machine_that_becomes_quiet_is_believed(caplog: pytest.LogCaptureFixture) -> None:
    clock, rng = Clock(), np.random.default_rng(0)

    def cost(arm: Arm, rows: int, call: int) -> float:
        return float(rng.choice([1.0, 5.0])) if clock.now < 60 else 2.0

    costs = calibration.measure("int8", 100, quiet, fake(clock, cost, 0.05), clock)
    assert costs is not None and costs.dense[0] == pytest.approx(2) and len(caplog.records) == 1


def test_a_machine_too_slow_for_the_time(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    assert calibration.measure("bf16", 10, quiet, fake(clock, speed, 3.0), clock) is None
    assert "no time" in caplog.text and clock.now < 20


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": float("nan")}, {"kinds": ["nf4"]}], ids=str)
def test_bad_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="seconds is a time|kinds are bf16"):
        ov_ext.calibrate(**wrong)


# The file


def test_what_is_kept_is_found_again_and_added_to() -> None:
    assert store.read() is None
    store.add(TABLE)
    assert store.read() == TABLE
    store.add(CostTable("this one", TABLE.threads, {"int4": COSTS}))
    found = store.read()
    assert found is not None and set(found.kinds) == {"bf16", "int4"}


@pytest.mark.parametrize("name, value", [("OV_EXT_ISA", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")])
def test_a_held_back_cpu_is_another_machine(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(TABLE)
    monkeypatch.setenv(name, value)
    assert store.read() is None


@pytest.mark.parametrize("function, value", [("cpu_count", 64), ("cpu_name", "another CPU")])
def test_another_cpu_or_number_of_threads_is_another_machine(
    function: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(TABLE)
    monkeypatch.setattr(machine, function, lambda: value)
    assert store.read() is None


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not json": lambda data: "{",
    "deep": lambda data: "[" * 100_000,
    "not utf-8": lambda data: b"\xff\xfe",
    "huge": lambda data: " " * (1 << 20) + "{}",
    "list": lambda data: "[]",
    "NaN": lambda data: json.dumps(data).replace("10.0", "NaN"),
    "infinite": lambda data: json.dumps(data).replace("10.0", "1e999"),
    "endless number": lambda data: json.dumps(data).replace("10.0", "1" * 10_000),
    "negative": lambda data: json.dumps(data).replace("10.0", "-10.0"),
    "another key": lambda data: json.dumps(data | {"key": data["key"] | {"cpu": "another"}}),
    "no key": lambda data: json.dumps({"table": data["table"]}),
    "another version": lambda data: json.dumps(data | {"key": data["key"] | {"version": 99}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unusable_file_is_ignored_with_one_warning(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store.add(TABLE)
    data = DAMAGES[damage](json.loads(store.path().read_text()))
    store.path().write_bytes(data if isinstance(data, bytes) else data.encode())
    assert store.read() is None and store.read() is None
    (record,) = caplog.records
    assert str(store.path()) in record.getMessage() and "ov-ext calibrate" in record.getMessage()
    store.add(TABLE)  # a new measurement takes its place
    assert store.read() == TABLE


def test_neither_a_folder_nor_a_pipe_in_its_place_does_harm(caplog: pytest.LogCaptureFixture) -> None:
    file = store.path()
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    assert store.read() is None
    file.unlink()
    file.mkdir()
    assert store.read() is None
    store.add(TABLE)
    assert "cannot be kept" in caplog.text


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    with store.alone(wait=0) as alone:
        assert alone
        store.add(TABLE)
    assert "cannot be kept" in caplog.text and store.read() is None


def test_one_measures_at_a_time() -> None:
    with store.alone(wait=0) as first, store.alone(wait=0.2) as second:
        assert first and not second
    with store.alone(wait=0) as third:
        assert third


def _adder(kind: str) -> None:
    with store.alone(wait=60):
        store.add(CostTable("this one", TABLE.threads, {kind: COSTS}))


def test_two_processes_lose_nothing() -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_adder, args=(kind,)) for kind in ("int4", "int8")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = store.read()
    assert found is not None and set(found.kinds) == {"int4", "int8"}


# Packing


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float]]:
    """Allows calibration, which is imitated; gives its calls."""
    calls = []

    def measure(kinds: list[str], seconds: float, on_progress: Any) -> CostTable:
        calls.append((list(kinds), seconds))
        table = replace(TABLE, kinds=dict.fromkeys(kinds, COSTS))
        store.add(table)
        return table

    monkeypatch.setenv("OV_EXT_CALIBRATE", "1")
    monkeypatch.setattr(calibration, "_measured", measure)
    return calls


def test_packing_measures_once_what_it_needs(measured: list[tuple[list[str], float]]) -> None:
    for _ in range(2):
        report = ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy())[1]
        assert report.layers[0].speedup == pytest.approx(2)  # 10 / 5
        assert "measured on this CPU" in report.costs and report.costs in str(report)
        assert report.before.token == pytest.approx(128 * 128 * 10e-12)  # type: ignore[union-attr]
    ((kinds, seconds),) = measured
    assert kinds == ["bf16"] and seconds <= calibration.SHORT
    assert "tokens 2.00x and prompts 0.91x as fast" in report.expectation and report.expectation in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["after"]["token"] == pytest.approx(128 * 128 * 5e-12)


def test_activations_in_floating_point_are_measured_apart(measured: list[tuple[list[str], float]]) -> None:
    store.add(replace(TABLE, kinds={"bf16": COSTS, "bf16_f32": replace(COSTS, sparse=((2.5, 990.0),))}))
    for group, speedup in ((128, 2), (0, 4)):
        report = ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy(activation_group=group))[1]
        assert report.layers[0].speedup == pytest.approx(speedup) and "quantized" not in report.costs
    assert not measured
    report = ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy(activation_group=0, target="avx512"))[1]
    assert "with quantized activations" in report.costs  # those of another CPU that nobody measured
    store.path().unlink()
    ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy(activation_group=0))
    assert [kinds for kinds, _ in measured] == [["bf16_f32"]]


def test_arms_keep_activations_as_the_entry_says() -> None:
    clock, seen = Clock(), list[tuple[str, Arm]]()

    def make(kind: str, arm: Arm, layers: int) -> Any:
        seen.append((kind, arm))
        return fake(clock, speed)(kind, arm, layers)

    for entry, group in (("int8_f32", 0), ("int8", 128)):
        seen.clear()
        assert calibration.measure(entry, clock.now + 1000, quiet, make, clock) is not None
        assert {kind for kind, _ in seen} == {"int8"}
        assert {arm.activation_group for _, arm in seen if arm.form != "stock"} == {group}


def test_what_switches_calibration_off(
    measured: list[tuple[list[str], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(TABLE)  # not even what is known is used: results are the same everywhere
    reports = [ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy(calibrate=False))[1]]
    reports.append(ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy(target="avx512"))[1])
    monkeypatch.setenv("OV_EXT_CALIBRATE", "0")
    reports.append(ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy())[1])
    assert not measured and all("built-in times of" in report.costs for report in reports)


def test_a_model_without_packable_weights_measures_nothing(measured: list[tuple[list[str], float]]) -> None:
    ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy(min_weights=1 << 20))
    assert not measured


def test_a_busy_machine_packs_with_built_in_times_and_tries_once(
    measured: list[tuple[list[str], float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure", lambda kind, deadline, on_progress: measured.append(([kind], 0)))
    monkeypatch.setattr(calibration, "_measured", REAL_MEASURED)
    for _ in range(2):
        report = ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy())[1]
        assert report.costs == f"built-in times of {tables.similar().cpu}"
    assert len(measured) == 1


def test_packing_waits_for_a_process_that_measures(measured: list[tuple[list[str], float]]) -> None:
    with store.alone(wait=0):
        packing = threading.Thread(target=lambda: ov_ext.pack_sparse_weights(layers(0.5), SparsePolicy()))
        packing.start()
        time.sleep(0.3)
        store.add(TABLE)  # what the other process found
    packing.join()
    assert not measured


# The whole


@pytest.mark.slow
def test_this_cpu() -> None:
    """Real layers, with little time: the file, the table and packing agree, whether or not the machine is busy."""
    begin = time.monotonic()
    table = ov_ext.calibrate(seconds=12, kinds=["int4"])
    assert time.monotonic() - begin < 30 and table.cpu == machine.cpu_name()
    if "int4" in table.kinds:
        costs = table.kinds["int4"]
        assert costs.rows == calibration.ROWS and costs.error <= calibration.CERTAIN
        assert costs.stock[-1] > costs.stock[0] and costs.sparse[2][0] < costs.sparse[0][0]
        found = store.read()
        assert found is not None and found.kinds == table.kinds


def test_layers_compute_the_same_in_all_forms() -> None:
    """What is timed is a product, and the same one: no form is fast because it does something else."""
    rng = np.random.default_rng(1)
    for kind in ("bf16", "int8", "int4"):
        weight = trials._layer(kind, 64, 0.5)
        assert float(weight.sparsity) == pytest.approx(0.5, abs=0.02)
        x = rng.standard_normal((1, 3, weight.shape[1]), np.float32)
        expected = x[0] @ weight.dequantize().T
        for form in ("stock", "dense", "sparse"):
            y = trials._request(weight, 1, Arm(form, 0.5, (F32,))).infer([x])[0][0]
            assert np.abs(y - expected).max() < 0.05 * np.abs(expected).max()


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(kind: str, deadline: float, on_progress: Any) -> KindCosts | None:
        return None if kind == "bf16" else COSTS

    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(calibration, "ZEROS", (0.5,))
    monkeypatch.setattr(cli, "calibrate_attention", lambda seconds: None)
    result = CliRunner().invoke(cli.app, ["calibrate", "--seconds", "5", "--report", str(tmp_path / "times.json")])
    assert result.exit_code == 1 and "bf16 could not be measured" in result.output
    assert "int8" in result.stdout and "5 (2.00)" in result.stdout and "990 (0.91)" in result.stdout
    assert json.loads((tmp_path / "times.json").read_text())["kinds"].keys() == {"int8", "int4"}
    found = store.read()
    assert found is not None and set(found.kinds) == {"int8", "int4"}
