"""What can be asked of mergeable adapters beyond the mode."""

from dataclasses import dataclass
from typing import Literal

import nncf


@dataclass(frozen=True)
class AdvancedSqftParameters:
    """
    Parameters of :func:`nncf_ext.make_mergeable` in mode QUANT_AWARE.

    :param trainable_scales: The scales of the grid are trained with the adapter, and gradients take the range of the
        grid into account. By default scales are frozen, and the gradient passes straight through.
    :param dropout: ``"adapter"`` drops inputs of the adapter's part alone, as in LoRA; the weight is rounded as a
        whole, so what is dropped is the adapter's delta before rounding. ``"input"`` drops inputs of the whole layer,
        as published.
    :param start: ``"grid"``: with an untrained adapter (B = 0) the weights have the codes of the grid; a base weight
        that would round to another code is moved just far enough into the cell of its code. ``"nearest"``, as
        published: base weights stay as they are and get the codes nearest to them, whatever the grid's own are.
    :raises nncf.ValidationError: A choice is none of those named.
    """

    trainable_scales: bool = False
    dropout: Literal["adapter", "input"] = "adapter"
    start: Literal["grid", "nearest"] = "grid"

    def __post_init__(self) -> None:
        for name, choices in (("dropout", ("adapter", "input")), ("start", ("grid", "nearest"))):
            if getattr(self, name) not in choices:
                msg = f"{name} must be one of {choices}; got {getattr(self, name)!r}."
                raise nncf.ValidationError(msg)
