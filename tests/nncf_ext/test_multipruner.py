"""MultiPruner: the search against a search written here, whole passes of masked models, and interruptions."""

import math

import nncf
import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM

import nncf_ext
import nncf_ext.structure.counting
from nncf_ext import AdvancedMultiPrunerParameters, CompressMode, DivergenceMetric, PerplexityMetric
from nncf_ext.pruning.candidates import Removal
from nncf_ext.pruning.scoring import Scorer
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import StructurePlan
from tests.structure_models import by_layer, place_of

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "max_position_embeddings": 64}


def models(tiny_llama) -> dict[str, nn.Module]:
    torch.manual_seed(5)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = {
        "llama": tiny_llama(4, hidden_size=32, intermediate_size=96, **heads),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=48, **heads, layer_types=None)),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48, num_attention_heads=4)),
    }
    for model in made.values():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.2)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)
    return {name: model.eval() for name, model in made.items()}


@pytest.fixture(params=["llama", "qwen2", "neox"])
def model(request, tiny_llama) -> nn.Module:
    return models(tiny_llama)[request.param]


def items(count=3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, VOCABULARY, (2, 11 + index), generator=generator)} for index in range(count)]


def settings(**more) -> AdvancedMultiPrunerParameters:
    return AdvancedMultiPrunerParameters(**{"mlp_group": 16, "width_subset_size": 2, "distribution": (3, 6, 1), **more})


def prune(model, ratio=0.3, count=3, **more):
    resume = more.pop("resume", None)
    scope = more.pop("ignored_scope", None)
    return nncf_ext.compress(
        model,
        CompressMode.MULTIPRUNER,
        ratio=ratio,
        dataset=nncf.Dataset(items(count)),
        do_copy=True,
        resume=resume,
        ignored_scope=scope,
        advanced_parameters=settings(**more),
    )


def losses(model, batches) -> list[float]:
    """Mean negative log-likelihood by sequence, token by token."""
    found = []
    for batch in batches:
        for ids in batch["input_ids"]:
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(dim=1)
            found.append(-sum(float(logits[at, ids[at + 1]]) for at in range(len(ids) - 1)) / (len(ids) - 1))
    return found


def order_of(model, branch, layer):
    """Units by the L1 norm of their rows, the largest first."""
    block = model.get_submodule("gpt_neox.layers" if hasattr(model, "gpt_neox") else "model.layers")[layer]
    if hasattr(model, "gpt_neox"):
        weight = block.attention.query_key_value.weight if branch == "attention" else block.mlp.dense_h_to_4h.weight
        rows = weight.abs().sum(dim=1)
        scores = rows.view(4, -1).mean(dim=1) if branch == "attention" else rows
    elif branch == "mlp":
        scores = block.mlp.gate_proj.weight.abs().sum(dim=1) + block.mlp.up_proj.weight.abs().sum(dim=1)
    else:
        q, k, v = (getattr(block.self_attn, f"{name}_proj").weight.abs().sum(dim=1) for name in "qkv")
        scores = q.view(2, -1).mean(dim=1) + k.view(2, -1).mean(dim=1) + v.view(2, -1).mean(dim=1)
    return torch.argsort(scores, descending=True, stable=True).tolist()


def size(model, plan):
    return sum(each.numel() for each in nncf_ext.extract(model, plan).parameters())


def greedy(model, ratio, distribution, groups):
    """The search as the paper has it, with a whole pass of an extracted or masked model for every candidate."""
    plan, dense, steps, paid = StructurePlan.dense(model), size(model, StructurePlan.dense(model)), [], 0.0
    for stage, share in enumerate(distribution):
        paid += share / sum(distribution)
        batches = items() if stage == 0 else items()[:2]
        while share and 1 - size(model, plan) / dense < ratio * paid:
            best = None
            for branch in ("attention", "mlp") if stage == 0 else (("mlp",), ("attention",))[stage - 1]:
                for layer in range(4):
                    now = len(plan.kept[f"layers.{layer}.{branch}"])
                    left = 0 if stage == 0 else now - groups[branch]
                    attentions = sum(bool(kept["attention"]) for kept in by_layer(plan))
                    if not now or left < 0 or (stage and left == 0):
                        continue
                    if stage == 0 and branch == "attention" and attentions == 1:
                        continue
                    candidate = plan.keep(f"layers.{layer}.{branch}", sorted(order_of(model, branch, layer)[:left]))
                    with masked(model, candidate, dimensions_of(model)):
                        found = losses(model, batches)
                    loss = sum(found) / len(found)
                    if best is None or loss < best[0]:
                        best = loss, candidate, (branch, layer, left)
            plan = best[1]
            steps.append((*best[2], math.exp(best[0])))
    return plan, steps


def test_search_is_greedy_search(model) -> None:
    expected, steps = greedy(model, 0.3, (3, 6, 1), {"mlp": 16, "attention": 1})
    for options in ({}, {"early_stop": False}, {"candidates_per_pass": 4, "reuse_bytes": 50_000}):
        small = prune(model, **options)
        plan = nncf_ext.structure_plan(small)
        assert [(*place_of(step), step.kept) for step in plan.steps] == [step[:3] for step in steps]
        assert [step.score for step in plan.steps] == pytest.approx([step[3] for step in steps], rel=1e-5)
        assert plan.kept == expected.kept
    assert {place_of(step)[0] for step in plan.steps} == {"attention", "mlp"} and len(steps) > 5
    assert sum(each.numel() for each in small.parameters()) == size(model, plan) == plan.costs_after.parameters
    assert 1 - plan.costs_after.parameters / plan.costs_before.parameters >= 0.3
    ids = items()[0]["input_ids"]
    with torch.no_grad(), masked(model, plan):
        masked_logits = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=ids, use_cache=False).logits, masked_logits, rtol=1e-4, atol=1e-4)


def test_early_stop_saves_work_and_no_choice(model) -> None:
    candidates = [Removal(f"layers.{layer}.{branch}", ()) for branch in ("attention", "mlp") for layer in range(4)]
    plan, metric = StructurePlan.dense(model), PerplexityMetric()
    with torch.no_grad():
        thorough = Scorer(model, items(4), metric.losses, early_stop=False)
        quick = Scorer(model, items(4), metric.losses)
        all_of_them, some = thorough.score(plan, candidates), quick.score(plan, candidates)
    assert all_of_them.best == some.best and thorough.evaluations == 32
    assert (some.totals <= all_of_them.totals).all()
    assert quick.evaluations == 24 + int(some.complete.sum())


def test_a_race_gives_up_who_is_behind(model) -> None:
    """Against paired differences computed here; the leader is never given up, and a wide margin gives up nobody."""
    candidates = [Removal(f"layers.{layer}.{branch}", ()) for branch in ("attention", "mlp") for layer in range(4)]
    plan, metric, batches = StructurePlan.dense(model), PerplexityMetric(), items(4)
    saved = torch.arange(1.0, 9.0, dtype=torch.float64)
    with torch.no_grad():
        for gains in (None, saved):
            full = Scorer(model, batches, metric.losses, early_stop=False).score(plan, candidates, saved=gains)
            base = Scorer(model, batches, metric.losses).loss(plan)
            assert full.base == pytest.approx(base)
            raced = Scorer(model, batches, metric.losses, early_stop=False, racing=1.0)
            found = raced.score(plan, candidates, saved=gains)
            keys = full.losses if gains is None else (full.losses - losses_of(model, batches)) / gains[:, None]
            here = torch.ones(8, dtype=torch.bool)
            for sequences in (4, 6):  # two a batch, and nobody is given up before four
                seen = keys[:, :sequences]
                leader = min((float(seen[index].mean()), index) for index in range(8) if here[index])[1]
                behind = seen - seen[leader]
                here &= behind.mean(dim=1) <= behind.std(dim=1) / sequences**0.5
                assert here[leader]
            assert torch.equal(found.complete, here) and 0 < int(here.sum()) < 8
            assert torch.equal(found.losses[here], full.losses[here]) and raced.evaluations < 32
            patient = Scorer(model, batches, metric.losses, early_stop=False, racing=1e6)
            assert torch.equal(patient.score(plan, candidates, saved=gains).losses, full.losses)


def losses_of(model, batches) -> torch.Tensor:
    metric = PerplexityMetric()
    return torch.cat([metric.losses(model(**each, use_cache=False).logits, each, None) for each in batches])


def test_perplexity_is_a_mean_of_means() -> None:
    """By hand: two tokens, of which the model believes one with 3/4; unequal numbers of targets."""
    logits = torch.tensor([[[3.0, 1.0]] * 4] * 2).log()
    batch = {"input_ids": torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0]]), "attention_mask": torch.ones(2, 4)}
    good, bad = -math.log(0.75), -math.log(0.25)
    metric = PerplexityMetric()
    assert metric.losses(logits, batch, None).tolist() == pytest.approx([(good + 2 * bad) / 3, good])
    assert metric.shown((good + bad) / 2) == pytest.approx(math.sqrt(1 / (0.75 * 0.25)))
    ignoring = PerplexityMetric(ignored_token=0)
    assert ignoring.losses(logits, batch, None).tolist() == pytest.approx([bad, 0.0])
    padded = {**batch, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    assert metric.losses(logits, padded, None).tolist() == pytest.approx([(good + bad) / 2, good])
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = DivergenceMetric().losses(logits, batch, torch.zeros(2, 4, 2))
    assert found.tolist() == pytest.approx([divergence, divergence]) and DivergenceMetric().shown(2.0) == 2.0


def test_divergence_chooses_too(model) -> None:
    plan = nncf_ext.structure_plan(prune(model, ratio=0.1, metric=DivergenceMetric()))
    best = plan.steps[0]
    ids = items()
    with torch.no_grad():
        dense = [model(**item, use_cache=False).logits.log_softmax(dim=2).double() for item in ids]
    totals = {}
    for branch in ("attention", "mlp"):
        for layer in range(4):
            with torch.no_grad(), masked(model, StructurePlan.dense(model).keep(f"layers.{layer}.{branch}", ())):
                ours = [model(**item, use_cache=False).logits.log_softmax(dim=2).double() for item in ids]
            parts = [((a.exp() * (a - b)).sum(dim=2)[:, :-1]).mean(dim=1) for a, b in zip(dense, ours, strict=True)]
            totals[branch, layer] = float(torch.cat(parts).mean())
    assert min(totals, key=totals.get) == place_of(best)
    assert best.score == pytest.approx(totals[place_of(best)], rel=1e-4)


def heads_and_channels(plan) -> float:
    """A cost of one's own."""
    return sum(20 * len(kept["attention"]) + len(kept["mlp"]) for kept in by_layer(plan))


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["parameters", "kv_bytes_per_token", heads_and_channels])
def test_joint_search_pays_where_a_unit_costs_least_loss(model, cost) -> None:
    small = prune(model, ratio=0.25, joint_cost=cost)
    plan, dense = nncf_ext.structure_plan(small), StructurePlan.dense(model)

    def price(each):
        return cost(each) if callable(cost) else getattr(nncf_ext.structure.counting.count_costs(model, each), cost)

    def loss(each):
        with masked(model, each, dimensions_of(model)):
            found = losses(model, items())
        return sum(found) / len(found)

    now = dense
    for step in plan.steps:
        candidates = {}
        for branch in ("attention", "mlp"):
            for layer, kept in enumerate(by_layer(now)):
                left = len(kept[branch]) - {"attention": 1, "mlp": 16}[branch]
                for count in {0, max(left, 0)} if kept[branch] else ():
                    last = branch == "attention" and not count and sum(bool(k["attention"]) for k in by_layer(now)) == 1
                    each = now.keep(f"layers.{layer}.{branch}", sorted(order_of(model, branch, layer)[:count]))
                    if not last and price(each) < price(now):
                        candidates[branch, layer, count] = (loss(each) - loss(now)) / (price(now) - price(each))
        assert min(candidates, key=candidates.get) == (*place_of(step), step.kept)
        kept = sorted(order_of(model, *place_of(step))[: step.kept])
        now = now.keep(step.dimension, kept)
    assert now.kept == plan.kept and price(now) <= 0.75 * price(dense)


@pytest.mark.parametrize("rescore_top", [None, 2])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_resumed_search_gives_the_same_plan(tiny_llama, tmp_path, stopped_search, at, rescore_top) -> None:
    model = models(tiny_llama)["llama"]
    expected = nncf_ext.structure_plan(prune(model, rescore_top=rescore_top))
    with stopped_search(at):
        prune(model, resume=tmp_path / "journal", rescore_top=rescore_top)
    resumed = nncf_ext.structure_plan(prune(model, resume=tmp_path / "journal", rescore_top=rescore_top))
    assert resumed == expected and len(resumed.steps) > at
    assert StructurePlan.load(sorted((tmp_path / "journal").glob("plan.*.json"))[-1]).kept == expected.kept
    for other in ({"ratio": 0.2}, {"mlp_group": 8}, {"count": 2}, {"distribution": (1, 1, 1)}):
        with pytest.raises(nncf.ValidationError, match="begun by another search"):
            prune(model, resume=tmp_path / "journal", **{"rescore_top": rescore_top, **other})


def test_ignored_branches_stay(tiny_llama) -> None:
    model = models(tiny_llama)["llama"]
    scope = nncf.IgnoredScope(patterns=[r".*mlp\.down_proj", r".*layers\.0\..*"])
    plan = nncf_ext.structure_plan(prune(model, ratio=0.05, distribution=(1, 0, 0), ignored_scope=scope))
    dense = StructurePlan.dense(model)
    assert all(kept["mlp"] == full["mlp"] for kept, full in zip(by_layer(plan), by_layer(dense), strict=True))
    assert by_layer(plan)[0] == by_layer(dense)[0] and plan.kept != dense.kept


def test_what_is_refused(tiny_llama) -> None:
    model = models(tiny_llama)["llama"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for options, message in (
        ({"ratio": 0.95}, r"95.0%.*reached \d+\.\d%"),
        ({"attention_group": 24}, "attention_group=24.*16 channels.*multiple of 16"),
        ({"attention_group": 64}, "attention_group=64"),
        ({"mlp_group": 4096}, "mlp_group=4096.*96 channels"),
        ({"mlp_group": 0}, "mlp_group must be at least 1"),
        ({"distribution": (0, 0, 0)}, "three shares"),
        ({"metric": lambda model: 0.0}, "Metric"),
        ({"racing": 0.0}, "racing must be above 0"),
        ({"candidates_per_pass": 0}, "candidates_per_pass.*whole number of at least 1; got 0"),
        ({"candidates_per_pass": None}, "candidates_per_pass.*got None"),
        ({"reuse_bytes": -1}, "reuse_bytes.*at least 0; got -1"),
        ({"reuse_bytes": float("inf")}, "reuse_bytes.*got inf"),
        ({"order": "size"}, "order='size'.*'activations'"),
        ({"joint_cost": "watts"}, "joint_cost='watts'.*kv_bytes_per_token"),
        ({"ignored_scope": nncf.IgnoredScope(patterns=[".*layers.*"])}, r"reached 0\.0%"),
    ):
        with pytest.raises(nncf.ValidationError, match=message):
            prune(model, **options)
    for dataset, message in (
        (None, "needs a dataset"),
        (nncf.Dataset([]), "empty"),
        (nncf.Dataset([{"input_ids": torch.zeros(2, 1, dtype=torch.int64)}]), "2 sequences of 1 tokens"),
        (nncf.Dataset([{"pixels": torch.zeros(2, 5)}]), "no input_ids"),
    ):
        with pytest.raises(nncf.ValidationError, match=message):
            nncf_ext.compress(model, CompressMode.MULTIPRUNER, ratio=0.1, dataset=dataset)
    with pytest.raises(nncf.ParameterNotSupportedError, match="AdvancedMultiPrunerParameters"):
        nncf_ext.compress(
            model,
            CompressMode.MULTIPRUNER,
            ratio=0.1,
            dataset=nncf.Dataset(items()),
            advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(),
        )
    shared = models(tiny_llama)["llama"]
    shared.model.layers[2].mlp.up_proj.weight = shared.model.layers[1].mlp.up_proj.weight
    with pytest.raises(nncf.UnsupportedModelError, match=r"shared: .*layers\.1.*layers\.2"):
        prune(shared)
    with pytest.raises(nncf.UnsupportedModelError, match="no record"):
        nncf_ext.compress(nn.Linear(4, 4), CompressMode.MULTIPRUNER, ratio=0.1, dataset=nncf.Dataset(items()))
    with pytest.raises(nncf.ValidationError, match="not cut by compress"):
        nncf_ext.structure_plan(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
