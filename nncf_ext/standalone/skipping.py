"""
What stands in place of a removed branch: modules without parameters, so that the block's own forward stays in use.

A branch that is added to the residual stream gives a scalar zero, which OpenVINO folds away; a branch that ends in its
own normalization (BERT) gives back what it was given. This file needs torch only: it lies beside the weights of models
whose layers differ, for those who load them without this package.
"""

from typing import Any

from torch import Tensor, nn


class Skipped(nn.Module):
    """Base of all stand-ins: this is how a removed branch is recognized."""

    @classmethod
    def standing_for(cls, _module: nn.Module) -> "Skipped":
        """:return: What stands in place of a module."""
        return cls()


class SkippedNorm(Skipped):
    """Gives back the hidden states."""

    def forward(self, hidden_states: Tensor, *_args: Any) -> Tensor:
        return hidden_states


class SkippedUnread(SkippedNorm):
    """Gives back what it was given, of whatever width: what reads it is skipped, too."""


class SkippedMambaNorm(SkippedNorm):
    """Mamba's blocks ask their normalization for its type."""

    @classmethod
    def standing_for(cls, module: Any) -> "SkippedMambaNorm":
        stand_in = cls()
        stand_in.weight = module.weight.detach()[:0]
        return stand_in


class SkippedMlp(Skipped):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states.new_zeros(())


class SkippedBlock(Skipped):
    """Stands for a whole block, of whatever model: gives back the first tensor that it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))


class SkippedBlockInTuple(SkippedBlock):
    """The same for blocks that give a tuple of one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (super().forward(*args, **kwargs),)


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


class BypassedSharedAttention(Skipped):
    """Zamba2's attention reads the hidden states beside the embeddings and has no residual: hidden states pass."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states[..., : hidden_states.shape[-1] // 2], None


class SkippedMambaOfHybrid(Skipped):
    """What Zamba2's shared transformer gave to the Mamba mixer goes into the residual stream."""

    def forward(self, hidden_states: Tensor, transformer_hidden_states: Tensor, **_kwargs: Any) -> Tensor:
        return hidden_states + transformer_hidden_states


def tied_names(base: Any) -> dict[str, str]:
    """
    :param base: A model of transformers without its head.
    :return: Parameters that it ties to others, by full name; empty unless its blocks share weights.
    """
    if not isinstance(getattr(base, "_tied_weights_keys", None), dict):
        return {}
    return base.get_expanded_tied_weights_keys(all_submodels=False)


def keep_ties(base: Any, ties: dict[str, str]) -> None:
    """
    Tells a model, after parts of it were removed, which of its parameters are still tied: it knows whole blocks only.

    :param base: The model, changed in place.
    :param ties: From :func:`tied_names`, before.
    """
    if not ties:
        return
    left = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    groups: dict[str, list[str]] = {}
    for name, source in ties.items():
        groups.setdefault(source, [source]).append(name)
    alive = [[name for name in group if name in left] for group in groups.values()]
    base._tied_weights_keys = {name: group[0] for group in alive for name in group[1:]}
