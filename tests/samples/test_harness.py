"""The lm-eval harness scores a packed model through its own OpenVINO model class."""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import openvino as ov
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nncf_ext
import ov_ext
import ov_ext.optimum

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from adapters import harness  # noqa: E402
from adapters.task import Item, Task  # noqa: E402

pytestmark = pytest.mark.slow

PROMPTS = (
    "def read_file(path):\n    return",
    "import numpy as",
    "class Config:\n    def __init__(self,",
    "x = [1, 2,",
    "import os\nimport",
)


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(SAMPLES / "assets" / "tiny_lm")


@pytest.fixture(scope="module")
def sparse_model() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(SAMPLES / "assets" / "tiny_lm", dtype=torch.float32).eval()
    ids = torch.arange(512).view(2, 256)
    return nncf_ext.compress(
        model,
        nncf_ext.CompressMode.SPARSE_MAGNITUDE,
        ratio=0.5,
        dataset=nncf.Dataset([{"input_ids": row[None]} for row in ids]),
        subset_size=2,
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(quantization=nncf.CompressWeightsMode.INT4_SYM),
    )


def test_a_packed_model_is_scored_by_what_it_writes(sparse_model, tokenizer, tmp_path: Path) -> None:
    folder = ov_ext.optimum.export(sparse_model, tokenizer, tmp_path / "model")
    core = ov_ext.add_extension(ov.Core())
    packed, report = ov_ext.pack_sparse_weights(core.read_model(folder / ov_ext.optimum.MODEL))
    assert len(report.replaced) > 0
    ov_ext.save_model(packed, folder / ov_ext.optimum.MODEL)

    model, items = ov_ext.optimum.load(folder), []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=False).replace("<|endoftext|>", "\n")
        if "\n" in text:  # otherwise the line has no end within the limit
            line = text.split("\n")[0]
            items += [Item(prompt, line), Item(prompt, line + "!")]  # right, and wrong
    assert len(items) >= 4
    tasks = harness.write_task(Task("written", (), (), tuple(items)), tmp_path / "tasks")
    found = harness.score(folder, tasks, "written", batch=4)
    assert found["exact_match,none"] == pytest.approx(0.5)
    assert harness.score(folder, tasks, "written", limit=1)["exact_match,none"] == pytest.approx(1.0)
