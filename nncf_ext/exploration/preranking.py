"""
Which of several points is worth measuring? A cheap score is asked before each measurement, for as long as it tells.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Protocol

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import kendalltau

from nncf_ext.exploration.space import Elastic, Point

logger = logging.getLogger("nncf_ext")

CANDIDATES = 10
"""Points that are drawn for each one that is measured."""
_AT_RANDOM = 0.2
"""Share of measured points that the score does not choose, so that it can be seen to be wrong."""
_ENOUGH = 16
"""Points measured before the score is judged."""
_CHANCE = 0.1
"""The score is not used where chance alone would agree as well as this often."""

Places = tuple[int, ...]


class Prerank(Protocol):
    """A cheap score of points, higher = said to be better in the first objective, such as :class:`nncf_ext.Proxy`."""

    name: str

    def bind(self, net: Elastic) -> Callable[[Point], float]:
        """
        :param net: The network to search.
        :return: The score of a point of it.
        """


def agreement(scores: Sequence[float], values: Sequence[float], sizes: Sequence[float] | None = None) -> float:
    """
    :param scores: Of some points.
    :param values: What was measured of them.
    :param sizes: What they cost: what scores and values owe to it is taken out (partial tau). None: nothing is.
    :return: Kendall's tau-b, -1 to 1; 0 where all are equal.
    Source: Kendall, Partial rank correlation, Biometrika 1942.
    """
    tau = _tau(scores, values)
    if sizes is None:
        return tau
    one, other = _tau(scores, sizes), _tau(values, sizes)
    left = (1 - one**2) * (1 - other**2)
    return (tau - one * other) / math.sqrt(left) if left > 1e-12 else 0.0


def _tau(one: Sequence[float], other: Sequence[float]) -> float:
    found = float(kendalltau(one, other).statistic)
    return 0.0 if math.isnan(found) else found


def by_chance(tau: float, count: int) -> float:
    """
    :param tau: Kendall's tau of `count` points.
    :param count: Their number.
    :return: How often a score that says nothing would agree as well, by the normal approximation.
    """
    deviation = math.sqrt(2 * (2 * count + 5) / (9 * count * (count - 1)))
    return 0.5 * math.erfc(tau / deviation / math.sqrt(2))


class Preranking:
    """
    The score of one search: what it says of points, and whether it is listened to. That depends on what was measured
    alone, so a search that continues from storage goes on as it would have.

    :param prerank: The score.
    :param net: The network.
    :param several: There are several objectives: candidates are compared at about equal cost, where the network knows
        what its points cost; else the score would always choose the largest.
    :param maximize: Whether more of the first objective is better.
    """

    def __init__(self, prerank: Prerank, net: Any, several: bool, maximize: bool) -> None:
        self.name = prerank.name
        self._score = prerank.bind(net)
        cost = getattr(net, "macs", None) if several else None
        self._cost: Callable[[Point], float] | None = cost if callable(cost) else None
        self.space, self._sign = net.space, 1.0 if maximize else -1.0
        self._known: Mapping[Places, Sequence[float]] = {}
        self._was_used: bool | None = None

    def look(self, known: Mapping[Places, Sequence[float]]) -> None:
        """
        :param known: Values of the points measured so far, by their places.
        """
        self._known = known

    def knows(self, point: Point) -> bool:
        """
        :param point: A point, the canonical one of those that are one.
        :return: Whether it is measured.
        """
        return self.space.encode(point) in self._known

    @property
    def tau(self) -> float:
        """Agreement between scores and the first objective, over all points measured."""
        points = [self.space.decode(places) for places in self._known]
        values = [self._sign * float(each[0]) for each in self._known.values()]
        sizes = None if self._cost is None else [self._cost(point) for point in points]
        return agreement([self._score(point) for point in points], values, sizes)

    @property
    def used(self) -> bool:
        """Whether the score chooses the next point."""
        count = len(self._known)
        if count < _ENOUGH:
            return True
        tau = self.tau
        used = by_chance(tau, count) < _CHANCE
        if used != self._was_used:
            how = "is used" if used else "is no better than chance, and not used"
            logger.info("The score %s %s: tau %.2f over %d points.", self.name, how, tau, count)
        self._was_used = used
        return used

    def note(self) -> str:
        """:return: A line for the report."""
        count = len(self._known)
        if count < 2:
            return f"Score {self.name}: too few points to judge it."
        how = "used to the end" if self.used else "no better than chance, and not used at the end"
        return f"Score {self.name}: Kendall's tau {self.tau:.2f} over {count} points measured; {how}."

    def choose(self, candidates: Sequence[Point], random: Random) -> Point:
        """
        :param candidates: Points that could be measured.
        :param random: Source of randomness.
        :return: The one to measure.
        """
        first = candidates[0]
        if random.random() < _AT_RANDOM or not self.used:
            return first
        if self._cost is not None:
            cost = self._cost
            target = cost(first)
            near = sorted(range(len(candidates)), key=lambda place: (abs(cost(candidates[place]) - target), place))
            candidates = [candidates[place] for place in near[: max(2, len(candidates) // 3)]]
        return max(candidates, key=self._score)


class PrerankingSampler(BaseSampler):
    """
    Lets a sampler draw several points, of which the one with the highest score is measured.

    :param fresh: Makes the sampler that draws, from the number of the candidate; its draws depend on that and on the
        study.
    :param preranking: What chooses.
    :param distributions: The parameters: places in the lists of sizes.
    :param random: Of what is not chosen by score.
    """

    def __init__(
        self,
        fresh: Callable[[int], BaseSampler],
        preranking: Preranking,
        distributions: Mapping[str, BaseDistribution],
        random: Random,
    ) -> None:
        self._first, self._fresh = fresh(0), fresh
        self._preranking, self._distributions, self._random = preranking, dict(distributions), random

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Optuna's interface."""
        return self._distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Optuna's interface: the chosen candidate."""
        first = self._draw(self._first, study, trial)
        if "fixed_params" in trial.system_attrs:  # where every search begins
            return first
        drawn = [first, *(self._draw(self._fresh(number), study, trial) for number in range(1, CANDIDATES))]
        new = [each for each in drawn if not self._preranking.knows(self._point(each))] or drawn
        points = [self._point(each) for each in new]
        return new[points.index(self._preranking.choose(points, self._random))]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Optuna's interface; not called, since all parameters come together."""
        return self._first.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Optuna's interface."""
        self._first.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Optuna's interface."""
        self._first.after_trial(study, trial, state, values)

    def _point(self, params: dict[str, Any]) -> Point:
        space = self._preranking.space
        return space.canonical(space.decode(tuple(params.values())))

    def _draw(self, sampler: BaseSampler, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        relative = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        return {
            name: relative[name] if name in relative else sampler.sample_independent(study, trial, name, each)
            for name, each in self._distributions.items()
        }
