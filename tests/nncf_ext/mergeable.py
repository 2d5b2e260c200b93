"""Tiny seeded models that are sparse, or sparse and on the INT4 grid, and adapters on them that were really trained."""

import copy
import functools
from typing import Any

import nncf
import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode, MergeMode

VOCABULARY, RANK, GROUP = 96, 6, 64
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MAKERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, num_key_value_heads=1)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=3, head_dim=32)
    ),
}
# Some layers of each stay without an adapter.
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "up_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "mixtral": ["q_proj", "v_proj"],
}
SPARSE, QUANT_AWARE = MergeMode.SPARSE, MergeMode.QUANT_AWARE


def tokens(seed: int, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Inputs with labels."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def logits(model: nn.Module) -> torch.Tensor:
    """The logits on some tokens."""
    with torch.no_grad():
        return model(input_ids=tokens(99)["input_ids"]).logits


@functools.cache
def _compressed(name: str, dtype: torch.dtype, on_grid: bool, settings: tuple[tuple[str, Any], ...]) -> nn.Module:
    torch.manual_seed(3)
    model = MAKERS[name]().eval()
    for parameter in model.parameters():
        # Random blocks of usual size hardly change their input; biases of random models are zero.
        parameter.data = (parameter.data * 4 if parameter.dim() > 1 else parameter.data + 0.1).to(dtype)
    parameters = {"quantization": nncf.CompressWeightsMode.INT4_SYM, "group_size": GROUP, "keep_prerounding": True}
    return nncf_ext.compress(
        model,
        CompressMode.SPARSE_WANDA,
        ratio=0.5,
        dataset=nncf.Dataset([{"input_ids": tokens(seed)["input_ids"]} for seed in range(4)]),
        advanced_parameters=AdvancedSparseWeightsParameters(**(parameters if on_grid else {}), **dict(settings)),
    )


def sparse(name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A fresh copy of a sparse floating model."""
    return copy.deepcopy(_compressed(name, dtype, False, tuple(settings.items())))


def packed(name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A fresh copy of a sparse model on the INT4 grid."""
    return copy.deepcopy(_compressed(name, dtype, True, tuple(settings.items())))


def adapter(model: nn.Module, name: str = "llama", **settings: Any) -> PeftModel:
    """Puts an untrained adapter on a model."""
    torch.manual_seed(4)
    wanted = {"r": RANK, "lora_alpha": 9, "target_modules": TARGETS[name], **settings}
    return get_peft_model(model, LoraConfig(**wanted)).eval()


def mergeable(
    mode: MergeMode, name: str = "llama", dtype: torch.dtype = torch.float32, lora: Any = None, **advanced: Any
) -> tuple[PeftModel, nn.Module]:
    """A model with an untrained mergeable adapter, and what it was made of: the sparse or the packed model."""
    if mode is SPARSE:
        origin = sparse(name, dtype)
        return nncf_ext.make_mergeable(adapter(copy.deepcopy(origin), name, **(lora or {})), SPARSE), origin
    origin = packed(name, dtype)
    model = adapter(nncf_ext.prerounding(origin), name, **(lora or {}))
    parameters = nncf_ext.AdvancedSqftParameters(**advanced)
    return nncf_ext.make_mergeable(model, QUANT_AWARE, grid=origin, advanced_parameters=parameters), origin


def train(model: PeftModel, steps: int = 5, rate: float = 2e-2, net: Any = None) -> PeftModel:
    """Real training steps, each with random ranks if the adapter is elastic."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        if net is not None:
            net.activate(net.random(step))
        model(**tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def oracle_delta(A: torch.Tensor, B: torch.Tensor, scaling: float) -> np.ndarray:
    """``s (B A)``: summed up in float64, float32 from there on."""
    product = B.detach().double().numpy() @ A.detach().double().numpy()
    return product.astype(np.float32) * np.float32(scaling)


def oracle_codes(weight: torch.Tensor, delta: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Nearest codes of ``W + D * (W != 0)``, float32."""
    start = weight.detach().float().numpy()
    merged = start + delta * (start != 0)
    steps = np.repeat(scales.astype(np.float32), start.shape[1] // scales.shape[1], axis=1)
    return np.clip(np.round(merged / steps), -8, 7).astype(np.int8)
