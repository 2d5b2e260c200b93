"""
What combinations of forms are predicted to cost and to lose, from few measurements, and the best by these predictions.

Costs: every form is put everywhere and measured as a whole. A layer in a form then takes the share of that whole which
its weights are of all weights. What takes no part in the choice, the head or attention over a cache, is in every whole,
and so is counted once. That is what decoding does, where time is bytes read; what is chosen in the end is measured as a
whole.

Losses: every group of layers alone is put on one form, and the change of the model's output is measured. Divided by the
error of the group's outputs, that is the price of error there; a form is predicted to lose its error times the price.
Losses of whole combinations correct the prices: Bayesian linear regression, around a factor of one for each price.
"""

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nncf_ext.algorithms.accuracy_control.forms import REMOVED
from nncf_ext.algorithms.accuracy_control.network import PRESENT, FormNetwork
from nncf_ext.exploration.additive import best_additive
from nncf_ext.exploration.domains import Domains
from nncf_ext.exploration.samplers import SeededSampler, asked
from nncf_ext.exploration.space import Point, SearchSpace

Floats = NDArray[np.float64]
_TOGETHER = 64  # combinations of forms in a branch that integer programming looks at together with leaving it out
_DOUBT = 0.5  # standard deviation of the factor of a price
_NOISE = 0.1  # of a measured loss, relative
_TRIES = 10
_CHANGES = 200


@dataclass(frozen=True)
class Prediction:
    """
    :param net: The network.
    :param wholes: Cost of the whole model with a form everywhere, by size of the form.
    :param prices: Loss of one unit of squared error, by group.
    :param removals: Loss where a branch alone is left out, by branch.
    """

    net: FormNetwork
    wholes: Mapping[int, float]
    prices: Mapping[str, float]
    removals: Mapping[str, float]

    def cost(self, point: Mapping[str, int]) -> float:
        """
        :param point: A point.
        :return: Its cost, in the unit of the objective.
        """
        gone = self.net.silent(point)
        return sum(self._cost_of(name, REMOVED if name in gone else point[name]) for name in self.net.groups)

    def losses(self, point: Mapping[str, int]) -> Floats:
        """
        :param point: A point.
        :return: What each of its forms and removals loses alone, ``[groups + branches]``; their sum is its loss.
        """
        gone = self.net.silent(point)
        forms = [0.0 if name in gone else self._loss_of(name, point[name]) for name in self.net.groups]
        return np.array([*forms, *(self.removals[name] * (point[name] == REMOVED) for name in self.net.branches)])

    def cheapest(self, loss: float, factors: Floats | None = None) -> Point:
        """
        :param loss: What may be lost.
        :param factors: Of losses, ``[groups + branches]``; None: 1.
        :return: The cheapest point that is predicted to lose no more, by integer programming.
        """
        names = [*self.net.groups, *self.net.branches]
        scale = dict(zip(names, np.ones(len(names)) if factors is None else factors, strict=True))
        losses = {
            unit: [sum(scale[name] * alone for name, alone in each.alone) for each in choices]
            for unit, choices in self._choices.items()
        }
        least = sum(map(min, losses.values()))
        found = best_additive(*self._program, losses, max(loss, least))
        point = self.net.space.maximal()
        for unit, size in found.items():
            point |= self._choices[unit][len(self._choices[unit]) - 1 - size].sizes
        return self.net.space.canonical(point)

    def learned(self, points: Sequence[Mapping[str, int]], losses: Sequence[float]) -> tuple[Floats, Floats]:
        """
        What losses of whole points say of the prices.

        :param points: Points.
        :param losses: What each of them loses.
        :return: Mean ``[groups + branches]`` of the factors of losses, and a root of their covariance
            ``[groups + branches, groups + branches]``.
        """
        count = len(self.net.groups) + len(self.net.branches)
        if not points:
            return np.ones(count), _DOUBT * np.eye(count)
        alone, measured = np.array([self.losses(point) for point in points]), np.array(losses, dtype=np.float64)
        weights = 1 / (_NOISE * np.maximum(measured, measured[measured > 0].min(initial=1.0)))
        scaled = alone * weights[:, None]
        covariance = np.linalg.inv(np.eye(count) / _DOUBT**2 + scaled.T @ scaled)
        mean: Floats = 1 + covariance @ (scaled.T @ ((measured - alone.sum(axis=1)) * weights))
        root = np.linalg.cholesky((covariance + covariance.T) / 2)
        return np.maximum(mean, 0.0), np.asarray(root, np.float64)

    @cached_property
    def _program(self) -> tuple[SearchSpace, dict[str, list[float]]]:
        """What stays of the integer program: a size for each choice, and the costs."""
        space = SearchSpace({unit: range(len(choices) - 1, -1, -1) for unit, choices in self._choices.items()})
        return space, {unit: [each.cost for each in choices] for unit, choices in self._choices.items()}

    @cached_property
    def _weights(self) -> int:
        return sum(each.weights for each in self.net.groups.values())

    @cached_property
    def _choices(self) -> "dict[str, list[_Choice]]":
        """By branch, or by group outside of those that are looked at as a whole: what can be chosen."""
        found: dict[str, list[_Choice]] = {}
        together: set[str] = set()
        for branch in self.net.branches:
            inside = sorted(self.net.silent({**dict.fromkeys(self.net.branches, PRESENT), branch: REMOVED}))
            lists = [[self._choice(name, size) for size in self.net.groups[name].forms] for name in inside]
            if np.prod([len(each) for each in lists]) > _TOGETHER:
                continue
            together |= {*inside}
            base = sum(self._cost_of(name, REMOVED) for name in inside)
            gone = _Choice({branch: REMOVED}, ((branch, self.removals[branch]),), base)
            found[branch] = [*(_joined(each) for each in itertools.product(*lists)), gone]
        for name, group in self.net.groups.items():
            if name not in together:
                found[name] = [self._choice(name, size) for size in group.forms]
        return found

    def _choice(self, group: str, size: int) -> "_Choice":
        return _Choice({group: size}, ((group, self._loss_of(group, size)),), self._cost_of(group, size))

    def _cost_of(self, group: str, size: int) -> float:
        share = self.net.groups[group].weights / self._weights
        return share * (self._besides if size == REMOVED else self.wholes[size])

    @cached_property
    def _besides(self) -> float:
        """What would be left without any weight: where lines through the largest form and each other one end, mean."""
        large = max(self.wholes)
        ends = [
            low - (self.wholes[large] - low) / (large - small) * small
            for small, low in self.wholes.items()
            if small != large
        ]
        return min(max(sum(ends) / len(ends), 0.0), *self.wholes.values())

    def _loss_of(self, group: str, size: int) -> float:
        return self.prices[group] * self.net.catalogue.error(self.net.groups[group], size)


@dataclass(frozen=True)
class _Choice:
    """What can be chosen at once: sizes, what each loses alone by the name of its price, and the cost."""

    sizes: Mapping[str, int]
    alone: tuple[tuple[str, float], ...]
    cost: float


def _joined(choices: Sequence[_Choice]) -> _Choice:
    sizes = {name: size for each in choices for name, size in each.sizes.items()}
    return _Choice(sizes, tuple(pair for each in choices for pair in each.alone), sum(each.cost for each in choices))


class PriceSampler(SeededSampler):
    """
    An Optuna sampler over the points of a network of forms: the cheapest point by integer programming within a loss,
    with prices drawn from what is known of them by now (Thompson sampling). Nothing is proposed twice, and what comes
    next depends on the seed and the study's trials alone.

    :param prediction: What is known of costs and losses. The loss is the study's first objective.
    :param losses: The least and the greatest loss that is of interest; what is drawn between is uniform in its
        logarithm.
    :param seed: Seed of the draws.
    """

    first_round = 1

    def __init__(self, prediction: Prediction, losses: tuple[float, float], seed: int = 0) -> None:
        super().__init__(seed)
        self._prediction, self._losses = prediction, losses

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Optuna's interface: the next point."""
        space = self._prediction.net.space
        if search_space.keys() != space.dimensions.keys():
            return {}
        names = [*space.dimensions]
        trials = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
        known = {
            tuple(each.params[name] for name in names): each for each in Domains(search_space).begun(trials).values()
        }
        done = {places: each for places, each in known.items() if each.state is TrialState.COMPLETE}
        losses = [each.values[0] for each in done.values()]
        mean, spread = self._prediction.learned([*map(space.decode, done)], losses)
        number = asked(study, names)
        places: tuple[int, ...] = ()
        for attempt in range(_TRIES):
            random = np.random.default_rng([self._seed, number, attempt])
            drawn = np.maximum(mean + spread @ random.standard_normal(len(mean)), 0.0)
            loss = float(np.exp(random.uniform(*np.log(self._losses))))
            places = space.encode(self._prediction.cheapest(loss, drawn))
            if places not in known:
                break
        else:
            places = self._beside(places, known, Random(f"{self._seed} {number}"))
        return dict(zip(names, places, strict=True))

    def _beside(self, places: tuple[int, ...], known: Container[tuple[int, ...]], random: Random) -> tuple[int, ...]:
        """Another point near by, changed step by step until it is new."""
        space = self._prediction.net.space
        counts = [len(sizes) for sizes in space.dimensions.values()]
        changed = list(places)
        for _ in range(_CHANGES):
            gene = random.randrange(len(counts))
            changed[gene] = random.randrange(counts[gene])
            found = space.encode(space.canonical(space.decode(changed)))
            if found not in known:
                return found
        return places
