"""The one call that looks for the best combination of forms within an accepted loss."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from torch import Tensor, nn

import nncf_ext
from nncf_ext.algorithms.accuracy_control import catalogue, control
from nncf_ext.exploration.objectives import NetworkObjective, Objective
from nncf_ext.weights.int4 import weight_hooks
from tests.nncf_ext.form_models import FEW, SIZES, divergence, items, llama, logits
from tests.structure_models import make

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
