"""Decoders, and what all transformers with attention and MLPs have in common."""

from dataclasses import dataclass, replace
from typing import Any

import nncf
from torch import nn

from nncf_ext.standalone.skipping import SkippedAttention, SkippedMlp, SkippedNorm, SkippedUnread
from nncf_ext.structure.dimensions import Dimension, Dimensions, Kept
from nncf_ext.structure.records.branch import ATTENTION, Branch
from nncf_ext.structure.records.record import Record


@dataclass(frozen=True)
class Transformer(Record):
    """Blocks of attention and MLP."""

    def check(self, model: nn.Module, dimensions: Dimensions, kept: Kept) -> None:
        if not self.uses_cache(model):
            return
        kinds = self._slot_kinds(model) or ["full_attention"] * len(dimensions.by_block)
        staying = [
            index for index, parts in enumerate(dimensions.by_block) if any(len(kept[each.name]) for each in parts)
        ]
        attending = [each.block for each in dimensions.of_part(ATTENTION) if len(kept[each.name])]
        if not staying or not any(kinds[index] == kinds[staying[0]] for index in attending):
            kind = f" of kind {kinds[staying[0]]}" if staying and len(set(kinds)) > 1 else ""
            msg = f"The plan removes the attention{kind} of every layer: the cache could not tell positions. Keep one."
            raise nncf.ValidationError(msg)

    def cache_slots(self, model: nn.Module, dimensions: Dimensions, kept: Kept) -> dict[str, int]:
        """
        Slots have kinds (full, sliding); each kind is filled from its first slot, because transformers reads lengths
        and masks from the first slot of each kind.
        """
        kinds = self._slot_kinds(model) or [""] * len(dimensions.by_block)
        free = {kind: iter([slot for slot, each in enumerate(kinds) if each == kind]) for kind in kinds}
        found = {}
        for each in dimensions.of_part(ATTENTION):
            owner = f"{dimensions.blocks}.{each.block}.{self.branches[ATTENTION].core}"
            if len(kept[each.name]):
                slot = next(free[kinds[each.block]])
                if getattr(model.get_submodule(owner), "layer_idx", None) is not None:
                    found[owner] = slot
        return found

    def uniform_sizes(self, model: nn.Module, dimension: Dimension) -> list[int]:
        sizes = super().uniform_sizes(model, dimension)
        if dimension.part != ATTENTION:
            return sizes
        if not self.head_dim_in_config:
            return [dimension.size]
        # transformers refuses a configuration whose query heads do not divide the hidden size.
        config: Any = model.config
        group = dimension.config_keys["num_attention_heads"]
        return [each for each in sizes if each == dimension.size or config.hidden_size % (each * group) == 0]

    def _slot_kinds(self, model: nn.Module) -> list[str] | None:
        """Kinds of the cache's slots, where there are several."""
        return getattr(model.config, "layer_types", None)


LLAMA = Transformer(
    name="Llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    blocks="layers",
    branches={
        "attention": Branch(
            core="self_attn",
            inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output="self_attn.o_proj",
            skip={"self_attn": SkippedAttention, "input_layernorm": SkippedNorm},
        ),
        "mlp": Branch(
            core="mlp",
            inputs=("mlp.gate_proj", "mlp.up_proj"),
            output="mlp.down_proj",
            skip={"mlp": SkippedMlp, "post_attention_layernorm": SkippedNorm},
        ),
    },
)
GEMMA2 = replace(
    LLAMA,
    name="Gemma 2",
    model_types=("gemma2", "gemma3_text"),
    branches={
        "attention": replace(
            LLAMA.branches["attention"],
            skip={
                "self_attn": SkippedAttention,
                "input_layernorm": SkippedNorm,
                "post_attention_layernorm": SkippedNorm,
            },
        ),
        "mlp": replace(
            LLAMA.branches["mlp"],
            skip={
                "mlp": SkippedMlp,
                "pre_feedforward_layernorm": SkippedNorm,
                "post_feedforward_layernorm": SkippedNorm,
            },
        ),
    },
)
PHI3 = replace(
    LLAMA,
    name="Phi-3",
    model_types=("phi3",),
    branches={
        "attention": replace(LLAMA.branches["attention"], inputs=("self_attn.qkv_proj",), layout="stacked"),
        "mlp": replace(LLAMA.branches["mlp"], inputs=("mlp.gate_up_proj",), layout="stacked"),
    },
    heads_from_config=True,
)
GPT_NEOX = Transformer(
    name="GPT-NeoX",
    model_types=("gpt_neox",),
    blocks="layers",
    branches={
        "attention": Branch(
            core="attention",
            inputs=("attention.query_key_value",),
            output="attention.dense",
            skip={"attention": SkippedAttention, "input_layernorm": SkippedNorm},
            layout="interleaved",
        ),
        "mlp": Branch(
            core="mlp",
            inputs=("mlp.dense_h_to_4h",),
            output="mlp.dense_4h_to_h",
            skip={"mlp": SkippedMlp, "post_attention_layernorm": SkippedNorm},
        ),
    },
    head_dim_in_config=False,
)
OPT = Transformer(
    name="OPT",
    model_types=("opt",),
    blocks="decoder.layers",
    branches={
        "attention": Branch(
            core="self_attn",
            inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output="self_attn.out_proj",
            skip={"self_attn": SkippedAttention, "self_attn_layer_norm": SkippedNorm},
        ),
        "mlp": Branch(
            core="",
            inputs=("fc1",),
            output="fc2",
            skip={"fc1": SkippedUnread, "fc2": SkippedMlp, "final_layer_norm": SkippedNorm},
        ),
    },
    width_key="ffn_dim",
    head_dim_in_config=False,
)
