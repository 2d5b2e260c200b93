"""Mamba-Shedder: the search against a search written here over extracted models, interruptions, refusals."""

import math

import nncf
import pytest
import torch
from torch.nn import functional as F

import nncf_ext
from nncf_ext import AdvancedMambaShedderParameters, CompressMode, PruningStage
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from tests.structure_models import LAYERS, VOCABULARY, by_layer, make, place_of

BLOCKS, SSM = PruningStage(("mamba_block",), 2), PruningStage(("ssm",), 2)
HYBRID = (
    PruningStage(("mamba_block", "attention", "mlp"), 3),
    PruningStage(("mlp_channels",), 3),
    PruningStage(("ssm",), 2),
)


def items(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCABULARY, (2, 9 + index), generator=generator)} for index in range(count)]


def shed(model, *stages, ratio=0.0, **more):
    options = {name: more.pop(name) for name in ("resume", "ignored_scope") if name in more}
    if stages:
        more["stages"] = stages
    return nncf_ext.compress(
        model,
        CompressMode.MAMBA_SHEDDER,
        ratio=ratio,
        dataset=nncf.Dataset(items()),
        do_copy=True,
        advanced_parameters=AdvancedMambaShedderParameters(**{"mlp_group": 8, **more}),
        **options,
    )


def perplexity(model) -> float:
    """Of an extracted model, in plain words."""
    losses = []
    for item in items():
        ids = item["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        for row, text in zip(logits, ids, strict=True):
            losses.append(F.cross_entropy(row[:-1].double(), text[1:]).item())
    return math.exp(sum(losses) / len(losses))


def greedy(model, moves_of, steps):
    """Takes the best of all moves, extracted one by one, as often as asked."""
    plan, taken = StructurePlan.dense(model), []
    for step in range(steps):
        scored = [(perplexity(extract_structure(model, after)), move, after) for move, after in moves_of(plan, step)]
        best = min(scored, key=lambda each: each[0])
        taken.append((*best[1], best[0]))
        plan = best[2]
    return plan, taken


def blocks(plan, _step):
    for layer, kept in enumerate(by_layer(plan)):
        if kept["mamba"]:
            yield ("mamba", layer, 0), plan.keep(f"layers.{layer}.mamba", ())


def state_spaces(plan, _step):
    for layer, kept in enumerate(by_layer(plan)):
        if len(kept["mamba"]) == 2:
            yield ("mamba", layer, 1), plan.keep(f"layers.{layer}.mamba", (0,))


def zamba2(plan, step):
    if step < 3:
        yield from blocks(plan, step)
        for name in ("attention", "mlp"):
            # The first attention stays: the cache tells positions by it.
            layers = [layer for layer, kept in enumerate(by_layer(plan)) if kept.get(name)]
            yield from (
                ((name, layer, 0), plan.keep(f"layers.{layer}.{name}", ()))
                for layer in layers
                if (name, layer) != ("attention", 2)
            )
    elif step < 6:
        for uses in ((2, 4), (3,)):
            left = [layer for layer in uses if plan.kept[f"layers.{layer}.mlp"]]
            if left and (count := len(plan.kept[f"layers.{left[0]}.mlp"]) - 8) > 0:
                after = plan
                for layer in left:
                    after = after.keep(f"layers.{layer}.mlp", range(count))
                yield ("mlp", left[0], count), after
    else:
        yield from state_spaces(plan, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages", "moves"),
    [
        ("mamba", (BLOCKS,), blocks),
        ("mamba2", (BLOCKS,), blocks),
        ("falcon_mamba", (SSM,), state_spaces),
        ("mamba2", (SSM,), state_spaces),
        ("zamba2", HYBRID, zamba2),
    ],
)
def test_search_is_greedy_search(name, stages, moves) -> None:
    model = make(name)
    small = shed(model, *stages, order=None)
    plan = nncf_ext.structure_plan(small)
    expected, taken = greedy(model, moves, sum(stage.steps for stage in stages))
    assert plan.kept == expected.kept
    assert [(*place_of(step), step.kept) for step in plan.steps] == [each[:3] for each in taken]
    assert [step.score for step in plan.steps] == pytest.approx([each[3] for each in taken], rel=1e-5)
    assert perplexity(small) == pytest.approx(taken[-1][3], rel=1e-5)
    assert plan.costs_after.parameters == sum(each.numel() for each in small.parameters())


def test_until_the_ratio_is_reached() -> None:
    model = make("mamba2")
    whole = sum(each.numel() for each in model.parameters())
    small = shed(model, ratio=0.3)
    sizes = [sum(each.numel() for each in extract_structure(model, plan).parameters()) for plan in _prefixes(small)]
    assert sizes[-1] <= 0.7 * whole < sizes[-2]
    # Steps first, then the ratio.
    small = shed(model, SSM, PruningStage(("mamba_block",)), ratio=0.3)
    kept = [step.kept for step in nncf_ext.structure_plan(small).steps]
    assert kept[:2] == [1, 1] and set(kept[2:]) == {0}


def _prefixes(small):
    plan = nncf_ext.structure_plan(small)
    trial = StructurePlan(plan.model, dict.fromkeys(plan.kept, (0, 1)))
    for step in plan.steps:
        yield trial
        trial = trial.keep(step.dimension, range(step.kept))
    yield trial


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 2, 5])
def test_resumed_search_gives_the_same_plan(at, tmp_path, stopped_search) -> None:
    model = make("zamba2")
    expected = nncf_ext.structure_plan(shed(model, *HYBRID))
    with stopped_search(at):
        shed(model, *HYBRID, resume=tmp_path / "journal")
    assert nncf_ext.structure_plan(shed(model, *HYBRID, resume=tmp_path / "journal")) == expected
    with pytest.raises(nncf.ValidationError, match="begun by another search; it differs in stages"):
        shed(model, *HYBRID[:2], resume=tmp_path / "journal")


def test_ignored_mixers_stay() -> None:
    scope = nncf.IgnoredScope(patterns=[r".*layers\.[0-2]\.mixer\.in_proj"])
    plan = nncf_ext.structure_plan(shed(make("mamba2"), PruningStage(("mamba_block",), 1), ignored_scope=scope))
    assert [(place_of(step)[1], step.kept) for step in plan.steps] == [(3, 0)]


def test_what_is_refused(tiny_llama) -> None:
    model = make("mamba2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for stages, options, message in (
        ((), {"ratio": 0.95}, r"95.0%.*mamba_block ran out of candidates: it reached \d+\.\d%"),
        ((PruningStage(("ssm",)),), {"ratio": 0.5}, "ssm ran out of candidates"),
        ((PruningStage(("mamba_block",), LAYERS),), {}, "ran out of candidates"),  # all mixers
        ((BLOCKS,), {"ratio": 0.2}, "every stage says its steps"),
        ((PruningStage(("ssm",)), BLOCKS), {"ratio": 0.2}, "Only the last stage"),
        ((PruningStage(("head",), 1),), {}, "some of mamba_block, ssm"),
        ((PruningStage("ssm", 1),), {}, "a tuple of some"),
        ((PruningStage(("ssm",), 0),), {}, "steps must be at least 1"),
        ((PruningStage(("attention", "ssm"), 1),), {}, "attention: Mamba2ForCausalLM has Mamba blocks only"),
        (("ssm",), {}, "stages are PruningStage"),
    ):
        with pytest.raises(nncf.ValidationError, match=message):
            shed(model, *stages, **options)
    for wrong, mode, message in (
        (tiny_llama(4), CompressMode.MAMBA_SHEDDER, "which has none.*MULTIPRUNER"),
        (model, CompressMode.MULTIPRUNER, "has mamba branches.*MAMBA_SHEDDER"),
    ):
        with pytest.raises(nncf.UnsupportedModelError, match=message):
            nncf_ext.compress(wrong, mode, ratio=0.1, dataset=nncf.Dataset(items()))
    with pytest.raises(nncf.ValidationError, match="needs a dataset"):
        nncf_ext.compress(model, CompressMode.MAMBA_SHEDDER, ratio=0.1)
    with pytest.raises(nncf.ParameterNotSupportedError, match="AdvancedMambaShedderParameters"):
        nncf_ext.compress(
            model,
            CompressMode.MAMBA_SHEDDER,
            ratio=0.1,
            dataset=nncf.Dataset(items()),
            advanced_parameters=nncf_ext.AdvancedMultiPrunerParameters(),
        )
    hybrid = make("zamba2")
    hybrid.model.layers[3].shared_transformer.feed_forward.gate_up_proj.weight = hybrid.model.layers[
        2
    ].shared_transformer.feed_forward.gate_up_proj.weight
    with pytest.raises(nncf.UnsupportedModelError, match="shared"):
        shed(hybrid, PruningStage(("mlp_channels",), 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
