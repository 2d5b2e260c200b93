"""What did a search find?"""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nncf
import numpy as np
from rich.table import Table

from nncf_ext.exploration.constraints import Constraint, named_constraints, total_violation
from nncf_ext.exploration.fronts import Floats, hypervolume, unbeaten
from nncf_ext.exploration.objectives import Objective
from nncf_ext.exploration.space import Point
from nncf_ext.files import write_whole
from nncf_ext.showing import as_text, save_figure

_NEAREST = 3
"""How many of the nearest points are shown where none keeps the constraints."""


@dataclass(frozen=True)
class Evaluation:
    """
    :param point: A point that was measured.
    :param values: What every objective gave, by name.
    :param spreads: How far repeated measurements lie from it, by name, for the objectives that tell it.
    """

    point: Point
    values: dict[str, float]
    spreads: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchReport:
    """
    ``str(report)`` is a table of the front; :meth:`to_dict` gives plain data.

    :param evaluations: Every point measured, in the order of measuring.
    :param objectives: The objectives. The first one decides which point is chosen.
    :param constraints: What the chosen point has to keep to.
    :param full: Values of the full network, by objective; empty if it was not measured.
    :param chosen: The point chosen on validation data; None if no point keeps the constraints.
    :param test: The first objective of the chosen point on test data; None if there was no test.
    :param complete: Whether the search came to its end; False if it was interrupted.
    :param notes: What objectives say about their values.
    """

    evaluations: tuple[Evaluation, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...] = ()
    full: dict[str, float] = field(default_factory=dict)
    chosen: Evaluation | None = None
    test: float | None = None
    complete: bool = True
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Point:
        """
        The point chosen: for ``extract(net, report.best)``.

        :raises nncf.ValidationError: No point keeps the constraints; the message names the nearest ones.
        """
        return (self._pick(self.constraints) if self.chosen is None else self.chosen).point

    @property
    def gap(self) -> float | None:
        """How much better the chosen point is on validation data than on test data; None without a test."""
        if self.chosen is None or self.test is None:
            return None
        first = self.objectives[0]
        return (self.chosen.values[first.name] - self.test) * (1 if first.maximize else -1)

    @property
    def front(self) -> tuple[Evaluation, ...]:
        """The points that no other point dominates, the best of the first objective first."""
        mask = unbeaten(self._losses()) if self.evaluations else ()
        return tuple(sorted((each for each, on in zip(self.evaluations, mask, strict=True) if on), key=self._rank))

    def pick(self, **bounds: float | str) -> Evaluation:
        """
        ``report.pick(macs="<=60%")``, ``report.pick(latency=3.5, accuracy=">= 0.9")``.

        :param bounds: Constraints by the name of an objective. A text is ``<=`` or ``>=`` with a number, in percent of
            the full network with a percent sign. A number bounds the objective's bad side: at most so much where it is
            minimized, at least so much where it is maximized.
        :return: Of the points that keep all of them, the best by the first objective; the next objectives decide
            between equal ones.
        :raises nncf.ValidationError: No point keeps them (the message names the nearest ones), there is no objective
            of that name, or a percentage is asked for and the full network was not measured.
        """
        return self._pick(named_constraints(bounds, self.objectives))

    def within(self, constraints: Iterable[Constraint]) -> Evaluation | None:
        """
        :param constraints: Constraints on the objectives.
        :return: What :meth:`pick` returns; None where no point keeps them.
        :raises nncf.ValidationError: A constraint is in percent, and the full network was not measured.
        """
        kept = tuple(constraints)
        allowed = (each for each in self.evaluations if total_violation(each.values, kept, self.full) <= 0)
        return min(allowed, key=self._rank, default=None)

    def nearest(self, **bounds: float | str) -> tuple[Evaluation, ...]:
        """
        :param bounds: As for :meth:`pick`; by default the constraints of the search.
        :return: All points, by how much they violate the constraints: the sum of the shares by which they are beyond
            their bounds. Equal ones by the objectives.
        :raises nncf.ValidationError: See :meth:`pick`.
        """
        return self._nearest(named_constraints(bounds, self.objectives) if bounds else self.constraints)

    def hypervolume(self, **reference: float) -> float:
        """
        How good the front is: the volume of what it beats and the reference does not, in the product of the
        objectives' units.

        :param reference: For each objective the worst value that counts.
        :return: The volume.
        :raises nncf.ValidationError: An objective has no reference, or there is one too many.
        """
        names = [objective.name for objective in self.objectives]
        if sorted(reference) != sorted(names):
            msg = f"The hypervolume of {names} takes a reference value of each; got {sorted(reference)}."
            raise nncf.ValidationError(msg)
        return hypervolume(self._losses(), np.array([reference[name] for name in names]) * self._signs())

    def to_dict(self) -> dict[str, Any]:
        """
        :return: Only numbers, strings, lists, dictionaries, booleans and None.
        """
        places = {id(evaluation): number for number, evaluation in enumerate(self.evaluations)}
        return {
            "objectives": {each.name: "maximize" if each.maximize else "minimize" for each in self.objectives},
            "constraints": [str(each) for each in self.constraints],
            "full": self.full,
            "evaluations": [_plain(each) for each in self.evaluations],
            "front": [places[id(evaluation)] for evaluation in self.front],
            "chosen": None if self.chosen is None else _plain(self.chosen),
            "test": self.test,
            "gap": self.gap,
            "complete": self.complete,
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """
        :return: The front as a rich table, the chosen point marked; where no point keeps the constraints, the nearest
            ones.
        """
        state = "" if self.complete else ", interrupted"
        table = Table(title=f"Search report: {len(self.evaluations)} points measured{state}")
        table.add_column("")
        for objective in self.objectives:
            table.add_column(f"{objective.name} ({'max' if objective.maximize else 'min'})", justify="right")
        table.add_column("point", overflow="fold")
        rows = dict.fromkeys(map(id, self.front), "")
        if self.chosen is not None:
            rows[id(self.chosen)] = "chosen"
        elif self.constraints and (self.full or not any(each.percent for each in self.constraints)):
            rows |= {id(each): "nearest" for each in self.nearest()[:_NEAREST]}
        found = {id(each): each for each in (*self.evaluations, *((self.chosen,) if self.chosen else ()))}
        for key, mark in rows.items():
            evaluation = found[key]
            values = [_shown(evaluation, objective.name) for objective in self.objectives]
            table.add_row(mark, *values, _summary(evaluation.point))
        lines = [*self.notes]
        if self.test is not None:
            name = self.objectives[0].name
            lines.append(f"{name} of the chosen point on test data: {self.test:.6g}, gap {self.gap:+.3g}")
        if self.full:
            lines.append(f"full network: {_listed(self.full)}")
        if self.constraints:
            kept = "keeps" if self.chosen is not None else "no point keeps"
            lines.append(f"the chosen point {kept} " + ", ".join(map(str, self.constraints)))
        table.caption = "\n".join(lines) or None
        return table

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """
        Writes a row for each point in the order of measuring: its sizes, its values, their spreads where there are
        any, and whether it is on the front and chosen (1 or 0).

        :param path: File to write.
        """
        spread = [each.name for each in self.objectives if any(each.name in one.spreads for one in self.evaluations)]
        names = [each.name for each in self.objectives]
        front = set(map(id, self.front))
        point = next((each.point for each in self.evaluations), {})

        def write(aside: Path) -> None:
            with aside.open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow([*point, *names, *(f"{name} spread" for name in spread), "front", "chosen"])
                for each in self.evaluations:
                    values = [each.values[name] for name in names]
                    spreads = [each.spreads.get(name, "") for name in spread]
                    marks = [int(id(each) in front), int(each == self.chosen)]
                    rows.writerow([*each.point.values(), *values, *spreads, *marks])

        write_whole(Path(path), write)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """
        Draws all points by the first two objectives, the front as a line, the chosen point as a star.

        :param path: File to write; its suffix says the format, such as ``.png`` or ``.svg``.
        :raises nncf.ValidationError: There is one objective only.
        """
        if len(self.objectives) < 2:
            msg = f"A front takes two objectives; this search had {self.objectives[0].name} alone."
            raise nncf.ValidationError(msg)
        from matplotlib.figure import Figure

        one, two = self.objectives[0].name, self.objectives[1].name
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=two, ylabel=one)
        for group, style, label in (
            (self.evaluations, "o", "measured"),
            (self.front, ".-", "front"),
            ((self.chosen,) if self.chosen else (), "*", "chosen"),
        ):
            values = [each.values for each in group]
            axes.plot([each[two] for each in values], [each[one] for each in values], style, label=label, alpha=0.7)
        axes.legend()
        save_figure(figure, path)

    def __str__(self) -> str:
        return as_text(self.table())

    def _rank(self, evaluation: Evaluation) -> tuple[float, ...]:
        """Smaller is better."""
        return tuple((-1 if each.maximize else 1) * evaluation.values[each.name] for each in self.objectives)

    def _signs(self) -> Floats:
        """Losses are values times these."""
        return np.array([-1.0 if each.maximize else 1.0 for each in self.objectives])

    def _losses(self) -> Floats:
        names = [each.name for each in self.objectives]
        values = [[each.values[name] for name in names] for each in self.evaluations]
        return np.array(values, dtype=np.float64).reshape(-1, len(names)) * self._signs()

    def _nearest(self, constraints: Iterable[Constraint]) -> tuple[Evaluation, ...]:
        kept = tuple(constraints)
        return tuple(
            sorted(
                self.evaluations, key=lambda each: (total_violation(each.values, kept, self.full), *self._rank(each))
            )
        )

    def _pick(self, constraints: Iterable[Constraint]) -> Evaluation:
        kept = tuple(constraints)
        chosen = self.within(kept)
        if chosen is not None:
            return chosen
        nearest = self._nearest(kept)
        near = "; ".join(f"{_listed(each.values)} at {_summary(each.point)}" for each in nearest[:_NEAREST])
        msg = (
            f"None of the {len(self.evaluations)} points measured keeps {', '.join(map(str, kept))}. "
            f"Widen the constraints, or search on with a larger budget. The nearest: {near or 'there is no point'}."
        )
        raise nncf.ValidationError(msg)


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    plain: dict[str, Any] = {"point": evaluation.point, "values": evaluation.values}
    return plain | ({"spreads": evaluation.spreads} if evaluation.spreads else {})


def _shown(evaluation: Evaluation, name: str) -> str:
    spread = f" ± {evaluation.spreads[name]:.2g}" if name in evaluation.spreads else ""
    return f"{evaluation.values[name]:.6g}{spread}"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())


def _summary(point: Point) -> str:
    """All of a small point; of a large one, how often each size occurs."""
    if len(point) <= 8:
        return ", ".join(f"{name}: {size}" for name, size in point.items())
    counts = Counter(point.values())
    return "sizes " + ", ".join(f"{size} ({counts[size]} times)" for size in sorted(counts, reverse=True))
