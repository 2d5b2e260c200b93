"""
The weights of a whole block, trained to give the hidden state of the model as it was.

A layer fitted by itself cannot make up for what the layers beside it, and the blocks before it, have changed. So all
weights of a block that stay learn together: its inputs come from the compressed blocks before, what it should give from
the dense model. Zeros stay zero. On the grid, scales stay and codes are those nearest to what is learned; the gradient
passes the rounding as if it were not there (straight through).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.algorithms.sparse_weights.solver import Solution
from nncf_ext.calibration.trainable_block import TrainableBlock
from nncf_ext.weights.int4 import dequantize, round_to_grid

_SAMPLES_PER_STEP = 4
_WARMUP = 0.1  # part of all steps
_SEED = 0
_SMALL = 1e-6  # of the mean size: smaller tokens count as if they had this


@dataclass
class _Learner:
    """One layer's weight ``[out_features, in_features]``, float32, while it learns."""

    weight: Tensor
    kept: Tensor
    scales: Tensor | None

    def seen(self, dtype: torch.dtype) -> Tensor:
        """What the forward sees, on the grid if there is one."""
        weight = self.weight * self.kept
        if self.scales is not None:
            with torch.no_grad():
                step = dequantize(round_to_grid(weight, self.scales), self.scales) - weight
            weight = weight + step
        return weight.to(dtype)


def reconstruct(
    block: TrainableBlock,
    layers: Mapping[str, nn.Linear],
    solutions: Mapping[str, Solution],
    epochs: int,
    learning_rate: float,
) -> dict[str, Solution]:
    """
    Trains the weights of one block by Adam. Half-precision models run in their own type; weights learn in float32.

    The loss is the mean over tokens of ``|h - h_dense|^2 / |h_dense|^2``. What follows a block normalizes each token,
    so relative errors count; a squared error would be that of the few tokens whose states are a thousand times larger.

    :param block: The block, its inputs, and the hidden states it should give.
    :param layers: Its layers by path; nothing of them changes.
    :param solutions: Their weights to begin with; zeros stay. Where there are scales, codes and `prerounding`, on their
        grid.
    :param epochs: How often each calibration sample is seen.
    :param learning_rate: The highest; a warm-up comes before, a cosine to zero behind.
    :return: The new weights, or the old ones if the loss on the calibration data has not become smaller.
    :raises nncf.ValidationError: The loss is not finite.

    Source: Guo et al., EBFT, arXiv 2402.12419, section 3 (with the dense model's own outputs in place of the dense
    block's on compressed inputs).
    """
    learners = {name: _learner(solution) for name, solution in solutions.items()}
    weights = [each.weight for each in learners.values()]
    optimizer = torch.optim.Adam(weights, lr=learning_rate, betas=(0.9, 0.95))
    count = len(block.wanted)
    steps = epochs * math.ceil(count / _SAMPLES_PER_STEP)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    generator = torch.Generator().manual_seed(_SEED)

    def loss(sample: int) -> Tensor:
        seen = {id(layers[name].weight): each.seen(layers[name].weight.dtype) for name, each in learners.items()}
        wanted = block.wanted[sample].float()
        error = (block.output(sample, seen).float() - wanted).square().sum(dim=-1)
        size = wanted.square().sum(dim=-1)
        # A token of zeros (padding) has no size.
        return (error / size.clamp(min=_SMALL * float(size.mean()) + torch.finfo(torch.float32).tiny)).mean()

    def total() -> float:
        with torch.no_grad():
            return sum(float(loss(sample)) for sample in range(count))

    before = total()
    if not math.isfinite(before):
        msg = "The error of a block's outputs is not finite: the model's hidden states are not, on this data."
        raise nncf.ValidationError(msg)
    for _ in range(epochs):
        for chosen in torch.randperm(count, generator=generator).split(_SAMPLES_PER_STEP):
            gradients = [torch.zeros_like(each) for each in weights]
            for sample in chosen.tolist():
                with torch.enable_grad():
                    parts = torch.autograd.grad(loss(sample), weights, allow_unused=True)
                for gradient, part in zip(gradients, parts, strict=True):
                    if part is not None:  # an expert that no token of this sample went to has none
                        gradient.add_(part, alpha=1 / len(chosen))
            for each, gradient in zip(weights, gradients, strict=True):
                each.grad = gradient
            optimizer.step()
            schedule.step()
    if not total() < before:  # diverged, too
        return dict(solutions)
    return {name: _learned(solutions[name], each) for name, each in learners.items()}


def _learner(solution: Solution) -> _Learner:
    # What a code was rounded from, so that a small weight with code 0 can still grow.
    start = solution.weight if solution.prerounding is None else solution.prerounding
    return _Learner(start.clone().requires_grad_(True), start != 0, solution.scales)


def _learned(solution: Solution, learner: _Learner) -> Solution:
    weight = (learner.weight * learner.kept).detach()
    if learner.scales is None:
        return replace(solution, weight=weight)
    codes = round_to_grid(weight, learner.scales)
    return replace(solution, weight=dequantize(codes, learner.scales), codes=codes, prerounding=weight)


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate."""
    return min(1.0, (step + 1) / (_WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
