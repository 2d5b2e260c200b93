"""One loop for every search: ask a sampler for a point, activate it, measure it, tell; over an Optuna study."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import nncf
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection

from nncf_ext.exploration.constraints import Constraint, parse_constraints
from nncf_ext.exploration.loop import Run, first_round_of
from nncf_ext.exploration.objectives import Measured, NetworkObjective, Objective
from nncf_ext.exploration.preranking import Prerank, Preranking
from nncf_ext.exploration.report import Evaluation, SearchReport
from nncf_ext.exploration.samplers import HillClimbingSampler
from nncf_ext.exploration.space import Elastic, Point, SearchSpace
from nncf_ext.exploration.storage import open_storage, without_password
from nncf_ext.parameters import SearchSampler, parse_choice

logger = logging.getLogger("nncf_ext")

_WHAT = "nncf_ext"
"""Attribute of a study that says what it searches: space and objectives. Another search must not continue from it."""


def search(
    net: Elastic,
    objectives: Sequence[Objective | NetworkObjective],
    *,
    constraints: Sequence[str] = (),
    sampler: SearchSampler | BaseSampler = SearchSampler.HILL_CLIMBING,
    budget: int = 100,
    starts: Sequence[Point] = (),
    prerank: Prerank | None = None,
    test: Callable[[Point], float] | None = None,
    storage: str | os.PathLike[str] | None = None,
    study_name: str = "nncf_ext",
    seed: int = 0,
) -> SearchReport:
    """
    Looks for the best sub-networks of an elastic network.

    Where there are several objectives or percentages, the full network (the largest size of every dimension) is
    measured first. The heuristic point (the middle sizes) is measured next, so without constraints the chosen point is
    never worse than it on the first objective. No point is measured twice. Ctrl-C ends the search early with what was
    found.

    :param net: Elastic network: what ``make_elastic`` returns. Its active point is the same before and after.
    :param objectives: What to maximize or minimize: Objective, ``latency("CPU")``, ``macs()``, ``parameter_count()``,
        ``weight_bytes()``. The first one, a measure on validation data, decides which point is chosen. With several
        objectives the report holds the front: the points that no other point dominates.
    :param constraints: What the chosen point has to keep to: an objective's name, ``<=`` or ``>=``, and a number, with
        a percent sign percent of the full network's value: ``("macs <= 60%", "accuracy >= 0.9")``. NSGA2, LINAS and
        NEMO prefer points that keep them. If no point measured does, none is chosen, and ``report.best`` names the
        nearest.
    :param sampler: A member of SearchSampler, or any Optuna sampler over integer parameters (places in the lists of
        sizes). HEURISTIC needs no search, HILL_CLIMBING one objective.
    :param budget: Number of points to measure, those found in the storage included; at least the population of a
        sampler that has one.
    :param starts: Points to measure first, such as what another method found; the heuristic point follows. Not for
        HEURISTIC.
    :param prerank: A cheap score of points, such as ``nncf_ext.Proxy("params")``: the sampler draws ten points for each
        that is measured, and of four in five the one with the highest score is taken (with several objectives, among
        those of about its cost). Kendall's tau between score and first objective is logged and stands in the report;
        while the score is no better than chance it is not used. For RANDOM, TPE and NSGA2.
    :param test: The measure of the first objective on test data, taken once, of the chosen point, at the end. The
        report tells the gap between validation and test.
    :param storage: File to keep every result in (Optuna's journal), or the URL of a data base; an interrupted or
        finished search continues from it, and several processes may search together, on several machines with a data
        base. None keeps results in memory. For Optuna's own tools (optuna-dashboard, plots), each trial has its point
        in the user attribute ``sizes``, and the values bear the names of the objectives.
    :param study_name: Name of the study in the storage.
    :param seed: Seed of the members of SearchSampler. A search that continues from storage gives the same as one that
        was not interrupted, wherever it was killed. With several processes the order depends on who was faster.
    :return: All points measured, the front, and the chosen point.
    :raises nncf.ValidationError: Objectives are missing or have equal names, a constraint cannot be read or names no
        objective, the budget is too small, the test function is that of validation, the storage is damaged or holds
        another search, or a value is not finite.
    :raises nncf.ParameterNotSupportedError: The sampler is unknown cannot take several objectives, or draws one
        point at a time where a score should choose.
    :raises KeyboardInterrupt: If interrupted before the first point was measured.
    """
    named = tuple(objectives)
    if not isinstance(sampler, BaseSampler):
        sampler = parse_choice(sampler, SearchSampler, "sampler", " or an Optuna sampler")
    _check(named, sampler, budget, test, net.space)
    _check_prerank(prerank, sampler)
    if starts and sampler is SearchSampler.HEURISTIC:
        msg = "SearchSampler.HEURISTIC measures one point; with starts= take another sampler, such as RANDOM."
        raise nncf.ParameterNotSupportedError(msg)
    checked = tuple(net.space.check(point) for point in starts)
    bound = tuple(objective.bind(net) for objective in named)
    limits = parse_constraints(constraints, bound)
    study = _open(net.space, bound, storage, study_name)
    before = net.active
    result, complete = None, False
    preranking = None if prerank is None else Preranking(prerank, net, len(bound) > 1, bound[0].maximize)
    run = Run(study, net, bound, limits, sampler, seed, storage is not None, preranking, checked)
    try:
        run.measure(budget)
        chosen = _report(run, limits).chosen
        if test is not None and chosen is not None:
            net.activate(chosen.point)
            result = replace(bound[0], function=test)(chosen.point)
        complete = True
    except KeyboardInterrupt:
        if not run.known:
            raise
        how = "Results are in memory only." if storage is None else "The same call continues."
        logger.warning("Interrupted: %d of %d points are measured. %s", len(run.known), budget, how)
    finally:
        net.activate(before)
    return replace(_report(run, limits), test=result, complete=complete)


def _check(
    objectives: tuple[Objective | NetworkObjective, ...],
    sampler: SearchSampler | BaseSampler,
    budget: int,
    test: Callable[[Point], float] | None,
    space: SearchSpace,
) -> None:
    names = [each.name for each in objectives if isinstance(each, Objective | NetworkObjective)]
    if not objectives or len(names) < len(objectives) or len(set(names)) < len(names):
        msg = f"A search needs at least one Objective, each with a name of its own; got {list(objectives)}."
        raise nncf.ValidationError(msg)
    if len(objectives) > 1 and (sampler is SearchSampler.HILL_CLIMBING or isinstance(sampler, HillClimbingSampler)):
        msg = f"Hill climbing needs one objective; got {names}. Use SearchSampler.LINAS, NEMO or NSGA2."
        raise nncf.ParameterNotSupportedError(msg)
    if budget < 1:
        msg = f"budget is a number of points to measure, at least 1; got {budget}."
        raise nncf.ValidationError(msg)
    first_round = first_round_of(sampler)
    if budget < min(first_round, space.size):
        msg = (
            f"A budget of {budget} points is less than the first round of the sampler, {first_round}: it would measure "
            f"random points only. Give it several times that, or a sampler with a smaller one, such as "
            f"LinasSampler(population_size=5)."
        )
        raise nncf.ValidationError(msg)
    first = objectives[0]
    if test is not None and test in (first, getattr(first, "function", None)):
        msg = f"test is the very function of {names[0]}: choosing on test data would hide the gap it should show."
        raise nncf.ValidationError(msg)


def _check_prerank(prerank: Prerank | None, sampler: SearchSampler | BaseSampler) -> None:
    if prerank is not None and sampler not in (SearchSampler.RANDOM, SearchSampler.TPE, SearchSampler.NSGA2):
        msg = (
            f"prerank chooses among points that a sampler draws at random; {sampler} says itself which one is next. "
            "Use SearchSampler.RANDOM, TPE or NSGA2."
        )
        raise nncf.ParameterNotSupportedError(msg)
    if prerank is not None and not callable(getattr(prerank, "bind", None)):
        msg = f"prerank is a score of points, such as nncf_ext.Proxy('params'); got {prerank!r}."
        raise nncf.ValidationError(msg)


def _open(
    space: SearchSpace, objectives: tuple[Objective, ...], storage: str | os.PathLike[str] | None, study_name: str
) -> optuna.Study:
    """Opens or creates the study and makes sure that it is one of this very search."""
    directions = [
        StudyDirection.MAXIMIZE if objective.maximize else StudyDirection.MINIMIZE for objective in objectives
    ]
    goals = [
        [objective.name, direction.name, *([objective.conditions] if objective.conditions else [])]
        for objective, direction in zip(objectives, directions, strict=True)
    ]
    what = json.dumps({"space": space.to_dict(), "objectives": goals})
    backend = open_storage(storage)
    if backend is not None and study_name in optuna.get_all_study_names(backend):
        study = optuna.load_study(study_name=study_name, storage=backend)
    else:
        study = optuna.create_study(study_name=study_name, storage=backend, directions=directions, load_if_exists=True)
    # A process that was killed here has left a study that says nothing, without a trial.
    if _WHAT not in study.user_attrs and not study.get_trials(deepcopy=False) and study.directions == directions:
        study.set_user_attr(_WHAT, what)
    if study.user_attrs.get(_WHAT) != what:
        msg = (
            f"{without_password(storage)} holds a search {study_name!r} of another space or other objectives, or of "
            f"other conditions: {study.user_attrs.get(_WHAT)}; this one is {what}. Name another file or another "
            "study_name."
        )
        raise nncf.ValidationError(msg)
    names = [objective.name for objective in objectives]
    if study.metric_names != names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)
    return study


def _report(run: Run, constraints: tuple[Constraint, ...]) -> SearchReport:
    names = [objective.name for objective in run.objectives]
    found = (
        Evaluation(
            run.space.decode(places),
            {name: float(value) for name, value in zip(names, values, strict=True)},
            {name: value.spread for name, value in zip(names, values, strict=True) if isinstance(value, Measured)},
        )
        for places, values in run.known.items()
    )
    notes = [objective.note() for objective in run.objectives if objective.note is not None]
    if run.preranking is not None:
        run.preranking.look(run.known)
        notes.append(run.preranking.note())
    report = SearchReport(
        tuple(found), run.objectives, constraints, run.full, notes=tuple(note for note in notes if note)
    )
    comparable = run.full or not any(each.percent for each in constraints)
    return replace(report, chosen=report.within(constraints)) if comparable else report
