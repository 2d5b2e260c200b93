"""What points are judged by: counts by hand, OpenVINO's latency, constraints as texts, tables of results."""

import csv

import nncf
import numpy as np
import pytest
import torch
from torch import nn

from nncf_ext import Measured, Objective, SearchSpace, latency, macs, parameter_count, search, weight_bytes
from nncf_ext.exploration import openvino_latency
from nncf_ext.exploration.constraints import Constraint, parse_constraints
from nncf_ext.exploration.openvino_latency import signature
from tests.nncf_ext.searches import ACCURACY, COST, accuracy, network

SIZES = {"a": [64, 16, 4], "b": [64, 16, 4]}


class Layers:
    """A convolution and two linear layers whose outputs can be cut, on a batch of 3 images of 4x5."""

    def __init__(self, sizes=SIZES) -> None:
        self.space = SearchSpace(sizes)
        self.active = self.space.minimal()
        self.example_input = torch.randn(3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
        self.extracted = 0

    def activate(self, point) -> None:
        self.active = self.space.check(point)

    def extract(self, point):
        self.extracted += 1
        a, b = self.space.check(point).values()
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(40, a), nn.ReLU(), nn.Linear(a, b)
        )


def test_counts_by_hand():
    net = Layers()
    report = search(net, [ACCURACY_OF_SIZES, macs(), parameter_count(), weight_bytes()], sampler="random", budget=9)
    assert len(report.evaluations) == 9 and net.active == net.space.minimal()
    for each in report.evaluations:
        a, b = each.point.values()
        assert each.values["macs"] == 3 * (20 * 9 * 2 + 40 * a + a * b)
        assert each.values["parameters"] == 18 + 2 + 4 + 40 * a + a + a * b + b
        assert each.values["bytes"] == 4 * (each.values["parameters"] + 4) + 8  # running statistics, and their counter
    assert report.pick(macs="<=60%").values["macs"] <= 0.6 * 3 * (360 + 2560 + 4096)


ACCURACY_OF_SIZES = Objective("size", lambda point: float(sum(point.values())))


def test_attention_is_counted():
    class Attention(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    net = Layers()
    net.extract = lambda point: Attention()
    example = (torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 5, 8))
    report = search(net, [macs(example)], sampler="heuristic")
    assert report.chosen.values["macs"] == 2 * (7 * 8 * 5 + 7 * 5 * 8)


def test_an_example_is_needed():
    for objective in (macs(), latency("CPU")):
        with pytest.raises(nncf.ValidationError, match=r"runs the network: give it an example_input"):
            search(network(), [objective])


# Latency


@pytest.fixture
def large() -> Layers:
    return Layers({"a": [2048, 2000, 8], "b": [1024, 8]})


@pytest.mark.slow
def test_latency_is_that_of_the_extracted_network(large):
    report = search(
        large, [latency("CPU", config={"INFERENCE_NUM_THREADS": 1}, rounds=5), ACCURACY_OF_SIZES],
        sampler="random", budget=6,
    )  # fmt: skip
    found = {tuple(each.point.values()): each for each in report.evaluations}
    # 2 million multiplications against hardly any.
    assert found[8, 8].values["latency"] < 0.5 * found[2048, 1024].values["latency"]
    assert all(each.values["latency"] > 0 and each.spreads["latency"] >= 0 for each in report.evaluations)
    assert " ± " in str(report)
    assert report.to_dict()["evaluations"][0]["spreads"].keys() == {"latency"}


@pytest.mark.slow
def test_the_table_says_by_how_much_it_is_off(large, monkeypatch):
    monkeypatch.setattr(openvino_latency, "_FIRST", 2)
    monkeypatch.setattr(openvino_latency, "_EVERY", 3)
    objective = latency("CPU", config={"INFERENCE_NUM_THREADS": 1}, rounds=5, table=True)
    report = search(large, [objective, ACCURACY_OF_SIZES], sampler="random", budget=6)
    (note,) = (line for line in report.notes if line.startswith("latency: 3 of 6 networks predicted from "))
    assert "1 others, timed whole to check, were off by" in note
    assert note.splitlines()[0] in " ".join(str(report).split())
    assert all(each.values["latency"] > 0 for each in report.evaluations)


def test_networks_of_the_same_shapes_are_timed_once(monkeypatch):
    import openvino

    net = Layers()
    bound = latency("CPU", rounds=3).bind(net)
    compiled = []
    original = openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core, "compile_model", lambda self, *given: compiled.append(given) or original(self, *given)
    )
    one = bound({"a": 16, "b": 4})
    assert bound({"a": 16, "b": 4}) == one and len(compiled) == 2  # itself and the full one
    assert bound({"a": 4, "b": 16}) > 0 and len(compiled) == 3
    graphs = [openvino.convert_model(net.extract(net.space.maximal()), example_input=net.example_input) for _ in "ab"]
    assert signature(graphs[0]) == signature(graphs[1]), "weights make no difference"
    assert signature(graphs[0]) != signature(
        openvino.convert_model(
            nn.Sequential(net.extract(net.space.maximal()), nn.ReLU()), example_input=net.example_input
        )
    )


def test_a_busy_machine_is_said(monkeypatch, caplog):
    """Turns of a clock that jumps."""
    timer = openvino_latency._Timer(Layers(), "CPU", None, {}, None, 5)
    timer._baseline = 2.0
    steady = timer._against_reference(lambda: 1.0, lambda: 4.0)
    assert (steady, steady.spread) == (0.5, 0.0) and timer.note() is None
    jumps = iter([1.0, 2.0, 3.0] * 50)
    timer._found["one"] = timer._against_reference(lambda: next(jumps), lambda: 4.0)
    assert timer._found["one"].spread > 0.1 and "is busy" in caplog.text
    assert "of 1 of 1 networks differ by more than 10%" in timer.note()


def test_conversions_and_devices(tmp_path):
    with pytest.raises(nncf.ValidationError, match=r"no device 'ABACUS' here; there are \['CPU'"):
        search(Layers(), [latency("ABACUS")])
    with pytest.raises(nncf.ValidationError, match="at least 3 rounds; got 2"):
        latency("CPU", rounds=2)

    def convert(model):
        raise RuntimeError("no such operation")

    with pytest.raises(nncf.UnsupportedModelError, match=r"cannot be converted.*no such operation.*convert="):
        search(Layers(), [latency("CPU", convert=convert)])
    storage = tmp_path / "search.log"
    settings = {"sampler": "heuristic", "storage": storage}
    search(Layers(), [latency("CPU", rounds=3)], **settings)
    with pytest.raises(nncf.ValidationError, match="of other conditions.*INFERENCE_NUM_THREADS"):
        search(Layers(), [latency("CPU", rounds=3, config={"INFERENCE_NUM_THREADS": 1})], **settings)


# Values and spreads


def test_spreads_are_kept(tmp_path):
    objective = Objective("loss", lambda point: Measured(-accuracy(point), 0.25), maximize=False)
    first = search(network(), [objective, COST], sampler="random", budget=4, storage=tmp_path / "search.log")
    again = search(network(), [objective, COST], sampler="random", budget=4, storage=tmp_path / "search.log")
    assert first.evaluations == again.evaluations
    assert [each.spreads for each in again.evaluations] == [{"loss": 0.25}] * 4


def test_csv(tmp_path):
    report = search(network(2), [ACCURACY, COST], sampler="random", budget=9, constraints=["cost <= 50"])
    report.to_csv(tmp_path / "points.csv")
    with (tmp_path / "points.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [*rows[0]] == ["d0", "d1", "accuracy", "cost", "front", "chosen"] and len(rows) == 9
    for row, each in zip(rows, report.evaluations, strict=True):
        assert {name: int(row[name]) for name in ("d0", "d1")} == each.point
        assert float(row["accuracy"]) == each.values["accuracy"] and float(row["cost"]) == each.values["cost"]
        assert (row["front"] == "1") == (each in report.front) and (row["chosen"] == "1") == (each == report.chosen)


# Constraints


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cost <= 60%", Constraint("cost", True, 60, True)),
        ("cost<=60", Constraint("cost", True, 60)),
        (" accuracy >= -1.5e-3 ", Constraint("accuracy", False, -0.0015)),
        ("cost >= 2.5 %", Constraint("cost", False, 2.5, True)),
    ],
)
def test_constraints_are_read(text, expected):
    assert parse_constraints([text], [ACCURACY, COST]) == (expected,)
    assert parse_constraints([str(expected)], [ACCURACY, COST]) == (expected,)


@pytest.mark.parametrize("text", ["cost", "cost < 3", "cost <= ", "cost <= 1.2.3", "<= 3", "cost == 3", "3 <= cost"])
def test_texts_that_are_no_constraints(text):
    with pytest.raises(nncf.ValidationError, match=r"NAME <= NUMBER or NAME >= NUMBER"):
        search(network(), [ACCURACY, COST], sampler="random", constraints=[text])


def test_one_text_is_no_sequence_of_them():
    with pytest.raises(nncf.ValidationError, match=r"sequence of texts; got one text 'cost <= 3'"):
        search(network(), [ACCURACY, COST], sampler="random", constraints="cost <= 3")


def test_the_nearest_points_where_none_keeps_the_constraints(tmp_path):
    report = search(network(3), [ACCURACY, COST], sampler="random", budget=27, constraints=["cost <= 20%"])
    assert report.chosen is None and report.full["cost"] == 96
    with pytest.raises(nncf.ValidationError, match=r"keeps cost <= 20%.*The nearest: accuracy .* cost 48 at d0: 16"):
        report.best  # noqa: B018
    near = report.nearest()
    assert [each.values["cost"] for each in near] == sorted(each.values["cost"] for each in report.evaluations)
    assert near[0].point == network(3).space.minimal() and len(near) == 27
    assert str(report).count("nearest") == 3 and "no point keeps cost <= 20%" in str(report)
    # Both have to be near: by the sum of the shares by which they are beyond their bounds.
    target = {"cost": "<= 40", "accuracy": ">= 4"}
    expected = min(
        report.evaluations,
        key=lambda each: max(0, each.values["cost"] / 40 - 1) + max(0, 1 - each.values["accuracy"] / 4),
    )
    assert report.nearest(**target)[0] == expected


def test_percentages_need_the_full_network(tmp_path):
    storage = tmp_path / "search.log"
    report = search(network(3), [ACCURACY], budget=2, storage=storage)
    with pytest.raises(nncf.ValidationError, match="share of the full network, which was not measured"):
        report.pick(accuracy=">= 95%")
    again = search(network(3), [ACCURACY], budget=4, storage=storage, constraints=["accuracy >= 95%"])
    assert again.evaluations[:2] == report.evaluations and again.evaluations[2].point == network(3).space.maximal()
    assert again.pick(accuracy=">= 95%").values["accuracy"] >= 0.95 * again.full["accuracy"]


def test_hypervolume_of_a_report():
    report = search(network(2), [ACCURACY, COST], sampler="random", budget=9)
    corners = np.array([[each.values["accuracy"], each.values["cost"]] for each in report.front])
    area, best = 0.0, 0.0
    for gain, price in sorted(corners.tolist(), key=lambda pair: pair[1]):
        area += max(0.0, gain - best) * (64 - price)
        best = max(best, gain)
    assert report.hypervolume(accuracy=0.0, cost=64) == pytest.approx(area)
    with pytest.raises(nncf.ValidationError, match=r"takes a reference value of each; got \['cost'\]"):
        report.hypervolume(cost=64)
