"""Where the parts of known architectures stand: one frozen record each."""

from torch import nn

from nncf_ext.structure.records.decoders import GEMMA2, GPT_NEOX, LLAMA, OPT, PHI3
from nncf_ext.structure.records.encoders import BERT
from nncf_ext.structure.records.record import Record
from nncf_ext.structure.records.state_spaces import MAMBA_MODELS, ZAMBA2

RECORDS: tuple[Record, ...] = (LLAMA, GEMMA2, PHI3, GPT_NEOX, OPT, BERT, MAMBA_MODELS, ZAMBA2)


def record_of(model: nn.Module) -> Record | None:
    """
    :param model: Any torch model.
    :return: The record of its architecture, or None.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((record for record in RECORDS if model_type in record.model_types), None)


def blocks_path(model: nn.Module) -> str | None:
    """
    :param model: Any torch model, with or without a head.
    :return: Path of the block list in this very model, or None if the architecture has no record.
    """
    record = record_of(model)
    return None if record is None else record.blocks_path(model)
