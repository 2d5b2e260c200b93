"""How good is a smaller language model? Losses by sequence, from its logits."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CHUNK = 256  # positions whose logits are turned to float32 at a time: a whole sequence of them needs much memory


class Metric(ABC):
    """
    A loss of every sequence, and what is shown for its mean.

    Losses must not be below zero: a search gives a candidate up once its sum exceeds the best one, which is right only
    if the rest cannot lower it.
    """

    needs_dense = False
    """Whether :meth:`losses` needs the logits of the dense model."""

    @abstractmethod
    def losses(self, logits: Tensor, batch: Mapping[str, Tensor], dense: Tensor | None) -> Tensor:
        """
        :param logits: Of the candidate, ``[sequences, tokens, vocabulary]``, any floating type.
        :param batch: The model's inputs: ``input_ids`` ``[sequences, tokens]``, on request ``attention_mask``.
        :param dense: Logits of the dense model, or None.
        :return: ``[sequences]`` float64.
        """

    def shown(self, loss: float) -> float:
        """
        :param loss: A mean loss.
        :return: What to show for it. It must rise with the loss.
        """
        return loss


@dataclass(frozen=True)
class PerplexityMetric(Metric):
    """
    Negative log-likelihood of the next token: the mean over a sequence's tokens; over sequences, their plain mean.

    Shown as perplexity, the exponential of the mean.

    :param ignored_token: Targets that do not count, such as the end of text; None: all count. Padding never does.

    Source: MultiPruner (arXiv 2501.09949) and BlockPruner (arXiv 2406.10594), importance of a block.
    """

    ignored_token: int | None = None

    def losses(self, logits: Tensor, batch: Mapping[str, Tensor], dense: Tensor | None) -> Tensor:
        """See :class:`Metric`. Logits are float32, sums float64."""
        targets = batch["input_ids"][:, 1:].to(logits.device)
        weights = _weights(batch, self.ignored_token).to(logits.device)
        total = torch.zeros(len(targets), dtype=torch.float64, device=logits.device)
        for start in range(0, targets.shape[1], _CHUNK):
            part = slice(start, min(start + _CHUNK, targets.shape[1]))
            few = logits[:, part].float().flatten(0, 1)
            values = nn.functional.cross_entropy(few, targets[:, part].flatten(), reduction="none")
            total += (values.view(len(targets), -1).double() * weights[:, part]).sum(dim=1)
        return total / weights.sum(dim=1).clamp_min(1.0)

    def shown(self, loss: float) -> float:
        """See :class:`Metric`."""
        return math.exp(min(loss, 700.0))  # beyond that a double overflows


@dataclass(frozen=True)
class DivergenceMetric(Metric):
    """
    Kullback-Leibler divergence of the candidate's next-token distribution from the dense model's, nats; means as in
    :class:`PerplexityMetric`. Costs one more pass of the dense model for each batch and step.

    :param ignored_token: See :class:`PerplexityMetric`.
    """

    ignored_token: int | None = None
    needs_dense = True

    def losses(self, logits: Tensor, batch: Mapping[str, Tensor], dense: Tensor | None) -> Tensor:
        """See :class:`Metric`."""
        assert dense is not None
        weights = _weights(batch, self.ignored_token).to(logits.device)
        total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        for start in range(0, weights.shape[1], _CHUNK):
            part = slice(start, min(start + _CHUNK, weights.shape[1]))
            ours, theirs = logits[:, part].float().log_softmax(dim=2), dense[:, part].float().log_softmax(dim=2)
            values = (theirs.exp() * (theirs - ours)).double().sum(dim=2).clamp_min(0.0)
            total += (values * weights[:, part]).sum(dim=1)
        return total / weights.sum(dim=1).clamp_min(1.0)


def _weights(batch: Mapping[str, Tensor], ignored_token: int | None) -> Tensor:
    """What counts of the predicted tokens, ``[sequences, tokens - 1]`` float64."""
    targets = batch["input_ids"][:, 1:]
    weights = torch.ones(targets.shape, dtype=torch.float64, device=targets.device)
    if "attention_mask" in batch:
        weights *= batch["attention_mask"][:, 1:].to(targets.device) != 0
    if ignored_token is not None:
        weights *= targets != ignored_token
    return weights
