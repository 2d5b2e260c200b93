"""The lm-eval harness scores a packed model through its own OpenVINO model class."""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import nncf_ext
import ov_ext
import ov_ext.optimum

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

import perplexity  # noqa: E402
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


@pytest.fixture(scope="module")
def packed_folder(sparse_model, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ov_ext.optimum.export(sparse_model, tokenizer, tmp_path_factory.mktemp("packed") / "model")
    core = ov_ext.add_extension(ov.Core())
    packed, report = ov_ext.pack_sparse_weights(core.read_model(folder / ov_ext.optimum.MODEL))
    assert len(report.replaced) > 0
    ov_ext.save_model(packed, folder / ov_ext.optimum.MODEL)
    return folder


def test_a_packed_model_is_scored_by_what_it_writes(packed_folder: Path, tokenizer, tmp_path: Path) -> None:
    folder = packed_folder
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


def test_perplexity_of_a_packed_model(
    packed_folder: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a sum over the tokens of each document, behind the token that begins a text."""
    text = "import os\n\n\ndef read_file(path):\n    return open(path).read()\n" * 6
    (tmp_path / "text.txt").write_text(text)
    model, nats = ov_ext.optimum.load(packed_folder), 0.0
    parts = (text[:150], text[150:300])
    for part in parts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(part, add_special_tokens=False)["input_ids"]]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        nats += float(F.cross_entropy(torch.as_tensor(logits).double(), ids[0, 1:], reduction="sum"))
    bits = nats / 300 / np.log(2)
    arguments = ["perplexity.py", str(packed_folder), "--text", str(tmp_path / "text.txt"), "--length", "150"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--documents", "2"])
    perplexity.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    shown = [float(cell) for cell in row.split("│")[2:4]]
    assert shown == pytest.approx([bits, 2**bits], rel=1e-2)


def test_documents_are_spread_over_a_text() -> None:
    text = "".join(f"{index:02d}" for index in range(50))
    assert perplexity.documents(text, 4, 5) == ["0001", "1011", "2021", "3031", "4041"]
    assert perplexity.documents("short", 10, 5) == ["short"]
