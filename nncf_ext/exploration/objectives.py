"""What is a point judged by?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import nncf

from nncf_ext.exploration.space import Point


@dataclass(frozen=True)
class Objective:
    """
    One number to maximize or to minimize.

    :param name: Its name in reports and storage.
    :param function: Called with a point, which is active in the network at that time; returns a finite number. It may
        measure the network and ignore the point: ``Objective("accuracy", lambda point: accuracy(model))``.
    :param maximize: Whether more is better.
    """

    name: str
    function: Callable[[Point], float]
    maximize: bool = True

    def __call__(self, point: Point) -> float:
        """
        :param point: The active point.
        :return: Its value.
        :raises nncf.ValidationError: The value is not a finite number.
        """
        value = float(self.function(point))
        if not math.isfinite(value):
            msg = f"{self.name} is {value} at {point}. Return a finite number; a large one for a failed point."
            raise nncf.ValidationError(msg)
        return value


def dominates(one: Sequence[float], other: Sequence[float], objectives: Sequence[Objective]) -> bool:
    """
    :param one: A value for each objective.
    :param other: The same of another point.
    :param objectives: The objectives.
    :return: Whether `one` is at least as good in everything and better in something.
    """
    signs = [1 if objective.maximize else -1 for objective in objectives]
    gains = [sign * (mine - theirs) for sign, mine, theirs in zip(signs, one, other, strict=True)]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)
