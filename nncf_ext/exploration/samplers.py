"""Optuna samplers, for our engine and for anyone else's study."""

from collections.abc import Callable, Collection
from random import Random
from typing import Any

import nncf
import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nncf_ext.exploration.domains import Domain, Inactive
from nncf_ext.exploration.fronts import Floats, best_first

_TRIES = 100


class SeededSampler(BaseSampler):
    """
    What our samplers have in common: they choose all parameters at once, by the seed and the trials of the study alone.

    :param seed: Seed of all draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Optuna's interface: the parameters of the trials so far."""
        return intersection_search_space(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Optuna's interface: a uniform value; for the first trial, and for parameters that not all trials have."""
        domain = Domain(param_name, param_distribution)
        count = asked(study, [param_name])
        return domain.value(Random(f"{self._seed} {count} {param_name}").randrange(domain.count))


class HillClimbingSampler(SeededSampler):
    """
    Tries neighbours of the best trial so far; as soon as one is better, it tries neighbours of that one.

    A neighbour differs in at most `distance` parameters, each by one step up or down. Parameters must be integers. The
    first trial, unless it was enqueued, is the middle of every range. What comes next depends on the seed and on the
    trials that have their parameters alone, so that a study continues from storage as if it had never stopped.

    :param neighbours: After how many trials without a gain :meth:`converged` is true.
    :param distance: Greatest number of parameters to change at once.
    :param seed: Seed of the choice of neighbours.
    :param inactive: Names of the parameters that make no difference at some parameters: trials that differ in nothing
        else are one.
    """

    def __init__(
        self, neighbours: int = 30, distance: int = 2, seed: int = 0, *, inactive: Inactive | None = None
    ) -> None:
        if neighbours < 1 or distance < 1:
            msg = f"neighbours and distance must be at least 1; got {neighbours} and {distance}."
            raise nncf.ValidationError(msg)
        super().__init__(seed)
        self._neighbours = neighbours
        self._distance = distance
        self._inactive = inactive

    def converged(self, study: Study) -> bool:
        """
        :param study: A study with one objective.
        :return: Whether the last `neighbours` finished trials brought no gain.
        """
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return bool(trials) and len(trials) - 1 - trials.index(_best(study, trials)) >= self._neighbours

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Optuna's interface: a neighbour of the best trial, one not yet tried if there is any to be found."""
        ranges = {name: _integers(name, range_) for name, range_ in search_space.items() if not range_.single()}
        if not ranges:
            return {}
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        done = [each for each in trials if each.state is TrialState.COMPLETE]
        tried = [self._active(each.params) for each in trials if each.number != trial.number]
        best = _best(study, done).params
        random = Random(f"{self._seed} {asked(study, search_space)}")
        neighbour = {}
        for _ in range(_TRIES):
            neighbour = {**best}
            for name in random.sample(sorted(ranges), random.randint(1, min(self._distance, len(ranges)))):
                neighbour[name] = _step(best[name], ranges[name], random)
            if self._active(neighbour) not in tried:
                break
        return {name: neighbour[name] for name in ranges}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Optuna's interface: the middle of a range; for the first trial."""
        range_ = _integers(param_name, param_distribution)
        return range_.low + (range_.high - range_.low) // (2 * range_.step) * range_.step

    def _active(self, params: dict[str, Any]) -> dict[str, Any]:
        silent = () if self._inactive is None else self._inactive(params)
        return {name: value for name, value in params.items() if name not in silent}


class OrderedNSGAIISampler(NSGAIISampler):
    """
    NSGA-II whose parents stand in the order of their numbers. Optuna hands a new generation its parents in the order of
    selection once, and in that of their numbers when it reads them from the study: a study that continues from storage
    would draw other children.

    :param violation: Of values ``[points, objectives]``, how far each point is from keeping constraints, 0 where it
        keeps them: ``[points]``. Points that keep them become parents before others. None: there are no constraints.
    :param settings: Those of Optuna's NSGAIISampler.
    """

    def __init__(
        self, population_size: int = 50, *, violation: Callable[[Floats], Floats] | None = None, **settings: Any
    ) -> None:
        super().__init__(population_size=population_size, **settings)
        self._violation = violation

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        """Optuna's interface: the trials that a generation descends from."""
        if self._violation is None:
            parents = super().select_parent(study, generation)
        else:
            before = generation - 1
            trials = self.get_population(study, before) + self.get_parent_population(study, before)
            values = np.array([trial.values for trial in trials], dtype=np.float64)
            signs = [-1.0 if each is StudyDirection.MAXIMIZE else 1.0 for each in study.directions]
            order = best_first(values * signs, self._violation(values), len(trials))
            parents = [trials[place] for place in order[: self.population_size]]
        return sorted(parents, key=lambda trial: trial.number)


def asked(study: Study, names: Collection[str]) -> int:
    """
    :param study: A study.
    :param names: Names of its parameters.
    :return: Number of trials that have them all. One whose process was killed while it asked for them does not count.
    """
    return sum(trial.params.keys() >= set(names) for trial in study.get_trials(deepcopy=False))


def _best(study: Study, trials: list[FrozenTrial]) -> FrozenTrial:
    """The best of some finished trials; among equals, the first."""
    if len(study.directions) != 1:
        msg = f"Hill climbing needs one objective; the study has {len(study.directions)}. Use NSGA-II."
        raise nncf.ParameterNotSupportedError(msg)
    sign = 1.0 if study.direction is StudyDirection.MAXIMIZE else -1.0
    return max(trials, key=lambda trial: sign * (trial.value if trial.value is not None else float("nan")))


def _integers(name: str, distribution: BaseDistribution) -> IntDistribution:
    if not isinstance(distribution, IntDistribution) or distribution.log:
        msg = f"Hill climbing takes steps on integers; {name} has a {type(distribution).__name__}."
        raise nncf.ParameterNotSupportedError(msg)
    return distribution


def _step(value: int, range_: IntDistribution, random: Random) -> int:
    """One step up or down, inside the range."""
    steps = [step for step in (-range_.step, range_.step) if range_.low <= value + step <= range_.high]
    return value + random.choice(steps)
