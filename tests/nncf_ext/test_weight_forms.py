"""Forms of weights as dimensions of a network, and what combinations of them are predicted to cost and lose."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import nncf
import optuna
import pytest
import torch
from torch import Tensor

import nncf_ext
from nncf_ext.algorithms.accuracy_control.catalogue import Catalogue
from nncf_ext.algorithms.accuracy_control.costs import Prediction, PriceSampler
from nncf_ext.algorithms.accuracy_control.forms import WeightForm, by_size
from nncf_ext.algorithms.accuracy_control.network import FormNetwork
from nncf_ext.structure.blocks import survey
from nncf_ext.weights.int4 import weight_hooks
from tests.nncf_ext.form_models import FEW, SIZES, items, llama, logits, network
from tests.structure_models import make

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
