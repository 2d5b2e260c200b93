"""LINAS: rounds of measured points, each the best unseen ones of an evolutionary search on predictors."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import nncf
import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nncf_ext.exploration.evolution import Integers, evolve
from nncf_ext.exploration.fronts import Floats, best_first
from nncf_ext.exploration.predictors import Predictor, one_hot
from nncf_ext.exploration.samplers import asked

Vector = tuple[int, ...]
"""For each parameter of a trial, in the order of their names, the place of its value in its domain."""

_LARGEST = 1000
_TRIES = 1000


class LinasSampler(BaseSampler):
    """
    An Optuna sampler for few, expensive trials with any number of objectives. The first `population_size` trials are
    uniform. Then, round by round, one predictor is fitted for each objective on all finished trials, NSGA-II runs on
    the predictors alone, and the best `population_size` points it came across that were not tried yet come next, best
    first. Nothing is proposed twice before everything was.

    Parameters are integers, categories, or floats with a step. What comes next depends on the seed and on the trials
    of the study alone, so that a study continues from storage as if it had never stopped. Several processes may share
    a study: each proposes the first point of the round that none has begun.

    :param population_size: Trials of a round, at least 5.
    :param inner_evaluations: Predictions of an inner search, at least `population_size`.
    :param mutation: Chance of each parameter to mutate in the inner search; None for 0.02, or with `resets` for one
        divided by the number of parameters.
    :param resets: A parameter that mutates takes any other value. The published polynomial mutation seldom leaves its
        value where domains have few values.
    :param exact: Objectives that need no predictor, by their number in the study: their value as a function of the
        parameters of a trial.
    :param inactive: Names of the parameters that make no difference at some parameters, such as widths of a block that
        is skipped: predictors see all their values as one.
    :param violation: Of values ``[points, objectives]``, how far each point is from keeping constraints, 0 where it
        keeps them: ``[points]``. Points that keep them come first.
    :param seed: Seed of all draws.
    :raises nncf.ValidationError: A number is too small.

    Source: LINAS of DyNAS-T, arXiv 2202.12954 and 2205.10358 (population 50, 5000 to 20000 inner evaluations). Their
    code takes the last inner population even where it holds points that were measured; here unseen ones fill it up.
    """

    def __init__(
        self,
        population_size: int = 50,
        *,
        inner_evaluations: int = 5000,
        mutation: float | None = None,
        resets: bool = False,
        exact: Mapping[int, Callable[[dict[str, Any]], float]] | None = None,
        inactive: Callable[[dict[str, Any]], set[str]] | None = None,
        violation: Callable[[Floats], Floats] | None = None,
        seed: int = 0,
    ) -> None:
        if population_size < 5 or inner_evaluations < population_size:
            msg = (
                f"LINAS takes a population of at least 5, and no fewer inner evaluations than that; got "
                f"{population_size} and {inner_evaluations}."
            )
            raise nncf.ValidationError(msg)
        if mutation is not None and not 0 <= mutation <= 1:
            msg = f"mutation is the chance of a parameter to mutate, 0 to 1; got {mutation}."
            raise nncf.ValidationError(msg)
        self.population_size = population_size
        self._inner_evaluations = inner_evaluations
        self._mutation = mutation
        self._resets = resets
        self._exact = dict(exact or {})
        self._inactive = inactive
        self._violation = violation
        self._seed = seed
        self._planned: tuple[Any, list[Vector]] = (None, [])

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Optuna's interface: the parameters of the trials so far."""
        return intersection_search_space(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Optuna's interface: the next point of the round."""
        if not search_space:
            return {}
        names = sorted(search_space)
        domains = [_Domain(name, search_space[name]) for name in names]
        others = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
        begun: dict[Vector, FrozenTrial] = {}
        for each in others:
            if each.params.keys() >= search_space.keys():
                vector = tuple(domain.place(each.params[domain.name]) for domain in domains)
                if begun.setdefault(vector, each).state is not TrialState.COMPLETE:
                    begun[vector] = each
        rounds = len(begun) // self.population_size
        before = [*begun.items()][: rounds * self.population_size]
        measured = {vector: each for vector, each in before if each.state is TrialState.COMPLETE and _finite(each)}
        key = (study.study_name, tuple(names), *(vector for vector, _ in before))
        if rounds and len(measured) >= 5 and self._planned[0] != key:
            self._planned = key, self._plan(study, rounds, domains, measured)
        plan = self._planned[1] if self._planned[0] == key else []
        chosen = next((vector for vector in plan if vector not in begun), None)
        if chosen is None:
            chosen = _unseen(domains, begun, Random(f"{self._seed} {len(begun)}"))
        return {domain.name: domain.value(place) for domain, place in zip(domains, chosen, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Optuna's interface: a uniform value; for the first trial, and for parameters that not all trials have."""
        domain = _Domain(param_name, param_distribution)
        count = asked(study, [param_name])
        return domain.value(Random(f"{self._seed} {count} {param_name}").randrange(domain.count))

    def _plan(
        self, study: Study, rounds: int, domains: "list[_Domain]", measured: Mapping[Vector, FrozenTrial]
    ) -> list[Vector]:
        """The points of a round, best first: a few more than are needed, since some may be begun elsewhere."""
        signs = np.array([-1.0 if each is StudyDirection.MAXIMIZE else 1.0 for each in study.directions])
        counts = np.array([domain.count for domain in domains])
        features = _Features(domains, counts, self._inactive)
        points = np.array([*measured])
        values = np.array([each.values for each in measured.values()], dtype=np.float64)
        predictors = {
            number: Predictor(features(points), values[:, number])
            for number in range(len(signs))
            if number not in self._exact
        }

        def judge(points: Integers) -> tuple[Floats, Floats]:
            seen = features(points)
            columns = [
                predictors[number](seen) if number in predictors else features.computed(points, self._exact[number])
                for number in range(len(signs))
            ]
            predicted = np.stack(columns, axis=1)
            violated = np.zeros(len(points)) if self._violation is None else self._violation(predicted)
            return predicted * signs, violated

        found = evolve(
            judge,
            counts,
            self.population_size,
            self._inner_evaluations // self.population_size,
            np.random.default_rng([self._seed, rounds]),
            self._mutation if self._mutation is not None else (1 / len(domains) if self._resets else 0.02),
            self._resets,
        )
        fresh = np.array([tuple(point) not in measured for point in found.points.tolist()], dtype=bool)
        enough = 2 * self.population_size
        order = best_first(found.losses[fresh], found.violations[fresh], enough)[:enough]
        return [tuple(point) for point in found.points[fresh][order].tolist()]


class _Domain:
    """The values of one parameter, in order."""

    def __init__(self, name: str, distribution: BaseDistribution) -> None:
        self.name = name
        self._distribution = distribution
        self.count = 0
        if isinstance(distribution, CategoricalDistribution):
            self.count = len(distribution.choices)
        elif isinstance(distribution, IntDistribution | FloatDistribution) and distribution.step is not None:
            self.count = round((distribution.high - distribution.low) / distribution.step) + 1
        if not 1 <= self.count <= _LARGEST:
            msg = (
                f"LINAS takes integers, categories and floats with a step, of at most {_LARGEST} values; {name} has "
                f"{distribution}."
            )
            raise nncf.ParameterNotSupportedError(msg)

    def value(self, place: int) -> Any:
        if isinstance(self._distribution, IntDistribution | FloatDistribution):
            return self._distribution.low + place * (self._distribution.step or 1)
        return self._distribution.to_external_repr(place)

    def place(self, value: Any) -> int:
        if isinstance(self._distribution, IntDistribution | FloatDistribution):
            return round((value - self._distribution.low) / (self._distribution.step or 1))
        return int(self._distribution.to_internal_repr(value))


class _Features:
    """What predictors see of points: a column for each value of each parameter; none is set for an inactive one."""

    def __init__(
        self,
        domains: list[_Domain],
        counts: Integers,
        inactive: Callable[[dict[str, Any]], set[str]] | None,
    ) -> None:
        self._domains, self._counts, self._inactive = domains, counts, inactive

    def __call__(self, points: Integers) -> Floats:
        columns = one_hot(points, self._counts)
        if self._inactive is None:
            return columns
        silent = [self._inactive(params) for params in self._params(points)]
        shown = np.array([[domain.name not in names for domain in self._domains] for names in silent])
        return columns * np.repeat(shown, self._counts, axis=1)

    def computed(self, points: Integers, function: Callable[[dict[str, Any]], float]) -> Floats:
        return np.array([float(function(params)) for params in self._params(points)])

    def _params(self, points: Integers) -> list[dict[str, Any]]:
        return [
            {domain.name: domain.value(place) for domain, place in zip(self._domains, point, strict=True)}
            for point in points.tolist()
        ]


def _finite(trial: FrozenTrial) -> bool:
    return bool(np.isfinite(trial.values).all())


def _unseen(domains: list[_Domain], begun: Mapping[Vector, Any], random: Random) -> Vector:
    """A uniform point that is not begun; any point where there seems to be none."""
    vector: Vector = ()
    for _ in range(_TRIES):
        vector = tuple(random.randrange(domain.count) for domain in domains)
        if vector not in begun:
            break
    return vector
