"""Tables and two pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.scores import bits_per_byte, difference, interval
from evidence.show import table

from side_by_side.arms import DENSE, LLAMA_CPP, OURS, STOCK, Arm

Record = dict[str, Any]
_COLORS = {STOCK: "#64748b", LLAMA_CPP: "#b45309", OURS: "#0f766e"}


def gap(found: Mapping[str, Record], name: str, text: str) -> tuple[float, float, float]:
    """:return: Nats a token that an arm loses to the dense one on a text, and the ends of the 95 % interval, paired."""
    one, dense = (np.array(found[each]["losses"][text]) for each in (name, DENSE))
    return interval(difference, one, dense)


def print_tables(
    arms: Sequence[Arm], found: Mapping[str, Record], times: Record, texts: Mapping[str, tuple[int, list[int]]]
) -> None:
    """
    :param arms: What was measured.
    :param found: Quality by name.
    :param times: From ``measuring.speed``.
    :param texts: For each text, tokens of a window, and bytes that each window predicts.
    """
    windows = " and ".join(f"{len(counts)} of {name}" for name, (_, counts) in texts.items())
    headings = ["arm"]
    for name in texts:
        headings += [name, "to dense (95 %)", "bits/byte"]
    rows = []
    for arm in arms:
        row = [arm.name]
        for name, (length, counts) in texts.items():
            each = np.array(found[arm.name]["losses"][name])
            apart = "" if arm.name == DENSE else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap(found, arm.name, name))
            row += [f"{each.mean():.3f}", apart, f"{bits_per_byte(each, length, counts):.3f}"]
        rows.append(row)
    table(f"Quality: nats a token, and how far from {DENSE}, paired; windows: {windows}", headings, rows)

    headings = ["arm", "MB on disk", "resident MiB", "ms a token", f"{DENSE} / this", "prompt ms", "setting"]
    rows = []
    for arm in arms:
        one, record = times["arms"][arm.name], found[arm.name]
        setting = " ".join(filter(None, record["setting"].values())) or "default"
        numbers = [f"{record['bytes'] / 1e6:.1f}", f"{one['resident_mib']:.0f}", f"{one['ms']:.2f}"]
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*one["ratio"])
        rows.append([arm.name, *numbers, ratio, f"{one['prompt_ms']:.0f}", setting])
    about = f"{times['rounds']} interleaved rounds, load {times['load']:.1f} before them"
    table(f"Speed and size: {times['cpu']}; {about}", headings, rows)


def best(arms: Sequence[Arm], found: Mapping[str, Record], start: str, text: str) -> str | None:
    """:return: The arm with the least loss on a text, among those whose names start so; None if there is none."""
    names = [arm.name for arm in arms if arm.name.startswith(start)]
    return min(names, key=lambda name: np.mean(found[name]["losses"][text]), default=None)


def draw(file: Path, arms: Sequence[Arm], found: Mapping[str, Record], x: Mapping[str, float], label: str) -> None:
    """
    Draws losses against something; each engine has a curve through those arms that no other of its arms beats in both.

    :param file: Picture to write.
    :param arms: What was measured.
    :param found: Quality by name.
    :param x: By name.
    :param label: Of x.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    texts = list(found[DENSE]["losses"])
    figure, panels = pyplot.subplots(1, len(texts), figsize=(8 * len(texts), 7), squeeze=False)
    for axis, text in zip(panels[0], texts, strict=True):
        y = {arm.name: float(np.mean(found[arm.name]["losses"][text])) for arm in arms}
        for engine, color in _COLORS.items():
            names = [arm.name for arm in arms if arm.engine == engine]
            if not names:
                continue
            axis.plot([x[name] for name in names], [y[name] for name in names], "o", color=color, ms=5, label=engine)
            front = frontier({name: (x[name], y[name]) for name in names})
            axis.plot([x[name] for name in front], [y[name] for name in front], color=color, lw=1.2)
            for name in names:
                axis.annotate(name, (x[name], y[name]), xytext=(5, 3), textcoords="offset points", fontsize=7)
        axis.set(xlabel=label, ylabel="nats a token", yscale="log", title=text)
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """:return: Names of the points that no other is below in both coordinates, by x."""
    found: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if not found or y < points[found[-1]][1]:
            found.append(name)
    return found
