"""
Where the parts of known architectures live: one frozen record each.

A model without a record is probed (:mod:`nncf_ext.structure.blocks`); a record is worth adding where probing could go
wrong or where a method needs a part by name.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """
    :param name: Name for messages.
    :param model_types: Values of ``model.config.model_type`` that share this layout.
    :param blocks: Path of the list of equal blocks, seen from the model without its head.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str


FAMILIES = (Family(name="Llama", model_types=("llama", "mistral", "qwen2", "qwen3"), blocks="layers"),)


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
