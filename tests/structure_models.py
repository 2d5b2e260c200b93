"""Tiny seeded models of every family whose structure can be removed."""

from typing import Any

import torch
import transformers
from torch import nn

from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.plan import Step, StructurePlan

VOCABULARY = 96
LAYERS = 4
SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 40, "head_dim": 6}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FOUR = {"num_attention_heads": 4, "intermediate_size": 40}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

# name: class, settings. Sizes are odd on purpose: heads do not make up the hidden size, 40 channels, windows of 5.
CAUSAL = {
    "llama": ("Llama", HEADS),
    "llama_biases": ("Llama", {**HEADS, "attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("Llama", {**HEADS, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**HEADS, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**FOUR, "num_key_value_heads": 2}),
    "qwen2_mixed": ("Qwen2", {**FOUR, "num_key_value_heads": 2, "use_sliding_window": True, **SLIDING}),
    "qwen3": ("Qwen3", HEADS),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", {**HEADS, **SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {**HEADS, **SLIDING, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {**FOUR, "num_key_value_heads": 2, "original_max_position_embeddings": 64}),
    "gpt_neox": ("GPTNeoX", {**FOUR, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoX", {**FOUR, "use_parallel_residual": False}),
    "opt": ("OPT", {"num_attention_heads": 4, "ffn_dim": 40}),
    "opt_post_norm": ("OPT", {"num_attention_heads": 4, "ffn_dim": 40, "do_layer_norm_before": False}),
}
MAMBA2 = {"state_size": 8, "num_heads": 8, "head_dim": 8, "chunk_size": 4}
ZAMBA2 = {
    # transformers 5.5 gives adapters to alternating blocks only, the first of them at an even place.
    "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid", "hybrid", "mamba"],
    "num_hidden_layers": 6,
    **{"mamba_d_state": 8, "n_mamba_heads": 8, "chunk_size": 4, "num_attention_heads": 4, "intermediate_size": 40},
    **{"num_mem_blocks": 2, "adapter_rank": 4, "use_mem_rope": True, "tie_word_embeddings": True},
}
STATE_SPACE = {
    "mamba": ("Mamba", {"state_size": 8, "time_step_rank": 3}),
    "mamba_biases": ("Mamba", {"state_size": 8, "time_step_rank": 3, "use_bias": True, "use_conv_bias": False}),
    "falcon_mamba": ("FalconMamba", {"state_size": 8, "time_step_rank": 3}),
    "mamba2": ("Mamba2", {**MAMBA2, "n_groups": 2}),
    "mamba2_tied": ("Mamba2", {**MAMBA2, "n_groups": 1, "tie_word_embeddings": True, "use_bias": True}),
}
HYBRIDS = {"zamba2": ("Zamba2", ZAMBA2)}
ENCODERS = {"bert": ("Bert", FOUR), "roberta": ("Roberta", FOUR)}


def make(name: str, **overrides: Any) -> nn.Module:
    """
    :param name: A key of one of the tables above.
    :param overrides: Settings that replace those of the table.
    :return: The model in evaluation mode, biases and norms random, too, so that nothing cancels out by chance.
    """
    kind, settings = (CAUSAL | ENCODERS | STATE_SPACE | HYBRIDS)[name]
    config_name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_name)(**{**SIZES, **TOKENS, **settings, **overrides})
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForMaskedLM" if name in ENCODERS else f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model


def by_layer(plan: StructurePlan) -> list[dict[str, tuple[int, ...]]]:
    """
    :return: The kept units of each branch, layer by layer.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, units in plan.kept.items():
        _, layer, branch = name.split(".")
        layers.setdefault(layer, {})[branch] = units
    return list(layers.values())


def blocks_of(model: nn.Module) -> Any:
    """
    :return: The repeated blocks.
    """
    return model.get_submodule(dimensions_of(model).blocks)


def place_of(step: Step) -> tuple[str, int]:
    """
    :return: Branch and layer.
    """
    _, layer, branch = step.dimension.split(".")
    return branch, int(layer)


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    """
    :param rows: Number of sequences.
    :param length: Their length, tokens.
    :return: Token ids ``[rows, length]``, none of them special.
    """
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """
    :return: Logits ``[rows, length, vocabulary]`` of one forward without a cache.
    """
    with torch.no_grad():
        return model(input_ids=ids).logits


def cached_logits(model: nn.Module, ids: torch.Tensor, prompt: int = 4) -> torch.Tensor:
    """
    :return: The same logits from a prompt and then token by token with a cache.
    """
    with torch.no_grad():
        first = model(input_ids=ids[:, :prompt], use_cache=True)
        parts, name = [first.logits], "cache_params" if "cache_params" in first else "past_key_values"
        for position in range(prompt, ids.shape[1]):
            step = model(input_ids=ids[:, position : position + 1], use_cache=True, **{name: first[name]})
            parts.append(step.logits)
    return torch.cat(parts, dim=1)
