"""What is accumulated from the inputs of linear layers."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.calibration.stream import Enough, Unit

_SAMPLED_TOKENS_PER_CALL = 16
_SAMPLED_TOKENS = 1024
_ROWS_AT_ONCE = 256  # of the products: what lies left of these rows' own square is known from the rows above


@dataclass
class InputStatistics:
    """
    Second moments of the inputs of one linear layer, and a sample of its input tokens.

    Memory is ``in_features^2`` floats with `full`, else ``in_features`` floats, whatever the number of tokens.

    :param in_features: Number of input features.
    :param full: Keep products of all pairs of features (the Hessian), not only squares.
    :param device: Where to accumulate.
    """

    in_features: int
    full: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        shape = (self.in_features, self.in_features) if self.full else (self.in_features,)
        self._products = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self._sample: list[Tensor] = []
        self._sampled = 0
        self.sequences = 0
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """
        Adds one call of the layer.

        :param inputs: Layer input ``[batch, tokens, in_features]`` or ``[tokens, in_features]`` (one sequence) or
            ``[in_features]``; any number of leading axes counts as batch.
        """
        rows = inputs.detach().reshape(-1, self.in_features).to(self._products.device, torch.float32)
        if self.full:
            for start in range(0, self.in_features, _ROWS_AT_ONCE):
                part = self._products[start : start + _ROWS_AT_ONCE, start:]
                part.addmm_(rows[:, start : start + _ROWS_AT_ONCE].T, rows[:, start:])
        else:
            self._products += rows.square().sum(dim=0)
        self.sequences += math.prod(inputs.shape[:-2])  # 1 without a batch axis: the product of no numbers
        self.tokens += rows.shape[0]
        wanted = min(_SAMPLED_TOKENS_PER_CALL, _SAMPLED_TOKENS - self._sampled, rows.shape[0])
        if wanted > 0:
            # Evenly spread over the call: the first tokens of a text are not typical of it.
            self._sample.append(rows[torch.arange(wanted) * rows.shape[0] // wanted].clone())
            self._sampled += wanted

    def merge(self, other: "InputStatistics") -> None:
        """
        Adds what another accumulator has seen of the same layer.

        :param other: Accumulator of equal `in_features` and `full`.
        """
        self._products += other._products.to(self._products.device)
        self._sample = [*self._sample, *(part.to(self._products.device) for part in other._sample)]
        self._sampled += other._sampled
        self.sequences += other.sequences
        self.tokens += other.tokens

    @property
    def mean_square(self) -> Tensor:
        """
        ``n_j``: the sum over tokens of ``x_j^2``, averaged over sequences. ``[in_features]``, float32.

        Source: Sun et al. (Wanda), section 3.
        """
        squares = self._products.diagonal() if self.full else self._products
        return squares / max(self.sequences, 1)

    @property
    def hessian(self) -> Tensor:
        """
        ``H = 2 X X^T`` averaged over sequences: the second derivative of the layer's squared output error with respect
        to one row of its weight. ``[in_features, in_features]``, float32.

        Source: Frantar & Alistarh, SparseGPT, section 3.1.
        """
        # The factor in front cancels in the solver: scores are compared with each other, corrections are ratios of
        # entries, and damping is relative to the diagonal. It is kept so that the number is the one of the paper.
        upper = self._products.triu()
        return (upper + upper.triu(1).T) * (2.0 / max(self.sequences, 1))

    def output_error(self, weight: Tensor, replacement: Tensor) -> float:
        """
        Relative error of the layer's output on the sampled tokens: ``|X (W - R)^T| / |X W^T|`` (Frobenius norms).

        :param weight: Weight ``[out_features, in_features]``.
        :param replacement: What stands in its place, same shape.
        :return: 0.0 when nothing changed; dimensionless.
        """
        if not self._sample:
            return 0.0
        tokens = torch.cat(self._sample)
        exact = torch.linalg.norm(tokens @ weight.float().T)
        error = torch.linalg.norm(tokens @ (weight.float() - replacement.float()).T)
        return float(error / exact) if exact > 0 else 0.0


def observe_inputs(unit: Unit, *, full: bool) -> dict[str, InputStatistics]:
    """
    Runs a unit once and accumulates the second moments of its layers' inputs.

    Layers that are fed the very same tensor (query, key and value; gate and up) share one accumulator.

    :param unit: The unit, as it is now.
    :param full: Accumulate Hessians, not only squares.
    :return: Statistics by the path of the layer; a layer that no token reached is missing.
    """
    apart: set[str] = set()
    while True:
        statistics, parted = _observe(unit, full, apart)
        if not parted:
            return {name: statistic for name, statistic in statistics.items() if statistic.tokens}
        apart |= parted


def _observe(unit: Unit, full: bool, apart: set[str]) -> tuple[dict[str, InputStatistics], set[str]]:
    """
    :param unit: The unit.
    :param full: Accumulate Hessians.
    :param apart: Layers that need an accumulator of their own.
    :return: Statistics by the path of the layer, and the layers that shared an input when first called and not always:
        the statistics are of no use then.
    """
    statistics: dict[str, InputStatistics] = {}
    leader_of: dict[str, str] = {}
    # Of each layer's last call: its number, the input, and how often that had been written to.
    latest: dict[str, tuple[int, Tensor, int]] = {}
    parted: set[str] = set()
    # Once a sample has been run whole, and has called each layer once, others end where the last of them is called.
    called: set[str] = set()
    once = False

    def observe(name: str, module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        version = 0 if inputs.is_inference() else inputs._version
        number = latest[name][0] + 1 if name in latest else 1
        same = (number, inputs, version)
        if name not in leader_of:
            found = () if name in apart else (other for other in leader_of.values() if _same_call(latest[other], same))
            leader_of[name] = next(iter(found), name)
        leader = leader_of[name]
        latest[name] = same
        if leader == name:
            if name not in statistics:
                statistics[name] = InputStatistics(module.in_features, full, inputs.device)
            statistics[name].update(inputs)
        elif not _same_call(latest[leader], same):
            parted.add(name)
        called.add(name)
        if once and len(called) == len(unit.layers):
            raise Enough

    def after_sample() -> None:
        nonlocal once
        once = once or [number for number, *_ in latest.values()] == [1] * len(unit.layers)
        called.clear()

    with ExitStack() as hooks:
        for name, layer in unit.layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(observe, name), with_kwargs=True).remove)
        unit.run(after_sample)
    parted |= {name for name, leader in leader_of.items() if latest[name][0] != latest[leader][0]}
    return {name: statistics[leader] for name, leader in leader_of.items()}, parted


def _same_call(left: tuple[int, Tensor, int], right: tuple[int, Tensor, int]) -> bool:
    return left[1] is right[1] and (left[0], left[2]) == (right[0], right[2])
