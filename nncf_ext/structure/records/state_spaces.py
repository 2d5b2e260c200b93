"""State-space models, and hybrids of them with attention."""

from typing import Any

import nncf
from torch import nn

from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.standalone.skipping import (
    BypassedSharedAttention,
    SkippedMambaNorm,
    SkippedMambaOfHybrid,
    SkippedMlp,
    SkippedNorm,
)
from nncf_ext.structure.dimensions import Dimensions, Kept
from nncf_ext.structure.records.branch import ATTENTION, MAMBA, Branch
from nncf_ext.structure.records.record import Record


class StateSpace(Record):
    """Blocks of a Mamba mixer; in hybrids, attention and an MLP that several blocks share stand before some of them."""

    def check(self, model: nn.Module, dimensions: Dimensions, kept: Kept) -> None:
        if not any(len(kept[each.name]) for each in dimensions.of_part(MAMBA)):
            msg = "The plan removes the Mamba mixer of every layer: no state would be left. Keep one."
            raise nncf.ValidationError(msg)
        for each in dimensions.of_part(MAMBA):
            if tuple(kept[each.name]) == (1,):
                msg = (
                    f"The plan keeps the state space of layer {each.block} without the mixer that it stands in. Keep "
                    "both."
                )
                raise nncf.ValidationError(msg)
        attention = dimensions.of_part(ATTENTION)
        if attention and not len(kept[attention[0].name]):
            msg = (
                f"The plan removes the attention of layer {attention[0].block}, the first that has some: the cache "
                "tells positions by it. Keep it."
            )
            raise nncf.ValidationError(msg)

    def cache_slots(self, model: nn.Module, dimensions: Dimensions, kept: Kept) -> dict[str, int]:
        """
        Slots are filled to the last, because transformers asks the last one whether there is a state. Where blocks
        stay that do nothing, each keeps its own.
        """
        if not self.drops_blocks:
            return {}
        mixers = [each for each in dimensions.of_part(MAMBA) if len(kept[each.name])]
        first = len(dimensions.by_block) - len(mixers)
        found = {}
        for slot, each in enumerate(mixers, first):
            block = f"{dimensions.blocks}.{each.block}"
            for owner in (block, f"{block}.{self.branches[MAMBA].core}"):
                module: Any = model.get_submodule(owner)
                if getattr(module, "layer_idx", None) is not None:
                    found[owner] = slot
        return found


MAMBA_MODELS = StateSpace(
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
ZAMBA2 = StateSpace(
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
    drops_blocks=False,
)
