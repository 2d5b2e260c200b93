"""
Greedy backward elimination: which part of a model is missed least? Remove it, and ask again.

The loop and its journal. What scores a candidate is :mod:`nncf_ext.pruning.scoring`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import torch

from nncf_ext.journal import Journal, read_json
from nncf_ext.pruning.candidates import Removal
from nncf_ext.pruning.scoring import Scorer
from nncf_ext.structure.plan import Step, StructurePlan


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
        # With costs the winner is not the one with the least loss, so a distance of losses would say nothing.
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
    """Names a place, not a width: what is known of a dimension's last candidate tells something about its next."""
    return f"{removal.dimension}.{'all' if not removal.kept else 'some'}"
