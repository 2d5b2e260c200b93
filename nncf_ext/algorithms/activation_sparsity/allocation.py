"""
How sparse each layer of a block gets, so that a wanted share of the block's weights is not read.

Source: TEAL, arXiv 2408.14690, section 4.3: what costs the block's output least is made sparser, again and again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.algorithms.activation_sparsity.parameters import LARGEST
from nncf_ext.calibration.stream import Enough, Unit
from nncf_ext.weights.activation_sparsity import ActivationSparsity, set_activation_sparsity

_STEP = 0.05  # of the weights that are allocated together
_TRIED = 2  # calibration items that a block is tried on


def greedy_fractions(sizes: Sequence[float], share: float, error: Callable[[list[float]], float]) -> list[float]:
    """
    :param sizes: Bytes of the weights of each group of layers.
    :param share: Of all these bytes, those that need not be read, 0..1.
    :param error: What fractions, one for each group, cost; smaller is better.
    :return: Fractions of the groups' inputs, 0..1, none above the largest that can be asked for. The weights behind
        them are the wanted share.
    """
    fractions = [0.0] * len(sizes)
    step = share * sum(sizes) / max(1, round(share / _STEP))
    left = share * sum(sizes)
    while left > 1e-6 * sum(sizes):
        candidates = []
        for group, size in enumerate(sizes):
            taken = min(step, left, (LARGEST - fractions[group]) * size)
            if taken > 0:
                raised = [*fractions]
                raised[group] += taken / size
                candidates.append((error(raised), taken, raised))
        if not candidates:
            break
        _, taken, fractions = min(candidates)
        left -= taken
    return fractions


def allocated(
    unit: Unit,
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    targets: Mapping[str, float],
    items: int,
    thresholds: Callable[[Sequence[str], float], Mapping[str, ActivationSparsity]],
) -> dict[str, float]:
    """
    Layers of a block that have the same target have it together: as the share of the bytes of their weights.

    :param unit: The unit; its layers have no thresholds, now and afterwards.
    :param block: Its block.
    :param groups: Layers that read the same tensor, in the order in which they run.
    :param targets: By layer, 0..1.
    :param items: Number of calibration items.
    :param thresholds: What layers of a group get for a fraction, with the thresholds that stand in the others.
    :return: Fractions of inputs by layer, 0..1.
    """
    outputs = _Outputs(unit, block, items)
    found: dict[str, float] = {}
    tried: dict[tuple[str, float], Mapping[str, ActivationSparsity]] = {}

    def put(names: Sequence[str], fraction: float) -> None:
        for name in names:
            set_activation_sparsity(unit.layers[name], None)
        if not fraction:
            return
        if (names[0], fraction) not in tried:
            tried[names[0], fraction] = thresholds(names, fraction)
        for name, each in tried[names[0], fraction].items():
            set_activation_sparsity(unit.layers[name], each)

    try:
        for target in sorted({targets[name] for group in groups for name in group}):
            together = [part for group in groups if (part := [name for name in group if targets[name] == target])]
            sizes = [sum(unit.layers[name].weight.nbytes for name in part) for part in together]

            def error(fractions: list[float], together: Sequence[Sequence[str]] = together) -> float:
                for part, fraction in zip(together, fractions, strict=True):
                    put(part, fraction)
                return outputs.error()

            fractions = greedy_fractions(sizes, target, error) if len(together) > 1 else [target]
            for part, fraction in zip(together, fractions, strict=True):
                put(part, fraction)
                found |= dict.fromkeys(part, fraction)
    finally:
        for layer in unit.layers.values():
            set_activation_sparsity(layer, None)
    return found


class _Outputs:
    """What a block gives on some of the calibration items, from all over."""

    def __init__(self, unit: Unit, block: nn.Module, items: int) -> None:
        self._unit, self._block = unit, block
        self._tried = {*torch.linspace(0, items - 1, min(_TRIED, items)).long().tolist()}
        self._dense = self._now()

    def error(self) -> float:
        """Mean over tokens, as some of them are much larger, of the squared relative change of the hidden state."""
        changes = [
            (now - dense).square().sum(-1) / dense.square().sum(-1).clamp(min=1e-12)
            for now, dense in zip(self._now(), self._dense, strict=True)
        ]
        return float(torch.cat([each.flatten() for each in changes]).mean())

    def _now(self) -> list[Tensor]:
        found: list[Tensor] = []
        item = 0

        def begin(*_: Any) -> None:
            if item not in self._tried:
                raise Enough

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found.append((output if isinstance(output, Tensor) else output[0]).detach().float())

        def count() -> None:
            nonlocal item
            item += 1

        hooks = [self._block.register_forward_pre_hook(begin), self._block.register_forward_hook(keep)]
        try:
            self._unit.run(count)
        finally:
            for hook in hooks:
                hook.remove()
        return found
