"""The parameters of a study as short vectors of integers: for each, the place of its value among all it can take."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import Random
from typing import Any

import nncf
import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

Vector = tuple[int, ...]
"""For each parameter, in the order of their names, the place of its value in its domain."""
Inactive = Callable[[dict[str, Any]], Collection[str]]
"""Of the parameters of a trial, the names of those that make no difference there."""

_LARGEST = 1000
_TRIES = 1000
_WALKED = 10_000
"""Points of a space that is walked whole where chance finds none that is new."""


class Domain:
    """
    The values of one parameter, in order.

    :param name: Its name.
    :param distribution: What it can be.
    :raises nncf.ParameterNotSupportedError: It is no integer, category or float with a step, or has too many values.
    """

    def __init__(self, name: str, distribution: BaseDistribution) -> None:
        self.name = name
        self._distribution = distribution
        self.ordered = not isinstance(distribution, CategoricalDistribution)
        self.count = 0
        if isinstance(distribution, CategoricalDistribution):
            self.count = len(distribution.choices)
        elif isinstance(distribution, IntDistribution | FloatDistribution) and distribution.step is not None:
            self.count = round((distribution.high - distribution.low) / distribution.step) + 1
        if not 1 <= self.count <= _LARGEST:
            msg = (
                f"The sampler takes integers, categories and floats with a step, of at most {_LARGEST} values; {name} "
                f"has {distribution}."
            )
            raise nncf.ParameterNotSupportedError(msg)

    def value(self, place: int) -> Any:
        """
        :param place: 0 to ``count - 1``.
        :return: The value that stands there.
        """
        if isinstance(self._distribution, IntDistribution | FloatDistribution):
            return self._distribution.low + place * (self._distribution.step or 1)
        return self._distribution.to_external_repr(place)

    def place(self, value: Any) -> int:
        """
        :param value: A value.
        :return: Where it stands.
        """
        if isinstance(self._distribution, IntDistribution | FloatDistribution):
            return round((value - self._distribution.low) / (self._distribution.step or 1))
        return int(self._distribution.to_internal_repr(value))


class Domains:
    """
    All parameters of a study, in the order of their names.

    :param distributions: What each can be.
    :param inactive: Names of the parameters that make no difference at some parameters. Vectors that differ in nothing
        else are one: that with the first value of each.
    :raises nncf.ParameterNotSupportedError: See :class:`Domain`.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], inactive: Inactive | None = None) -> None:
        self.each = [Domain(name, distributions[name]) for name in sorted(distributions)]
        self.names = [domain.name for domain in self.each]
        self.counts = np.array([domain.count for domain in self.each])
        self._inactive = inactive

    def params(self, vector: Sequence[int]) -> dict[str, Any]:
        """
        :param vector: A vector.
        :return: The parameters of a trial that has it.
        """
        return {domain.name: domain.value(place) for domain, place in zip(self.each, vector, strict=True)}

    def vector(self, params: Mapping[str, Any]) -> Vector:
        """
        :param params: Parameters of a trial, others among them.
        :return: Their vector, the canonical one.
        """
        return self.canonical([domain.place(params[domain.name]) for domain in self.each])

    def active(self, vector: Sequence[int]) -> tuple[bool, ...]:
        """
        :param vector: A vector.
        :return: For each parameter, whether it makes a difference there.
        """
        silent = () if self._inactive is None else self._inactive(self.params(vector))
        return tuple(name not in silent for name in self.names)

    def canonical(self, vector: Iterable[int]) -> Vector:
        """
        :param vector: A vector.
        :return: The one that stands for all that differ from it in inactive parameters only.
        """
        vector = tuple(vector)
        if self._inactive is None:
            return vector
        return tuple(place if shown else 0 for place, shown in zip(vector, self.active(vector), strict=True))

    def begun(self, trials: Iterable[FrozenTrial]) -> dict[Vector, FrozenTrial]:
        """
        :param trials: Trials of a study.
        :return: For each vector that was tried, in the order of the first trial that has it, a finished trial, or, as
            long as there is none, the last one.
        """
        found: dict[Vector, FrozenTrial] = {}
        names = set(self.names)
        for each in trials:
            if each.params.keys() >= names:
                vector = self.vector(each.params)
                if found.setdefault(vector, each).state is not TrialState.COMPLETE:
                    found[vector] = each
        return found

    def unseen(self, begun: Collection[Vector], random: Random) -> Vector:
        """
        :param begun: What was tried.
        :param random: Where chance comes from.
        :return: A uniform vector that was not tried; any where there seems to be none, in a small space surely.
        """
        vector: Vector = ()
        for _ in range(_TRIES):
            vector = self.canonical(random.randrange(domain.count) for domain in self.each)
            if vector not in begun:
                return vector
        total = math.prod(self.counts.tolist())
        if total <= _WALKED:
            start = random.randrange(total)
            for step in range(total):
                walked = np.unravel_index((start + step) % total, self.counts.tolist())
                found = self.canonical(int(place) for place in walked)
                if found not in begun:
                    return found
        return vector


def finite(trial: FrozenTrial) -> bool:
    """
    :param trial: A finished trial.
    :return: Whether all its values are finite.
    """
    return bool(np.isfinite(trial.values).all())
