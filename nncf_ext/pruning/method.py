"""
What MultiPruner and Mamba-Shedder share: stages of greedy pruning, from calibration text to a smaller model.

A method says what a stage may remove, in the order that breaks ties, and when the stage has paid its share. The loop is
:mod:`nncf_ext.pruning.greedy`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import nncf
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from nncf_ext.calibration.stream import evaluation, read_items
from nncf_ext.files import digest
from nncf_ext.importance.blocks import l1_norm
from nncf_ext.importance.metrics import Metric, PerplexityMetric
from nncf_ext.method import Request
from nncf_ext.progress import Progress
from nncf_ext.pruning.candidates import Removal
from nncf_ext.pruning.compensation import Compensator
from nncf_ext.pruning.greedy import Elimination
from nncf_ext.pruning.scoring import REUSE_BYTES, Scorer
from nncf_ext.structure.blocks import IGNORED, Survey
from nncf_ext.structure.checks import check_cache, check_plan, check_sharing
from nncf_ext.structure.counting import count_costs
from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.order import by_importance
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import cut_structure
from nncf_ext.upstream import is_wrapped
from nncf_ext.weights.activation_sparsity import refuse_sparse_inputs
from nncf_ext.weights.records import set_plan

logger = logging.getLogger("nncf_ext")


@dataclass(kw_only=True)
class PruningParameters:
    """
    What can be asked of any search for what to remove.

    :param metric: How good a candidate is.
    :param mlp_group: MLP channels that go together, a multiple of 128 keeps INT4 groups whole. None: a sixteenth of the
        MLP, at most 1024.
    :param order: Importance of the units within a layer, ``[units]``, from the weights that write into them; the least
        important go first. None: the last go first.
    :param early_stop: Give up candidates that cannot win any more. The choice is the same; margins become lower bounds.
    :param racing: Approximation: give up candidates that are so many standard errors behind after some of the batches;
        3 is careful. None: never.
    :param rescore_top: Approximation: score only so many of the candidates that came out best at the last full sweep,
        which every eighth step is. None: always all.
    :param candidates_per_pass: How many candidates may run side by side, where their passes begin at the same block:
        faster where one batch does not fill the device. Above 1 the last bits of a score depend on who runs with whom.
    :param reuse_bytes: Memory for what blocks gave in one step, for use in the next, bytes. All of it can be used by
        sequences x tokens x hidden size x layers x (1 + branches of the model / 2) values; with less, some of the
        blocks are kept.
    """

    metric: Metric = field(default_factory=PerplexityMetric)
    mlp_group: int | None = None
    order: Callable[[Sequence[Tensor]], Tensor] | str | None = l1_norm
    early_stop: bool = True
    racing: float | None = None
    rescore_top: int | None = None
    candidates_per_pass: int = 1
    reuse_bytes: int = REUSE_BYTES

    def check(self) -> None:
        """
        Checks what can be checked without a model.

        :raises nncf.ValidationError: A value is out of range.
        """
        for name in ("mlp_group", "rescore_top"):
            check_count(name, getattr(self, name))
        for name, least in (("candidates_per_pass", 1), ("reuse_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                msg = f"{name} must be a whole number of at least {least}; got {value}."
                raise nncf.ValidationError(msg)
        if self.racing is not None and not self.racing > 0:
            msg = f"racing must be above 0, standard errors, or None; got {self.racing}."
            raise nncf.ValidationError(msg)
        if not isinstance(self.metric, Metric):
            msg = (
                f"metric must be a nncf_ext.importance.metrics.Metric, such as PerplexityMetric(); got "
                f"{type(self.metric).__name__}. A subclass with losses() scores as you like."
            )
            raise nncf.ValidationError(msg)


def check_count(name: str, value: int | None) -> None:
    """
    :param name: Name of a parameter.
    :param value: What it was set to.
    :raises nncf.ValidationError: It is neither None nor a positive number.
    """
    if value is not None and value < 1:
        msg = f"{name} must be at least 1, or None; got {value}."
        raise nncf.ValidationError(msg)


@dataclass(frozen=True)
class Stage:
    """
    :param name: For the progress bar and messages.
    :param candidates: From the plan so far, what could go next, in the order that breaks ties.
    :param done: Whether a plan has paid what this stage and those before it have to pay.
    :param batches: What scores the candidates.
    """

    name: str
    candidates: Callable[[StructurePlan], Iterator[Removal]]
    done: Callable[[StructurePlan], bool]
    batches: Sequence[Mapping[str, Tensor]]


class StructuredPruning(ABC):
    """
    One run. Parameters and data are checked on construction; :meth:`check` looks at the model and finds its dimensions,
    once; :meth:`apply`, called after it, does the work.

    :param request: Ratio of the cost to remove, calibration data (batches of token ids), and everything else.
    :raises nncf.ValidationError: A parameter is out of range, or data is missing, empty, short or of another kind.
    """

    def __init__(self, request: Request[PruningParameters]) -> None:
        request.parameters.check()
        if request.dataset is None:
            msg = f"{request.mode} scores candidates on calibration text and needs a dataset; got None."
            raise nncf.ValidationError(msg)
        self._ratio = request.ratio
        self._search = request.parameters
        self._resume = request.resume
        items = read_items(request.dataset, request.subset_size)
        self._batches = [_batch(index, item, request.mode) for index, item in enumerate(items)]

    @abstractmethod
    def stages(self, model: nn.Module, dimensions: Dimensions, order: Mapping[str, list[int]]) -> list[Stage]:
        """
        :param model: The dense model.
        :param dimensions: Its dimensions.
        :param order: Units of each dimension, the most important first.
        :return: What to do, one after the other.
        :raises nncf.ValidationError: Something that was asked for does not fit the model.
        """

    def cost(self, model: nn.Module, dimensions: Dimensions, plan: StructurePlan) -> float:
        """:return: What the ratio is a fraction of."""
        return float(count_costs(model, plan, dimensions=dimensions).parameters)

    def savings(
        self, model: nn.Module, dimensions: Dimensions, plan: StructurePlan, candidates: Sequence[Removal]
    ) -> Mapping[Removal, float] | None:
        """:return: What each candidate saves, of those that save some, if that decides as well; None: it does not."""
        return None

    def compensator(self, model: nn.Module, dimensions: Dimensions) -> Compensator | None:
        """:return: What repairs the model after every step, or None."""
        return None

    def order(self, model: nn.Module, dimensions: Dimensions) -> dict[str, list[int]]:
        """:return: Units of each dimension, the most important first."""
        scores = {name: self.scores(model, dimensions, name) for name in dimensions}
        return {
            name: list(dimensions[name].all_units) if each is None else by_importance(each)
            for name, each in scores.items()
        }

    def scores(self, model: nn.Module, dimensions: Dimensions, name: str) -> Tensor | None:
        """:return: Importance of a dimension's units, or None where none is asked for."""
        order = self._search.order
        return order(dimensions.unit_weights(model, name)) if callable(order) and dimensions[name].cuts else None

    def header(self) -> dict[str, Any]:
        """:return: What was asked for, as plain data: what a journal must have been begun with to be continued."""
        order = self._search.order
        return {
            "ratio": self._ratio,
            "mlp_group": self._search.mlp_group,
            "metric": repr(self._search.metric),
            "order": order if isinstance(order, str | None) else getattr(order, "__qualname__", repr(order)),
            "rescore_top": self._search.rescore_top,
            "racing": self._search.racing,
            "candidates_per_pass": self._search.candidates_per_pass,
            "calibration": self.calibration(),
        }

    def calibration(self) -> dict[str, Any]:
        """:return: What candidates are scored on, as plain data."""
        return {
            "sequences": sum(len(batch["input_ids"]) for batch in self._batches),
            "tokens": [int(batch["input_ids"].shape[1]) for batch in self._batches[:1]][0],
            "digest": digest(self._batches),
        }

    def check(self, model: nn.Module, survey: Survey) -> None:
        """
        Refuses what cannot work, before any candidate is scored.

        :param model: The model.
        :param survey: Its weights; what is in the ignored scope keeps its branch whole.
        :raises nncf.ValidationError: Settings do not fit the model, or the ratio is out of reach.
        :raises nncf.UnsupportedModelError: The model's structure is unknown, shared, or already compressed.
        """
        if is_wrapped(model):
            msg = "Asked to cut a model that carries NNCF hooks. Remove structure first, then compress the result."
            raise nncf.UnsupportedModelError(msg)
        refuse_sparse_inputs(model, "cut")
        dimensions = self._dimensions = _prunable_dimensions(model)
        plan, ignored = StructurePlan.dense(model, dimensions), _ignored(model, dimensions, survey)
        whole = self.cost(model, dimensions, plan)
        # Which units go first does not matter here, only how many: no scores are computed before all is checked.
        natural = {name: list(each.all_units) for name, each in dimensions.items()}
        stages = self.stages(model, dimensions, natural)
        for stage in stages:
            for each in self._candidates(model, dimensions, stage, plan, ignored):
                check_sharing(model, each.on(plan), dimensions)
        for stage in stages:
            # Everything that the stage may remove: if even that does not pay, the search would end in an error, after
            # hours.
            while candidates := self._candidates(model, dimensions, stage, plan, ignored):
                for each in candidates:
                    if _allowed(model, dimensions, plan, each):
                        plan = replace(each.on(plan), steps=(*plan.steps, each.as_step()))
        for stage in stages:
            if not stage.done(plan):
                raise nncf.ValidationError(self._unreachable(stage, 1 - self.cost(model, dimensions, plan) / whole))

    def apply(self, model: nn.Module, survey: Survey) -> None:
        """
        Searches, and cuts the model in place.

        :param model: The model that was checked, or a copy of it.
        :param survey: Its weights.
        :raises nncf.ValidationError: The journal is another run's, or a stage ran out of candidates.
        """
        dimensions = self._dimensions
        ignored = _ignored(model, dimensions, survey)
        dense = StructurePlan.dense(model, dimensions)
        whole = self.cost(model, dimensions, dense)
        stages = self.stages(model, dimensions, self.order(model, dimensions))
        header = {"model": asdict(dense.model), "ignored": sorted(ignored), **self.header()}
        costs_before = count_costs(model, dimensions=dimensions)
        dense = replace(dense, calibration=self.calibration(), costs_before=costs_before)
        search = Elimination(dense, self._resume, header, self._search.rescore_top)
        check_plan(model, search.plan, dimensions)
        metric, compensator = self._search.metric, self.compensator(model, dimensions)
        with evaluation(model), _progress() as progress:
            if compensator is not None:
                task = progress.add_task("repairs of earlier steps", total=len(search.earlier), best="")
                # In the order in which they were made: a repair sees the model that the ones before it left.
                for plan in search.earlier:
                    compensator.refit(plan, plan.steps[-1].dimension)
                    progress.advance(task)
            for stage in stages:
                # A scorer for each stage: outputs that it keeps belong to the stage's batches.
                scorer = Scorer(
                    model,
                    stage.batches,
                    metric.losses,
                    needs_dense=metric.needs_dense,
                    early_stop=self._search.early_stop,
                    racing=self._search.racing,
                    candidates_per_pass=self._search.candidates_per_pass,
                    reuse_bytes=self._search.reuse_bytes,
                    as_dense=nullcontext if compensator is None else compensator.dense,
                    dimensions=dimensions,
                )
                task = progress.add_task(stage.name, total=None, best="")
                while not stage.done(search.plan):
                    candidates = self._candidates(model, dimensions, stage, search.plan, ignored)
                    saved = self.savings(model, dimensions, search.plan, candidates)
                    candidates = candidates if saved is None else list(saved)
                    if not candidates:
                        reached = 1 - self.cost(model, dimensions, search.plan) / whole
                        raise nncf.ValidationError(self._unreachable(stage, reached))
                    progress.reset(task, total=len(candidates) * len(stage.batches))
                    step = search.step(scorer, candidates, metric.shown, partial(progress.advance, task), saved)
                    if compensator is not None:
                        compensator.refit(search.plan, step.dimension)
                    share = 1 - self.cost(model, dimensions, search.plan) / whole
                    best = f"{step.dimension}: {step.score:.4g}, {share:.1%} removed"
                    progress.update(task, best=best)
                    logger.info("%s: %s", stage.name, best)
        plan = replace(search.plan, costs_after=count_costs(model, search.plan, dimensions=dimensions))
        cut_structure(model, plan.kept, dimensions)
        set_plan(model, plan)

    def _candidates(
        self, model: nn.Module, dimensions: Dimensions, stage: Stage, plan: StructurePlan, ignored: set[str]
    ) -> list[Removal]:
        return [
            each
            for each in stage.candidates(plan)
            if not ignored.intersection(each.dimensions) and _allowed(model, dimensions, plan, each)
        ]

    def _unreachable(self, stage: Stage, reached: float) -> str:
        return (
            f"Asked to remove {self._ratio:.1%} of the {self.cost_in_words()}. The stage of {stage.name} ran out of "
            f"candidates: it reached {reached:.1%}. {self.advice()}"
        )

    def cost_in_words(self) -> str:
        """:return: Name of the cost."""
        return "parameters"

    def advice(self) -> str:
        """:return: What to ask for instead of what is out of reach."""
        return "A lower ratio, smaller groups or a smaller ignored scope would work."


def mlp_group(dimensions: Dimensions, asked: int | None) -> int:
    """
    :param dimensions: Of the dense model.
    :param asked: What the parameters say.
    :return: MLP channels that go together.
    :raises nncf.ValidationError: No MLP has more.
    """
    width = max((each.size for each in dimensions.of_part("mlp")), default=0)
    group = asked or min(1024, max(1, width // 16))
    if group >= width:
        msg = f"mlp_group={group}, but the MLP has {width} channels. A number well below that works."
        raise nncf.ValidationError(msg)
    return group


def _prunable_dimensions(model: nn.Module) -> Dimensions:
    """
    :param model: The model to prune by the loss of what is left.
    :return: Its dimensions.
    :raises nncf.UnsupportedModelError: Its structure is unknown, or it does not generate text from a cache.
    """
    dimensions = dimensions_of(model)
    if not dimensions.record.uses_cache(model):
        msg = (
            f"Asked to prune {type(model).__name__}, which is no causal language model: candidates are scored by the "
            "likelihood of the next token. A plan made by hand works on it."
        )
        raise nncf.UnsupportedModelError(msg)
    return dimensions


def _ignored(model: nn.Module, dimensions: Dimensions, survey: Survey) -> set[str]:
    """Dimensions of which a layer is in the ignored scope."""
    scope = {id(each.module) for each in survey.weights if each.untouched == IGNORED}
    return {
        name
        for name, each in dimensions.items()
        for path in [cut.module for cut in each.cuts] or list(each.replacements.get(0, {}))
        if any(id(module) in scope for module in model.get_submodule(path).modules())
    }


def _allowed(model: nn.Module, dimensions: Dimensions, plan: StructurePlan, removal: Removal) -> bool:
    if removal.kept:
        return True
    try:
        check_cache(model, removal.on(plan), dimensions)
    except nncf.ValidationError:
        return False
    return True


def _batch(index: int, item: Any, mode: str) -> dict[str, Tensor]:
    """What the model takes, by name."""
    batch = {"input_ids": item} if isinstance(item, Tensor) else item
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        msg = (
            f"Item {index} of the calibration dataset holds no input_ids [sequences, tokens]. {mode} scores text: give "
            "nncf.Dataset a transform_func that makes {'input_ids': tensor} of it."
        )
        raise nncf.ValidationError(msg)
    if ids.shape[1] < 2 or not len(ids):
        msg = (
            f"Item {index} of the calibration dataset has {len(ids)} sequences of {ids.shape[1]} tokens. The next "
            "token is scored, so a sequence needs at least 2; hundreds are usual."
        )
        raise nncf.ValidationError(msg)
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}


def _progress() -> Progress:
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        TextColumn("{task.fields[best]}"),
    )
    return Progress(*columns)
