"""What can be asked of mergeable adapters beyond the mode."""

from dataclasses import dataclass
from typing import Literal

import nncf


@dataclass(frozen=True)
class AdvancedSqftParameters:
    """
    Parameters of :func:`nncf_ext.make_mergeable`.

    :param trainable_scales: QUANT_AWARE only: the scales of the grid are trained with the adapter, and gradients take
        the range of the grid into account. By default scales are frozen, and the gradient passes straight through.
    :param dropout: QUANT_AWARE only: ``"adapter"`` drops inputs of the adapter's part alone, as in LoRA; the weight is
        rounded as a whole, so what is dropped is the difference that the adapter makes. ``"input"`` drops inputs of
        the whole layer, as published.
    :raises nncf.ValidationError: `dropout` is neither.
    """

    trainable_scales: bool = False
    dropout: Literal["adapter", "input"] = "adapter"

    def __post_init__(self) -> None:
        if self.dropout not in ("adapter", "input"):
            msg = f"dropout must be 'adapter' or 'input'; got {self.dropout!r}."
            raise nncf.ValidationError(msg)
