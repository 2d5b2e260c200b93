"""What must a point keep to? ``"macs <= 60%"``, ``"accuracy >= 0.9"``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import nncf

from nncf_ext.exploration.objectives import Objective

_TEXT = re.compile(r"\s*(?P<name>.*?)\s*(?P<sign><=|>=)\s*(?P<number>[-+.\deE]+)\s*(?P<percent>%?)\s*")


@dataclass(frozen=True)
class Constraint:
    """
    A bound on an objective.

    :param name: Name of the objective.
    :param at_most: Whether values up to the bound are allowed, or values from it on.
    :param bound: The bound, in the objective's unit, or in percent.
    :param percent: Whether the bound is in percent of the value of the full network.
    """

    name: str
    at_most: bool
    bound: float
    percent: bool = False

    def violation(self, value: float, full: Mapping[str, float]) -> float:
        """
        :param value: A value of the objective.
        :param full: Values of the full network, by objective.
        :return: By what share of the bound the value is beyond it; 0 where it keeps it.
        :raises nncf.ValidationError: The bound is in percent, and the full network was not measured.
        """
        bound = self.bound
        if self.percent:
            if self.name not in full:
                msg = (
                    f"{self} is a share of the full network, which was not measured. Search on with a larger budget, "
                    f"or bound the value itself: '{self.name} {'<=' if self.at_most else '>='} 1000'."
                )
                raise nncf.ValidationError(msg)
            bound *= full[self.name] / 100
        beyond = (value - bound) * (1 if self.at_most else -1)
        return max(0.0, beyond) / (abs(bound) or 1.0)

    def __str__(self) -> str:
        return f"{self.name} {'<=' if self.at_most else '>='} {self.bound:g}{'%' if self.percent else ''}"


def parse_constraints(texts: Iterable[str], objectives: Sequence[Objective]) -> tuple[Constraint, ...]:
    """
    :param texts: Such as ``"macs <= 60%"``: an objective, ``<=`` or ``>=``, and a number; with a percent sign, percent
        of the full network's value.
    :param objectives: The objectives.
    :return: The constraints.
    :raises nncf.ValidationError: A text says no such thing, or there is no objective of that name.
    """
    if isinstance(texts, str):
        msg = f"constraints is a sequence of texts; got one text {texts!r}. Write ({texts!r},)."
        raise nncf.ValidationError(msg)
    return tuple(_parsed(text, objectives) for text in texts)


def named_constraints(bounds: Mapping[str, float | str], objectives: Sequence[Objective]) -> tuple[Constraint, ...]:
    """
    :param bounds: By the name of an objective, ``"<=60%"`` as in :func:`parse_constraints`, or a number: at most so
        much where the objective is minimized, at least so much where it is maximized.
    :param objectives: The objectives.
    :return: The constraints.
    :raises nncf.ValidationError: See :func:`parse_constraints`.
    """
    found = []
    for name, bound in bounds.items():
        if isinstance(bound, str):
            found.append(_parsed(f"{name} {bound}", objectives))
        else:
            found.append(Constraint(name, not _known(name, objectives).maximize, float(bound)))
    return tuple(found)


def total_violation(values: Mapping[str, float], constraints: Iterable[Constraint], full: Mapping[str, float]) -> float:
    """
    :param values: Of a point, by objective.
    :param constraints: The constraints.
    :param full: Values of the full network.
    :return: The violations of a point, added up; 0 where it keeps all constraints.
    """
    return sum(each.violation(values[each.name], full) for each in constraints)


def _parsed(text: str, objectives: Sequence[Objective]) -> Constraint:
    match = _TEXT.fullmatch(str(text))
    try:
        bound = float(match["number"]) if match else None
    except ValueError:
        bound = None
    if match is None or bound is None or not match["name"]:
        msg = f"A constraint is NAME <= NUMBER or NAME >= NUMBER, or NUMBER%, such as 'macs <= 60%'; got {text!r}."
        raise nncf.ValidationError(msg)
    return Constraint(_known(match["name"], objectives).name, match["sign"] == "<=", bound, match["percent"] == "%")


def _known(name: str, objectives: Sequence[Objective]) -> Objective:
    for objective in objectives:
        if objective.name == name:
            return objective
    msg = f"Asked for a constraint on {name!r}; the objectives are {[each.name for each in objectives]}."
    raise nncf.ValidationError(msg)
