"""Models with layers of different sizes as folders: read strictly, from the folder alone, refused by stock classes."""

import json
import os
import subprocess
import sys

import nncf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nncf_ext
from nncf_ext.importance.blocks import l1_norm
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from nncf_ext.structure.uniform import snap_to_uniform
from tests.structure_models import CAUSAL, ENCODERS, HYBRIDS, STATE_SPACE, by_layer, cached_logits, logits, make, tokens

SCANNED = STATE_SPACE | HYBRIDS


def uneven(name: str) -> torch.nn.Module:
    """Layer 0 without attention, layer 1 gone, layer 2 with one head group less, layer 3 with three channels."""
    model = make(name)
    plan = (
        StructurePlan.dense(model)
        .keep("layers.0.attention", ())
        .keep("layers.1.attention", ())
        .keep("layers.1.mlp", ())
    )
    heads = len(plan.kept["layers.2.attention"])
    return extract_structure(model, plan.keep("layers.2.attention", range(1, heads)).keep("layers.3.mlp", (2, 30, 11)))


def without_states(name: str) -> torch.nn.Module:
    """Two layers without state spaces; of a hybrid one without attention, one use of the shared MLP gone as well."""
    model = make(name)
    plan = StructurePlan.dense(model).keep("layers.0.mamba", (0,)).keep("layers.2.mamba", (0,))
    if name in HYBRIDS:
        plan = plan.keep("layers.3.attention", ()).keep("layers.4.mlp", ()).keep("layers.1.mamba", ())
    return extract_structure(model, plan)


def uniform(name: str) -> torch.nn.Module:
    """Every layer with half of the head groups and 16 channels; layer 3 gone."""
    model = make(name)
    plan = StructurePlan.dense(model).keep("layers.3.attention", ()).keep("layers.3.mlp", ())
    for layer in range(3):
        heads = len(plan.kept[f"layers.{layer}.attention"])
        plan = plan.keep(f"layers.{layer}.attention", range(heads // 2)).keep(
            f"layers.{layer}.mlp", range(layer, 16 + layer)
        )
    return extract_structure(model, plan)


@pytest.mark.parametrize("name", CAUSAL | ENCODERS)
def test_round_trip_of_uneven_layers(name, tmp_path) -> None:
    small, ids = uneven(name), tokens()
    nncf_ext.save_pretrained(small, tmp_path)
    loaded = nncf_ext.load_pretrained(tmp_path)
    assert type(loaded) is type(small)
    assert torch.equal(logits(loaded, ids), logits(small, ids))
    if name in CAUSAL:
        assert torch.equal(cached_logits(loaded, ids), cached_logits(small, ids))
    own, theirs = small.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    stored = load_file(tmp_path / "nncf_model.safetensors")
    assert sum(stored[key].numel() for key in stored.keys() & own.keys()) <= sum(each.numel() for each in own.values())


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma", "llama_tied"])
def test_uniform_layers_load_in_stock_transformers(name, tmp_path) -> None:
    small, ids = uniform(name), tokens()
    nncf_ext.save_pretrained(small, tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded, ids), logits(small, ids))
    assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path), ids), logits(small, ids))
    assert loaded.config.num_hidden_layers == 3 and loaded.config.intermediate_size == 16


@pytest.mark.parametrize("name", CAUSAL)
def test_any_plan_can_be_made_uniform(name, tmp_path) -> None:
    """Layer 1 gone, layer 0 without attention, few channels in layer 2: stock classes load the even one."""
    model = make(name)
    plan = (
        StructurePlan.dense(model)
        .keep("layers.1.attention", ())
        .keep("layers.1.mlp", ())
        .keep("layers.0.attention", ())
    )
    plan = plan.keep("layers.2.mlp", range(6))
    even = snap_to_uniform(model, plan, multiple=4, score=l1_norm)
    assert snap_to_uniform(model, plan, multiple=4).kept["layers.0.mlp"] == tuple(range(28))
    sizes = {tuple(len(kept[branch]) for branch in ("attention", "mlp")) for kept in by_layer(even)}
    assert (0, 0) in sizes and len(sizes) == 2
    heads, width = max(sizes)
    assert width == 28 and heads in (1, 2, 4)  # (40 + 6 + 40) / 3; two of three layers had attention
    small = extract_structure(model, even)
    nncf_ext.save_pretrained(small, tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.num_hidden_layers == 3
    assert torch.equal(logits(loaded, tokens()), logits(small, tokens()))
    with pytest.raises(nncf.ValidationError, match="multiple=41 .*40 channels"):
        snap_to_uniform(model, plan, multiple=41)


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_weights_of_before_do_not_come_back(branch, tmp_path) -> None:
    model = make("llama")
    small = extract_structure(model, StructurePlan.dense(model).keep(f"layers.1.{branch}", ()))
    nncf_ext.save_pretrained(model, tmp_path)
    nncf_ext.save_pretrained(small, tmp_path)
    with pytest.raises((OSError, ValueError)):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(small, tokens()))


@pytest.mark.slow
def test_a_fresh_process_needs_the_folder_alone(tmp_path) -> None:
    small, ids = uneven("qwen3"), tokens()
    nncf_ext.save_pretrained(small, tmp_path)
    code = (
        "import sys, torch, nncf_ext\n"
        "model = nncf_ext.load_pretrained(sys.argv[1])\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "with torch.no_grad(): torch.save(model(input_ids=ids).logits, sys.argv[3])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ids.tolist()), str(tmp_path / "logits.pt")], check=True
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(small, ids), rtol=1e-5, atol=1e-5)


REMOTE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nncf_ext", "nncf", "ov_ext"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch, transformers
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    kind = "AutoModelForCausalLM" if (torch.load(f"{folder}/causal.pt")) else "AutoModelForMaskedLM"
    model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True)
    ids = torch.load(f"{folder}/ids.pt")
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, f"{folder}/logits.pt")
        if kind == "AutoModelForCausalLM":
            made = model.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
            torch.save(made, f"{folder}/generated.pt")
    half = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
"""


@pytest.mark.slow
def test_trust_remote_code_needs_no_package_of_ours(tmp_path) -> None:
    """All families in one process, which cannot import ours."""
    made = {name: uneven(name) for name in CAUSAL | ENCODERS} | {name: without_states(name) for name in SCANNED}
    for name, small in made.items():
        nncf_ext.save_pretrained(small, tmp_path / name)
        torch.save(tokens(), tmp_path / name / "ids.pt")
        torch.save(name not in ENCODERS, tmp_path / name / "causal.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, str(tmp_path), *made]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    for name, small in made.items():
        found = torch.load(tmp_path / name / "logits.pt")
        torch.testing.assert_close(found, logits(small, tokens()), rtol=1e-5, atol=1e-5)
        if name not in ENCODERS:
            asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            expected = small.generate(input_ids=tokens(), **asked)
            assert torch.equal(torch.load(tmp_path / name / "generated.pt"), expected), name


def test_what_the_folder_says(tmp_path) -> None:
    nncf_ext.save_pretrained(uneven("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nncf_structured" and config["base_model_type"] == "llama"
    assert config["num_hidden_layers"] == 3 and config["head_dim"] == 6
    assert config["per_layer_config"] == {
        "0": {"skip": ["attention"]},
        "1": {"num_attention_heads": 6, "num_key_value_heads": 3},
        "2": {"intermediate_size": 3},
    }
    stored = load_file(tmp_path / "nncf_model.safetensors")
    assert stored["model.layers.2.mlp.up_proj.weight"].shape == (3, 32)
    assert not [name for name in stored if name.startswith("model.layers.0.") and ("attn" in name or "input_" in name)]


def test_other_floating_type(tmp_path) -> None:
    small = uneven("llama")
    nncf_ext.save_pretrained(small, tmp_path)
    loaded = nncf_ext.load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}


def test_uneven_layers_on_the_grid(tiny_llama, token_dataset, tmp_path) -> None:
    dense = tiny_llama(layers=3)
    plan = StructurePlan.dense(dense).keep("layers.0.mlp", range(64, 192)).keep("layers.1.attention", ())
    small = nncf_ext.compress(
        extract_structure(dense, plan),
        nncf_ext.CompressMode.SPARSE_MAGNITUDE,
        ratio=0.5,
        dataset=token_dataset,
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64
        ),
    )
    nncf_ext.save_pretrained(small, tmp_path)
    loaded = nncf_ext.load_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(small, tokens()))
    assert loaded.model.layers[0].mlp.down_proj.in_features == 128
    with pytest.raises(nncf.UnsupportedModelError, match="Extract the plain model first"):
        extract_structure(small, StructurePlan.dense(dense))
    # A folder that is written again forgets what it held before.
    nncf_ext.save_pretrained(extract_structure(dense, plan), tmp_path)
    assert torch.equal(
        logits(nncf_ext.load_pretrained(tmp_path), tokens()), logits(extract_structure(dense, plan), tokens())
    )
    nncf_ext.save_pretrained(dense, tmp_path)
    assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path), tokens()), logits(dense, tokens()))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "version", "layer", "size", "class", "weights"])
def test_damaged_folders(change, tmp_path) -> None:
    nncf_ext.save_pretrained(uneven("llama"), tmp_path)
    weights, place = tmp_path / "nncf_model.safetensors", "model.layers.2.mlp.up_proj.weight"
    state, config = load_file(weights), json.loads((tmp_path / "config.json").read_text())
    message = {
        "missing": "missing",
        "unexpected": "unexpected",
        "shape": r"nncf_model.safetensors: model.layers.2.mlp.up_proj.weight is \[4, 32\]",
        "version": "Upgrade",
        "layer": "layers 0 to 2",
        "size": "multiple of 2 up to",
        "class": "no model that transformers knows",
        "weights": "It is missing",
    }[change]
    if change == "missing":
        del state[place]
    elif change == "unexpected":
        state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(48, 32)
    elif change == "shape":
        state[place] = torch.zeros(4, 32)
    elif change == "version":
        config["structure_version"] = 2
    elif change == "layer":
        config["per_layer_config"]["3"] = {"skip": ["mlp"]}
    elif change == "size":
        config["per_layer_config"]["1"]["num_attention_heads"] = 5
    elif change == "class":
        config["architectures"] = ["AutoConfig"]
    save_file(state, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if change == "weights":
        weights.unlink()
    with pytest.raises(nncf.ValidationError, match=message):
        nncf_ext.load_pretrained(tmp_path)
