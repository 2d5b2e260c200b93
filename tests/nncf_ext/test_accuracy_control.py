"""Forms of weights as dimensions of a search, and the one call that looks for the best within an accepted loss."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import nncf
import optuna
import pytest
import torch
from torch import Tensor, nn

import nncf_ext
from nncf_ext.algorithms.accuracy_control import catalogue, control
from nncf_ext.algorithms.accuracy_control.catalogue import Catalogue
from nncf_ext.algorithms.accuracy_control.costs import Prediction, PriceSampler
from nncf_ext.algorithms.accuracy_control.forms import WeightForm, by_size
from nncf_ext.algorithms.accuracy_control.network import FormNetwork
from nncf_ext.calibration.stream import evaluation
from nncf_ext.exploration.objectives import NetworkObjective, Objective
from nncf_ext.journal import Journal
from nncf_ext.structure.blocks import survey
from nncf_ext.weights.int4 import weight_hooks
from tests.structure_models import VOCABULARY, make

SIZES = {"hidden_size": 64, "num_hidden_layers": 2}
FEW = nncf_ext.AdvancedAccuracyControlParameters(forms=("float16", "int8", "int4", "int4-s50"))


def items(count: int = 8) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, 24))} for _ in range(count)]


def llama() -> nn.Module:
    return make("llama", **SIZES, intermediate_size=128, head_dim=16)


def network(model: nn.Module, folder: Path, parameters: Any = FEW) -> FormNetwork:
    with evaluation(model):
        journal = Journal(folder / "journal", "test", {})
        return FormNetwork(model, Catalogue(model, survey(model), items(), parameters, journal))


def logits(model: nn.Module, item: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**item, use_cache=False).logits
        return found


def divergence(dense: nn.Module, model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """What the user is promised: nats a token, over all positions of all items, in float64."""
    total = []
    for item in data:
        expected = logits(dense, item).double().log_softmax(-1)
        total.append((expected.exp() * (expected - logits(model, item).double().log_softmax(-1))).sum(-1).mean())
    return float(torch.stack(total).mean())


# Forms


@pytest.mark.parametrize(
    "text, bits",
    [("float16", 16), ("int8", 8), ("int8-s50", 5), ("int4-g64", 4.25), ("int4-g128", 4.125), ("int4-g64-s30", 4.05)],
)
def test_a_form_knows_its_bits(text: str, bits: float) -> None:
    form = WeightForm.parse(text)
    assert str(form) == text and form.size == 1000 * bits


def test_groups_of_64_go_without_saying() -> None:
    assert WeightForm.parse("int4") == WeightForm(4) == WeightForm.parse("int4-g64")


NO_FORMS = (
    "int5",
    "",
    "int8-g64",
    "int4-x3",
    "int4-s",
    "int4-g32",
    "int8-s99",
    "int4-s50-s30",
    "int4-ginf",
    "int4-g64.5",
)


@pytest.mark.parametrize("text", NO_FORMS)
def test_what_is_no_form_is_refused(text: str) -> None:
    with pytest.raises(nncf.ValidationError, match="form"):
        WeightForm.parse(text)


def test_two_forms_of_one_size_are_refused() -> None:
    with pytest.raises(nncf.ValidationError, match="both"):
        by_size([WeightForm(8), WeightForm(8, group_size=128)])


# The network


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "phi3"])
def test_what_is_extracted_computes_what_was_active(tmp_path: Path, family: str) -> None:
    sizes = {"llama": {"intermediate_size": 128, "head_dim": 16}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}}
    model = make(family, **SIZES, **sizes.get(family, {"intermediate_size": 128}))
    dense = copy.deepcopy(model)
    net = network(model, tmp_path)
    item = items(1)[0]
    call = (lambda each: each(**item).logits) if family == "bert" else (lambda each: logits(each, item))
    removed = 0
    with torch.no_grad():
        for seed in range(6):
            point = net.space.canonical(net.space.sample(Random(seed)))
            net.activate(point)
            active = call(net.model)
            small = net.extract(point)
            assert net.active == point
            assert torch.equal(call(small), active)
            removed += any(size == 0 for size in point.values())
        net.activate(net.space.maximal())
        assert torch.equal(call(net.model), call(dense))
    assert removed
    branches = ["layers.1.attention", "layers.1.mlp"]
    assert [*net.branches] == branches
    for name, tensor in dense.state_dict().items():
        assert torch.equal(net.model.state_dict()[name], tensor), name


def test_half_precision_stays(tmp_path: Path) -> None:
    model = llama().bfloat16()
    before = copy.deepcopy(model.state_dict())
    net = network(model, tmp_path)
    point, item = net.everywhere(min(net.groups["model.layers.0.mlp.down_proj"].forms)), items(1)[0]
    net.activate(point)
    active = logits(net.model, item)
    assert active.dtype == torch.bfloat16 and torch.equal(logits(net.extract(point), item), active)
    net.restore()
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_extracted_layers_have_their_forms(tmp_path: Path) -> None:
    net = network(llama(), tmp_path)
    sizes = sorted(by_size(map(WeightForm.parse, FEW.forms)))
    for size in sizes:
        form = net.groups["model.layers.0.mlp.down_proj"].forms[size]
        small = net.extract(net.everywhere(size))
        hooks = weight_hooks(small)
        for name in survey(llama()).targets:
            stored = small.get_parameter(f"{name}.weight")
            assert stored.dtype == {16: torch.float32, 8: torch.int8, 4: torch.uint8}[form.bits]
            weight = stored if form.bits == 16 else hooks[f"{name}.weight"](stored)
            zeros = float((weight == 0).float().mean())
            assert zeros >= form.sparsity - 0.01
            for row in weight[:4] if form.bits == 8 else ():
                codes = row.double() / (row.abs().max().double() / 127)
                assert float((codes - codes.round()).abs().max()) < 0.1  # on a grid of 127 steps, but for float16
        if form.bits < 16:
            assert nncf_ext.compression_report(small).weights[1].precision == f"int{form.bits}"


def test_layers_that_read_the_same_share_a_form(tmp_path: Path) -> None:
    net = network(llama(), tmp_path)
    assert net.groups["model.layers.0.self_attn.q_proj"].layers == tuple(
        f"model.layers.0.self_attn.{each}_proj" for each in "qkv"
    )
    assert net.groups["model.layers.1.mlp.gate_proj"].layers == (
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    )
    assert len(net.groups) == 8 and [*net.branches] == ["layers.1.attention", "layers.1.mlp"]


def test_a_layer_that_no_group_divides_has_the_other_forms(tmp_path: Path) -> None:
    net = network(make("llama", **SIZES, intermediate_size=40, head_dim=16), tmp_path)
    forms = [str(form) for form in net.groups["model.layers.0.mlp.down_proj"].forms.values()]
    assert forms == ["float16", "int8"]
    point = net.everywhere(min(net.groups["model.layers.0.mlp.gate_proj"].forms))
    assert point["model.layers.0.mlp.down_proj"] == WeightForm(8).size


def test_errors_are_those_of_the_outputs(tmp_path: Path) -> None:
    model, name = llama(), "model.layers.0.mlp.down_proj"
    net = network(model, tmp_path)
    read: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    for item in items():
        logits(model, item)
    hook.remove()
    inputs = torch.cat([each.flatten(0, 1) for each in read]).double()
    weight = model.get_parameter(f"{name}.weight").detach().double()
    for size in [*net.groups[name].forms][1:]:
        entry = net.catalogue.entry(name, size)
        lost = torch.linalg.norm(inputs @ (weight - entry.dense().double()).T) / torch.linalg.norm(inputs @ weight.T)
        assert entry.error == pytest.approx(float(lost), rel=0.1, abs=1e-6)  # on a sample of the tokens


def test_finished_forms_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = network(llama(), tmp_path)
    monkeypatch.setattr(Catalogue, "_made", lambda *_: pytest.fail("made again"))
    again = network(llama(), tmp_path)
    assert again.space.dimensions == first.space.dimensions
    for group in first.groups.values():
        for size in group.forms:
            assert again.catalogue.error(group, size) == first.catalogue.error(group, size)


# Predictions


@pytest.fixture(scope="module")
def prediction(tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    parameters = replace(FEW, forms=("float16", "int8", "int4"))
    net = network(llama(), tmp_path_factory.mktemp("forms"), parameters)
    wholes = {16000: 10.0, 8000: 7.0, 4250: 5.0}
    prices = {name: 1.0 + place for place, name in enumerate(net.groups)}
    return Prediction(net, wholes, prices, {name: 0.02 * (1 + place) for place, name in enumerate(net.branches)})


def every_point(net: FormNetwork) -> Iterator[dict[str, int]]:
    for sizes in itertools.product(*net.space.dimensions.values()):
        yield net.space.canonical(dict(zip(net.space.dimensions, sizes, strict=True)))


def test_one_form_everywhere_is_predicted_to_cost_what_it_did(prediction: Prediction) -> None:
    for size, whole in prediction.wholes.items():
        assert prediction.cost(prediction.net.everywhere(size)) == pytest.approx(whole)


@pytest.mark.parametrize("loss", [0.0, 1e-4, 3e-3, 0.02, 0.03, 0.2])
def test_no_point_within_a_loss_is_cheaper(prediction: Prediction, loss: float) -> None:
    found = prediction.cheapest(loss)
    assert float(prediction.losses(found).sum()) <= loss + 1e-9
    within = [point for point in every_point(prediction.net) if float(prediction.losses(point).sum()) <= loss]
    assert prediction.cost(found) <= min(map(prediction.cost, within)) + 1e-4


def test_prices_are_learned_from_whole_losses(prediction: Prediction) -> None:
    """Where a group loses four times as much as measured alone, the next points spare it."""
    net = prediction.net
    sampler = PriceSampler(prediction, (1e-4, 0.1), seed=0)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    dear, names = 3, [*net.space.dimensions]
    distributions: dict[str, Any] = {
        name: optuna.distributions.IntDistribution(0, len(sizes) - 1) for name, sizes in net.space.dimensions.items()
    }
    seen = set()
    for number in range(40):
        trial = study.ask(distributions)
        places = tuple(trial.params[name] for name in names)
        assert number == 0 or places not in seen
        seen.add(places)
        losses = prediction.losses(net.space.decode(places))
        losses[dear] *= 4
        study.tell(trial, [float(losses.sum()), prediction.cost(net.space.decode(places))])
    points = [net.space.decode([each.params[name] for name in names]) for each in study.get_trials()]
    mean, _ = prediction.learned(points, [each.values[0] for each in study.get_trials()])
    assert mean[dear] > 2.5 and abs(mean - 1).argmax() == dear


# The one call


def run(model: nn.Module, **options: Any) -> Any:
    settings: dict[str, Any] = {"objective": nncf_ext.packed_bytes(), "budget": 12, "advanced_parameters": FEW}
    return nncf_ext.compress_with_accuracy_control(model, nncf.Dataset(items(12)), **{**settings, **options})


@pytest.fixture(scope="module")
def found() -> tuple[nn.Module, Any]:
    model = llama()
    return model, run(model, max_drop=0.05)


def test_the_chosen_keeps_to_the_limit_and_nothing_cheaper_does(found: tuple[nn.Module, Any]) -> None:
    model, result = found
    report = result.report
    assert divergence(model, result.model, items(12)[9:]) == pytest.approx(report.chosen.drop, rel=1e-3)
    assert report.chosen.drop <= 0.05
    assert all(each.drop > 0.05 for each in report.candidates if each.cost < report.chosen.cost)
    singles = [each.cost for each in report.candidates if each.single and each.drop <= 0.05]
    assert report.chosen.cost < min(singles)
    assert not report.chosen.single


def test_the_plan_says_what_the_model_is(found: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, result = found
    hooks = weight_hooks(result.model)
    for layer, form in result.plan.forms.items():
        if not any(layer.startswith(f"model.{each}") for each in result.plan.removed):
            assert (f"{layer}.weight" in hooks) == (form != "float16")
    result.plan.save(tmp_path / "plan.json")
    assert nncf_ext.FormPlan.load(tmp_path / "plan.json") == result.plan
    (tmp_path / "plan.json").write_text('{"version": 7, "forms": {}, "removed": []}')
    with pytest.raises(nncf.ValidationError, match="version 7"):
        nncf_ext.FormPlan.load(tmp_path / "plan.json")


def test_report_shows_a_table_and_a_picture(found: tuple[nn.Module, Any], tmp_path: Path) -> None:
    _, result = found
    text = str(result.report)
    assert "chosen" in text and "int8 everywhere" in text and "0.05 nats" in text
    result.report.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
    front = result.report.front
    assert all(a.cost < b.cost and a.drop > b.drop for a, b in itertools.pairwise(front))
    assert result.report.to_dict()["chosen"] == result.report.chosen.name


def test_model_is_saved_and_read_again(found: tuple[nn.Module, Any], tmp_path: Path) -> None:
    _, result = found
    nncf_ext.save_pretrained(result.model, tmp_path / "model")
    again = nncf_ext.load_pretrained(tmp_path / "model")
    item = items(1)[0]
    assert torch.equal(logits(again, item), logits(result.model, item))


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = llama(), 0
    before = copy.deepcopy(model.state_dict())
    whole = run(llama(), max_drop=0.05, storage=tmp_path / "whole")
    original: Callable[..., Any] = control.Divergence.__call__

    def counted(self: Any, changed: nn.Module) -> Any:
        nonlocal calls
        calls += 1
        if calls == 28:
            raise KeyboardInterrupt
        return original(self, changed)

    monkeypatch.setattr(control.Divergence, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, max_drop=0.05, storage=tmp_path / "cut")
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    again = run(model, max_drop=0.05, storage=tmp_path / "cut")
    assert again.report.to_dict() == whole.report.to_dict()
    calls = 29
    run(model, max_drop=0.05, storage=tmp_path / "cut")
    assert calls == 29, "nothing is judged twice"


@pytest.mark.parametrize("stop", [5, 60])
def test_the_model_is_dense_again_wherever_it_was_interrupted(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While forms are made, and between two layers of a combination."""
    original, model, calls = catalogue.Entry.dense, llama(), 0
    before = copy.deepcopy(model.state_dict())

    def counted(self: catalogue.Entry) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(catalogue.Entry, "dense", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, max_drop=0.05)
    assert calls == stop
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_another_objective_on_the_same_storage_measures_anew(tmp_path: Path) -> None:
    def bits(factor: float) -> NetworkObjective:
        def make(net: Any) -> Objective:
            return Objective("bits", lambda point: factor * sum(point.values()), False, conditions=f"factor {factor}")

        return NetworkObjective("bits", make)

    first, second = (run(llama(), max_drop=0.05, budget=2, storage=tmp_path, objective=bits(each)) for each in (1, 2))
    costs = [{each.name: each.cost for each in one.report.candidates if each.single} for one in (first, second)]
    assert costs[1] == {name: 2 * cost for name, cost in costs[0].items()}


def test_what_a_function_says_is_asked_again(tmp_path: Path) -> None:
    run(llama(), validation_fn=lambda _: 1.0, max_drop=0.5, budget=1, storage=tmp_path)

    def strict(changed: nn.Module) -> float:
        return float(all(torch.equal(a, b) for a, b in zip(changed.parameters(), llama().parameters(), strict=True)))

    with pytest.raises(nncf.ValidationError, match="it loses 1,"):
        run(llama(), validation_fn=strict, max_drop=0.5, budget=1, storage=tmp_path)


def test_padding_is_not_judged() -> None:
    model, item = llama(), items(1)[0]
    padded = {
        "input_ids": torch.nn.functional.pad(item["input_ids"], (0, 8), value=0),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(item["input_ids"]), (0, 8)),
    }
    other = make("llama_biases", **SIZES, intermediate_size=128, head_dim=16)
    with torch.no_grad():
        plain, masked = (control.Divergence(model, [each])(other) for each in (item, padded))
    assert masked == pytest.approx(plain, rel=1e-4)


def test_what_is_not_finite_is_refused_or_worst() -> None:
    model, broken = llama(), llama()
    broken.get_parameter("model.norm.weight").data.fill_(math.nan)
    with torch.no_grad():
        assert control.Divergence(model, items(1))(broken) == 1e6
        with pytest.raises(nncf.ValidationError, match="not finite"):
            control.Divergence(broken, items(1))


def test_another_run_does_not_continue(tmp_path: Path) -> None:
    run(llama(), max_drop=0.5, budget=1, storage=tmp_path)
    with pytest.raises(nncf.ValidationError, match="differs in weights"):
        run(make("llama_biases", **SIZES, intermediate_size=128, head_dim=16), max_drop=0.05, storage=tmp_path)


def test_recovery_trains_and_is_judged_again(found: tuple[nn.Module, Any]) -> None:
    model, trained, data = llama(), [], items(12)

    def recover(small: nn.Module, dense: nn.Module) -> nn.Module:
        """What has no form learns to give what the dense model gives."""
        assert dense is not model and weight_hooks(small)
        learning = [each for each in small.parameters() if each.requires_grad and each.is_floating_point()]
        optimizer = torch.optim.Adam(learning, lr=3e-3)
        for _ in range(12):
            for item in data[7:]:  # those that are judged among them, so that it must get better
                expected = logits(dense, item).log_softmax(-1)
                gap = nn.functional.kl_div(
                    small(**item, use_cache=False).logits.log_softmax(-1), expected, log_target=True, reduction="sum"
                )
                gap.backward()
            optimizer.step()
            optimizer.zero_grad()
        for each in dense.parameters():
            each.data.zero_()  # it is a copy
        trained.append(small)
        return small

    result = run(model, max_drop=0.05, recover=recover)
    before = {each.name: each.drop for each in result.report.candidates}
    again = [each for each in result.report.candidates if each.name.endswith("recovered")]
    assert 0 < len(trained) <= 3 and len(again) == len(trained)
    assert all(each.drop != before[each.name.removesuffix(", recovered")] for each in again)
    assert min(each.drop for each in again) < min(before[each.name.removesuffix(", recovered")] for each in again)
    assert result.report.chosen.cost <= found[1].report.chosen.cost
    assert divergence(llama(), result.model, data[9:]) == pytest.approx(result.report.chosen.drop, rel=1e-3)


def test_a_recovery_to_other_forms_is_refused() -> None:
    with pytest.raises(nncf.ValidationError, match="another form"):
        run(llama(), max_drop=0.05, recover=lambda small, dense: dense)


def test_a_recovery_that_loses_zeros_is_refused() -> None:
    """Those of INT4 are codes, two in a byte."""

    def fill(small: nn.Module, dense: nn.Module) -> nn.Module:
        for name in weight_hooks(small):
            small.get_parameter(name).data.fill_(1 if small.get_parameter(name).dtype is torch.int8 else 0x99)
        return small

    with pytest.raises(nncf.ValidationError, match="another form"):
        run(llama(), max_drop=0.05, recover=fill)


def test_a_function_of_the_users_judges() -> None:
    model, data = llama(), items(12)[9:]
    dense = copy.deepcopy(model)

    def validation(changed: nn.Module) -> float:
        return 1 - divergence(dense, changed, data)

    result = run(model, validation_fn=validation, max_drop=0.05)
    assert 0 < result.report.chosen.drop <= 0.05
    assert 1 - validation(result.model) == pytest.approx(result.report.chosen.drop, abs=1e-6)
    assert "validation_fn" in result.report.drop_of


# What is refused


def raising(_: nn.Module) -> float:
    raise OSError("no such file")


@pytest.mark.parametrize(
    "validation, message",
    [
        (raising, "raised OSError: no such file"),
        (lambda _: math.nan, "finite"),
        (lambda _: float(torch.rand(())), "second time"),
    ],
)
def test_a_function_that_cannot_judge_is_refused_at_once(validation: Any, message: str) -> None:
    with pytest.raises(nncf.ValidationError, match=message):
        run(llama(), validation_fn=validation)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_drop": 0}, "max_drop"),
        ({"max_drop": -1.0}, "max_drop"),
        ({"budget": 0}, "budget"),
        ({"advanced_parameters": replace(FEW, forms=("float16",))}, "two forms"),
        ({"advanced_parameters": replace(FEW, forms=("int8", "int3"))}, "int3"),
        ({"advanced_parameters": replace(FEW, held_out=1.0)}, "held_out"),
        ({"advanced_parameters": replace(FEW, forms=("float16-s5", "int8"))}, "more than the dense"),
        ({"max_drop": math.inf}, "max_drop"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(nncf.ValidationError, match=message):
        run(llama(), **options)


def test_where_nothing_keeps_to_the_limit_the_nearest_is_named() -> None:
    parameters = replace(FEW, forms=("int4", "int4-s50"), removable=False)
    with pytest.raises(nncf.ValidationError, match="nearest is combination"):
        run(llama(), max_drop=1e-6, advanced_parameters=parameters)


def test_what_is_to_be_large_is_refused() -> None:
    speed = NetworkObjective("speed", lambda _: Objective("speed", lambda _: 1.0, maximize=True))
    with pytest.raises(nncf.ParameterNotSupportedError, match="maximized"):
        run(llama(), objective=speed)


def test_a_compressed_model_and_a_single_item_are_refused(found: tuple[nn.Module, Any]) -> None:
    small = found[1].model
    with pytest.raises(nncf.UnsupportedModelError, match="compressed already"):
        run(small)
    with pytest.raises(nncf.ValidationError, match="at least 2"):
        nncf_ext.compress_with_accuracy_control(llama(), nncf.Dataset(items(1)))
