"""Zeros that stay zeros while the other weights learn."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KeepZeros(TrainerCallback):
    """
    Trains the kept weights of a sparse model: every weight that is zero when the training begins is zero at its end.

    It holds for trainable matrices of which some, but not all, values are zero. Vectors (norms, biases), and matrices
    that are zero altogether (the second half of a fresh LoRA adapter), learn freely. Gradients of zeros are dropped
    where they arise, so that clipping and the optimizer's statistics do not see them. Takes one byte a weight.

    A Trainer that resumes from a checkpoint finds the zeros in it.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes down where the zeros are."""
        self._release()
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                kept = parameter.detach() != 0
                if not kept.all() and kept.any():
                    self._kept.append((parameter, kept))
                    self._hooks.append(parameter.register_hook(lambda gradient, kept=kept: gradient * kept))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets them to zero again, where an optimizer moves weights without a gradient."""
        with torch.no_grad():
            for parameter, kept in self._kept:
                parameter.masked_fill_(~kept, 0.0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the zeros."""
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._kept.clear()
