"""One loop for every search: ask a sampler for a point, activate it, measure it, tell; over an Optuna study."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import nncf
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nncf_ext.exploration.objectives import Objective
from nncf_ext.exploration.report import Evaluation, SearchReport
from nncf_ext.exploration.samplers import HillClimbingSampler, OrderedNSGAIISampler, asked
from nncf_ext.exploration.space import Elastic, Point, SearchSpace
from nncf_ext.exploration.storage import open_storage
from nncf_ext.parameters import SearchSampler, parse_choice
from nncf_ext.progress import Progress

logger = logging.getLogger("nncf_ext")

Places = tuple[int, ...]
"""For each dimension of a space, the place of a size in its list."""

_WHAT = "nncf_ext"
"""Attribute of a study that says what it searches: space and objectives. Another search must not continue from it."""
_SIZES = "sizes"
"""Attribute of a trial: the size of every dimension, for people. Its parameters are places, for samplers."""
_REPEATS = 200
"""A sampler that proposes nothing new this many times in a row has nothing left."""
_POPULATION = 20


def search(
    net: Elastic,
    objectives: Sequence[Objective],
    *,
    sampler: SearchSampler | BaseSampler = SearchSampler.HILL_CLIMBING,
    budget: int = 100,
    limits: Mapping[str, float] | None = None,
    test: Callable[[Point], float] | None = None,
    storage: str | os.PathLike[str] | None = None,
    study_name: str = "nncf_ext",
    seed: int = 0,
) -> SearchReport:
    """
    Looks for the best sub-networks of an elastic network.

    The heuristic point (the middle size of every dimension) is measured first, so without limits the chosen point is
    never worse than it on the first objective. No point is measured twice. Ctrl-C ends the search early with what was
    found.

    :param net: Elastic network: what ``make_elastic`` returns. Its active point is the same before and after.
    :param objectives: What to maximize or minimize. The first one, a measure on validation data, decides which point is
        chosen. With several objectives the report holds the front: the points that no other point dominates.
    :param sampler: A member of SearchSampler, or any Optuna sampler over integer parameters (places in the lists of
        sizes). HEURISTIC needs no search, HILL_CLIMBING one objective.
    :param budget: Number of points to measure, at least 1, those found in the storage included.
    :param limits: Constraints on the chosen point, by the name of the objective: at most this where the objective is
        minimized, at least this where it is maximized.
    :param test: The measure of the first objective on test data, taken once, of the chosen point, at the end. The
        report tells the gap between validation and test.
    :param storage: File to keep every result in (Optuna's journal), or the URL of a data base; an interrupted or
        finished search continues from it, and several processes may search together. None keeps results in memory.
        For Optuna's own tools (optuna-dashboard, plots), each trial has its point in the user attribute ``sizes``, and
        the values bear the names of the objectives.
    :param study_name: Name of the study in the storage.
    :param seed: Seed of the members of SearchSampler. A search that continues from storage gives the same as one that
        was not interrupted, wherever it was killed.
    :return: All points measured, the front, and the chosen point.
    :raises nncf.ValidationError: Objectives are missing or have equal names, a limit names no objective, the test
        function is that of validation, the storage is damaged or holds another search, or a value is not finite.
    :raises nncf.ParameterNotSupportedError: The sampler is unknown or cannot take several objectives.
    :raises KeyboardInterrupt: If interrupted before the first point was measured.
    """
    objectives = tuple(objectives)
    limits = dict(limits or {})
    if not isinstance(sampler, BaseSampler):
        sampler = parse_choice(sampler, SearchSampler, "sampler", " or an Optuna sampler")
    _check(objectives, sampler, budget, limits, test)
    study = _open(net.space, objectives, storage, study_name)
    before = net.active
    result, complete = None, False
    known = _measured(study, net.space)
    try:
        _run(study, net, objectives, known, sampler, budget, seed)
        chosen = _report(known, net.space, objectives).pick(**limits)
        if test is not None and chosen is not None:
            net.activate(chosen.point)
            result = replace(objectives[0], function=test)(chosen.point)
        complete = True
    except KeyboardInterrupt:
        if not known:
            raise
        how = "Results are in memory only." if storage is None else "The same call continues."
        logger.warning("Interrupted: %d of %d points are measured. %s", len(known), budget, how)
    finally:
        net.activate(before)
    report = _report(known, net.space, objectives)
    return replace(report, chosen=report.pick(**limits), test=result, complete=complete)


def _check(
    objectives: tuple[Objective, ...],
    sampler: SearchSampler | BaseSampler,
    budget: int,
    limits: Mapping[str, float],
    test: Callable[[Point], float] | None,
) -> None:
    names = [objective.name for objective in objectives if isinstance(objective, Objective)]
    if not objectives or len(names) < len(objectives) or len(set(names)) < len(names):
        msg = f"A search needs at least one Objective, each with a name of its own; got {list(objectives)}."
        raise nncf.ValidationError(msg)
    if len(objectives) > 1 and (sampler is SearchSampler.HILL_CLIMBING or isinstance(sampler, HillClimbingSampler)):
        msg = f"Hill climbing needs one objective; got {names}. Use SearchSampler.NSGA2."
        raise nncf.ParameterNotSupportedError(msg)
    if budget < 1:
        msg = f"budget is a number of points to measure, at least 1; got {budget}."
        raise nncf.ValidationError(msg)
    if unknown := sorted(set(limits) - set(names)):
        msg = f"Asked for limits on {unknown}; the objectives are {names}."
        raise nncf.ValidationError(msg)
    if test is not None and test in (objectives[0], objectives[0].function):
        msg = f"test is the very function of {names[0]}: choosing on test data would hide the gap it should show."
        raise nncf.ValidationError(msg)


def _open(
    space: SearchSpace, objectives: tuple[Objective, ...], storage: str | os.PathLike[str] | None, study_name: str
) -> optuna.Study:
    """Opens or creates the study and makes sure that it is one of this very search."""
    directions = [
        StudyDirection.MAXIMIZE if objective.maximize else StudyDirection.MINIMIZE for objective in objectives
    ]
    goals = [[objective.name, direction.name] for objective, direction in zip(objectives, directions, strict=True)]
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
            f"{storage} holds a search {study_name!r} of another space or other objectives: "
            f"{study.user_attrs.get(_WHAT)}. Name another file or another study_name."
        )
        raise nncf.ValidationError(msg)
    names = [objective.name for objective in objectives]
    if study.metric_names != names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)
    return study


def _run(
    study: optuna.Study,
    net: Elastic,
    objectives: tuple[Objective, ...],
    known: dict[Places, tuple[float, ...]],
    sampler: SearchSampler | BaseSampler,
    budget: int,
    seed: int,
) -> None:
    """Measures points into `known` until the budget is used up or the sampler proposes nothing new."""
    space = net.space
    distributions: dict[str, BaseDistribution] = {
        name: IntDistribution(0, len(sizes) - 1) for name, sizes in space.dimensions.items()
    }
    if sampler is SearchSampler.HEURISTIC:
        budget = 1
    elif sampler is SearchSampler.HILL_CLIMBING:
        sampler = HillClimbingSampler(seed=seed)
    with Progress() as progress:
        task = progress.add_task("Searching", total=budget)

        def measure(trial: optuna.Trial | FrozenTrial) -> bool:
            places = _places(trial, space)
            point = space.decode(places)
            if isinstance(trial, optuna.Trial):
                trial.set_user_attr(_SIZES, point)
            new = places not in known
            if new:
                net.activate(point)
                known[places] = tuple(objective(point) for objective in objectives)
            # Another process on the same storage may have finished this very trial.
            study.tell(trial.number, known[places], skip_if_finished=True)
            progress.update(task, completed=len(known), description=f"Searching; {_best(known, objectives)}")
            return new

        # A trial whose process was stopped has its point already. It comes first, as in a search without interruption.
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            if trial.params.keys() >= distributions.keys():
                measure(trial)
        heuristic = space.encode(space.heuristic())
        if heuristic not in known and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(dict(zip(space.dimensions, heuristic, strict=True)))
        while len(known) < min(budget, space.size) and _repeats(study, space) < _REPEATS:
            if isinstance(sampler, HillClimbingSampler) and sampler.converged(study):
                break
            study.sampler = sampler if isinstance(sampler, BaseSampler) else _seeded(sampler, study, space, seed)
            measure(study.ask(distributions))
            # What other processes on the same storage have measured meanwhile is not measured again.
            known.update(_measured(study, space))


def _repeats(study: optuna.Study, space: SearchSpace) -> int:
    """How many of the last trials brought nothing new."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    first = {_places(trial, space): place for place, trial in reversed([*enumerate(trials)])}
    return len(trials) - 1 - max(first.values(), default=-1)


def _seeded(kind: SearchSampler, study: optuna.Study, space: SearchSpace, seed: int) -> BaseSampler:
    """A sampler whose next draw depends on the seed and on what the study holds, not on earlier draws of a process."""
    drawn = Random(f"{seed} {asked(study, space.dimensions)}").getrandbits(32)
    if kind is SearchSampler.NSGA2:
        return OrderedNSGAIISampler(population_size=_POPULATION, seed=drawn)
    return RandomSampler(seed=drawn)


def _measured(study: optuna.Study, space: SearchSpace) -> dict[Places, tuple[float, ...]]:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {_places(trial, space): tuple(trial.values) for trial in trials}


def _places(trial: optuna.Trial | FrozenTrial, space: SearchSpace) -> Places:
    return tuple(trial.params[name] for name in space.dimensions)


def _report(
    known: Mapping[Places, tuple[float, ...]], space: SearchSpace, objectives: tuple[Objective, ...]
) -> SearchReport:
    names = [objective.name for objective in objectives]
    found = (
        Evaluation(space.decode(places), dict(zip(names, values, strict=True))) for places, values in known.items()
    )
    return SearchReport(tuple(found), objectives)


def _best(known: Mapping[Places, tuple[float, ...]], objectives: tuple[Objective, ...]) -> str:
    """The best of every objective so far."""
    bests = (
        (max if objective.maximize else min)(values)
        for objective, values in zip(objectives, zip(*known.values(), strict=True), strict=True)
    )
    return "best so far: " + ", ".join(f"{each.name} {best:.4g}" for each, best in zip(objectives, bests, strict=True))
