"""Ask, activate, measure, tell: until the budget is used up, alone or with other processes on the same study."""

import time
from collections.abc import Collection, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from nncf_ext.exploration.constraints import Constraint, total_violation
from nncf_ext.exploration.fronts import Floats
from nncf_ext.exploration.linas import LinasSampler
from nncf_ext.exploration.nemo import NemoSampler
from nncf_ext.exploration.objectives import Measured, Objective
from nncf_ext.exploration.preranking import Preranking, PrerankingSampler
from nncf_ext.exploration.samplers import HillClimbingSampler, OrderedNSGAIISampler, asked
from nncf_ext.exploration.space import Elastic, Point
from nncf_ext.exploration.workers import Workers
from nncf_ext.parameters import SearchSampler
from nncf_ext.progress import Progress

Places = tuple[int, ...]
"""For each dimension of a space, the place of a size in its list; of points that are one, those of the canonical."""

_SIZES = "sizes"
"""Attribute of a trial: the size of every dimension, for people. Its parameters are places, for samplers."""
_SPREADS = "spreads"
_REPEATS = 200
"""A sampler that proposes nothing new this many times in a row has nothing left."""
_FIRST_ROUNDS = {SearchSampler.NSGA2: 20, SearchSampler.LINAS: 10, SearchSampler.NEMO: 20}
_LINAS_ROUND = 5
_PAUSE = 0.2
"""Seconds between two looks at what other processes do."""


def first_round_of(sampler: SearchSampler | BaseSampler) -> int:
    """
    :param sampler: A sampler.
    :return: How many points it draws at random before it learns from them; 1 where it has no population.
    """
    if isinstance(sampler, SearchSampler):
        return _FIRST_ROUNDS.get(sampler, 1)
    first_round = getattr(sampler, "first_round", getattr(sampler, "population_size", None))
    return first_round if isinstance(first_round, int) else 1


class Run:
    """
    The measuring of points of a network for a study.

    :param study: The study, which says what has been measured.
    :param net: The network.
    :param objectives: What is measured.
    :param constraints: What NSGA-II, LINAS and NEMO should keep to.
    :param sampler: What proposes points.
    :param seed: Of the members of SearchSampler.
    :param shared: Whether other processes can take part.
    :param preranking: What chooses among several points that the sampler draws; None: each that it draws is measured.
    :param starts: Points to measure first.
    """

    def __init__(
        self,
        study: optuna.Study,
        net: Elastic,
        objectives: tuple[Objective, ...],
        constraints: tuple[Constraint, ...],
        sampler: SearchSampler | BaseSampler,
        seed: int,
        shared: bool,
        preranking: Preranking | None = None,
        starts: Sequence[Point] = (),
    ) -> None:
        self.objectives, self.space = objectives, net.space
        self._study, self._net, self._constraints, self._seed = study, net, constraints, seed
        self._starts = starts
        self._sampler, self.preranking = self._lasting(sampler), preranking
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(sizes) - 1) for name, sizes in self.space.dimensions.items()
        }
        self._workers = Workers(study, shared)
        self.known: dict[Places, tuple[float, ...]] = {}
        """Values of every point measured, by anyone."""
        self._look()

    @property
    def full(self) -> dict[str, float]:
        """Values of the full network, by objective; empty while it is not measured."""
        values = self.known.get(self.space.encode(self.space.maximal()), ())
        return {each.name: float(value) for each, value in zip(self.objectives, values, strict=False)}

    def measure(self, budget: int) -> None:
        """
        :param budget: How many points are to be known at the end.
        """
        budget = 1 if self._sampler is SearchSampler.HEURISTIC else min(budget, self.space.size)
        if len(self.known) >= budget or self._exhausted():
            return
        with self._workers, Progress() as progress:
            task = progress.add_task("Searching", total=budget)
            busy = self._take_over()
            while len(self.known) < budget and not self._exhausted():
                if len(self.known) + len(busy) < budget:
                    self._enqueue(busy)
                    self._next(budget)
                else:
                    time.sleep(_PAUSE)  # others measure the last points; should one of them be killed, they are ours
                self._look()
                busy = self._take_over()
                progress.update(task, completed=len(self.known), description=f"Searching; {self._best()}")

    def _next(self, budget: int) -> None:
        """Asks for a point and measures it, unless somebody else has it, or is at it or at the last one there is."""
        self._study.sampler = self._fresh()
        trial = self._study.ask(self._distributions)
        self._workers.take(trial.number)
        if _SIZES not in trial.user_attrs:
            trial.set_user_attr(_SIZES, self.space.decode(self._places(trial)))
        # Of two processes that asked for the same point, or for the last one, that with the earlier trial measures it.
        earlier = self._earlier(trial.number)
        while not all(map(self._has_places, earlier)):
            time.sleep(_PAUSE / 10)
            earlier = self._earlier(trial.number)
        self._look()
        places = self._places(trial)
        taken = places in map(self._places, earlier) or len(self.known) + len(earlier) >= budget
        if taken and places not in self.known:
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self._measure(trial)

    def _measure(self, trial: optuna.Trial | FrozenTrial) -> None:
        places = self._places(trial)
        if places not in self.known:
            point = self.space.decode(places)
            self._net.activate(point)
            values = tuple(objective(point) for objective in self.objectives)
            spreads = {
                each.name: value.spread
                for each, value in zip(self.objectives, values, strict=True)
                if isinstance(value, Measured)
            }
            if spreads and isinstance(trial, optuna.Trial):
                trial.set_user_attr(_SPREADS, spreads)
            self.known[places] = values
        # Another process on the same storage may have finished this very trial.
        self._study.tell(trial.number, self.known[places], skip_if_finished=True)

    def _take_over(self) -> list[FrozenTrial]:
        """
        Measures the points of processes that are gone, so that what comes next is what would have come.

        :return: The trials that other processes are at.
        """
        while True:
            busy, abandoned = self._workers.running()
            for trial in abandoned:
                if not self._has_places(trial):  # nobody will ever know the rest of its parameters
                    self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            trials = [trial for trial in abandoned if self._has_places(trial)]
            if not trials:
                return busy
            self._workers.take(trials[0].number)
            self._measure(trials[0])

    def _enqueue(self, busy: list[FrozenTrial]) -> None:
        """
        Where every search begins: the full network, where it is needed to compare with, what the user starts from, then
        the heuristic point. One at a time, so that a kill in between does not change their order.
        """
        starts = [self.space.canonical(point) for point in (*self._starts, self.space.heuristic())]
        percentages = any(each.percent for each in self._constraints)
        if self._sampler is not SearchSampler.HEURISTIC and (percentages or len(self.objectives) > 1):
            starts.insert(0, self.space.maximal())
        for point in starts:
            places = self.space.encode(point)
            if places in self.known or point in (trial.user_attrs.get(_SIZES) for trial in busy):
                continue
            if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                params = dict(zip(self.space.dimensions, places, strict=True))
                self._study.enqueue_trial(params, user_attrs={_SIZES: point})
            return

    def _exhausted(self) -> bool:
        """Whether the sampler has come to its end: the last trials brought nothing new, or no gain."""
        if isinstance(self._sampler, HillClimbingSampler) and self._sampler.converged(self._study):
            return True
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        first = {self._places(trial): place for place, trial in reversed([*enumerate(trials)])}
        return len(trials) - 1 - max(first.values(), default=-1) >= _REPEATS

    def _look(self) -> None:
        """What has been measured by now, here and elsewhere, in the order of the trials."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        for trial in trials:
            self.known.setdefault(self._places(trial), self._values(trial))
        order = {self._places(trial): trial.number for trial in reversed(trials)}
        self.known = {places: self.known[places] for places in sorted(order, key=order.__getitem__)}

    def _values(self, trial: FrozenTrial) -> tuple[float, ...]:
        spreads = trial.user_attrs.get(_SPREADS, {})
        return tuple(
            Measured(value, spreads[each.name]) if each.name in spreads else value
            for each, value in zip(self.objectives, trial.values, strict=True)
        )

    def _earlier(self, number: int) -> list[FrozenTrial]:
        return [trial for trial in self._workers.running()[0] if trial.number < number]

    def _has_places(self, trial: FrozenTrial) -> bool:
        return trial.params.keys() >= self._distributions.keys()

    def _places(self, trial: optuna.Trial | FrozenTrial) -> Places:
        places = tuple(trial.params[name] for name in self.space.dimensions)
        if self.space.inactive is None:
            return places
        return self.space.encode(self.space.canonical(self.space.decode(places)))

    def _best(self) -> str:
        """The best of every objective so far."""
        if not self.known:
            return "others measure the first point"
        columns = zip(*self.known.values(), strict=True)
        bests = ((max if each.maximize else min)(values) for each, values in zip(self.objectives, columns, strict=True))
        found = zip(self.objectives, bests, strict=True)
        return "best so far: " + ", ".join(f"{each.name} {best:.4g}" for each, best in found)

    # Samplers

    def _lasting(self, sampler: SearchSampler | BaseSampler) -> SearchSampler | BaseSampler:
        """Those of our samplers that need not be made anew: they remember nothing that the study does not say."""
        inactive = None if self.space.inactive is None else self._inactive
        if sampler is SearchSampler.HILL_CLIMBING:
            return HillClimbingSampler(seed=self._seed, inactive=inactive)
        if sampler is SearchSampler.LINAS:
            return LinasSampler(
                _LINAS_ROUND,
                first_round=first_round_of(sampler),
                by_gain=True,
                smooth=True,
                resets=True,
                inactive=inactive,
                violation=self._violation,
                seed=self._seed,
            )
        if sampler is SearchSampler.NEMO:
            sizes = self.space.dimensions
            return NemoSampler(
                first_round_of(sampler),
                features={name: (place, len(sizes[name])) for place, name in enumerate(sizes)},
                edges=[*pairwise(sizes)],
                inactive=inactive,
                violation=self._violation,
                seed=self._seed,
            )
        return sampler

    def _fresh(self) -> BaseSampler:
        """A sampler whose next draw depends on the seed and on what the study holds, not on what it drew before."""
        if isinstance(self._sampler, BaseSampler):
            return self._sampler
        state = f"{self._seed} {asked(self._study, self.space.dimensions)}"
        if self.preranking is None:
            return self._drawing(Random(state).getrandbits(32))
        self.preranking.look(self.known)
        return PrerankingSampler(
            lambda number: self._drawing(Random(f"{state} {number}").getrandbits(32)),
            self.preranking,
            self._distributions,
            Random(f"{state} chosen"),
        )

    def _drawing(self, seed: int) -> BaseSampler:
        if self._sampler is SearchSampler.NSGA2:
            violation = self._violation if self._constraints else None
            return OrderedNSGAIISampler(first_round_of(self._sampler), violation=violation, seed=seed)
        return TPESampler(seed=seed) if self._sampler is SearchSampler.TPE else RandomSampler(seed=seed)

    def _inactive(self, params: dict[str, Any]) -> Collection[str]:
        point = self.space.decode([params[name] for name in self.space.dimensions])
        return () if self.space.inactive is None else self.space.inactive(point)

    def _violation(self, values: Floats) -> Floats:
        """Of values ``[points, objectives]``: ``[points]``."""
        if not self._constraints:
            return np.zeros(len(values))
        names, full = [each.name for each in self.objectives], self.full
        rows: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in values.tolist()]
        return np.array([total_violation(row, self._constraints, full) for row in rows])
