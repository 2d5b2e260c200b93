"""The report: what every weight of a model is now, and why compression left it alone."""

import copy
import io
import json

import nncf
import pytest
import torch
from rich.console import Console
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressionReport, CompressMode
from nncf_ext.report import WeightReport

INT4 = nncf.CompressWeightsMode.INT4_SYM


def rows_of(model):
    return {row.name: row for row in nncf_ext.compression_report(model).weights}


def test_dense_model(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[:64] = 0.0
    rows = rows_of(model)
    assert rows.keys() == {name for name, value in model.named_parameters() if value.dim() > 1}
    up = rows["model.layers.0.mlp.up_proj.weight"]
    assert (up.sparsity, up.shape, up.bytes_before, up.bytes_after) == (0.25, (256, 128), 131072, 131072)
    assert (up.mode, up.error, up.note, up.precision) == (None, None, "not compressed", "float32")
    assert rows["model.embed_tokens.weight"].note == "embedding"
    assert rows["lm_head.weight"].note.startswith("output head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_model_counts_codes_and_bytes(tiny_llama, token_dataset, dtype):
    model = tiny_llama().to(dtype)
    advanced = AdvancedSparseWeightsParameters(quantization=INT4, group_size=64)
    nncf_ext.compress(model, CompressMode.SPARSE_GPT, ratio=0.5, dataset=token_dataset, advanced_parameters=advanced)
    report = nncf_ext.compression_report(model)
    row = next(row for row in report.weights if row.name == "model.layers.1.mlp.down_proj.weight")
    assert row.shape == (128, 256) and row.precision == "int4"
    assert row.bytes_before == 128 * 256 * dtype.itemsize
    assert row.bytes_after == 128 * 256 // 2 + 128 * 4 * 2
    assert 0.5 <= row.sparsity < 0.65
    assert 0 < row.error < 0.6 and row.error_of == "output" and row.note is None
    assert len(report.compressed) == 14 and len(report.untouched) == 2
    assert 0.5 <= report.sparsity < 0.65


def test_error_of_the_weight_when_there_is_no_data(tiny_llama):
    model = tiny_llama()
    exact = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    nncf_ext.compress(model, CompressMode.SPARSE_MAGNITUDE, ratio=0.5)
    row = rows_of(model)["model.layers.0.self_attn.q_proj.weight"]
    changed = torch.linalg.norm(exact - model.model.layers[0].self_attn.q_proj.weight.detach())
    assert row.error_of == "weight"
    assert row.error == pytest.approx(float(changed / torch.linalg.norm(exact)), rel=1e-6)


def test_ignored_layers_say_so(tiny_llama, token_dataset):
    scope = nncf.IgnoredScope(patterns=[r".*o_proj"])
    model = nncf_ext.compress(
        tiny_llama(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset, ignored_scope=scope
    )
    rows = rows_of(model)
    assert rows["model.layers.0.self_attn.o_proj.weight"].note == "ignored scope"
    assert rows["model.layers.0.self_attn.q_proj.weight"].note is None


def test_second_pass_does_not_forget_the_first(tiny_llama, token_dataset):
    model = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)
    nncf_ext.compress(
        model,
        CompressMode.SPARSE_GPT,
        ratio=0.0,
        dataset=token_dataset,
        ignored_scope=nncf.IgnoredScope(patterns=[r".*o_proj"]),
        advanced_parameters=AdvancedSparseWeightsParameters(quantization=INT4),
    )
    rows = rows_of(model)
    sparse, packed = (rows[f"model.layers.0.self_attn.{name}.weight"] for name in ("o_proj", "q_proj"))
    assert (sparse.mode, sparse.precision, sparse.sparsity, sparse.note) == ("sparse_wanda", "float32", 0.5, None)
    assert (packed.mode, packed.precision) == ("sparse_gpt", "int4") and packed.sparsity >= 0.5


def test_experts_in_one_tensor_are_named(token_items, token_dataset):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=320,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    experts = copy.deepcopy(model.model.layers[0].mlp.experts.state_dict())
    nncf_ext.compress(model, CompressMode.SPARSE_GPT, ratio=0.5, dataset=token_dataset)
    rows = rows_of(model)
    for name in ("gate_up_proj", "down_proj"):
        note = rows[f"model.layers.0.mlp.experts.{name}"].note
        assert "3-D parameter of MixtralExperts" in note and "3 experts" in note
        assert torch.equal(model.model.layers[0].mlp.experts.state_dict()[name], experts[name])
    assert rows["model.layers.1.self_attn.q_proj.weight"].sparsity == 0.5
    assert "not torch.nn.Linear" in rows["model.layers.1.mlp.gate.weight"].note


def test_transposed_layers_of_gpt2_are_named_and_refused(token_dataset):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=320, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    assert "Conv1D" in rows_of(model)["transformer.h.0.mlp.c_fc.weight"].note
    with pytest.raises(nncf.ValidationError, match="no linear layer.*Conv1D"):
        nncf_ext.compress(model, CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, 2)
        self.position = nn.Parameter(torch.zeros(4, 8))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.blocks(hidden).mean(dim=1))


def test_other_kinds_of_weights_are_named():
    torch.manual_seed(0)
    model = Vision()
    items = [torch.randn(2, 1, 4, 4) for _ in range(3)]
    nncf_ext.compress(model, CompressMode.SPARSE_WANDA, ratio=0.5, dataset=nncf.Dataset(items))
    notes = {name: row.note for name, row in rows_of(model).items()}
    assert notes["patch.weight"] == "convolution"
    assert notes["classifier.weight"] == "outside the repeated blocks"
    assert "2-D parameter of Vision" in notes["position"]
    assert notes["blocks.0.0.weight"] is None and rows_of(model)["blocks.1.2.weight"].sparsity == 0.5


def test_shared_weights_are_left_alone_and_counted_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.third.weight = self.first.weight

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    model = Shared()
    before = model.first.weight.detach().clone()
    nncf_ext.compress(model, CompressMode.SPARSE_MAGNITUDE, ratio=0.5)
    rows = rows_of(model)
    assert rows["first.weight"].note == "weight shared with third.weight"
    assert rows["third.weight"].note == "weight shared with first.weight"
    assert torch.equal(model.first.weight, before) and rows["second.weight"].sparsity == 0.5
    assert nncf_ext.compression_report(model).bytes_after == 2 * 8 * 8 * 4


def test_model_compressed_by_nncf_is_understood(tiny_llama, token_items):
    model = nncf.compress_weights(
        tiny_llama(), mode=INT4, group_size=128, ratio=1.0, dataset=nncf.Dataset(token_items[:1])
    )
    rows = rows_of(model)
    row = rows["model.layers.0.mlp.up_proj.weight"]
    assert row.precision == "int4" and row.shape == (256, 128) and row.bytes_after == 256 * 64 + 256 * 2
    assert "INT4SymmetricWeightsDecompressor" in row.note
    embedding = rows["model.embed_tokens.weight"]
    assert embedding.precision == "uint8" and embedding.shape == (320, 128) and "INT8" in embedding.note


def test_text_and_dictionary(tiny_llama, token_dataset):
    model = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)
    report = nncf_ext.compression_report(model)
    text = str(report)
    for row in report.weights:
        assert row.name in text
    assert "14 of 16 treated" in text and "embedding" in text and "50.0%" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["sparsity"] == 0.5 and len(data["weights"]) == 16
    assert data["bytes_before"] == data["bytes_after"] == sum(row.bytes_after for row in report.weights)


def test_summary_has_a_row_for_each_type_and_note():
    rows = [
        WeightReport("a", (4, 4), 0.5, 64, 12, "int4", "sparse_gpt", 0.25, "output", None),
        WeightReport("b", (4, 4), 0.75, 64, 12, "int4", "sparse_gpt", 0.125, "output", None),
        WeightReport("c", (4, 4), 0.0, 64, 64, "float32", None, None, None, "embedding"),
        WeightReport("d", (4, 4), 0.5, 64, 64, "float32", "sparse_gpt", 0.5, "output", "no multiple"),
    ]
    text = io.StringIO()
    Console(file=text, width=120).print(CompressionReport(tuple(rows)).summary())
    lines = [line.replace("│", " ").split() for line in text.getvalue().splitlines()]
    assert ["int4", "2", "50.0%", "-", "75.0%", "128", "24", "0.125", "-", "0.250"] in lines
    assert ["float32", "1", "0.0%", "64", "64", "embedding"] in lines
    assert ["float32", "1", "50.0%", "64", "64", "0.500", "no", "multiple"] in lines
    assert ["total", "3", "of", "4", "treated", "58.3%", "256", "152"] in lines


def test_record_follows_a_copy(tiny_llama, token_dataset):
    model = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)
    assert str(nncf_ext.compression_report(copy.deepcopy(model))) == str(nncf_ext.compression_report(model))
