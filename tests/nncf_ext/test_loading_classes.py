"""A folder brings back the class that was saved, its ties, what lies beside the weights, and its code."""

import json

import nncf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import nncf_ext
from nncf_ext.weights.int4 import pack
from tests.nncf_ext.model_folders import WEIGHTS, edit, on_grid, refused, rewrite, saved
from tests.structure_models import logits, tokens

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
