"""Numbers in words, tables and pictures, on a console that belongs to them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path


def quiet() -> None:
    """Leaves the console to a sample's own progress and tables; to be called before transformers is imported."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A filter, because nncf sets its level when it is imported.
    logging.getLogger("nncf").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore")  # tracing warns about every Python condition in transformers


def in_words(found: tuple[float, float, float], form: str) -> str:
    """
    :param found: From :func:`evidence.scores.interval`.
    :param form: How to write a number, such as ``".1%"``.
    :return: The statistic and its interval.
    """
    value, low, high = (format(each, form) for each in found)
    return f"{value} (95 %: {low} to {high})"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = 140) -> None:
    """
    Prints a table.

    :param title: Above it.
    :param columns: Headings; the first stands left, the others right.
    :param rows: Cells.
    :param width: Characters of a line.
    """
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title)
    for index, heading in enumerate(columns):
        made.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    Console(width=width).print(made)


def plot(file: Path, lines: Mapping[str, Sequence[tuple[float, float]]], axes: tuple[str, str]) -> None:
    """
    :param file: Picture to write.
    :param lines: Points by name; a single point is a mark.
    :param axes: Labels of x and y.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for name, points in lines.items():
        x, y = zip(*points, strict=True)
        axis.plot(x, y, marker="o", markersize=3 if len(points) > 1 else 8, linewidth=1.2, label=name)
    axis.set_xlabel(axes[0])
    axis.set_ylabel(axes[1])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
