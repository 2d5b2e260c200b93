"""
As cheap as possible within a loss that one accepts: which layer takes which form, and what can be left out?

Every layer is compressed to every form once. Predictions from few measurements say what combinations cost and lose;
integer programming gives the best ones by these predictions, and a search goes on from there on the divergence of whole
combinations on little text. The best are judged by all held-out data, and measured as a whole.
"""

import copy
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.algorithms.accuracy_control.catalogue import Catalogue
from nncf_ext.algorithms.accuracy_control.costs import Prediction, PriceSampler
from nncf_ext.algorithms.accuracy_control.forms import DENSE, REMOVED
from nncf_ext.algorithms.accuracy_control.judging import Divergence, Drop
from nncf_ext.algorithms.accuracy_control.network import FormNetwork
from nncf_ext.algorithms.accuracy_control.objectives import packed_bytes
from nncf_ext.algorithms.accuracy_control.parameters import AdvancedAccuracyControlParameters
from nncf_ext.algorithms.accuracy_control.report import (
    AccuracyControlReport,
    AccuracyControlResult,
    Candidate,
    FormPlan,
)
from nncf_ext.calibration.stream import evaluation, read_items
from nncf_ext.exploration.engine import search
from nncf_ext.exploration.objectives import NetworkObjective, Objective
from nncf_ext.exploration.report import SearchReport
from nncf_ext.exploration.space import Point
from nncf_ext.files import digest
from nncf_ext.importance.outputs import few_items
from nncf_ext.journal import Journal, read_json
from nncf_ext.progress import Progress
from nncf_ext.report import compression_report
from nncf_ext.structure.blocks import survey
from nncf_ext.structure.wrappers import check_plain, plain_arithmetic, unwrapped
from nncf_ext.upstream import is_wrapped

logger = logging.getLogger("nncf_ext")
_LITTLE = 1024  # tokens that combinations are tried on
_STARTS = 12
_AROUND = 5.0  # times less and times more than the loss that is allowed
_WIDEST = 1e4
_LOST_ZEROS = 0.001  # of a weight's entries; more after a recovery, and the zeros are gone
_MEASURED = 3  # candidates on each side of the limit that are measured as a whole; recovery tries those beyond it


@plain_arithmetic()
def compress_with_accuracy_control(
    model: nn.Module,
    dataset: nncf.Dataset,
    validation_fn: Callable[[Any], float] | None = None,
    *,
    max_drop: float = 0.01,
    objective: Objective | NetworkObjective | None = None,
    budget: int = 60,
    storage: str | os.PathLike[str] | None = None,
    recover: Callable[[Any, Any], Any] | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    subset_size: int = 128,
    seed: int = 0,
    advanced_parameters: AdvancedAccuracyControlParameters | None = None,
) -> AccuracyControlResult:
    """
    Makes a model as fast, or as small, as possible within a loss that is accepted: each group of layers that read the
    same inputs gets a form of its own (float16, INT8, INT4, each with or without zeros), and attentions and MLPs that
    the model hardly needs are left out.

    :param model: Torch model with linear layers, dense; not changed.
    :param dataset: Items are what the model takes, as for :func:`nncf_ext.compress`. The last quarter of them is held
        out: nothing is calibrated on it.
    :param validation_fn: Takes a model in evaluation mode and returns a number, more is better. None: the drop is the
        divergence from the dense model on the held-out items, nats a token for language models.
    :param max_drop: By how much the number may be lower than that of the dense model, or how large the divergence may
        be. 0.01 nats are about one percent of perplexity.
    :param objective: What shall be small: ``nncf_ext.latency("CPU", convert=...)`` or any other that is minimized. None
        for ``nncf_ext.packed_bytes()``, which is what decoding reads. The example of one that runs networks is a single
        token for causal language models, which is what decoding repeats, and an item of the dataset for others.
    :param budget: How many combinations to try on little text.
    :param storage: Folder that keeps what is finished, made if it does not exist: the same call continues. What
        validation_fn says is not kept: nobody knows whether it is the same function. Once the forms are made, further
        processes with the same folder try combinations, too. None: nothing is kept.
    :param recover: Takes a compressed model and a copy of the dense one, and returns the first after training, with the
        same forms. It is tried on up to three combinations that lose somewhat too much.
    :param ignored_scope: Layers to leave as they are.
    :param subset_size: How many items of the dataset to use.
    :param seed: Of the search.
    :param advanced_parameters: Forms and everything else.
    :return: The model that was chosen, new, its weights in NNCF's torch form; its plan; and a report.
    :raises nncf.ValidationError: A number is out of range, there are too few items, the model is not dense,
        validation_fn is no function of the model alone, the storage is another run's, or nothing that is smaller than
        the dense model keeps to max_drop (the message names the nearest).
    :raises nncf.ParameterNotSupportedError: The objective is to be maximized.
    :raises nncf.UnsupportedModelError: The model cannot be compressed, or no network of it can be measured.
    :raises KeyboardInterrupt: If interrupted; the model is as it was.
    """
    parameters = advanced_parameters or AdvancedAccuracyControlParameters()
    parameters.check()
    model = _checked(model, max_drop, budget)
    objective = packed_bytes() if objective is None else objective
    items = read_items(dataset, subset_size)
    held = max(1, round(len(items) * parameters.held_out))
    if len(items) - held < 1:
        msg = f"Some items are calibrated on and others are held out: at least 2 are needed, got {len(items)}."
        raise nncf.ValidationError(msg)
    calibration, held_out = items[:-held], items[-held:]
    with evaluation(model), _folder(storage) as folder:
        drop = Divergence(model, held_out) if validation_fn is None else Drop(model, validation_fn)
        found = survey(model, ignored_scope)
        header = {
            "parameters": asdict(replace(parameters, forms=[*map(str, parameters.by_size.values())])),
            "layers": [*found.targets],
            "data": digest(items),
            "weights": digest(model.state_dict().items()),
        }
        journal = Journal(folder / "journal", "accuracy control", json.loads(json.dumps(header, default=str)))
        catalogue = Catalogue(model, found, calibration, parameters, journal)
        net = FormNetwork(model, catalogue, removable=parameters.removable, example_input=_example(model, items[0]))
        bound = objective.bind(net)
        if bound.maximize:
            msg = f"The objective {bound.name!r} is to be maximized; what shall be small is needed, such as latency()."
            raise nncf.ParameterNotSupportedError(msg)
        little = Divergence(model, few_items(calibration, _LITTLE))
        run = _Control(net, bound, drop, little, journal, parameters, max_drop)
        try:
            report = run.searched(budget, None if storage is None else folder / "search.log", seed)
            if not report.complete:
                raise KeyboardInterrupt
            tried = run.tried(report)
            net.restore()
            return run.chosen(report, tried, recover)
        finally:
            net.restore()


def _checked(model: nn.Module, max_drop: float, budget: int) -> nn.Module:
    if not isinstance(model, nn.Module):
        msg = f"Asked to compress a {type(model).__name__}; a torch.nn.Module is needed."
        raise nncf.UnsupportedModelError(msg)
    if not 0 < max_drop < math.inf or budget < 1:
        msg = f"max_drop is a number above 0 and budget a number of combinations from 1; got {max_drop} and {budget}."
        raise nncf.ValidationError(msg)
    model = unwrapped(model)
    check_plain(model)
    if is_wrapped(model) or hasattr(model, "peft_config"):
        msg = "The model is compressed already, or carries adapters. Start from the dense model, adapters merged."
        raise nncf.UnsupportedModelError(msg)
    return model


@contextmanager
def _folder(storage: str | os.PathLike[str] | None) -> Iterator[Path]:
    if storage is not None:
        Path(storage).mkdir(parents=True, exist_ok=True)
        yield Path(storage)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _example(model: nn.Module, item: Any) -> Any:
    """One token where the model predicts the next one: decoding repeats that. Else an item as it is."""
    predicts = type(model).__name__.endswith("ForCausalLM")
    if isinstance(item, Mapping):
        return {"input_ids": item["input_ids"][:1, :1]} if predicts and "input_ids" in item else dict(item)
    return item[:1, :1] if predicts and isinstance(item, Tensor) else item


@dataclass(frozen=True)
class _Tried:
    """A candidate, and the point that it is."""

    candidate: Candidate
    point: Point


class _Control:
    """One run, model and catalogue being ready."""

    def __init__(
        self,
        net: FormNetwork,
        objective: Objective,
        drop: Divergence | Drop,
        little: Divergence,
        journal: Journal,
        parameters: AdvancedAccuracyControlParameters,
        max_drop: float,
    ) -> None:
        self._net, self._objective, self._drop, self._little = net, objective, drop, little
        self._journal, self._parameters, self._max_drop = journal, parameters, max_drop
        self._known: dict[str, float] = {}

    @cached_property
    def _singles(self) -> list[_Tried]:
        """One form everywhere: what other combinations are predicted from, and compared with."""
        found = []
        with Progress() as progress:
            task = progress.add_task("Measuring one form everywhere", total=len(self._parameters.by_size))
            for size, form in self._parameters.by_size.items():
                found.append(self._tried(f"{form} everywhere", self._net.everywhere(size), single=True))
                progress.advance(task)
        smaller = [each.candidate for each in found if not _is_dense(each.candidate)]
        if not any(each.drop <= self._max_drop for each in smaller):
            logger.warning(
                "No form everywhere keeps to max_drop %g; the nearest is %s with %.4g.",
                self._max_drop,
                *min(((each.name, each.drop) for each in smaller), key=lambda pair: pair[1], default=("none", 0.0)),
            )
        return found

    @cached_property
    def _prediction(self) -> Prediction:
        """From what one form everywhere costs, and what changes of single parts lose."""
        pairs = zip(self._parameters.by_size, self._singles, strict=True)
        return Prediction(self._net, {size: each.candidate.cost for size, each in pairs}, *self._measured_alone())

    def searched(self, budget: int, storage: Path | None, seed: int) -> SearchReport:
        """Combinations on little text, with predicted costs."""
        prediction = self._prediction
        sampler: Any = self._parameters.sampler
        low, high = losses = self._losses_of_interest()
        sampler = PriceSampler(prediction, losses, seed) if sampler is None else sampler
        starts = min(_STARTS, max(1, budget // 2))
        limits = [low * (high / low) ** (place / max(1, starts - 1)) for place in range(starts)]
        name, where = self._objective.name, self._objective.conditions
        return search(
            self._net,
            [
                Objective("divergence", lambda _: self._little(self._net.model), maximize=False),
                Objective(f"predicted {name}", prediction.cost, maximize=False, conditions=where),
            ],
            sampler=sampler,
            budget=budget,
            starts=[prediction.cheapest(limit) for limit in limits],
            storage=storage,
            # Predictions of another CPU, or of another objective, are of no use here.
            study_name=f"at most {self._max_drop:g}, {name}, seed {seed}, {digest([where])[:8]}",
            seed=seed,
        )

    def tried(self, report: SearchReport) -> list[_Tried]:
        """
        Combinations around the limit, judged by all held-out data; those that count are measured as a whole.

        :return: One form everywhere; the cheapest by prediction that keep to the limit; those that are least beyond it.
        """
        points = self._around_the_limit(report)
        keeping = [place for place, point in enumerate(points) if self._drop_of(point) <= self._max_drop]
        beyond = [place for place in range(len(points)) if place not in keeping]
        cost = self._prediction.cost
        # Predicted costs are not quite those of wholes: the next ones may be cheaper in truth.
        keeping = sorted(keeping, key=lambda place: cost(points[place]))[:_MEASURED]
        beyond = sorted(beyond, key=lambda place: self._drop_of(points[place]))[:_MEASURED]
        measured = (self._tried(f"combination {place + 1}", points[place]) for place in (*keeping, *beyond))
        return [*self._singles, *measured]

    def chosen(
        self,
        report: SearchReport,
        tried: list[_Tried],
        recover: Callable[[Any, Any], Any] | None,
    ) -> AccuracyControlResult:
        """The cheapest that keeps to the limit, recovered or not. The model is dense by now."""
        max_drop = self._max_drop
        dense = next(each for each in tried if _is_dense(each.candidate))
        smaller = [each for each in tried if not _is_dense(each.candidate)]
        model, best = None, _cheapest(smaller, max_drop, dense.candidate.cost)
        everything = [each.candidate for each in tried]
        if recover is not None:
            limit = dense.candidate.cost if best is None else best.candidate.cost
            beyond = [each for each in smaller if each.candidate.drop > max_drop and each.candidate.cost < limit]
            for each in sorted(beyond, key=lambda one: one.candidate.drop)[:_MEASURED]:
                trained = self._recovered(each, recover)
                with evaluation(trained):
                    drop = self._drop(trained)
                again = replace(each.candidate, name=f"{each.candidate.name}, recovered", drop=drop, single=False)
                everything.append(again)
                if drop <= max_drop and (best is None or again.cost < best.candidate.cost):
                    model, best = trained, _Tried(again, each.point)
        if best is None:
            nearest = min((each.candidate for each in smaller), key=lambda each: each.drop)
            msg = (
                f"Nothing that costs less than the dense model keeps to max_drop {max_drop:g}. The nearest is "
                f"{nearest.name}: it loses {nearest.drop:.4g}, {self._objective.name} {nearest.cost:.5g} (dense: "
                f"{dense.candidate.cost:.5g}). Allow more, add forms with more bits, or give recover=."
            )
            raise nncf.ValidationError(msg)
        if model is None:
            model = self._net.extract(best.point)
        drop_of = "nats of divergence" if isinstance(self._drop, Divergence) else "of validation_fn"
        notes = [note for note in (self._objective.note() if self._objective.note else None,) if note]
        ordered = tuple(sorted(everything, key=lambda each: (each.cost, each.drop)))
        name = self._objective.name
        result = AccuracyControlReport(ordered, best.candidate, max_drop, drop_of, name, report, tuple(notes))
        return AccuracyControlResult(model, best.candidate.plan, result)

    def _recovered(self, tried: _Tried, recover: Callable[[Any, Any], Any]) -> Any:
        """A combination after the user's training, which must not have changed its forms."""
        small = self._net.extract(tried.point)
        before = compression_report(small).weights
        with torch.enable_grad():
            trained = recover(small, copy.deepcopy(self._net.model))
        rows = compression_report(trained).weights if isinstance(trained, nn.Module) else ()
        after = {each.name: each for each in rows}
        changed = [
            each.name
            for each in before
            if (now := after.get(each.name)) is None
            or (now.precision, now.shape) != (each.precision, each.shape)
            or now.sparsity < each.sparsity - _LOST_ZEROS
        ]
        if changed:
            msg = (
                f"recover= returned a {type(trained).__name__} in which {changed[0]} has another form, so that it "
                "costs something else. Train adapters that merge into the codes (make_mergeable), or what has no form; "
                "keep zeros (KeepZeros)."
            )
            raise nncf.ValidationError(msg)
        return trained.eval()

    def _losses_of_interest(self) -> tuple[float, float]:
        """Divergences around what is allowed; where another function says that, those of one form everywhere."""
        if isinstance(self._drop, Divergence):
            return self._max_drop / _AROUND, self._max_drop * _AROUND
        net, predicted = self._net, self._prediction
        found = [float(predicted.losses(net.everywhere(size)).sum()) for size in self._parameters.by_size]
        least = min((each for each in found if each > 0), default=1.0)
        return max(least, max(found) / _WIDEST), max(*found, least)

    def _around_the_limit(self, report: SearchReport) -> list[Point]:
        """
        Combinations around the limit, all judged: first by halving what the search found; then the cheapest ones by the
        prices that it has learned, at predicted losses between what keeps to the limit and what does not.
        """
        predicted, max_drop = self._prediction, self._max_drop
        losses = [float(each.values["divergence"]) for each in report.evaluations]
        factors, _ = predicted.learned([each.point for each in report.evaluations], losses)
        points: list[Point] = []
        front = [each.point for each in sorted(report.front, key=lambda each: predicted.cost(each.point))]
        low, high = 0, len(front)  # the cheapest that keeps to the limit lies here
        while low < high and len(points) < (self._parameters.finalists + 1) // 2:
            middle = (low + high) // 2
            points.append(front[middle])
            low, high = (low, middle) if self._drop_of(front[middle]) <= max_drop else (middle + 1, high)
        least, most = self._losses_of_interest()
        while len(points) < self._parameters.finalists:
            loss_of = {place: float(predicted.losses(point) @ factors) for place, point in enumerate(points)}
            kept = [loss for place, loss in loss_of.items() if self._drop_of(points[place]) <= max_drop]
            lost = [loss for place, loss in loss_of.items() if self._drop_of(points[place]) > max_drop]
            lower = max([least, *kept])
            upper = min((loss for loss in lost if loss > lower), default=max(most, lower * 2))
            point = predicted.cheapest(math.sqrt(lower * upper), factors)
            if point in points:
                break
            points.append(point)
        return points

    def _tried(self, name: str, point: Point, single: bool = False) -> _Tried:
        """Judged and measured as a whole."""
        return _Tried(Candidate(name, self._plan(point), self._drop_of(point), self._cost_of(point), single), point)

    def _drop_of(self, point: Point) -> float:
        """What a point loses on all held-out data, found now or before; what a user's function says, now."""

        def judge() -> float:
            self._net.activate(point)
            return self._drop(self._net.model)

        return self._once("drop", [*point.items()], judge, keep=isinstance(self._drop, Divergence))

    def _cost_of(self, point: Point) -> float:
        """What it costs, measured as a whole now or before."""
        of = [*point.items(), self._objective.name, self._objective.conditions]
        return self._once("cost", of, lambda: float(self._objective(point)))

    def _once(self, what: str, of: list[Any], measure: Callable[[], float], keep: bool = True) -> float:
        name = f"{what}-{digest(of)[:16]}.json"
        if name not in self._known:
            known = self._journal.read(name, read_json) if keep else None
            if known is None:
                known = {what: measure()}
                content = json.dumps(known)
                if keep:
                    self._journal.write(name, lambda aside: aside.write_text(content))
            self._known[name] = known[what]
        return self._known[name]

    def _plan(self, point: Point) -> FormPlan:
        silent = self._net.silent(point)
        forms = {
            layer: str(group.forms[point[name]])
            for name, group in self._net.groups.items()
            if name not in silent
            for layer in group.layers
        }
        return FormPlan(forms, tuple(name for name in self._net.branches if point[name] == REMOVED))

    def _measured_alone(self) -> tuple[dict[str, float], dict[str, float]]:
        """Prices of errors by group, and losses of removals by branch."""
        known = self._journal.read("alone.json", read_json)
        if known is None:
            whole = self._net.space.maximal()
            prices, removals = {}, {}
            with Progress() as progress:
                task = progress.add_task(
                    "Changing one part after the other", total=len(self._net.groups) + len(self._net.branches)
                )
                for name, group in self._net.groups.items():
                    size = max(group.forms, key=lambda each: self._net.catalogue.error(group, each))
                    self._net.activate({**whole, name: size})
                    error = self._net.catalogue.error(group, size)
                    prices[name] = self._little(self._net.model) / error if error > 0 else 0.0
                    progress.advance(task)
                for name in self._net.branches:
                    self._net.activate(self._net.space.canonical({**whole, name: REMOVED}))
                    removals[name] = self._little(self._net.model)
                    progress.advance(task)
            # Rounding can leave a difference of nothing; nothing is free.
            least = min((price for price in prices.values() if price > 0), default=1.0)
            prices = {name: max(price, least) for name, price in prices.items()}
            known = {"prices": prices, "removals": removals}
            content = json.dumps(known)
            self._journal.write("alone.json", lambda aside: aside.write_text(content))
        return known["prices"], known["removals"]


def _cheapest(tried: list[_Tried], max_drop: float, dense: float) -> _Tried | None:
    kept = (each for each in tried if each.candidate.drop <= max_drop and each.candidate.cost < dense)
    return min(kept, key=lambda each: (each.candidate.cost, each.candidate.drop), default=None)


def _is_dense(candidate: Candidate) -> bool:
    return not candidate.plan.removed and {*candidate.plan.forms.values()} == {str(DENSE)}
