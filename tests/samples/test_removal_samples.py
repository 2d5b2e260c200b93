"""samples/03_multipruner.py and 04_mamba_shedder.py from one end to the other, and what they share."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pytest
import torch
from peft import LoraModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

import nncf_ext
from nncf_ext import PerplexityMetric, StructurePlan, extract
from nncf_ext.pruning.candidates import Removal
from nncf_ext.pruning.greedy import Elimination
from nncf_ext.pruning.scoring import Scorer
from nncf_ext.structure.masking import masked
from nncf_ext.weights.int4 import codes_and_scales, decompressors
from tests.structure_models import make, tokens

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from evidence import recovery, scores, show  # noqa: E402
from evidence.text import batches  # noqa: E402
from removal import models, text  # noqa: E402
from train_tiny_mamba import CHUNK, fast  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", ["03_multipruner", "04_mamba_shedder"])
def test_a_quick_run_shows_everything(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / f"{script}.py"), "--quick", "--steps", "2", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert not first.returncode, first.stderr[-3000:]
    for shown in ("perplexity", "held-out windows", "nats to dense", "Picture:", "Text by", "def read_file(path)"):
        assert shown in first.stdout, shown
    assert "OTHER than" not in first.stdout
    assert json.loads((tmp_path / "quick" / "record.json").read_text())
    assert (tmp_path / "quick" / "frontier.png").stat().st_size > 10_000
    assert list((tmp_path / "quick").glob("search/*/plan.*.json"))


def test_matrix_products_compute_what_the_scan_computes() -> None:
    model, ids = make("mamba2_tied", use_bias=False), tokens(2, 2 * CHUNK)
    mixers = [block.mixer for block in model.backbone.layers]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with fast(model):
            assert all(block.mixer is not mixer for block, mixer in zip(model.backbone.layers, mixers, strict=True))
            found = model(input_ids=ids, use_cache=False).logits
    assert all(block.mixer is mixer for block, mixer in zip(model.backbone.layers, mixers, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_committed_mamba_is_what_its_provenance_says() -> None:
    folder = SAMPLES / "assets" / "tiny_mamba2"
    facts = json.loads((folder / "provenance.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.num_parameters() == facts["parameters"]
    assert facts["tokens"] == facts["steps"] * 16 * recovery.WINDOW
    with fast(model.eval()):
        loss = scores.losses(model, text.windows(AutoTokenizer.from_pretrained(folder), "heldout", 8))
    assert 2.6 < loss.mean() < 3.3  # nats a token; a uniform guess has 8.0


def test_a_searched_choice_beats_influence_and_influence_beats_chance() -> None:
    """Three branches of the committed Llama. Influence: how far a branch turns the residual stream (ShortGPT)."""
    model = models.load(SAMPLES / "assets" / "tiny_lm").requires_grad_(False)
    ids = text.windows(AutoTokenizer.from_pretrained(SAMPLES / "assets" / "tiny_lm"), "calibration", 4)[:, :128]
    dense, seen = StructurePlan.dense(model), {}
    candidates = [
        Removal(f"layers.{layer}.{branch}", ())
        for branch in ("attention", "mlp")
        for layer in range(len(dense.kept) // 2)
    ]
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for branch, norm in (("attention", block.input_layernorm), ("mlp", block.post_attention_layernorm)):
            see = partial(lambda place, _module, inputs: seen.update({place: inputs[0]}), f"layers.{layer}.{branch}")
            hooks.append(norm.register_forward_pre_hook(see))
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _module, inputs: seen.update(end=inputs[0])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        turns = {
            place: 1 - float(torch.cosine_similarity(before, after, dim=-1).mean())
            for (place, before), after in zip(list(seen.items())[:-1], list(seen.values())[1:], strict=True)
        }

        def loss(removed: Iterable[Removal]) -> float:
            plan = reduce(lambda plan, removal: removal.on(plan), removed, dense)
            with masked(model, plan):
                return float(scores.losses(model, ids).mean())

        search = Elimination(dense)
        scorer = Scorer(model, batches(ids, 4), PerplexityMetric().losses)
        for _ in range(3):
            left = [each for each in candidates if search.plan.kept[each.dimension]]
            search.step(scorer, left, lambda loss: loss)
        greedy = loss(Removal(step.dimension, ()) for step in search.plan.steps)
        influence = loss(sorted(candidates, key=lambda each: turns[each.dimension])[:3])
        draws = random.Random(0)
        chance = [loss(draws.sample(candidates, 3)) for _ in range(8)]
    assert greedy == pytest.approx(search.plan.steps[-1].score, abs=1e-4)
    assert greedy < min(influence, *chance) and influence < np.mean(chance)


@pytest.mark.parametrize(("rank", "rate"), [(4, 1e-2), (None, 1e-3)])
def test_recovery_learns_from_the_dense_model_and_keeps_shapes(
    rank: int | None, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make("llama")
    plan = StructurePlan.dense(dense).keep("layers.1.mlp", range(9)).keep("layers.2.attention", (0, 2))
    small, before = extract(dense, plan), {name: value.clone() for name, value in dense.state_dict().items()}
    rng = np.random.default_rng(0)
    stream = recovery.Stream(rng.integers(3, 96, 4 * recovery.WINDOW).astype(np.uint16), 2, seed=0)
    ids, adapted = stream.batch(0)[:, :32], []
    merge = LoraModel.merge_and_unload

    def look_and_merge(self: LoraModel) -> torch.nn.Module:
        with torch.no_grad():
            adapted.append(self.eval()(input_ids=ids, use_cache=False).logits)
        return merge(self)

    monkeypatch.setattr(LoraModel, "merge_and_unload", look_and_merge)

    def divergence(model: torch.nn.Module) -> float:
        with torch.no_grad():
            ours, wanted = (each(input_ids=ids, use_cache=False).logits.log_softmax(-1) for each in (model, dense))
        return float((wanted.exp() * (wanted - ours)).sum(-1).mean())

    far, shapes = divergence(small), {name: value.shape for name, value in small.state_dict().items()}
    result = recovery.recover(small, dense, stream, steps=8, learning_rate=rate, rank=rank)
    assert {name: value.shape for name, value in result.state_dict().items()} == shapes
    assert divergence(result) < 0.9 * far
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    if rank is not None:
        with torch.no_grad():
            torch.testing.assert_close(result(input_ids=ids, use_cache=False).logits, adapted[0], rtol=1e-4, atol=1e-4)


def test_recovery_on_the_grid_learns_and_keeps_zeros_and_scales() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    stream = recovery.Stream(np.random.default_rng(0).integers(3, 96, 512).astype(np.uint16), 4, seed=0, window=32)
    ids = stream.batch(0)
    grid = nncf_ext.compress(
        copy.deepcopy(dense),
        nncf_ext.CompressMode.SPARSE_MAGNITUDE,
        ratio=0.5,
        dataset=nncf.Dataset([{"input_ids": ids}]),
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64, keep_prerounding=True
        ),
    )

    def far(model: torch.nn.Module) -> float:
        with torch.no_grad():
            ours, wanted = (each(input_ids=ids, use_cache=False).logits.log_softmax(-1) for each in (model, dense))
        return float((wanted.exp() * (wanted - ours)).sum(-1).mean())

    def codes(model: torch.nn.Module) -> dict[str, Any]:
        return {path: codes_and_scales(model.get_parameter(path), hook) for path, hook in decompressors(model).items()}

    before = codes(grid)
    result = recovery.recover_on_grid(grid, dense, stream, steps=30, learning_rate=3e-3, rank=8)
    after = codes(result)
    assert before.keys() == after.keys() and len(after) == 14
    assert all(torch.equal(before[path][1], after[path][1]) for path in after)
    zeros = {path: nncf_ext.prerounding(grid).get_parameter(path) == 0 for path in after}
    assert all(not after[path][0][zeros[path]].any() and float(zeros[path].float().mean()) == 0.5 for path in after)
    assert any(not torch.equal(before[path][0], after[path][0]) for path in after)
    assert far(result) < 0.9 * far(grid)


@pytest.mark.slow
def test_an_interrupted_recovery_of_a_sparse_model_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "CHECKPOINT_STEPS", 2)
    dense, rng = make("llama"), np.random.default_rng(0)
    stream = recovery.Stream(rng.integers(3, 96, 8 * 32).astype(np.uint16), 2, seed=0, window=32)
    options: dict[str, Any] = {"steps": 4, "learning_rate": 1e-3, "rank": None, "folder": tmp_path}

    def sparse() -> torch.nn.Module:
        model = make("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight[:, ::2] = 0.0
        return model

    whole = recovery.recover(sparse(), dense, stream, **options | {"folder": None})
    seen = []

    class Interruption(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)
            if seen == [1, 2, 3]:
                raise KeyboardInterrupt

    bar = recovery.ProgressBar
    monkeypatch.setattr(recovery, "ProgressBar", lambda show: Interruption())
    with pytest.raises(KeyboardInterrupt):
        recovery.recover(sparse(), dense, stream, **options)
    monkeypatch.setattr(recovery, "ProgressBar", bar)
    resumed = recovery.recover(sparse(), dense, stream, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        if name.endswith("down_proj.weight"):
            assert not value[:, ::2].any() and value[:, 1::2].all()


def test_statistics() -> None:
    generator = np.random.default_rng(0)
    dense, noise = generator.normal(2, 1, 400), generator.normal(0, 0.1, 400)
    before, after = dense + 0.4 + noise, dense + 0.1 + noise
    value, low, high = scores.interval(scores.closed, after, before, dense)
    assert low < value < high and value == pytest.approx(0.75, abs=0.03)
    value, low, high = scores.interval(scores.difference, before, dense)
    assert 0.38 < low < 0.4 < high < 0.42 and value == pytest.approx(0.4 + noise.mean())
    assert show.in_words((0.25, 0.1, 0.3), ".0%") == "25% (95 %: 10% to 30%)"
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]]])
    loss = scores.losses(lambda **_: type("Output", (), {"logits": logits}), torch.tensor([[0, 1, 0]]))
    assert loss[0] == pytest.approx((np.log(2) + np.log(1 + np.exp(-2.0))) / 2)


def test_every_pass_over_the_text_takes_all_of_it() -> None:
    stream = recovery.Stream(np.arange(10 * recovery.WINDOW, dtype=np.uint16), 2, seed=3)
    passes = [torch.cat([stream.batch(step) for step in range(first, first + 5)]) for first in (0, 5)]
    for each in passes:
        assert sorted(each.flatten().tolist()) == list(range(10 * recovery.WINDOW))
    assert not torch.equal(*passes) and torch.equal(stream.batch(7), stream.batch(7))
    with pytest.raises(ValueError, match="needs 512 tokens, the text has 500"):
        recovery.Stream(np.zeros(500, np.uint16), 2, seed=0)
