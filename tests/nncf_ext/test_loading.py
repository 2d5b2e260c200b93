"""Folders are read strictly: what is missing, misshapen, of another kind or damaged is named; nothing is made up."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nncf_ext
from nncf_ext.saving.folder import read_tensors
from tests.nncf_ext.model_folders import UP, WEIGHTS, edit, refused, rewrite, saved
from tests.structure_models import logits, tokens


@pytest.mark.parametrize("kind", WEIGHTS)
class TestTensors:
    NORM = "model.layers.0.input_layernorm.weight"

    def test_missing(self, kind, tiny_llama, tmp_path) -> None:
        saved(kind, tiny_llama(), tmp_path)
        rewrite(tmp_path / WEIGHTS[kind], **{self.NORM: None})
        refused(tmp_path, WEIGHTS[kind], self.NORM)

    def test_of_another_shape(self, kind, tiny_llama, tmp_path) -> None:
        saved(kind, tiny_llama(), tmp_path)
        rewrite(tmp_path / WEIGHTS[kind], **{self.NORM: torch.ones(100)})
        refused(tmp_path, WEIGHTS[kind], self.NORM, "[100]", "[128]")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
    def test_of_integers(self, kind, dtype, tiny_llama, tmp_path) -> None:
        saved(kind, tiny_llama(), tmp_path)
        name = "model.embed_tokens.weight"
        rewrite(tmp_path / WEIGHTS[kind], **{name: torch.ones(320, 128, dtype=dtype)})
        refused(tmp_path, WEIGHTS[kind], name)

    def test_of_double_precision(self, kind, tiny_llama, tmp_path) -> None:
        saved(kind, tiny_llama(), tmp_path)
        rewrite(tmp_path / WEIGHTS[kind], **{self.NORM: torch.ones(128, dtype=torch.float64)})
        if kind == "plain":  # transformers turns it into the type of the model
            assert nncf_ext.load_pretrained(tmp_path).get_parameter(self.NORM).dtype is torch.float32
        else:
            refused(tmp_path, WEIGHTS[kind], self.NORM, "F64")

    def test_damaged_file(self, kind, tiny_llama, tmp_path) -> None:
        saved(kind, tiny_llama(), tmp_path)
        file = tmp_path / WEIGHTS[kind]
        whole = file.read_bytes()
        for damaged in (whole[:-100], whole[:5], b"", b"\xff" * 8 + whole[8:], whole[:8] + b"x" + whole[9:]):
            file.write_bytes(damaged)
            refused(tmp_path, str(file), "damaged")


def test_a_surplus_tensor_of_a_plain_folder_is_no_error(tiny_llama, tmp_path) -> None:
    model = saved("plain", tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.bias": torch.ones(4, dtype=torch.uint8)}, file)
    assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path), tokens()), logits(model, tokens()))


BROKEN = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "another encoding": "\xff",
    "a list": "[]",
    "nothing": "null",
    "a long number": '{"a": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", ["config.json", "nncf_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_json(name, text, tiny_llama, tmp_path) -> None:
    saved("int4 of version 0.1" if name == "nncf_config.json" else "plain", tiny_llama(), tmp_path)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused(tmp_path, str(tmp_path / name))


@pytest.mark.parametrize("entries", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {"a": ["b"]}}])
def test_index_that_is_none(entries, tiny_llama, tmp_path) -> None:
    saved("plain", tiny_llama(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(entries))
    refused(tmp_path, "model.safetensors.index.json")


def test_shards(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path), tokens()), logits(model, tokens()))
    lost = sorted(load_file(shards[1]))[0]
    rewrite(shards[1], **{lost: None})
    refused(tmp_path, "model.safetensors.index.json", lost)
    shards[1].unlink()
    refused(tmp_path, shards[1].name, "missing")


MANY = 10**6


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts", "intermediate_size", "hidden_size"])
@pytest.mark.parametrize("number", [MANY, 10**12, 999], ids=str)
def test_a_configuration_of_millions_is_refused_at_once(kind, key, number, tiny_llama, tmp_path) -> None:
    saved(kind, tiny_llama(), tmp_path)
    edit(tmp_path / "config.json", **{key: number, "head_dim": 64})
    start = time.perf_counter()
    if key == "num_local_experts" and number == 999:  # a Llama has no experts
        nncf_ext.load_pretrained(tmp_path)
    else:
        refused(tmp_path, "config.json" if number >= MANY else str(tmp_path))
    assert time.perf_counter() - start < 20


def test_experts_of_a_mixture(tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=3)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    nncf_ext.save_pretrained(model, tmp_path)
    assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path), tokens() % 64), logits(model, tokens() % 64))
    for number in (4, MANY):
        edit(tmp_path / "config.json", num_local_experts=number)
        refused(tmp_path, "config.json" if number == MANY else "experts.down_proj")


def test_no_quantization_may_be_said(tiny_llama, tmp_path) -> None:
    for kind in WEIGHTS.keys() - {"int4"}:
        model = saved(kind, tiny_llama(), tmp_path / kind)
        edit(tmp_path / kind / "config.json", quantization_config=None)
        assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path / kind), tokens()), logits(model, tokens()))


def test_weights_that_another_tool_quantized_are_refused_by_name(tiny_llama, tmp_path) -> None:
    saved("plain", tiny_llama(), tmp_path)
    for said, word in (({"quant_method": "gptq", "bits": 4}, "nncf_ext.load_gptq"), ({"bits": 4}, "unnamed"), (3, "3")):
        edit(tmp_path / "config.json", quantization_config=said)
        with pytest.raises(nncf.UnsupportedModelError, match=f"quantized already.*{word}"):
            nncf_ext.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
    ids=lambda error: str(error)[:30],
)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_short_memory_is_no_fault_of_the_folder(kind, error, tiny_llama, tmp_path, monkeypatch) -> None:
    saved(kind, tiny_llama(), tmp_path)

    def raising(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", raising)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "load_state_dict", raising)
    with pytest.raises(type(error)) as caught:
        nncf_ext.load_pretrained(tmp_path)
    assert caught.value is error


def test_only_floating_numbers_that_lie_badly_are_copied(tmp_path) -> None:
    numbers = {"a": torch.arange(64.0), "b": torch.arange(33.0), "c": torch.arange(16.0)}
    for kind, tensors, kept in (("numbers", numbers, False), ("codes", {"d": torch.arange(99).to(torch.uint8)}, True)):
        file = tmp_path / f"{kind}.safetensors"
        for padding in range(8):  # headers end at multiples of 8 bytes: one of eight of 64
            save_file(tensors, file, {"padding": "x" * 8 * padding})
            if (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 8:
                break
        found = read_tensors(file)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all(each.data_ptr() % 64 == 0 for each in found.values() if each.is_floating_point())
        assert (str(file) in Path("/proc/self/maps").read_text()) is kept


NOTHING: list[dict[str, object]] = [
    *({"model_type": 7}, {"hidden_size": "many"}, {"hidden_size": -1}, {"num_attention_heads": 0}),
    *({"hidden_act": "none"}, {"dtype": "int4"}, {"rope_parameters": {"rope_type": "magic"}}, {"layer_types": 3}),
    *({"architectures": each} for each in ([3], ["AutoModel"], ["GhostForNothing"], "Llama")),
    {"transformers_weights": "../model.safetensors"},
]


@pytest.mark.parametrize("entries", NOTHING, ids=str)
def test_configurations_that_describe_nothing(entries, tiny_llama, tmp_path) -> None:
    saved("plain", tiny_llama(), tmp_path)
    edit(tmp_path / "config.json", **entries)
    try:
        nncf_ext.load_pretrained(tmp_path)  # what transformers does not mind is no fault
    except nncf.ValidationError as error:
        assert str(tmp_path) in str(error)


def regrid(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the description of the grid."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "entries",
    [{"result_shape": [128, 256]}, {"result_shape": [256, 64]}, {"compressed_weight_shape": [256, 3, 64]},
     {"compressed_weight_shape": [512, 1, 64]}, {"compressed_weight_shape": [256, 10**12, 64]},
     {"compressed_weight_shape": 5}, {"result_dtype": "int8"}, {"result_dtype": "load"}, {"result_dtype": 3}],
    ids=str,
)  # fmt: skip
def test_a_grid_that_fits_no_weight(entries, tiny_llama, tmp_path) -> None:
    saved("int4", tiny_llama(), tmp_path)
    regrid(tmp_path, lambda grid: grid["compression_state"][0]["module_config"].update(entries))
    refused(tmp_path, str(tmp_path))


@pytest.mark.parametrize("state", [None, 3, [3], [{}], [{"module_cls_name": "PackedInt4Weight"}]], ids=str)
def test_a_grid_that_is_none(state, tiny_llama, tmp_path) -> None:
    saved("int4", tiny_llama(), tmp_path)
    regrid(tmp_path, lambda grid: grid.update(compression_state=state))
    refused(tmp_path, "config.json")
    regrid(tmp_path, lambda grid: grid.pop("compression_state"))
    refused(tmp_path, "config.json")
    regrid(tmp_path, lambda grid: grid.update(compression_state=[]))
    refused(tmp_path, "model.safetensors", UP, "config.json")


@pytest.mark.parametrize("version", [2, "1", None], ids=str)
def test_a_grid_of_a_later_release(version, tiny_llama, tmp_path) -> None:
    saved("int4", tiny_llama(), tmp_path)
    regrid(tmp_path, lambda grid: grid.update(version=version))
    refused(tmp_path, "config.json", "Upgrade nncf-ext")


def test_codes_without_a_grid(tiny_llama, tmp_path) -> None:
    saved("int4", tiny_llama(), tmp_path)
    edit(tmp_path / "config.json", quantization_config=None)
    refused(tmp_path, "model.safetensors", UP)


def test_foreign_code_of_a_grid_is_not_imported(tiny_llama, tmp_path) -> None:
    saved("int4", tiny_llama(), tmp_path)
    foreign = {"module_path": "antigravity", "module_cls_name": "Foreign"}
    regrid(tmp_path, lambda grid: grid["compression_state"][0].update(foreign))
    refused(tmp_path, str(tmp_path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_are_finite_numbers(value, tiny_llama, tmp_path) -> None:
    saved("int4", tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    (name,) = [name for name in load_file(file) if name.endswith("_scale")]
    scales = load_file(file)[name]
    scales[7] = value
    rewrite(file, **{name: scales})
    refused(tmp_path, str(file), UP, "finite")


def test_scales_and_codes_of_other_sizes(tiny_llama, tmp_path) -> None:
    saved("int4", tiny_llama(), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    (name,) = [name for name in state if name.endswith("_scale")]
    whole = file.read_bytes()
    for changed in (
        {name: state[name][:, :1]}, {name: state[name].float()}, {name: None},
        {UP: state[UP][:-1]}, {UP: state[UP].float()}, {UP: torch.cat([state[UP], state[UP]])},
    ):  # fmt: skip
        file.write_bytes(whole)
        rewrite(file, **{key: each if each is None else each.contiguous() for key, each in changed.items()})
        refused(tmp_path, "model.safetensors")


def test_one_module_in_two_places_is_saved_for_both(tiny_llama, tmp_path) -> None:
    for kind in ("plain", "int4"):
        model = tiny_llama(layers=3)
        model.model.layers[2].mlp = model.model.layers[0].mlp
        model = saved(kind, model, tmp_path / kind)
        assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path / kind), tokens()), logits(model, tokens()))
