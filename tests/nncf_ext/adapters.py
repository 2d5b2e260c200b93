"""Tiny seeded models of several architectures with adapters whose A and B are both random."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from nncf_ext import RankGroup

RANK, ALPHA, VOCABULARY = 6, 9, 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Architecture:
    """
    :param groups: Groups that leave at least one adapter outside where there are several.
    :param dimensions: Names of their dimensions.
    :param lora: Settings of the adapter.
    """

    name: str
    make: Callable[[], nn.Module]
    groups: list[RankGroup]
    dimensions: list[str]
    lora: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def qkv(*ranks: int) -> RankGroup:
    return RankGroup([r".*\.[qkv]_proj$"], ranks)


def blocks(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{block}.{name}" for block in range(2) for name in names]


ARCHITECTURES = [
    Architecture(
        "llama",
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
        [qkv(6, 4, 1), RankGroup([r".*up_proj", r".*gate_proj"], [3, 6], name="mlp")],
        blocks("model.layers", "q_proj+k_proj+v_proj", "mlp"),
        {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"]},
    ),
    Architecture(
        "qwen2 with biases",
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
        [qkv(6, 5, 2), RankGroup([r".*down_proj$"], [6, 1], per="model")],
        ["down_proj", *blocks("model.layers", "q_proj+k_proj+v_proj")],
        {"target_modules": "all-linear", "rank_pattern": {"o_proj": 2}, "use_rslora": True},
    ),
    Architecture(
        "gpt-neox with fused qkv",
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)),
        [RankGroup([r".*query_key_value$"], [6, 4, 2]), RankGroup([r".*dense_h_to_4h$"], [6, 3])],
        blocks("gpt_neox.layers", "query_key_value", "dense_h_to_4h"),
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]},
    ),
    Architecture(
        "mixtral with 3-D experts",
        lambda: transformers.MixtralForCausalLM(
            # The faster implementations take no double precision.
            transformers.MixtralConfig(**GROUPED, num_local_experts=3, head_dim=16, experts_implementation="eager")
        ),
        [qkv(6, 4, 3)],
        blocks("model.layers", "q_proj+v_proj"),
        {
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"o_proj": 3},
        },
    ),
    Architecture(
        "gpt2 with transposed weights",
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=64)
        ),
        [RankGroup([r".*c_attn$"], [6, 5, 4])],
        blocks("transformer.h", "c_attn"),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    Architecture(
        "t5 with two block lists",
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=VOCABULARY, decoder_start_token_id=0
            )
        ),
        [RankGroup([r".*SelfAttention\.(q|v)$"], [6, 2])],
        [*blocks("encoder.block", "q+v"), *blocks("decoder.block", "q+v")],
        {"target_modules": ["q", "v"]},
    ),
]
BY_NAME = {architecture.name.split()[0]: architecture for architecture in ARCHITECTURES}


@functools.cache
def _base(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = BY_NAME[name].make().eval()
    # Random blocks of usual size hardly change their input, and all ranks look alike.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
        elif parameter.dim() == 1 and (parameter == 0).all():
            parameter.data.normal_()
    return model


def base(name: str) -> nn.Module:
    """A fresh copy of a base model."""
    return copy.deepcopy(_base(name))


def adapted(name: str = "llama", seed: int = 4, **settings: Any) -> PeftModel:
    """A base model with an adapter that matters."""
    with_defaults = {"r": RANK, "lora_alpha": ALPHA, **BY_NAME[name].lora, **settings}
    return randomized(get_peft_model(base(name), LoraConfig(**with_defaults)), seed)


def randomized(model: PeftModel, seed: int = 4) -> PeftModel:
    """The same model with random A and B."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(seed: int = 5, rows: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    """Inputs with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def logits(model: nn.Module) -> torch.Tensor:
    """The logits on some tokens."""
    with torch.no_grad():
        return model(**tokens()).logits
