"""
On the committed language model: which method loses least, measured by paired differences over fixed held-out windows.

The spread of a window's loss is far larger than the effect of a method; the difference of two methods on the same
window is not. So means of paired differences are compared with their standard errors, never losses of separate runs.
"""

from itertools import pairwise
from pathlib import Path

import nncf
import pytest
import torch

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.algorithms.sparse_weights.algorithm import MODES

pytestmark = pytest.mark.slow

ASSETS = Path(__file__).parents[2] / "samples" / "assets"
WINDOW = 256
CALIBRATION_WINDOWS = 48
EVALUATION_WINDOWS = 80
RATIOS = (0.5, 0.7)


class LanguageModel:
    """The dense model, its data, and its loss on every held-out window; made once for all tests of this file."""

    def __init__(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_lm")
        self.dense = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()
        calibration = self._windows("calibration.txt", CALIBRATION_WINDOWS)
        self.dataset = nncf.Dataset([{"input_ids": window.unsqueeze(0)} for window in calibration])
        self._heldout = self._windows("heldout.txt", EVALUATION_WINDOWS)
        self.dense_loss = self.loss(self.dense)
        self.losses: dict[tuple[CompressMode, float], torch.Tensor] = {}

    def _windows(self, file: str, count: int) -> torch.Tensor:
        """`count` windows [count, tokens], evenly spread over a text."""
        text = (ASSETS / file).read_text(encoding="utf-8")
        tokens = torch.tensor(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        starts = torch.arange(count) * (len(tokens) - WINDOW) // (count - 1)
        return torch.stack([tokens[start : start + WINDOW] for start in starts])

    @torch.no_grad()
    def loss(self, model) -> torch.Tensor:
        """Mean negative log-likelihood of each held-out window in nats per token, [windows]."""
        means = []
        for batch in self._heldout.split(8):
            logits = model(input_ids=batch).logits[:, :-1].transpose(1, 2).float()
            means.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(dim=1))
        return torch.cat(means)

    def compressed_loss(self, mode: CompressMode, ratio: float) -> torch.Tensor:
        if (mode, ratio) not in self.losses:
            model = nncf_ext.compress(self.dense, mode, ratio=ratio, dataset=self.dataset, do_copy=True)
            self.losses[mode, ratio] = self.loss(model)
        return self.losses[mode, ratio]


@pytest.fixture(scope="module")
def language_model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LanguageModel()
    torch.set_num_threads(threads)


def standard_errors(differences: torch.Tensor) -> float:
    """By how many standard errors the mean of paired differences is above zero."""
    return float(differences.mean() / (differences.std() / len(differences) ** 0.5))


@pytest.mark.parametrize("ratio", RATIOS)
def test_sparsegpt_is_better_than_wanda_is_better_than_magnitude(language_model, ratio):
    losses = [language_model.compressed_loss(mode, ratio) for mode in MODES]
    found = {
        f"{worse.value} above {better.value}": standard_errors(losses[index] - losses[index + 1])
        for index, (worse, better) in enumerate(pairwise(MODES))
    }
    assert all(value > 2 for value in found.values()), found


def test_more_zeros_cost_more(language_model):
    half, more = (language_model.compressed_loss(CompressMode.SPARSE_GPT, ratio) for ratio in RATIOS)
    assert standard_errors(half - language_model.dense_loss) > 2
    assert standard_errors(more - half) > 2


def test_int4_on_top_of_sparsity_costs_little(language_model):
    """Mask-keeping GPTQ adds less to the loss than the zeros did."""
    advanced = AdvancedSparseWeightsParameters(quantization=nncf.CompressWeightsMode.INT4_SYM)
    model = nncf_ext.compress(
        language_model.dense,
        CompressMode.SPARSE_GPT,
        ratio=0.5,
        dataset=language_model.dataset,
        do_copy=True,
        advanced_parameters=advanced,
    )
    sparse = language_model.compressed_loss(CompressMode.SPARSE_GPT, 0.5)
    added = float((language_model.loss(model) - sparse).mean())
    assert added < 0.5 * float((sparse - language_model.dense_loss).mean())
    assert nncf_ext.compression_report(model).sparsity > 0.5
