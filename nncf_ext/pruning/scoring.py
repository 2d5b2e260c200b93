"""
How good would the model be without a candidate? The loss of the whole model on calibration batches.

Batches come outside, candidates inside: a candidate's pass begins behind all blocks whose output is known
(:mod:`nncf_ext.pruning.prefix_cache`), and its score is that of a whole pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from nncf_ext.pruning.candidates import Removal
from nncf_ext.pruning.prefix_cache import PrefixCache
from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import StructurePlan

REUSE_BYTES = 2**30
_LEAST_SEQUENCES = 4  # before anybody is given up in a race

Losses = Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor]
"""From logits ``[sequences, tokens, vocabulary]``, the batch, and the dense model's logits, to ``[sequences]`` float64,
none below zero."""


@dataclass(frozen=True)
class Scores:
    """
    :param losses: float64 ``[candidates, sequences]``; of a candidate that was given up, zero (early stop) or its mean
        (racing) where it has not been.
    :param complete: Which candidates saw all sequences, bool ``[candidates]``.
    :param base: Mean loss of the model without any of the candidates removed.
    """

    losses: Tensor
    complete: Tensor
    base: float

    @property
    def totals(self) -> Tensor:
        """:return: Mean loss over sequences, float64 ``[candidates]``; of a candidate that was given up, a lower bound
        (early stop) or an estimate (racing)."""
        return self.losses.mean(dim=1)

    @property
    def best(self) -> int:
        """:return: The first of the candidates with the least loss."""
        return int(torch.where(self.complete, self.totals, torch.inf).argmin())


class Scorer:
    """
    Scores candidates on one calibration set.

    :param model: The dense model, in evaluation mode and without gradients. Between steps its weights may change in
        blocks that the plan changes, and in no other.
    :param batches: Inputs of the model by name; with ``input_ids`` ``[sequences, tokens]``.
    :param losses: Loss of each sequence of a batch.
    :param needs_dense: Whether losses look at the dense model's logits.
    :param early_stop: Give a candidate up once its sum exceeds the best complete one. Decisions stay the same.
    :param racing: Approximation: give a candidate up after a batch when its sequences are worse than the leader's by so
        many standard errors of the mean difference. None: never.
    :param candidates_per_pass: How many candidates may run side by side. The mathematics are the same; above 1 the
        order of float sums is not: the last bits of a score depend on who runs with whom.
    :param reuse_bytes: Memory for what blocks gave in one step, for use in the next, bytes.
    :param as_dense: Context in which the model is the dense one, when its weights change between steps.
    :param dimensions: The model's dimensions; None: find them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        losses: Losses,
        *,
        needs_dense: bool = False,
        early_stop: bool = True,
        racing: float | None = None,
        candidates_per_pass: int = 1,
        reuse_bytes: int = REUSE_BYTES,
        as_dense: Callable[[], AbstractContextManager[None]] = nullcontext,
        dimensions: Dimensions | None = None,
    ) -> None:
        self._model = model
        self._batches = batches
        self._losses = losses
        self._needs_dense = needs_dense
        self._early_stop = early_stop
        self._racing = racing
        self._candidates_per_pass = candidates_per_pass
        self._as_dense = as_dense
        self._dimensions = dimensions_of(model) if dimensions is None else dimensions
        self._passes = PrefixCache(model, self._dimensions, batches, reuse_bytes)
        self.evaluations = 0

    def score(
        self,
        plan: StructurePlan,
        candidates: Sequence[Removal],
        advance: Callable[[int], None] = lambda _count: None,
        saved: Tensor | None = None,
    ) -> Scores:
        """
        :param plan: What is there without the candidates.
        :param candidates: What to score, in the order that breaks ties.
        :param advance: Called with the number of candidates that were dealt with, as each batch goes on.
        :param saved: What each candidate saves of a cost, ``[candidates]`` float64, when the loss added for each unit
            of it will decide. Nobody is stopped early then.
        :return: Their scores.
        """
        found = torch.zeros(len(candidates), 0, dtype=torch.float64)  # [candidates, sequences]
        base = found[0]
        racing = torch.ones(len(candidates), dtype=torch.bool)
        complete = ~racing
        self._passes.prepare(plan, candidates)
        for number, batch in enumerate(self._batches):
            dense = self._dense_logits(batch)
            last = number == len(self._batches) - 1
            early_stop = last and self._early_stop and saved is None
            sums = found.sum(dim=1)
            least = torch.inf
            new = torch.zeros(len(candidates), len(batch["input_ids"]), dtype=torch.float64)
            # The dense logits first: within the mask the model is not dense.
            with masked(self._model, plan, self._dimensions):
                base = torch.cat([base, self._losses(self._passes.whole(number), batch, dense).cpu()])
                begins = [self._passes.begin(number, each) for each in candidates]
                for group in self._groups(number, begins, racing, sums if early_stop else None):
                    # Losses are never negative, so a sum that is behind already stays behind.
                    running = [index for index in group if not (early_stop and sums[index] > least)]
                    if running:
                        new[running] = self._losses_without(number, [candidates[index] for index in running], dense)
                    if last:
                        complete[running] = True
                        least = min([least, *(sums + new.sum(dim=1))[running].tolist()])
                    advance(len(group))
                advance(int((~racing).sum()))
            found = torch.cat([found, torch.where(racing.unsqueeze(1), new, found.mean(dim=1, keepdim=True))], dim=1)
            if self._racing is not None and not last:
                racing &= self._in_the_race(found if saved is None else (found - base) / saved.unsqueeze(1), racing)
        return Scores(found, complete, float(base.mean()))

    def _losses_without(self, number: int, candidates: Sequence[Removal], dense: Tensor | None) -> Tensor:
        """Of one pass, ``[candidates, sequences]``."""
        self.evaluations += len(candidates)
        logits = self._passes.without(number, candidates)
        losses = [self._losses(own, self._batches[number], dense) for own in logits]
        return torch.stack(losses).nan_to_num(nan=torch.inf).cpu()

    def _groups(self, number: int, begins: Sequence[int], racing: Tensor, sums: Tensor | None) -> Iterator[list[int]]:
        """Who runs together: those whose passes begin at the same block. Where sums decide who need not run, the
        likeliest winner comes first, alone."""
        waiting = sorted(racing.nonzero().flatten().tolist(), key=lambda index: begins[index])
        if sums is not None:
            yield [leader := int(torch.where(racing, sums, torch.inf).argmin())]
            waiting.remove(leader)
        batch = self._batches[number]
        padded = "attention_mask" in batch and not batch["attention_mask"].all()
        # Mamba-2 in transformers ignores the padding of a batch of one sequence: no other may stand beside it.
        size = 1 if padded and len(batch["input_ids"]) == 1 else self._candidates_per_pass
        for _, group in groupby(waiting, key=lambda index: begins[index]):
            together = list(group)
            for first in range(0, len(together), size):
                yield together[first : first + size]

    def _in_the_race(self, keys: Tensor, racing: Tensor) -> Tensor:
        """Who is not worse than the leader by more than some standard errors of their paired difference."""
        assert self._racing is not None
        sequences = keys.shape[1]
        if sequences < _LEAST_SEQUENCES:
            return racing
        leader = torch.where(racing, keys.mean(dim=1), torch.inf).argmin()
        behind = keys - keys[leader]
        errors = behind.std(dim=1) / sequences**0.5
        stays = behind.mean(dim=1) <= self._racing * errors
        stays[leader] = True  # where all losses are infinite, too
        return stays

    def loss(self, plan: StructurePlan) -> float:
        """
        :param plan: What is there.
        :return: Mean loss over sequences.
        """
        total, sequences = 0.0, 0
        for batch in self._batches:
            dense = self._dense_logits(batch)
            with masked(self._model, plan, self._dimensions):
                total += float(self._losses(self._logits(batch), batch, dense).sum())
            sequences += len(batch["input_ids"])
        return total / sequences

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._model(**batch, use_cache=False).logits

    def _dense_logits(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        if not self._needs_dense:
            return None
        with self._as_dense():
            return self._logits(batch)
