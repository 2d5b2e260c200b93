"""What did a search find?"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
from rich.console import Console
from rich.table import Table

from nncf_ext.exploration.objectives import Objective, dominates
from nncf_ext.exploration.space import Point
from nncf_ext.files import write_whole


@dataclass(frozen=True)
class Evaluation:
    """
    :param point: A point that was measured.
    :param values: What every objective gave, by name.
    """

    point: Point
    values: dict[str, float]


@dataclass(frozen=True)
class SearchReport:
    """
    ``str(report)`` is a table of the front; :meth:`to_dict` gives plain data.

    :param evaluations: Every point measured, in the order of measuring.
    :param objectives: The objectives. The first one decides which point is chosen.
    :param chosen: The point chosen on validation data; None if no point is within the limits.
    :param test: The first objective of the chosen point on test data; None if there was no test.
    :param complete: Whether the search came to its end; False if it was interrupted.
    """

    evaluations: tuple[Evaluation, ...]
    objectives: tuple[Objective, ...]
    chosen: Evaluation | None = None
    test: float | None = None
    complete: bool = True

    @property
    def best(self) -> Point:
        """
        The point chosen: for ``extract(net, report.best)``.

        :raises nncf.ValidationError: No point keeps the limits.
        """
        if self.chosen is None:
            msg = f"None of the {len(self.evaluations)} points measured keeps the limits. Widen them, or search on."
            raise nncf.ValidationError(msg)
        return self.chosen.point

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
        unbeaten = [
            one for one in self.evaluations if not any(self._dominates(other, one) for other in self.evaluations)
        ]
        return tuple(sorted(unbeaten, key=self._rank))

    def pick(self, **limits: float) -> Evaluation | None:
        """
        :param limits: Bounds on objectives by name: at most this where the objective is minimized, at least this where
            it is maximized.
        :return: Of the points within all limits, the best by the first objective; the next objectives decide between
            equal ones. None if no point is within the limits.
        :raises nncf.ValidationError: There is no objective of that name.
        """
        named = {objective.name: objective for objective in self.objectives}
        if unknown := sorted(set(limits) - set(named)):
            msg = f"Asked for limits on {unknown}; the objectives are {list(named)}."
            raise nncf.ValidationError(msg)
        allowed = [
            evaluation
            for evaluation in self.evaluations
            if all(
                evaluation.values[name] >= limit if named[name].maximize else evaluation.values[name] <= limit
                for name, limit in limits.items()
            )
        ]
        return min(allowed, key=self._rank, default=None)

    def to_dict(self) -> dict[str, Any]:
        """
        :return: Only numbers, strings, lists, dictionaries, booleans and None.
        """
        places = {id(evaluation): number for number, evaluation in enumerate(self.evaluations)}
        return {
            "objectives": {each.name: "maximize" if each.maximize else "minimize" for each in self.objectives},
            "evaluations": [{"point": each.point, "values": each.values} for each in self.evaluations],
            "front": [places[id(evaluation)] for evaluation in self.front],
            "chosen": None if self.chosen is None else {"point": self.chosen.point, "values": self.chosen.values},
            "test": self.test,
            "gap": self.gap,
            "complete": self.complete,
        }

    def table(self) -> Table:
        """
        :return: The front as a rich table, the chosen point marked.
        """
        state = "" if self.complete else ", interrupted"
        table = Table(title=f"Search report: {len(self.evaluations)} points measured{state}")
        table.add_column("")
        for objective in self.objectives:
            table.add_column(f"{objective.name} ({'max' if objective.maximize else 'min'})", justify="right")
        table.add_column("point", overflow="fold")
        rows = [*self.front]
        if self.chosen is not None and self.chosen not in rows:
            rows.append(self.chosen)
        for evaluation in rows:
            values = [f"{evaluation.values[objective.name]:.6g}" for objective in self.objectives]
            mark = "chosen" if evaluation == self.chosen else ""
            table.add_row(mark, *values, _summary(evaluation.point))
        if self.test is not None:
            table.caption = f"{self.objectives[0].name} of the chosen point on test data: {self.test:.6g}, " + (
                f"gap {self.gap:+.3g}"
            )
        return table

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
        file = Path(path)
        write_whole(file, lambda aside: figure.savefig(aside, format=file.suffix.removeprefix(".") or "png"))

    def __str__(self) -> str:
        console = Console(width=160, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def _rank(self, evaluation: Evaluation) -> tuple[float, ...]:
        """Smaller is better."""
        return tuple((-1 if each.maximize else 1) * evaluation.values[each.name] for each in self.objectives)

    def _dominates(self, one: Evaluation, other: Evaluation) -> bool:
        names = [objective.name for objective in self.objectives]
        mine, theirs = [one.values[name] for name in names], [other.values[name] for name in names]
        return dominates(mine, theirs, self.objectives)


def _summary(point: Point) -> str:
    """All of a small point; of a large one, how often each size occurs."""
    if len(point) <= 8:
        return ", ".join(f"{name}: {size}" for name, size in point.items())
    counts = Counter(point.values())
    return "sizes " + ", ".join(f"{size} ({counts[size]} times)" for size in sorted(counts, reverse=True))
