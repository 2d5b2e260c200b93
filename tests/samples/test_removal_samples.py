"""samples/03_multipruner.py and 04_mamba_shedder.py from one end to the other, and what they share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.structure_models import make, tokens

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from removal import evidence, text  # noqa: E402
from train_tiny_mamba import CHUNK, fast  # noqa: E402


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
    assert facts["tokens"] == facts["steps"] * 16 * text.WINDOW
    with fast(model.eval()):
        loss = evidence.losses(model, text.windows(AutoTokenizer.from_pretrained(folder), "heldout", 8))
    assert 2.6 < loss.mean() < 3.3  # nats a token; a uniform guess has 8.0


def test_statistics() -> None:
    generator = np.random.default_rng(0)
    dense, noise = generator.normal(2, 1, 400), generator.normal(0, 0.1, 400)
    before, after = dense + 0.4 + noise, dense + 0.1 + noise
    value, low, high = evidence.interval(evidence.closed, after, before, dense)
    assert low < value < high and value == pytest.approx(0.75, abs=0.03)
    value, low, high = evidence.interval(evidence.difference, before, dense)
    assert 0.38 < low < 0.4 < high < 0.42 and value == pytest.approx(0.4 + noise.mean())
    assert evidence.in_words((0.25, 0.1, 0.3), ".0%") == "25% (95 %: 10% to 30%)"
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]]])
    loss = evidence.losses(lambda **_: type("Output", (), {"logits": logits}), torch.tensor([[0, 1, 0]]))
    assert loss[0] == pytest.approx((np.log(2) + np.log(1 + np.exp(-2.0))) / 2)


def test_every_pass_over_the_text_takes_all_of_it() -> None:
    stream = text.Stream(np.arange(10 * text.WINDOW, dtype=np.uint16), 2, seed=3)
    passes = [torch.cat([stream.batch(step) for step in range(first, first + 5)]) for first in (0, 5)]
    for each in passes:
        assert sorted(each.flatten().tolist()) == list(range(10 * text.WINDOW))
    assert not torch.equal(*passes) and torch.equal(stream.batch(7), stream.batch(7))
    with pytest.raises(ValueError, match="needs 512 tokens, the text has 500"):
        text.Stream(np.zeros(500, np.uint16), 2, seed=0)
