"""
Where the parts of known architectures live: one frozen record each.

A model without a record is probed (:mod:`nncf_ext.structure.blocks`) for its blocks; removing structure needs a record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import (
    BypassedSharedAttention,
    Skipped,
    SkippedAttention,
    SkippedAttentionWithResidual,
    SkippedMambaNorm,
    SkippedMambaOfHybrid,
    SkippedMlp,
    SkippedNorm,
    SkippedOutputWithResidual,
    SkippedUnread,
)


@dataclass(frozen=True)
class Branch:
    """
    One residual branch of a block. Paths are seen from the block.

    :param core: Module that keeps head counts, sizes and the index into the cache; empty: the block itself.
    :param skip: What replaces which module when the whole branch is removed.
    :param inputs: Linear layers whose outputs are cut. Attention: query, key, value, or one fused layer. Empty: the
        branch goes as a whole, or loses its state space.
    :param output: Linear layer whose inputs are cut.
    :param layout: Rows of a fused layer: ``"stacked"`` (all queries, all keys, all values; all gates, all ups) or
        ``"interleaved"`` (query, key, value of a head together). ``"separate"``: nothing is fused.
    :param adapters: List of modules whose last linear layers, where they have some, are cut like the inputs.
    :param without_ssm: What replaces which module when a Mamba mixer loses its state space.
    """

    core: str
    skip: Mapping[str, type[Skipped]]
    inputs: tuple[str, ...] = ()
    output: str = ""
    layout: Literal["separate", "stacked", "interleaved"] = "separate"
    adapters: str = ""
    without_ssm: Mapping[str, type[GatedConvMixer]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """
    :param name: Name for messages.
    :param model_types: Values of ``model.config.model_type`` that share this layout.
    :param blocks: Path of the list of equal blocks, seen from the model without its head.
    :param branches: The residual branches of a block by name: ``"attention"`` and ``"mlp"``, or ``"mamba"``.
    :param hybrids: The branches of other kinds of blocks, by the name of the block's class.
    :param width_key: The configuration's name for the number of MLP channels.
    :param head_dim_in_config: The configuration can state the head size, so that the number of heads may change.
    :param heads_from_config: The attention's forward reads the number of heads from its configuration.
    :param decodes: Generates with a cache, whatever the configuration says.
    :param renumbers: A layer without any branch can vanish; else it stays as one that does nothing.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    branches: Mapping[str, Branch]
    width_key: str = "intermediate_size"
    head_dim_in_config: bool = True
    heads_from_config: bool = False
    decodes: bool = True
    hybrids: Mapping[str, Mapping[str, Branch]] = field(default_factory=dict)
    renumbers: bool = True

    def branches_of(self, block: nn.Module) -> Mapping[str, Branch]:
        """:return: The branches of one block."""
        return self.hybrids.get(type(block).__name__, self.branches)


_LLAMA = Family(
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
_GEMMA2 = replace(
    _LLAMA,
    name="Gemma 2",
    model_types=("gemma2", "gemma3_text"),
    branches={
        "attention": replace(
            _LLAMA.branches["attention"],
            skip={
                "self_attn": SkippedAttention,
                "input_layernorm": SkippedNorm,
                "post_attention_layernorm": SkippedNorm,
            },
        ),
        "mlp": replace(
            _LLAMA.branches["mlp"],
            skip={
                "mlp": SkippedMlp,
                "pre_feedforward_layernorm": SkippedNorm,
                "post_feedforward_layernorm": SkippedNorm,
            },
        ),
    },
)
_PHI3 = replace(
    _LLAMA,
    name="Phi-3",
    model_types=("phi3",),
    branches={
        "attention": replace(_LLAMA.branches["attention"], inputs=("self_attn.qkv_proj",), layout="stacked"),
        "mlp": replace(_LLAMA.branches["mlp"], inputs=("mlp.gate_up_proj",), layout="stacked"),
    },
    heads_from_config=True,
)
_GPT_NEOX = Family(
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
_OPT = Family(
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
_BERT = Family(
    name="BERT",
    model_types=("bert", "roberta"),
    blocks="encoder.layer",
    branches={
        "attention": Branch(
            core="attention.self",
            inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
            output="attention.output.dense",
            skip={"attention": SkippedAttentionWithResidual},
        ),
        "mlp": Branch(
            core="",
            inputs=("intermediate.dense",),
            output="output.dense",
            skip={"intermediate": SkippedUnread, "output": SkippedOutputWithResidual},
        ),
    },
    head_dim_in_config=False,
    decodes=False,
)

_MAMBA = Family(
    name="Mamba",
    model_types=("mamba", "falcon_mamba", "mamba2"),
    blocks="layers",
    branches={
        "mamba": Branch(
            core="mixer",
            skip={"mixer": SkippedMlp, "norm": SkippedMambaNorm},
            without_ssm={"mixer": GatedConvMixer},
        )
    },
)
_ZAMBA2 = Family(
    name="Zamba2",
    model_types=("zamba2",),
    blocks="layers",
    branches={
        "mamba": Branch(
            core="mamba",
            skip={"mamba": SkippedMlp, "input_layernorm": SkippedNorm},
            without_ssm={"mamba": GatedConvMixer},
        )
    },
    hybrids={
        "Zamba2HybridLayer": {
            "mamba": Branch(
                core="mamba_decoder.mamba",
                skip={"mamba_decoder": SkippedMambaOfHybrid},
                without_ssm={"mamba_decoder.mamba": GatedConvMixer},
            ),
            "attention": Branch(
                core="shared_transformer.self_attn",
                skip={
                    "shared_transformer.self_attn": BypassedSharedAttention,
                    "shared_transformer.input_layernorm": SkippedNorm,
                },
            ),
            "mlp": Branch(
                core="shared_transformer.feed_forward",
                inputs=("shared_transformer.feed_forward.gate_up_proj",),
                output="shared_transformer.feed_forward.down_proj",
                skip={
                    "shared_transformer.feed_forward": SkippedNorm,
                    "shared_transformer.pre_ff_layernorm": SkippedNorm,
                },
                layout="stacked",
                adapters="shared_transformer.feed_forward.gate_up_proj_adapter_list",
            ),
        }
    },
    renumbers=False,
)

FAMILIES = (_LLAMA, _GEMMA2, _PHI3, _GPT_NEOX, _OPT, _BERT, _MAMBA, _ZAMBA2)


def family_of(model: nn.Module) -> Family | None:
    """
    :param model: Any torch model.
    :return: The record of its architecture, or None.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def blocks_path(model: nn.Module) -> str | None:
    """
    :param model: Any torch model, with or without a head.
    :return: Path of the block list in this very model, or None if the architecture has no record.
    """
    family = family_of(model)
    if family is None:
        return None
    prefixes = (getattr(model, "base_model_prefix", ""), "")
    paths = [f"{prefix}.{family.blocks}" if prefix else family.blocks for prefix in prefixes]
    names = dict(model.named_modules())
    return next((path for path in paths if path in names), None)
