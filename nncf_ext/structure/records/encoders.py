"""Encoders: blocks whose branches end in a normalization of their own."""

from nncf_ext.standalone.skipping import SkippedAttentionWithResidual, SkippedOutputWithResidual, SkippedUnread
from nncf_ext.structure.records.branch import Branch
from nncf_ext.structure.records.decoders import Transformer

BERT = Transformer(
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
