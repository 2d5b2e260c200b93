"""What control of accuracy found: candidates that were judged and measured as a whole, and the one that was chosen."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
from rich.table import Table

from nncf_ext.exploration.report import SearchReport
from nncf_ext.files import write_whole
from nncf_ext.showing import as_text, save_figure

_VERSION = 1


@dataclass(frozen=True)
class FormPlan:
    """
    Which form each layer has, and what is left out.

    :param forms: Names of forms (``str(form)``) by the layer's path in the dense model.
    :param removed: Names of attentions and MLPs that are left out, such as ``"layers.3.mlp"``.
    """

    forms: Mapping[str, str]
    removed: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """:return: How many layers have each form, the most frequent first."""
        return dict(Counter(self.forms.values()).most_common())

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        :param path: JSON file to write, whole or not at all.
        """
        content = {"version": _VERSION, "forms": dict(self.forms), "removed": list(self.removed)}
        write_whole(Path(path), lambda aside: aside.write_text(json.dumps(content, indent=1)))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "FormPlan":
        """
        :param path: A file that :meth:`save` wrote.
        :return: The plan.
        :raises nncf.ValidationError: The file is no plan, or of a newer version.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["version"] != _VERSION:
                msg = f"version {content['version']!r}, this release reads {_VERSION}"
                raise ValueError(msg)
            forms, removed = content["forms"], content["removed"]
            if not all(isinstance(each, str) for each in (*forms, *forms.values(), *removed)):
                raise ValueError("names that are no text")
            return FormPlan(forms, tuple(removed))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise nncf.ValidationError(f"{path} is no plan of forms ({type(error).__name__}: {error}).") from error


@dataclass(frozen=True)
class Candidate:
    """
    A model that was judged by all held-out data and measured as a whole.

    :param name: ``"int8 everywhere"``, ``"combination 3"``, ``"combination 3, recovered"``.
    :param plan: Its forms.
    :param drop: What it loses.
    :param cost: What it costs, by the objective.
    :param single: Whether it is one form everywhere: a point of the curve of a single method.
    """

    name: str
    plan: FormPlan
    drop: float
    cost: float
    single: bool = False


@dataclass(frozen=True)
class AccuracyControlReport:
    """
    ``str(report)`` is a table of the candidates.

    :param candidates: All that were judged and measured, cheapest first.
    :param chosen: The cheapest of those that lose no more than allowed.
    :param max_drop: What was allowed.
    :param drop_of: What a drop is, in words.
    :param cost_of: Name of the objective.
    :param search: The combinations that were tried on little text, with predicted costs.
    :param notes: What was noticed.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    max_drop: float
    drop_of: str
    cost_of: str
    search: SearchReport
    notes: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Candidate, ...]:
        """Candidates that no other one beats in drop and cost, cheapest first."""
        best: list[Candidate] = []
        for each in sorted(self.candidates, key=lambda one: (one.cost, one.drop)):
            if not best or each.drop < best[-1].drop:
                best.append(each)
        return tuple(best)

    def to_dict(self) -> dict[str, Any]:
        """:return: Only numbers, strings, lists, dictionaries and None."""
        return {
            "candidates": [
                {
                    "name": each.name,
                    "drop": each.drop,
                    self.cost_of: each.cost,
                    "forms": dict(each.plan.forms),
                    "removed": list(each.plan.removed),
                    "single": each.single,
                }
                for each in self.candidates
            ],
            "chosen": self.chosen.name,
            "max_drop": self.max_drop,
            "drop_of": self.drop_of,
            "search": self.search.to_dict(),
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """:return: The candidates as a rich table."""
        table = Table(title=f"At most {self.max_drop:g} {self.drop_of}, as little {self.cost_of} as possible")
        table.add_column("")
        table.add_column("candidate")
        table.add_column("drop", justify="right")
        table.add_column(self.cost_of, justify="right")
        table.add_column("layers by form", overflow="fold")
        front = {id(each) for each in self.front}
        for each in self.candidates:
            mark = "chosen" if each == self.chosen else "front" if id(each) in front else ""
            forms = ", ".join(f"{count} {form}" for form, count in each.plan.counts().items())
            without = f"; without {', '.join(each.plan.removed)}" if each.plan.removed else ""
            table.add_row(mark, each.name, f"{each.drop:.4f}", f"{each.cost:.5g}", forms + without)
        table.caption = "\n".join(self.notes) or None
        return table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """
        Draws drop against cost: one form everywhere as one curve, combinations as another, what was allowed as a line.

        :param path: File to write; its suffix says the format.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=self.cost_of, ylabel=f"drop ({self.drop_of})")
        singles = [each for each in self.candidates if each.single]
        for group, style, label in (
            (singles, "s:", "one form everywhere"),
            ([each for each in self.candidates if not each.single], "o-", "combinations"),
            ([self.chosen], "*", "chosen"),
        ):
            axes.plot([each.cost for each in group], [each.drop for each in group], style, label=label, alpha=0.7)
        for each in singles:
            axes.annotate(each.name.removesuffix(" everywhere"), (each.cost, each.drop), fontsize=7)
        axes.axhline(self.max_drop, linewidth=0.8, linestyle="--", label="allowed")
        axes.legend()
        save_figure(figure, path)

    def __str__(self) -> str:
        return as_text(self.table())


@dataclass(frozen=True)
class AccuracyControlResult:
    """
    :param model: The model that was chosen, a new one.
    :param plan: Its forms.
    :param report: All that was measured.
    """

    model: Any
    plan: FormPlan
    report: AccuracyControlReport
