"""How far is what a changed model gives from what it gave before? Seen at a few positions of a few items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POSITIONS = 64  # of an item


@dataclass(frozen=True)
class Output:
    """
    :param values: ``[items, positions, features]``, float32.
    :param logits: Whether they are those of predicted tokens or classes.
    """

    values: Tensor
    logits: bool


def few_items(items: Sequence[Any], tokens: int) -> list[Any]:
    """
    :param items: Calibration data.
    :param tokens: About how many to see.
    :return: Items spread over the data: two, and up to eight where they are short.
    """
    first = items[0]
    values = first.values() if isinstance(first, Mapping) else [first] if isinstance(first, Tensor) else first
    length = max((each.shape[:2].numel() for each in values if isinstance(each, Tensor)), default=1)
    count = min(len(items), max(2, min(8, tokens // max(length, 1))))
    return [items[index] for index in torch.linspace(0, len(items) - 1, count).long().tolist()]


def read_output(given: Any, positions: int = _POSITIONS, mask: Tensor | None = None) -> Output:
    """
    :param given: What a model gives: a mapping, a tuple or a tensor.
    :param positions: How many to look at, spread evenly.
    :param mask: ``[items, tokens]``: where it is 0 there is padding, which is left out; None: there is none.
    :return: Its logits, or else its first output. With a mask, positions of all items are one axis.
    """
    logits = getattr(given, "logits", None)
    values = list(given.values()) if isinstance(given, Mapping) else [given] if isinstance(given, Tensor) else [*given]
    tensor = logits if logits is not None else next(each for each in values if isinstance(each, Tensor))
    if mask is not None and tensor.shape[:2] == mask.shape and not bool(mask.all()):
        tensor = tensor[mask.to(tensor.device) != 0].unsqueeze(0)
    if tensor.dim() > 2:
        rows = tensor.flatten(1, -2)
        places = torch.linspace(0, rows.shape[1] - 1, min(positions, rows.shape[1])).long()
        tensor = rows[:, places.to(rows.device)]
    return Output(tensor.detach().float(), logits is not None)


def difference(found: Output, dense: Output) -> float:
    """
    :param found: Of the changed model.
    :param dense: Of the model before, for the same item.
    :return: Divergence of the predicted distributions, nats; of other outputs, the squared error relative to their
        size.
    """
    if dense.logits:
        expected = dense.values.log_softmax(dim=-1)
        return float((expected.exp() * (expected - found.values.log_softmax(dim=-1))).sum(dim=-1).mean())
    tiny = torch.finfo(torch.float32).tiny
    return float((found.values - dense.values).square().sum() / dense.values.square().sum().clamp(min=tiny))
