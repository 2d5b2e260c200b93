"""
Greedy backward elimination: which part of a model is missed least? Remove it, and ask again.

Every candidate is scored by the loss of the whole model on calibration batches. Batches come outside, candidates
inside: a candidate's pass begins behind all blocks whose output is known (:mod:`nncf_ext.pruning.prefix_cache`), and
its score is that of a whole pass.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.journal import Journal, read_json
from nncf_ext.pruning.prefix_cache import Suffixes
from nncf_ext.structure.coupling import Layout, layout_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import Removal, Step, StructurePlan

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
        layers that the plan changes, and in no other.
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
    ) -> None:
        self._model = model
        self._batches = batches
        self._losses = losses
        self._needs_dense = needs_dense
        self._early_stop = early_stop
        self._racing = racing
        self._candidates_per_pass = candidates_per_pass
        self._as_dense = as_dense
        self._layout = layout_of(model)
        self._suffixes = Suffixes(model, self._layout, batches, reuse_bytes)
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
        self._suffixes.prepare(plan, candidates)
        for number, batch in enumerate(self._batches):
            dense = self._dense_logits(batch)
            last = number == len(self._batches) - 1
            early_stop = last and self._early_stop and saved is None
            sums = found.sum(dim=1)
            least = torch.inf
            new = torch.zeros(len(candidates), len(batch["input_ids"]), dtype=torch.float64)
            with masked(self._model, plan, self._layout):
                base = torch.cat([base, self._losses(self._suffixes.whole(number), batch, dense).cpu()])
                begins = [self._suffixes.begin(number, each) for each in candidates]
                for group in self._groups(number, begins, racing, sums if early_stop else None):
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
        logits = self._suffixes.without(number, candidates)
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
            with masked(self._model, plan, self._layout):
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


class Elimination:
    """
    The greedy loop, with its journal.

    :param plan: Where to begin.
    :param folder: Where each step is kept, or None. A folder that holds steps is continued.
    :param header: What the run was asked for, as plain data: a folder of another run is refused.
    :param rescore_top: Score only this many of the candidates that came out best when they were last scored. An
        approximation: every eighth step scores all of them again.
    :raises nncf.ValidationError: The folder belongs to another run.
    """

    full_sweep_every = 8

    def __init__(
        self,
        plan: StructurePlan,
        folder: Path | None = None,
        header: Mapping[str, Any] | None = None,
        rescore_top: int | None = None,
    ) -> None:
        self.plan = plan
        self.earlier: list[StructurePlan] = []
        """Plans after each step that was found in the folder."""
        self._rescore_top = rescore_top
        self._known: dict[str, float] = {}
        self._journal = None if folder is None else Journal(folder, "search", header or {})
        while self._journal is not None:
            number = len(self.earlier) + 1
            kept = self._journal.read(_plan_file(number), StructurePlan.load)
            known = self._journal.read(_scores_file(number), read_json)
            if kept is None or known is None:
                break
            self.plan, self._known = kept, known
            self.earlier.append(kept)

    def step(
        self,
        scorer: Scorer,
        candidates: Sequence[Removal],
        score: Callable[[float], float],
        advance: Callable[[int], None] = lambda _count: None,
        saved: Mapping[Removal, float] | None = None,
    ) -> Step:
        """
        Removes what is missed least.

        :param scorer: What scores.
        :param candidates: What could go, at least one, in the order that breaks ties.
        :param score: From the mean loss to the score to note, such as from negative log-likelihood to perplexity.
        :param advance: Called with the number of candidates that were dealt with.
        :param saved: What each candidate saves, above 0, of a cost: the loss that is added for each unit of it decides.
            None: the loss decides.
        :return: What was done. Its margin is a least distance of scores, None if there was one candidate or costs
            decided.
        :raises nncf.ValidationError: No candidate leaves a model with a finite loss.
        """
        chosen = self._shortlist(candidates)
        gains = None if saved is None else torch.tensor([saved[each] for each in chosen], dtype=torch.float64)
        scores = scorer.score(self.plan, chosen, advance, gains)
        keys = scores.totals if gains is None else (scores.totals - scores.base) / gains
        self._known |= {_key(each): float(key) for each, key in zip(chosen, keys, strict=True)}
        winner = int(torch.where(scores.complete, keys, torch.inf).argmin())
        best, found, margin = chosen[winner], float(scores.totals[winner]), None
        if not math.isfinite(found):
            msg = (
                f"Step {len(self.plan.steps) + 1}: without any of the {len(chosen)} candidates the loss is not finite. "
                "Check the model on the calibration data; float32 helps where float16 overflows."
            )
            raise nncf.ValidationError(msg)
        if saved is None and len(chosen) > 1:
            others = torch.cat([scores.totals[:winner], scores.totals[winner + 1 :]])
            margin = score(float(others.min())) - score(found)
        step = best.as_step(score(found), margin)
        plan = best.on(self.plan)
        self.plan = replace(plan, steps=(*self.plan.steps, step))
        if self._journal is not None:
            number = len(self.plan.steps)
            self._journal.write(_scores_file(number), lambda aside: aside.write_text(json.dumps(self._known)))
            self._journal.write(_plan_file(number), self.plan.save)
        return step

    def _shortlist(self, candidates: Sequence[Removal]) -> list[Removal]:
        known = [self._known.get(_key(each)) for each in candidates]
        if self._rescore_top is None or None in known or len(self.plan.steps) % self.full_sweep_every == 0:
            return list(candidates)
        order = sorted(range(len(candidates)), key=lambda index: (known[index], index))
        return [candidates[index] for index in sorted(order[: self._rescore_top])]


def _plan_file(step: int) -> str:
    return f"plan.{step:05}.json"


def _scores_file(step: int) -> str:
    return f"scores.{step:05}.json"


def _key(removal: Removal) -> str:
    """Names a place, not a width: what is known of a layer's last candidate tells something about its next."""
    return f"{removal.branch}.{removal.layer}.{'all' if not removal.kept else 'some'}"


def layout_for_removal(model: nn.Module) -> Layout:
    """
    :param model: The model to search.
    :return: Its layout.
    :raises nncf.UnsupportedModelError: Its structure is unknown, or it does not generate text from a cache.
    """
    layout = layout_of(model)
    if not layout.decodes:
        msg = (
            f"Asked to search {type(model).__name__}, which is no causal language model: candidates are scored by the "
            "likelihood of the next token. A plan made by hand works on it."
        )
        raise nncf.UnsupportedModelError(msg)
    return layout
