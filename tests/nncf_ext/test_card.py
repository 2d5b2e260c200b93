"""Model cards of saved folders."""

from pathlib import Path

import nncf
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import nncf_ext
from tests.structure_models import make

SOURCE = """---
license: mit
base_model: somebody/something
language: en
widget: []
---

# Something
"""


def compressed(model: torch.nn.Module) -> torch.nn.Module:
    return nncf_ext.compress(
        model,
        nncf_ext.CompressMode.SPARSE_WANDA,
        ratio=0.5,
        dataset=nncf.Dataset([{"input_ids": torch.arange(3, 19)[None]}]),
    )


def test_a_card_says_what_was_done_and_carries_the_licence_on(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(SOURCE)
    model = compressed(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    nncf_ext.save_pretrained(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and card.data.base_model == "somebody/something" and card.data.language == "en"
    assert {"nncf-ext", "sparse"} <= set(card.data.tags) and not hasattr(card.data, "widget")
    assert "by `sparse_wanda`: float32, 50.0% zeros" in card.text and "load_pretrained" in card.text


def test_a_card_of_ours_is_renewed_and_one_of_somebody_else_stays(tmp_path: Path) -> None:
    nncf_ext.save_pretrained(make("llama"), tmp_path / "out")
    first = (tmp_path / "out" / "README.md").read_text()
    assert "% zeros" not in first
    nncf_ext.save_pretrained(compressed(make("llama")), tmp_path / "out")
    assert "50.0% zeros" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    nncf_ext.save_pretrained(make("llama"), tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


def test_a_cut_model_says_so(tmp_path: Path) -> None:
    dense = make("llama")
    plan = nncf_ext.StructurePlan.dense(dense).keep("layers.1.mlp", range(9))
    nncf_ext.save_pretrained(nncf_ext.extract(dense, plan), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "pruned" in card.data.tags and "Parts of the structure were removed" in card.text
