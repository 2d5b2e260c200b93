"""
MultiPruner: first whole attention and MLP branches go, then groups of MLP channels, then groups of heads.

Which layer pays is chosen by the loss of the whole model, which channels of a layer go by the size of their weights.
Nothing is trained.

Source: Munoz et al., MultiPruner: Balanced Structure Removal in Foundation Models (arXiv 2501.09949).
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import nncf
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from nncf_ext.algorithms.multipruner.parameters import ACTIVATIONS, COSTS, AdvancedMultiPrunerParameters
from nncf_ext.calibration.statistics import InputStatistics
from nncf_ext.calibration.stream import evaluation, read_items
from nncf_ext.importance.blocks import activation_norm
from nncf_ext.structure.blocks import IGNORED, Survey
from nncf_ext.structure.compensation import Compensator
from nncf_ext.structure.counting import count_costs
from nncf_ext.structure.coupling import Coupling, Layout, unit_weights
from nncf_ext.structure.files import digest
from nncf_ext.structure.plan import StructurePlan, check_cache, check_plan, fingerprint
from nncf_ext.structure.records import set_plan
from nncf_ext.structure.removal import Elimination, Removal, Scorer, layout_for_removal
from nncf_ext.structure.surgery import cut_structure
from nncf_ext.upstream import is_wrapped

logger = logging.getLogger("nncf_ext")

STAGES = ("blocks", "MLP channels", "heads")


class MultiPruner:
    """
    One run. Parameters and data are checked on construction; :meth:`apply` does the work.

    :param ratio: Fraction of all parameters to remove, 0 <= ratio < 1.
    :param dataset: Calibration data: batches of token ids.
    :param subset_size: Number of calibration items that score blocks.
    :param resume: Folder of a journal, or None.
    :param parameters: Everything else.
    :raises nncf.ValidationError: A parameter is out of range, or data is missing, empty, short or of another kind.
    """

    def __init__(
        self,
        ratio: float,
        dataset: nncf.Dataset | None,
        subset_size: int,
        resume: str | os.PathLike[str] | None,
        parameters: AdvancedMultiPrunerParameters,
    ) -> None:
        parameters.check()
        if dataset is None:
            msg = "multipruner scores candidates on calibration text and needs a dataset; got None."
            raise nncf.ValidationError(msg)
        self._ratio = ratio
        self._parameters = parameters
        self._resume = None if resume is None else Path(resume)
        self._batches = [_batch(index, item) for index, item in enumerate(read_items(dataset, subset_size))]
        width = parameters.width_subset_size or max(1, len(self._batches) // 2)
        self._width_batches = self._batches[:width]

    def check(self, model: nn.Module, survey: Survey) -> None:
        """
        Refuses what cannot work, before any candidate is scored.

        :param model: The model.
        :param survey: Its weights; what is in the ignored scope keeps its branch whole.
        :raises nncf.ValidationError: Group sizes do not fit, or the ratio is out of reach.
        :raises nncf.UnsupportedModelError: The model's structure is unknown, shared, or already compressed.
        """
        if is_wrapped(model):
            msg = "Asked to cut a model that carries NNCF hooks. Remove structure first, then compress the result."
            raise nncf.UnsupportedModelError(msg)
        layout = layout_for_removal(model)
        plan = StructurePlan.dense(model)
        self._groups(layout)
        floor = plan
        for stage in STAGES:
            if self._share(stage):
                floor = self._all_removed(model, layout, floor, stage, self._ignored(model, layout, survey))
        check_plan(model, floor, layout)  # shared weights
        reach = self._saved(model, floor, self._cost(model, plan))
        if reach < self._ratio:
            raise nncf.ValidationError(self._unreachable(reach))

    def apply(self, model: nn.Module, survey: Survey) -> None:
        """
        Searches, and cuts the model in place.

        :param model: The model.
        :param survey: Its weights.
        :raises nncf.ValidationError: The journal is another run's, or a stage ran out of candidates.
        """
        layout = layout_for_removal(model)
        ignored = self._ignored(model, layout, survey)
        order = self._order(model, layout)
        dense = StructurePlan.dense(model)
        whole = self._cost(model, dense)
        dense = replace(dense, calibration=self._calibration(), costs_before=count_costs(model))
        search = Elimination(dense, self._resume, self._header(model, ignored), self._parameters.rescore_top)
        check_plan(model, search.plan, layout)
        compensator = Compensator(model, self._batches) if self._parameters.compensate else None
        metric, joint = self._parameters.metric, self._parameters.joint_cost is not None
        paying = [stage for stage in STAGES if self._share(stage)]
        paid = 0.0
        with evaluation(model), _progress() as progress:
            if compensator is not None:
                task = progress.add_task("repairs of earlier steps", total=len(search.earlier), best="")
                for plan in search.earlier:
                    compensator.refit(plan, plan.steps[-1].layer, plan.steps[-1].branch)
                    progress.advance(task)
            for stages in [paying] if joint else [[stage] for stage in paying]:
                paid += sum(self._share(stage) for stage in stages)
                batches = self._batches if STAGES[0] in stages else self._width_batches
                scorer = Scorer(
                    model,
                    batches,
                    metric.losses,
                    needs_dense=metric.needs_dense,
                    early_stop=self._parameters.early_stop,
                    racing=self._parameters.racing,
                    as_dense=nullcontext if compensator is None else compensator.dense,
                )
                name = ", ".join(stages)
                task = progress.add_task(name, total=None, best="")
                while self._saved(model, search.plan, whole) < self._ratio * min(paid, 1.0):
                    candidates = [
                        each
                        for stage in stages
                        for each in self._candidates(layout, search.plan, stage, order)
                        if (each.branch, each.layer) not in ignored and _allowed(model, layout, search.plan, each)
                    ]
                    saved = self._savings(model, search.plan, candidates) if joint else None
                    if saved is not None:
                        candidates = list(saved)
                    if not candidates:
                        raise nncf.ValidationError(self._unreachable(self._saved(model, search.plan, whole), name))
                    progress.reset(task, total=len(candidates) * len(batches))
                    step = search.step(scorer, candidates, metric.shown, partial(progress.advance, task), saved)
                    if compensator is not None:
                        compensator.refit(search.plan, step.layer, step.branch)
                    share = self._saved(model, search.plan, whole)
                    best = f"{step.branch} of layer {step.layer}: {step.score:.4g}, {share:.1%} removed"
                    progress.update(task, best=best)
                    logger.info("%s: %s", name, best)
        plan = replace(search.plan, costs_after=count_costs(model, search.plan))
        cut_structure(model, plan.layers)
        set_plan(model, plan)

    # What each stage may remove, in the order that breaks ties: attention before MLP, lower layers first.
    def _candidates(
        self, layout: Layout, plan: StructurePlan, stage: str, order: Mapping[tuple[str, int], list[int]]
    ) -> Iterator[Removal]:
        if stage == "blocks":
            for branch in ("attention", "mlp"):
                yield from (Removal(layer, branch, ()) for layer, kept in enumerate(plan.layers) if kept[branch])
            return
        branch = "mlp" if stage == "MLP channels" else "attention"
        size = self._groups(layout)[branch]
        for layer, kept in enumerate(plan.layers):
            count = len(kept[branch]) - size
            if count > 0:
                yield Removal(layer, branch, tuple(sorted(order[branch, layer][:count])))

    def _order(self, model: nn.Module, layout: Layout) -> dict[tuple[str, int], list[int]]:
        """Units of each branch, the most important first."""
        found = {}
        spread = self._spread(model, layout) if self._parameters.order == ACTIVATIONS else {}
        for layer, (block, couplings) in enumerate(zip(layout.blocks, layout.couplings, strict=True)):
            for branch, coupling in couplings.items():
                found[branch, layer] = list(range(coupling.units))
                scores = self._scores(block, coupling, spread)
                if scores is not None:
                    found[branch, layer] = torch.argsort(scores, descending=True, stable=True).tolist()
        return found

    def _scores(self, block: nn.Module, coupling: Coupling, spread: Mapping[nn.Module, Tensor]) -> Tensor | None:
        """Importance of a branch's units, or None where none is asked for."""
        order = self._parameters.order
        if order is None or not coupling.units:
            return None
        if callable(order):
            return order(unit_weights(block, coupling))
        output: Any = block.get_submodule(coupling.branch.output)
        return activation_norm(spread[output], output.weight.detach(), coupling.units)

    def _spread(self, model: nn.Module, layout: Layout) -> dict[nn.Module, Tensor]:
        """Mean square of every input of the output projections, on calibration text."""
        outputs: dict[nn.Module, InputStatistics] = {}
        with ExitStack() as hooks, evaluation(model):
            for block, couplings in zip(layout.blocks, layout.couplings, strict=True):
                for coupling in couplings.values():
                    output: Any = block.get_submodule(coupling.branch.output) if coupling.units else None
                    if output is not None:
                        outputs[output] = InputStatistics(output.in_features, device=output.weight.device)
                        hook = output.register_forward_pre_hook(
                            lambda module, inputs: outputs[module].update(inputs[0])
                        )
                        hooks.callback(hook.remove)
            for batch in self._batches:
                model(**batch, use_cache=False)
        return {output: statistics.mean_square for output, statistics in outputs.items()}

    def _groups(self, layout: Layout) -> dict[str, int]:
        """Units that go together, by branch."""
        channels = layout.group * layout.head_dim
        heads = max(couplings["attention"].units for couplings in layout.couplings)
        width = max(couplings["mlp"].units for couplings in layout.couplings)
        asked = self._parameters.attention_group or channels
        if asked % channels or asked > heads * channels:
            msg = (
                f"attention_group={asked} query channels. A key/value head goes with its {layout.group} query heads, "
                f"{channels} channels; a multiple of {channels} below {heads * channels} works."
            )
            raise nncf.ValidationError(msg)
        group = self._parameters.mlp_group or min(1024, max(1, width // 16))
        if self._share("MLP channels") and group >= width:
            msg = f"mlp_group={group}, but the MLP has {width} channels. A number well below that works."
            raise nncf.ValidationError(msg)
        return {"attention": asked // channels, "mlp": group}

    def _share(self, stage: str) -> float:
        return self._parameters.distribution[STAGES.index(stage)] / sum(self._parameters.distribution)

    def _cost(self, model: nn.Module, plan: StructurePlan) -> float:
        cost = self._parameters.joint_cost
        return float(cost(plan)) if callable(cost) else float(getattr(count_costs(model, plan), cost or COSTS[0]))

    def _saved(self, model: nn.Module, plan: StructurePlan, whole: float) -> float:
        """Fraction of the cost."""
        return 1 - self._cost(model, plan) / whole

    def _savings(self, model: nn.Module, plan: StructurePlan, candidates: Sequence[Removal]) -> dict[Removal, float]:
        """What each candidate saves of the cost, for those that save some."""
        now = self._cost(model, plan)
        found = {each: now - self._cost(model, each.on(plan)) for each in candidates}
        return {each: saved for each, saved in found.items() if saved > 0}

    def _ignored(self, model: nn.Module, layout: Layout, survey: Survey) -> set[tuple[str, int]]:
        """Branches of which a layer is in the ignored scope."""
        scope = {id(each.module) for each in survey.weights if each.untouched == IGNORED}
        return {
            (branch, layer)
            for layer, (block, couplings) in enumerate(zip(layout.blocks, layout.couplings, strict=True))
            for branch, coupling in couplings.items()
            if any(id(block.get_submodule(cut.module)) in scope for cut in coupling.cuts)
        }

    def _all_removed(
        self, model: nn.Module, layout: Layout, plan: StructurePlan, stage: str, ignored: set[tuple[str, int]]
    ) -> StructurePlan:
        """The plan after everything has gone that a stage may remove."""
        order = {
            (branch, layer): list(range(coupling.units))
            for layer, couplings in enumerate(layout.couplings)
            for branch, coupling in couplings.items()
        }
        while True:
            candidates = [
                each
                for each in self._candidates(layout, plan, stage, order)
                if (each.branch, each.layer) not in ignored and _allowed(model, layout, plan, each)
            ]
            if not candidates:
                return plan
            for each in candidates:
                if _allowed(model, layout, plan, each):
                    plan = each.on(plan)

    def _unreachable(self, reached: float, stage: str | None = None) -> str:
        cost = self._parameters.joint_cost
        cost = "cost" if callable(cost) else cost or "parameters"
        where = f"The stage of {stage} ran out of candidates: it" if stage else "It"
        return (
            f"Asked to remove {self._ratio:.1%} of the {cost}. {where} reached {reached:.1%}. A lower ratio, "
            "smaller groups, another distribution or a smaller ignored scope would work."
        )

    def _calibration(self) -> dict[str, Any]:
        return {
            "sequences": sum(len(batch["input_ids"]) for batch in self._batches),
            "sequences_width": sum(len(batch["input_ids"]) for batch in self._width_batches),
            "tokens": [int(batch["input_ids"].shape[1]) for batch in self._batches[:1]][0],
            "digest": digest(self._batches),
        }

    def _header(self, model: nn.Module, ignored: set[tuple[str, int]]) -> dict[str, Any]:
        order, cost = self._parameters.order, self._parameters.joint_cost
        return {
            "model": asdict(fingerprint(model)),
            "ratio": self._ratio,
            "distribution": list(self._parameters.distribution),
            "groups": [self._parameters.mlp_group, self._parameters.attention_group],
            "metric": repr(self._parameters.metric),
            "joint_cost": cost if isinstance(cost, str | None) else getattr(cost, "__qualname__", repr(cost)),
            "order": order if isinstance(order, str | None) else getattr(order, "__qualname__", repr(order)),
            "rescore_top": self._parameters.rescore_top,
            "racing": self._parameters.racing,
            "compensate": self._parameters.compensate,
            "ignored": sorted(map(list, ignored)),
            "calibration": self._calibration(),
        }


def _batch(index: int, item: Any) -> dict[str, Tensor]:
    """What the model takes, by name."""
    batch = {"input_ids": item} if isinstance(item, Tensor) else item
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        msg = (
            f"Item {index} of the calibration dataset holds no input_ids [sequences, tokens]. multipruner scores text: "
            "give nncf.Dataset a transform_func that makes {'input_ids': tensor} of it."
        )
        raise nncf.ValidationError(msg)
    if ids.shape[1] < 2 or not len(ids):
        msg = (
            f"Item {index} of the calibration dataset has {len(ids)} sequences of {ids.shape[1]} tokens. The next "
            "token is scored, so a sequence needs at least 2; hundreds are usual."
        )
        raise nncf.ValidationError(msg)
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}


def _allowed(model: nn.Module, layout: Layout, plan: StructurePlan, removal: Removal) -> bool:
    if removal.kept:
        return True
    try:
        check_cache(model, removal.on(plan), layout)
    except nncf.ValidationError:
        return False
    return True


def _progress() -> Progress:
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        TextColumn("{task.fields[best]}"),
    )
    return Progress(*columns, console=Console(file=sys.stderr))
