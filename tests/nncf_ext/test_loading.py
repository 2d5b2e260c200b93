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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nncf_ext
from nncf_ext.saving.folder import read_tensors
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from nncf_ext.weights.int4 import pack
from tests.structure_models import logits, tokens

WEIGHTS = {
    **{"plain": "model.safetensors", "cut": "nncf_model.safetensors"},
    **{"int4": "model.safetensors", "int4 of version 0.1": "nncf_model.safetensors"},
}
UP = "model.layers.1.mlp.up_proj.weight"


def on_grid(model: nn.Module) -> nn.Module:
    """With its last up projection on the INT4 grid: random codes, scales of one 64th."""
    rows, columns = model.get_parameter(UP).shape
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    pack(model, UP, codes, torch.full((rows, columns // 64), 2**-6, dtype=torch.float16))
    return model


def saved(kind: str, model: nn.Module, folder: Path) -> nn.Module:
    """A model of two layers in one of three kinds of folder."""
    if kind == "cut":
        model = extract_structure(model, StructurePlan.dense(model).keep("layers.0.mlp", range(64)))
    elif "int4" in kind:
        model = on_grid(model)
    nncf_ext.save_pretrained(model, folder)
    if kind.endswith("0.1"):
        as_before(folder)
    return model


def as_before(folder: Path) -> None:
    """A folder on the grid as version 0.1 wrote it: the grid is a file of its own."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        state = {name.removeprefix("~"): opened.get_tensor(name) for name in opened.keys()}
        save_file(state, folder / "nncf_model.safetensors", opened.metadata())
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    grid = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "nncf_config.json").write_text(json.dumps({"compression_state": grid["compression_state"]}))


def rewrite(file: Path, **changed: torch.Tensor | None) -> None:
    """Other tensors under some names; None takes one away. Names have underscores for dots."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    for name, tensor in changed.items():
        del state[name]
        if tensor is not None:
            state[name] = tensor
    save_file(state, file, metadata)


def edit(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(nncf.ValidationError) as caught:
        nncf_ext.load_pretrained(folder)
    assert all(word in str(caught.value) for word in words), (str(caught.value), words)


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


# Classes and what lies beside the weights


CLASSES = {
    "BertForSequenceClassification": lambda: transformers.BertConfig(**SIZES, num_labels=3),
    "BertForMaskedLM": lambda: transformers.BertConfig(**SIZES),
    "BertModel": lambda: transformers.BertConfig(**SIZES),
    "LlamaForSequenceClassification": lambda: transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0),
    "LlamaModel": lambda: transformers.LlamaConfig(**SIZES),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(**T5),
    "T5EncoderModel": lambda: transformers.T5Config(**T5),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**SIZES, image_size=16, patch_size=4),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
T5 = {"d_model": 64, "d_ff": 64, "d_kv": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_that_was_saved_is_loaded(name, quantized, tmp_path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, name)(CLASSES[name]()).eval()
    if quantized:
        path = next(
            path
            for path, each in model.named_modules()
            if isinstance(each, nn.Linear) and each.in_features == 64 and "layer" in path
        )
        shape = model.get_parameter(f"{path}.weight").shape
        pack(model, f"{path}.weight", torch.ones(shape, dtype=torch.int8), torch.full((shape[0], 1), 0.01).half())
    nncf_ext.save_pretrained(model, tmp_path)
    loaded = nncf_ext.load_pretrained(tmp_path)
    assert type(loaded) is type(model)
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    item = {"input_ids": tokens() % 64}
    if name.startswith("T5For"):
        item["decoder_input_ids"] = item["input_ids"]
    elif name.startswith("ViT"):
        item = {"pixel_values": torch.ones(1, 3, 16, 16)}
    with torch.no_grad():
        assert torch.equal(loaded(**item)[0], model(**item)[0])


@pytest.mark.parametrize("name", ["MyLlamaForCausalLM", "LLaMAForCausalLM", "MyLlama"])
def test_a_class_that_transformers_lacks_is_read_by_an_auto_class(name, tiny_llama, tmp_path, caplog) -> None:
    model = saved("plain", tiny_llama(), tmp_path)
    edit(tmp_path / "config.json", architectures=[name])
    found = nncf_ext.load_pretrained(tmp_path)
    assert type(found) is transformers.LlamaForCausalLM and torch.equal(
        logits(found, tokens()), logits(model, tokens())
    )
    assert f"no class {name}" in caplog.text
    rewrite(tmp_path / "model.safetensors", **{"lm_head.weight": None})
    refused(tmp_path, "lacks lm_head.weight")


def test_encoders_without_a_pooler(tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=100), add_pooling_layer=False)
    image = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    for model in (bert, transformers.ViTModel(image, add_pooling_layer=False)):
        nncf_ext.save_pretrained(model, tmp_path / type(model).__name__)
        found = nncf_ext.load_pretrained(tmp_path / type(model).__name__)
        assert found.pooler is None and found.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(each, model.state_dict()[name]) for name, each in found.state_dict().items())


def test_what_only_training_uses_may_be_missing(tmp_path) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=32, conv_dim=(32,),
        conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config).eval()
    nncf_ext.save_pretrained(model, tmp_path)
    rewrite(tmp_path / "model.safetensors", **{"wav2vec2.masked_spec_embed": None})
    found, sound = nncf_ext.load_pretrained(tmp_path), torch.randn(1, 400)
    assert torch.equal(found(sound).logits, model(sound).logits)


def test_a_head_that_the_files_lack_is_not_made_up(tiny_llama, tmp_path) -> None:
    saved("plain", tiny_llama(), tmp_path)
    edit(tmp_path / "config.json", architectures=["LlamaForSequenceClassification"])
    refused(tmp_path, "model.safetensors", "score.weight")
    nncf_ext.save_pretrained(tiny_llama().model, tmp_path / "headless")
    for architectures in (["LlamaForCausalLM"], None):
        edit(tmp_path / "headless" / "config.json", architectures=architectures)
        refused(tmp_path / "headless", "lm_head.weight")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_generation_config_survives(kind, tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    settings = {"eos_token_id": [5, 7], "pad_token_id": 3, "do_sample": True, "temperature": 0.3, "max_new_tokens": 11}
    model.generation_config = transformers.GenerationConfig(**settings, repetition_penalty=1.2)
    saved(kind, model, tmp_path)
    found = nncf_ext.load_pretrained(tmp_path).generation_config
    assert {key: getattr(found, key) for key in settings} == settings and found.repetition_penalty == 1.2
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises((nncf.ValidationError, OSError), match=str(tmp_path)):
        nncf_ext.load_pretrained(tmp_path)


def test_an_adapter_in_the_folder_is_refused(tiny_llama, tmp_path) -> None:
    saved("plain", tiny_llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    refused(tmp_path, "adapter_config.json")


# Tensors that are one, or views of one memory


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_views_of_one_memory_are_all_saved(kind, tmp_path) -> None:
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        parts = torch.randn(192).chunk(3)
        for each, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            getattr(layer.self_attn, each).bias = nn.Parameter(part)
    overlapping = torch.randn(100)
    model.model.norm.weight = nn.Parameter(overlapping[:64])
    model.model.layers[0].input_layernorm.weight = nn.Parameter(overlapping[36:])
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn(64, 64).T)
    saved(kind, model, tmp_path)
    loaded = nncf_ext.load_pretrained(tmp_path)
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert torch.equal(logits(loaded, tokens() % 64), logits(model, tokens() % 64))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("done", [True, False])
def test_ties_are_those_of_the_model_whatever_its_configuration_says(kind, said, done, tiny_llama, tmp_path) -> None:
    model = tiny_llama(tie_word_embeddings=said)
    weight = model.model.embed_tokens.weight
    model.lm_head.weight = weight if done else nn.Parameter(weight.detach() + 1)
    model = saved(kind, model, tmp_path)
    loaded = nncf_ext.load_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    if kind == "plain" and done and not said:
        return  # a folder of transformers can say that weights are tied by its configuration only: two equal weights
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is done
    stored = load_file(tmp_path / WEIGHTS[kind])
    assert ("lm_head.weight" in stored) is not done
    if done and said:  # transformers may have kept the other of two names
        state = stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}
        del state["model.embed_tokens.weight"]
        save_file(state, tmp_path / WEIGHTS[kind])
        assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path), tokens()), logits(model, tokens()))


# Code that lies in the folder, and code of ours that travels with weights

CODE = """
import transformers

class OwnConfig(transformers.LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(transformers.LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_folder_goes_with_the_model(tiny_llama, tmp_path) -> None:
    source, model = tmp_path / "source", tiny_llama()
    nncf_ext.save_pretrained(model, source)
    (source / "modeling_own.py").write_text(CODE)
    places = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(source / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=places)
    refused(source, "config.json", "trust_remote_code=True")
    own = nncf_ext.load_pretrained(source, trust_remote_code=True)
    assert type(own).__name__ == "OwnForCausalLM"
    assert torch.equal(logits(own, tokens()), logits(model, tokens()))
    nncf_ext.save_pretrained(on_grid(own), tmp_path / "int4")
    assert (tmp_path / "int4" / "modeling_own.py").is_file()
    loaded = nncf_ext.load_pretrained(tmp_path / "int4", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert torch.equal(logits(loaded, tokens()), logits(own, tokens()))
    (source / "model.safetensors").unlink()
    refused(source, "no weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_code_in_a_folder_brings_back_ties_buffers_and_settings(dtype, tiny_llama, tmp_path) -> None:
    dense = tiny_llama()
    dense.generation_config = transformers.GenerationConfig(eos_token_id=[5, 7], pad_token_id=3)
    dense.lm_head.weight = dense.model.embed_tokens.weight  # its configuration says that they are not tied
    model = saved("cut", dense.to(dtype), tmp_path)
    own = nncf_ext.load_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    for loaded in (own, theirs):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.generation_config.eos_token_id == [5, 7] and loaded.generation_config.pad_token_id == 3
        assert loaded.model.rotary_emb.inv_freq.dtype is dtype
        assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("kind", ["cut", "int4"])
def test_another_type_never_shortens_position_embeddings(kind, tiny_llama, tmp_path) -> None:
    model = saved(kind, tiny_llama(), tmp_path)
    loaded = nncf_ext.load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in loaded.parameters() if each.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
