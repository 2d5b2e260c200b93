"""Scores of candidates are those of whole masked passes, whatever of them is not run again: a table over families."""

import gc

import nncf
import pytest
import torch

from nncf_ext import PerplexityMetric
from nncf_ext.pruning.candidates import Removal
from nncf_ext.pruning.compensation import Compensator
from nncf_ext.pruning.greedy import Elimination
from nncf_ext.pruning.scoring import Scorer
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import StructurePlan
from tests.structure_models import CAUSAL, HYBRIDS, STATE_SPACE, VOCABULARY, blocks_of, by_layer, make

PLENTY = 2**30
METRIC = PerplexityMetric()


def items() -> list[dict[str, torch.Tensor]]:
    """The second with padding, on the left as generation has it."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randint(3, VOCABULARY, (2, 9 + index), generator=generator) for index in range(2))
    mask = torch.ones_like(second)
    mask[1, :3] = 0
    return [{"input_ids": first}, {"input_ids": second, "attention_mask": mask}]


def all_candidates(plan: StructurePlan) -> list[Removal]:
    """Every branch as a whole, and half of it where it has several units."""
    branches = [(layer, name, kept) for layer, branches in enumerate(by_layer(plan)) for name, kept in branches.items()]
    whole = [Removal(f"layers.{layer}.{name}", ()) for layer, name, kept in branches if kept]
    return whole + [
        Removal(f"layers.{layer}.{name}", kept[: len(kept) // 2]) for layer, name, kept in branches if len(kept) > 1
    ]


def layer_of(removal: Removal) -> int:
    return int(removal.dimension.split(".")[1])


def journey(model) -> list[StructurePlan]:
    """What a search could come by: a late layer, an early one, two at once."""
    plans = [StructurePlan.dense(model)]
    last = len(by_layer(plans[0])) - 1
    for layers in ((last,), (1,), (0, last - 1)):
        plan = plans[-1]
        for layer in layers:
            name, kept = max(by_layer(plan)[layer].items(), key=lambda each: len(each[1]))
            plan = plan.keep(f"layers.{layer}.{name}", kept[: len(kept) // 2])
        plans.append(plan)
    return plans


def whole_passes(model, plan, candidate) -> torch.Tensor:
    """Losses of the masked model, every block of it run."""
    with torch.no_grad(), masked(model, candidate.on(plan), dimensions_of(model)):
        return torch.cat([METRIC.losses(model(**each, use_cache=False).logits, each, None) for each in items()])


@pytest.mark.parametrize("name", [*CAUSAL, *STATE_SPACE, *HYBRIDS])
def test_scores_are_those_of_whole_masked_passes(name) -> None:
    """Bit for bit, when candidates run one by one; to rounding, side by side."""
    model = make(name)
    plan = StructurePlan.dense(model)
    layers = len(by_layer(plan))
    half = layers + sum(layers - 1 - layer_of(each) for each in all_candidates(plan)) // 2  # of what could be kept
    some = len(items()) * (2 * 10 * 32 * 4) * half
    exact = [Scorer(model, items(), METRIC.losses, early_stop=False, reuse_bytes=each) for each in (some, PLENTY)]
    together = Scorer(model, items(), METRIC.losses, early_stop=False, candidates_per_pass=3)
    for plan in journey(model):
        candidates = all_candidates(plan)
        expected = torch.stack([whole_passes(model, plan, each) for each in candidates])
        with torch.no_grad():
            for scorer in exact:
                assert torch.equal(scorer.score(plan, candidates).losses, expected)
            torch.testing.assert_close(together.score(plan, candidates).losses, expected, rtol=2e-4, atol=2e-5)
    assert exact[0].evaluations == exact[1].evaluations == together.evaluations


def test_shared_weights_lose_the_same_in_all_their_uses() -> None:
    model = make("zamba2")
    plan = StructurePlan.dense(model)
    candidates = [Removal("layers.2.mlp", tuple(range(left)), ("layers.4.mlp",)) for left in (32, 8)] + [
        Removal("layers.3.attention", ())
    ]
    expected = torch.stack([whole_passes(model, plan, each) for each in candidates])
    with torch.no_grad():
        found = Scorer(model, items(), METRIC.losses, early_stop=False).score(plan, candidates)
        scorer = Scorer(model, items(), METRIC.losses, early_stop=False, candidates_per_pass=3)
        together = scorer.score(plan, candidates)
    assert torch.equal(found.losses, expected)
    torch.testing.assert_close(together.losses, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("count", [1, 8])
def test_only_what_changed_runs_again(count) -> None:
    """Counted block by block against what has to run: of the model, of who stands before the change, of the others."""
    model = make("llama")
    runs = torch.zeros(4, dtype=torch.int64)

    def counting(layer):
        def count_rows(_module, inputs):
            runs[layer] += len(inputs[0])

        return count_rows

    for layer, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(counting(layer))
    batches = items()[:1]
    scorer = Scorer(model, batches, METRIC.losses, early_stop=False, candidates_per_pass=count)
    plan, changed = StructurePlan.dense(model), None
    for step in (2, 3, 0, 1):
        candidates = all_candidates(plan)
        expected = torch.zeros(4, dtype=torch.int64)
        expected[0 if changed is None else changed :] += 2  # sequences of the batch, in the model as it is
        for each in candidates:
            expected[layer_of(each) if changed is None else max(layer_of(each), changed) :] += 2
        runs.zero_()
        with torch.no_grad():
            scorer.score(plan, candidates)
        assert torch.equal(runs, expected)
        plan, changed = plan.keep(f"layers.{step}.mlp", ()), step


@pytest.mark.parametrize("reuse_bytes", [0, 30_000, 70_000, PLENTY])
def test_memory_between_steps_has_a_limit(reuse_bytes) -> None:
    """Hidden states of ``[2, 9, 32]`` float32, counted among all that lives."""
    model = make("llama")
    size = 2 * 9 * 32 * 4

    def alive() -> set[int]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (2, 9, 32)]
        return {each.untyped_storage().data_ptr() for each in tensors}

    before = alive()
    scorer = Scorer(model, items()[:1], METRIC.losses, early_stop=False, reuse_bytes=reuse_bytes)
    plan = StructurePlan.dense(model)
    with torch.no_grad():
        scorer.score(plan, all_candidates(plan))
        scorer.score(plan.keep("layers.3.mlp", ()), all_candidates(plan.keep("layers.3.mlp", ())))
    kept = len(alive() - before) * size
    assert kept <= max(reuse_bytes, 4 * size)  # of the batch at hand all blocks' outputs are there
    if reuse_bytes == PLENTY:  # all blocks of the model, and of candidates what stands before the last block
        assert kept == size * (4 + sum(3 - layer_of(each) for each in all_candidates(plan)))
    elif reuse_bytes == 70_000:
        assert kept > 4 * size


def test_repairs_between_steps_are_seen() -> None:
    """Weights change where the plan does; what stands before is still known, and no score is an old one."""
    model = make("llama")
    compensator = Compensator(model, items())
    scorer = Scorer(model, items(), METRIC.losses, early_stop=False)
    plan = StructurePlan.dense(model)
    for layer, kept in ((2, 30), (1, 20), (2, 10)):
        plan = plan.keep(f"layers.{layer}.mlp", range(kept))
        with torch.no_grad():
            compensator.refit(plan, f"layers.{layer}.mlp")
            found = scorer.score(plan, all_candidates(plan))
        expected = torch.stack([whole_passes(model, plan, each) for each in all_candidates(plan)])
        assert torch.equal(found.losses, expected)


def test_a_padded_sequence_is_scored_alike_alone_and_side_by_side() -> None:
    """Transformers' Mamba-2 ignores the padding of a batch of one sequence."""
    model = make("mamba2")
    item = {name: value[1:] for name, value in items()[1].items()}
    plan = StructurePlan.dense(model)
    candidates = all_candidates(plan)
    with torch.no_grad():
        alone, together = (
            Scorer(model, [item], METRIC.losses, early_stop=False, candidates_per_pass=count).score(plan, candidates)
            for count in (1, 4)
        )
    assert torch.equal(alone.losses, together.losses)


def test_a_race_is_the_same_side_by_side() -> None:
    model = make("llama")
    batches = [items()[0]] * 2 + items() * 2
    plan = StructurePlan.dense(model)
    alone, together = (
        Scorer(model, batches, METRIC.losses, early_stop=False, racing=1.0, candidates_per_pass=count)
        for count in (1, 4)
    )
    for _ in range(2):
        with torch.no_grad():
            one, other = (scorer.score(plan, all_candidates(plan)) for scorer in (alone, together))
        assert torch.equal(one.complete, other.complete) and 0 < int(one.complete.sum()) < len(all_candidates(plan))
        torch.testing.assert_close(one.losses, other.losses, rtol=2e-4, atol=2e-5)
        plan = plan.keep("layers.2.attention", ())
    assert alone.evaluations == together.evaluations


@pytest.mark.parametrize("options", [{"racing": 1.0}, {"early_stop": False}, {"racing": 1.0, "candidates_per_pass": 4}])
def test_infinite_losses_are_an_error_of_their_own(options) -> None:
    class Overflowing(PerplexityMetric):
        def losses(self, logits, batch, dense):
            return super().losses(logits, batch, dense) / 0

    model = make("llama")
    plan = StructurePlan.dense(model)
    scorer = Scorer(model, items() * 3, Overflowing().losses, **options)
    with torch.no_grad(), pytest.raises(nncf.ValidationError, match="Step 1.*16 candidates.*not finite"):
        Elimination(plan).step(scorer, all_candidates(plan), lambda loss: loss)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("at", [3, 11, 40])
def test_a_pass_that_fails_leaves_the_model_as_it_was(count, at) -> None:
    model = make("opt")
    before = dict(model.named_modules())
    expected = model(**items()[0], use_cache=False).logits
    calls = []

    def fail(*_arguments):
        calls.append(1)
        if len(calls) == at:
            raise MemoryError

    hooks = [block.fc2.register_forward_pre_hook(fail) for block in blocks_of(model)]
    scorer = Scorer(model, items(), METRIC.losses, candidates_per_pass=count)
    plan = StructurePlan.dense(model)
    with torch.no_grad(), pytest.raises(MemoryError):
        scorer.score(plan, all_candidates(plan))
    for hook in hooks:
        hook.remove()
    assert {name: id(module) for name, module in model.named_modules()} == {
        name: id(module) for name, module in before.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**items()[0], use_cache=False).logits, expected)
