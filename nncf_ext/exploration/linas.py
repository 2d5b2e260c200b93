"""LINAS: rounds of measured points, each the best unseen ones of an evolutionary search on predictors."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import nncf
import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nncf_ext.exploration.domains import Domains, Inactive, Vector, finite
from nncf_ext.exploration.evolution import Integers, evolve
from nncf_ext.exploration.fronts import Floats, best_first, by_gain
from nncf_ext.exploration.predictors import Predictor, SmoothPredictor, one_hot
from nncf_ext.exploration.samplers import SeededSampler

_INNER_POPULATION = 50


class LinasSampler(SeededSampler):
    """
    An Optuna sampler for few, expensive trials with any number of objectives. The first `first_round` trials are
    uniform. Then, round by round, one predictor is fitted for each objective on all finished trials, NSGA-II runs on
    the predictors alone, and the best `population_size` points it came across that were not tried yet come next, best
    first. Nothing is proposed twice before everything was.

    The defaults are the published algorithm. Fewer trials are needed with small rounds of the points that add most to
    the front: ``LinasSampler(5, first_round=10, by_gain=True, smooth=True, resets=True)``, which is what
    SearchSampler.LINAS means.

    Parameters are integers, categories, or floats with a step. What comes next depends on the seed and on the trials
    of the study alone, so that a study continues from storage as if it had never stopped. Several processes may share
    a study: each proposes the first point of the round that none has begun.

    :param population_size: Trials of a round, at least 5.
    :param first_round: Uniform trials at the beginning, at least 5; None for `population_size`.
    :param by_gain: The next points are those that add most hypervolume to what was measured, by prediction, one after
        the other. Otherwise those of the best rank, and among these the least crowded.
    :param smooth: Predict by a Gaussian process, for which neighbouring values are alike: it learns from ten trials.
        Objectives with positive values only are predicted as logarithms. Otherwise by the published predictors, which
        do not know the order of values.
    :param inner_evaluations: Predictions of an inner search, at least `population_size`.
    :param mutation: Chance of each parameter to mutate in the inner search; None for 0.02, or with `resets` for one
        divided by the number of parameters.
    :param resets: A parameter that mutates takes any other value. The published polynomial mutation seldom leaves its
        value where domains have few values.
    :param exact: Objectives that need no predictor, by their number in the study: their value as a function of the
        parameters of a trial.
    :param inactive: Names of the parameters that make no difference at some parameters, such as widths of a block that
        is skipped: predictors see all their values as one, and trials that differ in nothing else are one, that with
        the first value of each.
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
        first_round: int | None = None,
        by_gain: bool = False,
        smooth: bool = False,
        inner_evaluations: int = 5000,
        mutation: float | None = None,
        resets: bool = False,
        exact: Mapping[int, Callable[[dict[str, Any]], float]] | None = None,
        inactive: Inactive | None = None,
        violation: Callable[[Floats], Floats] | None = None,
        seed: int = 0,
    ) -> None:
        first_round = population_size if first_round is None else first_round
        if min(population_size, first_round) < 5 or inner_evaluations < population_size:
            msg = (
                f"LINAS takes a population and a first round of at least 5, and no fewer inner evaluations than the "
                f"population; got {population_size}, {first_round} and {inner_evaluations}."
            )
            raise nncf.ValidationError(msg)
        if mutation is not None and not 0 <= mutation <= 1:
            msg = f"mutation is the chance of a parameter to mutate, 0 to 1; got {mutation}."
            raise nncf.ValidationError(msg)
        super().__init__(seed)
        self.population_size = population_size
        self.first_round = first_round
        self._by_gain = by_gain
        self._smooth = smooth
        self._inner_evaluations = inner_evaluations
        self._mutation = mutation
        self._resets = resets
        self._exact = dict(exact or {})
        self._inactive = inactive
        self._violation = violation
        self._planned: tuple[Any, list[Vector]] = (None, [])

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Optuna's interface: the next point of the round."""
        if not search_space:
            return {}
        domains = Domains(search_space, self._inactive)
        begun = domains.begun(each for each in study.get_trials(deepcopy=False) if each.number != trial.number)
        later = len(begun) - self.first_round
        rounds = 0 if later < 0 else 1 + later // self.population_size
        before = [*begun.items()][: self.first_round + (rounds - 1) * self.population_size if rounds else 0]
        measured = {vector: each for vector, each in before if each.state is TrialState.COMPLETE and finite(each)}
        key = (study.study_name, tuple(domains.names), *(vector for vector, _ in before))
        if rounds and len(measured) >= 5 and self._planned[0] != key:
            self._planned = key, self._plan(study, rounds, domains, measured)
        plan = self._planned[1] if self._planned[0] == key else []
        chosen = next((vector for vector in plan if vector not in begun), None)
        if chosen is None:
            chosen = domains.unseen(begun, Random(f"{self._seed} {len(begun)}"))
        return domains.params(chosen)

    def _plan(
        self, study: Study, rounds: int, domains: Domains, measured: Mapping[Vector, FrozenTrial]
    ) -> list[Vector]:
        """The points of a round, best first: a few more than are needed, since some may be begun elsewhere."""
        signs = np.array([-1.0 if each is StudyDirection.MAXIMIZE else 1.0 for each in study.directions])
        features = _Features(domains, self._smooth)
        points = np.array([*measured])
        values = np.array([each.values for each in measured.values()], dtype=np.float64)
        predictors = {
            number: (SmoothPredictor if self._smooth else Predictor)(features(points), values[:, number])
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

        # Small rounds do not make the inner search small.
        inner = max(self.population_size, min(_INNER_POPULATION, self._inner_evaluations))
        found = evolve(
            judge,
            domains.counts,
            inner,
            self._inner_evaluations // inner,
            np.random.default_rng([self._seed, rounds]),
            self._mutation if self._mutation is not None else (1 / len(domains.each) if self._resets else 0.02),
            self._resets,
        )
        vectors = [domains.canonical(point) for point in found.points.tolist()]
        first = {vector: place for place, vector in reversed([*enumerate(vectors)])}
        fresh = np.array(sorted(place for vector, place in first.items() if vector not in measured), dtype=np.int64)
        losses, violations, enough = found.losses[fresh], found.violations[fresh], 2 * self.population_size
        order = best_first(losses, violations, len(losses) if self._by_gain else enough)
        if self._by_gain:
            sound = np.ones(len(values), bool) if self._violation is None else self._violation(values) <= 0
            keeping = order[: int((violations <= 0).sum())]
            chosen = keeping[by_gain(losses[keeping], (values * signs)[sound], enough)]
            order = np.concatenate([chosen, order[len(keeping) :]])
        return [vectors[place] for place in fresh[order[:enough]]]


class _Features:
    """
    What predictors see of points: a column for each value of each parameter, none of which is set for an inactive one.
    Smooth ones see ordered parameters as one column from 0 to 1, and -0.5 for an inactive one.
    """

    def __init__(self, domains: Domains, smooth: bool) -> None:
        self._domains, self._counts = domains, domains.counts
        self._ordered = np.array([smooth and domain.ordered for domain in domains.each])

    def __call__(self, points: Integers) -> Floats:
        shown = np.array([self._domains.active(point) for point in points.tolist()])
        ordered, others = self._ordered, ~self._ordered
        places = points[:, ordered] / np.maximum(self._counts[ordered] - 1, 1)
        columns = [np.where(shown[:, ordered], places, -0.5)]
        if others.any():
            hot = one_hot(points[:, others], self._counts[others])
            columns.append(hot * np.repeat(shown[:, others], self._counts[others], axis=1))
        return np.concatenate(columns, axis=1)

    def computed(self, points: Integers, function: Callable[[dict[str, Any]], float]) -> Floats:
        return np.array([float(function(self._domains.params(point))) for point in points.tolist()])
