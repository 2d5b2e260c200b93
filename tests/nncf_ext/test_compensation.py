"""Repair of output projections: against a least-squares solution written here, and inside a search."""

import copy

import nncf
import pytest
import torch
from torch import nn

import nncf_ext
from nncf_ext import DivergenceMetric
from nncf_ext.pruning.compensation import RIDGE, Compensator
from nncf_ext.pruning.scoring import Scorer
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import StructurePlan
from tests.nncf_ext.test_multipruner import items, models, prune
from tests.structure_models import by_layer


@pytest.fixture(params=["llama", "qwen2", "neox"])
def model(request, tiny_llama) -> nn.Module:
    return models(tiny_llama)[request.param]


def output_of(model: nn.Module, layer: int, branch: str) -> nn.Linear:
    if hasattr(model, "gpt_neox"):
        block = model.gpt_neox.layers[layer]
        return block.attention.dense if branch == "attention" else block.mlp.dense_4h_to_h
    block = model.model.layers[layer]
    return block.self_attn.o_proj if branch == "attention" else block.mlp.down_proj


def inputs_of(model: nn.Module, module: nn.Module, batches) -> torch.Tensor:
    """What a layer reads, [tokens, in_features] float64; padding left out."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
            if "attention_mask" in batch:
                seen[-1] = seen[-1][batch["attention_mask"].flatten() != 0]
    hook.remove()
    return torch.cat(seen).double()


def padded(batches):
    masks = [torch.ones_like(batch["input_ids"]) for batch in batches]
    for mask in masks:
        mask[0, -3:] = 0
    return [{**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)]


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_the_refit_is_the_ridge_regression(model, branch) -> None:
    """Rows of the penalty below the data, solved by numpy's way of least squares; a bias as a free column."""
    batches = padded(items(5))
    dense = copy.deepcopy(model)
    units = 4 if hasattr(model, "gpt_neox") else 2
    kept = (1,) if branch == "attention" else tuple(range(2, 30))
    columns = torch.arange(32 // units, 64 // units) if branch == "attention" else torch.arange(2, 30)
    plan = StructurePlan.dense(model).keep("layers.0.mlp", ()).keep(f"layers.2.{branch}", kept)
    with masked(model, StructurePlan.dense(model).keep("layers.0.mlp", ())):
        a = inputs_of(model, output_of(model, 2, branch), batches)
    with torch.no_grad():
        Compensator(model, batches).refit(plan, f"layers.2.{branch}")

    output, before = output_of(model, 2, branch), output_of(dense, 2, branch)
    weight, bias = before.weight.detach().double(), before.bias
    own, mean = a[:, columns], a.mean(dim=0)
    centred = own if bias is None else own - mean[columns]
    ridge = RIDGE * centred.square().mean(dim=0).mean() * len(a)
    target = (a if bias is None else a - mean) @ weight.T
    penalty = ridge.sqrt() * torch.eye(len(columns), dtype=torch.float64)
    rows, goals = torch.cat([centred, penalty]), torch.cat([target, ridge.sqrt() * weight[:, columns].T])
    expected = torch.linalg.lstsq(rows, goals).solution.T
    torch.testing.assert_close(output.weight[:, columns].double(), expected, rtol=1e-4, atol=1e-5)
    if bias is not None:
        shift = weight @ mean - expected @ mean[columns]
        torch.testing.assert_close(output.bias.double(), bias.double() + shift, rtol=1e-4, atol=1e-4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense.state_dict()[name])}
    names = {name for name, module in model.named_modules() if module is output}
    assert {name.rpartition(".")[0] for name in changed} == names


def test_a_second_refit_starts_from_the_dense_weight(model) -> None:
    other = copy.deepcopy(model)
    once, twice = Compensator(model, items()), Compensator(other, items())
    plan = StructurePlan.dense(model).keep("layers.1.mlp", range(20))
    with torch.no_grad():
        twice.refit(StructurePlan.dense(other).keep("layers.1.mlp", range(40)), "layers.1.mlp")
        for each in (once, twice):
            each.refit(plan, "layers.1.mlp")
    torch.testing.assert_close(output_of(other, 1, "mlp").weight, output_of(model, 1, "mlp").weight)


def test_the_dense_model_can_be_asked_in_between(model) -> None:
    dense = copy.deepcopy(model)
    compensator, batch = Compensator(model, items()), items()[0]
    plan = StructurePlan.dense(model).keep("layers.1.mlp", range(20)).keep("layers.2.attention", (0,))
    with torch.no_grad():
        for layer, branch in ((1, "mlp"), (2, "attention"), (3, "mlp")):  # the last has nothing to repair
            compensator.refit(plan, f"layers.{layer}.{branch}")
        repaired = {name: value.clone() for name, value in model.state_dict().items()}
        with compensator.dense():
            assert torch.equal(model(**batch, use_cache=False).logits, dense(**batch, use_cache=False).logits)
        assert all(torch.equal(value, repaired[name]) for name, value in model.state_dict().items())
        metric = DivergenceMetric()
        scorer = Scorer(model, [batch], metric.losses, needs_dense=True, as_dense=compensator.dense)
        with masked(model, plan, scorer._dimensions):
            ours = model(**batch, use_cache=False).logits
        expected = metric.losses(ours, batch, dense(**batch, use_cache=False).logits).mean()
        assert scorer.loss(plan) == pytest.approx(float(expected))


def test_search_with_repairs_strays_less_from_the_dense_model(model) -> None:
    options = {"ratio": 0.15, "distribution": (0, 1, 0), "metric": DivergenceMetric()}
    plain, repaired = prune(model, **options), prune(model, **options, compensate=True)

    def divergence(small: nn.Module) -> float:
        with torch.no_grad():
            logits = [[each(**batch, use_cache=False).logits for each in (small, model)] for batch in items()]
        found = [
            DivergenceMetric().losses(ours, batch, dense) for (ours, dense), batch in zip(logits, items(), strict=True)
        ]
        return float(torch.cat(found).mean())

    assert divergence(repaired) < 0.9 * divergence(plain)
    plan = nncf_ext.structure_plan(repaired)
    assert plan.steps[0] == nncf_ext.structure_plan(plain).steps[0]  # repairs come after a choice
    assert sum(each.numel() for each in repaired.parameters()) == plan.costs_after.parameters


@pytest.mark.slow
def test_a_resumed_search_repairs_what_it_had_repaired(tiny_llama, tmp_path, stopped_search) -> None:
    model = models(tiny_llama)["llama"]
    options = {"ratio": 0.3, "compensate": True, "joint_cost": "parameters"}
    expected = prune(model, **options)
    with stopped_search(4):
        prune(model, resume=tmp_path / "journal", **options)
    resumed = prune(model, resume=tmp_path / "journal", **options)
    assert nncf_ext.structure_plan(resumed) == nncf_ext.structure_plan(expected)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
    with pytest.raises(nncf.ValidationError, match="differs in compensate"):
        prune(model, resume=tmp_path / "journal", **{**options, "compensate": False})


def test_order_by_activations(model) -> None:
    """Energy that a channel writes into the residual stream: the least goes first."""
    plan = nncf_ext.structure_plan(prune(model, ratio=0.2, distribution=(0, 1, 0), order="activations"))
    for layer, kept in enumerate(by_layer(plan)):
        output = output_of(model, layer, "mlp")
        energy = inputs_of(model, output, items()).square().mean(dim=0) * output.weight.double().square().sum(dim=0)
        order = torch.argsort(energy, descending=True).tolist()
        assert set(kept["mlp"]) == set(order[: len(kept["mlp"])])
    assert any(len(kept["mlp"]) < 48 for kept in by_layer(plan))


def test_orders_by_activations_of_heads(model) -> None:
    plan = nncf_ext.structure_plan(prune(model, ratio=0.03, distribution=(0, 0, 1), order="activations"))
    units = 4 if hasattr(model, "gpt_neox") else 2
    for layer, kept in enumerate(by_layer(plan)):
        output = output_of(model, layer, "attention")
        energy = inputs_of(model, output, items()).square().mean(dim=0) * output.weight.double().square().sum(dim=0)
        order = torch.argsort(energy.view(units, -1).sum(dim=1), descending=True).tolist()
        assert set(kept["attention"]) == set(order[: len(kept["attention"])])
    assert any(len(kept["attention"]) < units for kept in by_layer(plan))
