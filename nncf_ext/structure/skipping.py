"""
What stands in place of a removed branch: modules without parameters, so that the block's own forward stays in use.

A branch that is added to the residual stream gives a scalar zero, which OpenVINO folds away; a branch that ends in its
own normalization (BERT) gives back what it was given.
"""

from typing import Any

from torch import Tensor, nn


class Skipped(nn.Module):
    """Base of all stand-ins: this is how a removed branch is recognized."""


class SkippedNorm(Skipped):
    """Gives back the hidden states."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class SkippedMlp(Skipped):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(())


class SkippedAttention(Skipped):
    """Adds nothing to the residual stream and has no attention weights."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class SkippedAttentionWithResidual(Skipped):
    """Stands for attention, residual and normalization together: gives back the hidden states."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


class SkippedOutputWithResidual(Skipped):
    """Stands for output projection, residual and normalization together: gives back the residual."""

    def forward(self, _hidden_states: Tensor, residual: Tensor) -> Tensor:
        return residual
