"""Folders of this package in stock classes of transformers: the same numbers, or a refusal that names the cure."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import nncf_ext
from nncf_ext.saving.quantizer import GridConfig
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from nncf_ext.weights.int4 import codes_and_scales, decompressors, pack
from tests.structure_models import logits, tokens

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def on_grid(model: nn.Module, *names: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Puts the projections of a model, and more weights by name, on a random grid.

    :return: The codes and scales, by the path of the weight.
    """
    generator = torch.Generator().manual_seed(5)
    paths = [f"{path}.weight" for path, each in model.named_modules() if isinstance(each, nn.Linear) and "proj" in path]
    grid = {}
    for path in [*paths, *names]:
        rows, columns = model.get_parameter(path).shape
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
        scales = (torch.rand(rows, columns // 64, generator=generator) / 32 + 0.01).half()
        pack(model, path, codes, scales)
        grid[path] = codes, scales
    return grid


def check_grid(model: nn.Module, grid: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    found = decompressors(model)
    assert found.keys() == grid.keys()
    for path, (codes, scales) in grid.items():
        own_codes, own_scales = codes_and_scales(model.get_parameter(path), found[path])
        assert own_scales.dtype is torch.float16
        assert torch.equal(own_codes, codes) and torch.equal(own_scales, scales)


@pytest.mark.parametrize("dtype", [*FLOATS, "auto", None], ids=str)
@pytest.mark.parametrize("saved_as", FLOATS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_codes_and_scales_are_those_that_were_saved(tied, saved_as, dtype, tiny_llama, tmp_path) -> None:
    model = tiny_llama(tie_word_embeddings=tied).to(saved_as)
    grid = on_grid(model)
    nncf_ext.save_pretrained(model, tmp_path)
    kind = dtype if isinstance(dtype, torch.dtype) else saved_as
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, device_map=None, output_loading_info=True
    )
    assert not any(info.values()), info
    check_grid(loaded, grid)
    assert {each.dtype for each in loaded.parameters()} == {kind, torch.uint8}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert not loaded.training
    own = nncf_ext.load_pretrained(tmp_path, dtype=kind)
    assert torch.equal(logits(loaded, tokens()), logits(own, tokens()))
    if kind is saved_as:
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_a_base_model_has_the_codes_of_the_whole(dtype, tiny_llama, tmp_path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    grid = on_grid(model, "lm_head.weight")
    nncf_ext.save_pretrained(model, tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(base) is transformers.LlamaModel
    check_grid(base, {name.removeprefix("model."): each for name, each in grid.items() if name != "lm_head.weight"})
    whole = nncf_ext.load_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        expected = whole(tokens(), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(base(tokens()).last_hidden_state, expected)


def test_a_head_that_was_not_saved_is_reported(tiny_llama, tmp_path) -> None:
    base = tiny_llama().model
    grid = on_grid(base)
    nncf_ext.save_pretrained(base, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    check_grid(loaded, {f"model.{name}": each for name, each in grid.items()})
    assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]


def test_weights_are_tied_that_the_configuration_does_not_tie(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].input_layernorm.weight = model.model.norm.weight
    grid = on_grid(model)
    nncf_ext.save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    check_grid(loaded, grid)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.model.layers[1].input_layernorm.weight is loaded.model.norm.weight
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, nncf_ext.load_pretrained], ids=["stock", "own"])
@pytest.mark.parametrize("shard", ["50GB", "200KB"])
def test_what_stock_transformers_saves_is_read_again(load, shard, tiny_llama, tmp_path) -> None:
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    grid = on_grid(model)
    nncf_ext.save_pretrained(model, tmp_path / "ours")
    load(tmp_path / "ours").save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) == (1 if shard == "50GB" else 2)
    for again in (AutoModelForCausalLM.from_pretrained, nncf_ext.load_pretrained):
        loaded = again(tmp_path / "theirs")
        check_grid(loaded, grid)
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_a_model_that_left_the_grid_is_saved_as_an_ordinary_one(tiny_llama, tmp_path) -> None:
    from nncf_ext.upstream import unwrap_model
    from nncf_ext.weights.int4 import unpack

    model = tiny_llama()
    grid = on_grid(model)
    nncf_ext.save_pretrained(model, tmp_path / "grid")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "grid")
    for name in grid:
        unpack(loaded, name)
    unwrap_model(loaded)
    loaded.save_pretrained(tmp_path / "stock")
    nncf_ext.save_pretrained(loaded, tmp_path / "own")
    for folder in ("stock", "own"):
        assert "quantization_config" not in json.loads((tmp_path / folder / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))


UP = "model.layers.1.mlp.up_proj.weight"
SCALE = "~__nncf_hooks.post_hooks.model:layers:1:mlp:up_proj:weight__0.0._scale"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scales": (lambda state: state.pop(SCALE), "up_proj"),
    "scales of another type": (lambda state: state.update({SCALE: state[SCALE].float()}), "up_proj.*float32"),
    "scales that are no numbers": (lambda state: state.update({SCALE: state[SCALE] / 0}), "up_proj.*not finite"),
    "no codes": (lambda state: state.pop(UP), "up_proj"),
    "fewer codes": (lambda state: state.update({UP: state[UP][:-1].clone()}), "up_proj"),
    "another norm": (lambda state: state.update({"model.norm.weight": torch.ones(100)}), r"norm.weight is \[100\]"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_refused(damage, words, tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    on_grid(model)
    nncf_ext.save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(nncf.ValidationError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_floating_model_is_not_put_on_the_grid_while_it_is_loaded(tiny_llama, tmp_path) -> None:
    nncf_ext.save_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="nncf_ext"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GridConfig([]))


def test_layers_of_different_sizes_need_no_code_of_the_folder(tiny_llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    model = tiny_llama()
    small = extract_structure(model, StructurePlan.dense(model).keep("layers.0.mlp", range(64)))
    nncf_ext.save_pretrained(small, tmp_path / "cut")
    expected = logits(small, tokens())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert type(loaded) is type(model) and torch.equal(logits(loaded, tokens()), expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype="bfloat16")
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut", device_map="auto")
    grid = on_grid(small)
    nncf_ext.save_pretrained(small, tmp_path / "both")
    check_grid(AutoModelForCausalLM.from_pretrained(tmp_path / "both"), grid)


# Which is imported first


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=100
    )


def test_the_package_imports_neither_torch_nor_transformers() -> None:
    found = run("import sys, nncf_ext; print({'torch', 'transformers', 'nncf'} & sys.modules.keys())")
    assert found.stdout.strip() == "set()", found.stderr


@pytest.fixture
def grid_folder(tiny_llama, tmp_path) -> Path:
    model = tiny_llama()
    on_grid(model)
    nncf_ext.save_pretrained(model, tmp_path)
    return tmp_path


LOAD = "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\nfrom nncf_ext.weights.int4 import decompressors\n"
ORDERS = {
    "ours first": f"import sys, nncf_ext\nfrom transformers import AutoModelForCausalLM\n{LOAD}",
    "ours last": "import sys, transformers.quantizers, transformers.models.auto.modeling_auto\nimport nncf_ext\n"
    f"from transformers import AutoModelForCausalLM\n{LOAD}",
    "ours between": "import sys, transformers\nfrom transformers import AutoTokenizer, AutoConfig\nimport nncf_ext\n"
    f"from transformers import AutoModelForCausalLM\n{LOAD}",
    "by its own module": "import sys, nncf_ext.saving.quantizer\nfrom transformers import AutoModelForCausalLM\n"
    + LOAD,
}


@pytest.mark.slow
@pytest.mark.parametrize("code", ORDERS.values(), ids=ORDERS)
def test_the_order_of_imports_does_not_matter(code, grid_folder) -> None:
    found = run(code + "print(len(decompressors(model)))", grid_folder)
    assert found.stdout.strip() == "14", found.stderr


@pytest.mark.slow
def test_transformers_alone_names_what_is_missing(grid_folder) -> None:
    code = "import sys, transformers\ntransformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    found = run(code, grid_folder)
    assert found.returncode and "Unknown quantization type, got nncf_ext" in found.stderr
    assert "MISMATCH" in found.stderr  # and no weight is made up


@pytest.mark.slow
def test_transformers_works_where_nncf_is_not_installed(tiny_llama, tmp_path) -> None:
    nncf_ext.save_pretrained(tiny_llama(), tmp_path)
    code = (
        "import sys\nsys.modules['nncf'] = None\nimport nncf_ext\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    found = run(code, tmp_path)
    assert found.stdout.strip() == "LlamaForCausalLM", found.stderr
