"""Models of every task, from torch through a folder of this package to OpenVINO: the class and the numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
import transformers

import nncf_ext
import ov_ext.optimum

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 64}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
CASES = {
    "BertModel": TEXT,
    "BertForMaskedLM": TEXT,
    "BertForSequenceClassification": {**TEXT, "num_labels": 3},
    "BertForTokenClassification": {**TEXT, "num_labels": 3},
    "BertForQuestionAnswering": TEXT,
    "BertForMultipleChoice": TEXT,
    "RobertaForSequenceClassification": {**TEXT, "num_labels": 3},
    "LlamaModel": TEXT,
    "LlamaForSequenceClassification": {**TEXT, "num_labels": 3, "pad_token_id": 0},
    "LlamaForCausalLM": TEXT,
    "ViTModel": IMAGE,
    "ViTForImageClassification": {**IMAGE, "num_labels": 3},
    "T5ForConditionalGeneration": {
        "vocab_size": 99,
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 2,
    },
}


def inputs(model: Any) -> dict[str, torch.Tensor]:
    if "pixel_values" in model.main_input_name:
        return {"pixel_values": torch.randn(1, 3, 16, 16)}
    ids = torch.arange(3, 11)[None]
    if type(model).__name__.endswith("MultipleChoice"):
        ids = ids.expand(1, 2, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", CASES)
def test_saved_loaded_exported(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = getattr(transformers, name)
    model = architecture(architecture.config_class(**CASES[name])).bfloat16().float().eval()  # packing rounds nothing
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[module.weight.abs() < module.weight.abs().median()] = 0
    nncf_ext.save_pretrained(model, tmp_path / "torch")
    loaded = nncf_ext.load_pretrained(tmp_path / "torch")
    assert type(loaded) is architecture

    folder = ov_ext.optimum.export(loaded, None, tmp_path / "ir", rest=None)
    if name.startswith("T5"):
        assert {path.name for path in folder.glob("*.xml")} >= {
            "openvino_encoder_model.xml",
            "openvino_decoder_model.xml",
        }
        return
    given = inputs(model)
    with torch.no_grad():
        wanted = model(**given)[0].numpy()
    core = ov_ext.add_extension(ov.Core())
    ir = core.read_model(folder / "openvino_model.xml")
    ir, _ = ov_ext.pack_sparse_weights(
        ir, ov_ext.SparsePolicy(min_sparsity=0.4, min_weights=0, max_growth=999, activation_group=0)
    )
    fed: dict[str, Any] = {key: value.numpy() for key, value in given.items()}
    for parameter in ir.inputs:  # what torch makes up by itself
        shape = given["input_ids"].shape if "input_ids" in given else ()
        missing = {"token_type_ids": np.zeros(shape, np.int64), "beam_idx": np.zeros(1, np.int32)}
        missing["position_ids"] = np.arange(8)[None] if shape else np.zeros(0)
        fed.setdefault(parameter.any_name, missing.get(parameter.any_name))
    names = {parameter.any_name for parameter in ir.inputs}
    compiled = core.compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({key: value for key, value in fed.items() if key in names})[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
