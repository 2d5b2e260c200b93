"""Every causal language model that transformers makes of a tiny configuration comes back bit for bit."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import nncf_ext
from nncf_ext.saving.folder import STRUCTURED
from nncf_ext.weights.int4 import pack
from tests.structure_models import ZAMBA2

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "is_decoder": True, "rotary_dim": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
PARTS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
BY_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0}
ATTENTION = {"layer_types": ["sliding_attention", "full_attention"]}
# What some need beside or in place of that.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**PARTS, "attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # the other one is replaced, in the model, by short inputs
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cpmant": {"dim_ff": 128, "dim_head": 16},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {**PARTS, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 3},
    "gemma3n_text": {**ATTENTION, **BY_LAYER},
    "gemma4_text": {**ATTENTION, **BY_LAYER, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**PARTS, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {"state_size": 8, "time_step_rank": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "modernbert-decoder": {},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlnet": {"d_head": 16, "n_head": 4},
    "zamba2": {**ZAMBA2, "num_attention_heads": 4},
}
WITHOUT = {
    **dict.fromkeys(("deepseek_v3", "falcon", "glm4_moe_lite", "youtu"), ["head_dim"]),
    "prophetnet": ["num_hidden_layers"],
    "xlnet": ["max_position_embeddings"],
}
# Compositions with towers of their own, and models that need more than sizes to be tiny.
NOT_TINY = {
    *(
        "blt",
        "dbrx",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "git",
        "got_ocr2",
        "llama4",
        "longcat_flash",
        "mllama",
    ),
    *("mllama", "moshi", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe"),
    *("glm_moe_dsa", "reformer", "roc_bert", "xlstm", "xmod", "zamba"),
}
ONLY_FLOAT32 = {"ctrl", "xlnet"}  # their code mixes types otherwise
KINDS = {each.model_type for each in transformers.MODEL_FOR_CAUSAL_LM_MAPPING} - {STRUCTURED}


def made(kind: str) -> nn.Module:
    """A random model in evaluation mode."""
    config_class = transformers.CONFIG_MAPPING[kind]
    stock = config_class()
    settings = {key: each for key, each in SIZES.items() if hasattr(stock, key) and key not in WITHOUT.get(kind, ())}
    if getattr(stock, "layer_types", None) and kind not in OWN:
        settings["layer_types"] = [stock.layer_types[0], stock.layer_types[-1]]
    config = config_class(**{**settings, **OWN.get(kind, {})})
    torch.manual_seed(0)
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with torch.no_grad():
        return model(input_ids=ids).logits


def ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), []).append(name)
    return [*names.values()]


def same(one: nn.Module, other: nn.Module, *, types: bool = True) -> None:
    """Class, names, ties and values are those of the other, bit for bit; with `types` types, buffers and logits."""
    assert type(one) is type(other) and ties(one) == ties(other)
    own, theirs = one.state_dict(), other.state_dict()
    if types:
        own, theirs = ({**state, **dict(each.named_buffers())} for state, each in ((own, one), (theirs, other)))
        for parameter in (*one.parameters(), *other.parameters()):
            parameter.data = parameter.data.clone()  # kernels add up in another order where memory is not aligned
        assert torch.equal(logits(one), logits(other))
    assert own.keys() == theirs.keys(), own.keys() ^ theirs.keys()
    for name, each in own.items():
        assert torch.equal(each, theirs[name].to(each.dtype)), name
        assert not types or each.dtype is theirs[name].dtype, name


def linear_layer(model: Any) -> str | None:
    """The first linear layer that can be put on the grid."""
    layers = ((path, each) for path, each in model.named_modules() if type(each) is nn.Linear)
    head = model.get_output_embeddings()
    return next((path for path, each in layers if each.in_features % 64 == 0 and each is not head), None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS - NOT_TINY))
def test_round_trip(kind, tmp_path) -> None:
    model = made(kind)
    assert sum(each.numel() for each in model.parameters()) < 20_000_000
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 1 if kind in ONLY_FLOAT32 else 3]:
        turned = copy.deepcopy(model) if dtype is torch.float32 else copy.deepcopy(model).to(dtype)
        plain = tmp_path / f"plain {dtype}"
        nncf_ext.save_pretrained(turned, plain)
        first = nncf_ext.load_pretrained(plain)
        # A plain folder holds no passing buffers: the first model from it has those of transformers, which keeps some
        # weights in float32, too.
        same(turned, first, types=dtype is torch.float32)
        if dtype is not torch.float32:
            nncf_ext.save_pretrained(first, plain)
            same(first, nncf_ext.load_pretrained(plain))
        layer = linear_layer(turned)
        if layer is None:
            continue
        rows, columns = turned.get_parameter(f"{layer}.weight").shape
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
        pack(turned, f"{layer}.weight", codes, torch.full((rows, columns // 64), 2**-7).half())
        nncf_ext.save_pretrained(turned, tmp_path / f"int4 {dtype}")
        same(turned, nncf_ext.load_pretrained(tmp_path / f"int4 {dtype}"))


def test_what_is_left_out_is_there() -> None:
    assert KINDS >= NOT_TINY | OWN.keys() | WITHOUT.keys() and len(KINDS - NOT_TINY) > 120
