"""A tokenizer that OpenVINO cannot convert costs the tokenizer IR, not the export."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

import ov_ext.genai
import ov_ext.optimum
from tests.structure_models import make

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ByT5Tokenizer()
    model = make("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
    with caplog.at_level(logging.WARNING, "ov_ext"):
        folder = ov_ext.optimum.export(model, tokenizer, tmp_path / "ir")
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ov_ext"]
    assert "cannot convert ByT5Tokenizer" in said and "OpenVINO GenAI cannot read it" in said
    assert not [path for path in folder.iterdir() if "tokenizer" in path.name and path.suffix in (".xml", ".bin")]
    ids = AutoTokenizer.from_pretrained(folder)("text", return_tensors="pt")["input_ids"]
    loaded = ov_ext.optimum.load(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    torch.testing.assert_close(
        loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits, rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match="openvino_tokenizer.xml"):
        ov_ext.genai.pipeline(folder)


@pytest.mark.parametrize("text", ["{}", "no JSON"])
def test_damaged_tokenizers_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ov_ext.optimum.TokenizerError, match=f"tokenizer of {tmp_path} cannot be read"):
        ov_ext.optimum.load_tokenizer(tmp_path)
