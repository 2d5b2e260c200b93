"""A file of thresholds is refused by a model with other weights, and taken by the same weights in another form."""

import json

import nncf
import peft
import pytest
import torch
from torch import nn

import nncf_ext
import ov_ext
from nncf_ext import CompressMode
from nncf_ext.weights.activation_sparsity import activation_sparsity_of
from tests.properties.cases import Logits, llama

DATA = [{"input_ids": torch.arange(3, 25).view(2, 11)}]


def seeded(seed=1):
    torch.manual_seed(seed)
    return llama()


def sparse(model):
    return nncf_ext.compress(model, CompressMode.ACTIVATION_SPARSITY, ratio=0.4, dataset=nncf.Dataset(DATA))


def on_the_grid(model):
    return nncf_ext.compress(
        model,
        CompressMode.SPARSE_MAGNITUDE,
        ratio=0.5,
        dataset=nncf.Dataset(DATA),
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64
        ),
    )


@pytest.fixture
def file(tmp_path):
    nncf_ext.save_thresholds(sparse(seeded()), tmp_path / "thresholds.json")
    return tmp_path / "thresholds.json"


@pytest.mark.parametrize(
    "same",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to(torch.float16),
        lambda model: model.to(torch.bfloat16).float(),
        nn.DataParallel,
        lambda model: model.requires_grad_(False).train(),
        sparse,
    ],
    ids=["bfloat16", "float16", "rounded", "in a shell", "frozen", "calibrated before"],
)
def test_the_same_weights_take_them(file, same):
    model = seeded()
    nncf_ext.load_thresholds(same(model), file)
    found = activation_sparsity_of(model.model.layers[1].mlp.down_proj)
    assert found.threshold == json.loads(file.read_text())["model.layers.1.mlp.down_proj"]["threshold"]


def pruned(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter.abs() < parameter.abs().median()] = 0
    return model


def with_adapter(model):
    """Merged into two layers only."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return adapted.merge_and_unload()


@pytest.mark.parametrize(
    "other",
    [lambda _: seeded(2), pruned, with_adapter, on_the_grid],
    ids=["another", "pruned", "adapted", "on the grid"],
)
def test_other_weights_refuse_them(file, other):
    model = other(seeded())
    with pytest.raises(nncf.ValidationError, match="calibrated on other weights: .* Calibrate ACTIVATION_SPARSITY on"):
        nncf_ext.load_thresholds(model, file)
    assert all(activation_sparsity_of(module) is None for module in model.modules())


def test_files_of_scap_say_nothing_and_are_taken(file):
    rows = json.loads(file.read_text())
    for row in rows.values():
        del row["weights_digest"]
    file.write_text(json.dumps(rows))
    nncf_ext.load_thresholds(seeded(2), file)


@pytest.mark.parametrize("make", [seeded, lambda: on_the_grid(seeded())], ids=["floating", "on the grid"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_folders_are_read_in_every_type(tmp_path, make, dtype):
    model = sparse(make())
    nncf_ext.save_pretrained(model, tmp_path / "model")
    loaded = nncf_ext.load_pretrained(tmp_path / "model", dtype=dtype)
    nncf_ext.save_thresholds(model, tmp_path / "thresholds.json")
    nncf_ext.load_thresholds(loaded, tmp_path / "thresholds.json")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_export_changes_nothing(tmp_path):
    model = sparse(seeded())
    nncf_ext.save_thresholds(model, tmp_path / "before.json")
    ov_ext.convert_model(Logits(model), example_input=(DATA[0]["input_ids"],), method="trace")
    nncf_ext.save_thresholds(model, tmp_path / "after.json")
    assert (tmp_path / "before.json").read_text() == (tmp_path / "after.json").read_text()
