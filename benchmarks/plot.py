"""The picture of `make bench`: speed against bytes a weight under the roof of the memory, and the gain against rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import OURS, STOCK
from benchmarks.results import Record

_COLORS = {OURS: "#c2410c", STOCK: "#1d4ed8", "ONNX Runtime": "#047857", "PyTorch": "#7c3aed"}
_MARKERS = {"bf16": "s", "int8": "o", "int4": "D"}
_LABELS = {"bf16": "bf16", "int8": "INT8", "int4": "INT4"}
_GREY = "#6b7280"


def roofline(records: Sequence[Record], path: Path) -> None:
    """Draw the linear layers.

    :param records: Those of :mod:`benchmarks.matmul`, several rows and shares of zeros.
    :param path: A PNG file, written whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(14.5, 6.2), width_ratios=(1.35, 1), layout="constrained")
        shown = [r for r in records if r.get("ms") and r["fastest"] and r["kind"] == r["beside"]]
        _draw_roof(left, [r for r in shown if r["rows"] == 1])
        _draw_gain(right, [r for r in shown if r["engine"] == OURS])
        about = shown[0]
        figure.suptitle(
            f"{about['cpu']}, {about['threads']} threads, linear layers of a 1B Llama's "
            f"{about['decoder_layers']} decoder layers, medians of interleaved rounds",
            fontsize=9,
            color=_GREY,
        )
        aside = path.with_name(f".{path.name}")
        figure.savefig(aside, dpi=140, format="png")
        pyplot.close(figure)
    os.replace(aside, path)


def _draw_roof(axes: Any, records: Sequence[Record]) -> None:
    """Weights a second against bytes a weight, both logarithmic: the bandwidth is a straight line."""
    bytes_of = {id(r): r["weights_mib"] * 2**20 / r["weight_count"] for r in records}
    low, high = min(bytes_of.values()) / 1.35, max(bytes_of.values()) * 1.35
    x = np.array([low, high])
    # Every kind of weights has its own rounds and so its own bandwidths: the line is their median.
    median = float(np.median([r["bandwidth_gbps"] for r in records]))
    slowest, quickest = min(r["bandwidth_min"] for r in records), max(r["bandwidth_max"] for r in records)
    axes.fill_between(x, slowest / x, quickest / x, color=_GREY, alpha=0.15, lw=0)
    axes.plot(x, median / x, color=_GREY, lw=1.5)
    for record in records:
        at, color = bytes_of[id(record)], _COLORS[record["engine"]]
        dense = record["engine"] == OURS and not record["sparsity"]
        face = "white" if dense else color
        marker = _MARKERS[record["kind"]]
        rate = record["weights_per_ns"]  # the bar is the range over rounds
        axes.vlines(
            at, *(rate * record["ms"] / record[key] for key in ("ms_max", "ms_min")), color=color, lw=1, alpha=0.5
        )
        axes.plot(at, rate, marker, ms=8, mfc=face, mec=color, mew=1.5, zorder=3)
    for kind in _MARKERS:
        ours = [r for r in records if (r["engine"], r["kind"]) == (OURS, kind)]
        ours.sort(key=lambda r: r["sparsity"])
        axes.plot(
            *([bytes_of[id(r)] for r in ours], [r["weights_per_ns"] for r in ours]),
            color=_COLORS[OURS],
            lw=1,
            alpha=0.6,
        )
        for record in ours:
            at = bytes_of[id(record)], record["weights_per_ns"]
            axes.annotate(
                *(f"{record['sparsity']:.0%}", at), xytext=(8, -3), textcoords="offset points", ha="left",
                fontsize=7.5, color=_COLORS[OURS],
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="bytes a weight that one token reads")
    axes.set(ylabel="G weights a second (zeros count)")
    axes.set_title("One token: how near is the memory's limit?", loc="left")
    _plain_ticks(axes.xaxis, (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2))
    _plain_ticks(axes.yaxis, (0.5, 1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200))
    _legend(axes, records, f"read bandwidth {median:.0f} GB/s\n(range over rounds {slowest:.0f} to {quickest:.0f})")


def _legend(axes: Any, records: Iterable[Record], roof: str) -> None:
    from matplotlib.lines import Line2D

    engines = dict.fromkeys(r["engine"] for r in records)
    handles = [Line2D([], [], color=_GREY, lw=1.5, label=roof)]
    for engine in engines:
        label = f"{engine}, zeros in % beside it" if engine == OURS else engine
        handles.append(Line2D([], [], color=_COLORS[engine], marker="o", ls="", label=label))
    handles.append(Line2D([], [], mec=_COLORS[OURS], mfc="white", marker="o", ls="", label="ours, without a mask"))
    for kind, marker in _MARKERS.items():
        handles.append(Line2D([], [], color="black", marker=marker, ls="", label=_LABELS[kind]))
    axes.legend(handles=handles, frameon=False, fontsize=8.5, loc="lower left")


def _draw_gain(axes: Any, records: Sequence[Record]) -> None:
    """Ours against stock of the same kind, by rows: the smallest and the largest share of zeros, and one half."""
    shares = sorted({r["sparsity"] for r in records})
    styles = dict(zip((shares[0], *([0.5] if 0.5 in shares[1:-1] else []), shares[-1]), (":", "-", "--"), strict=False))
    colors = {"bf16": "#0f766e", "int8": "#b45309", "int4": "#be123c"}
    for kind, color in colors.items():
        for share, line in styles.items():
            chosen = [r for r in records if (r["kind"], r["sparsity"]) == (kind, share)]
            chosen.sort(key=lambda r: r["rows"])
            if not chosen:
                continue
            rows, ratios = [r["rows"] for r in chosen], [r["ratio"] for r in chosen]
            axes.plot(
                rows, ratios, ls=line, color=color, marker=_MARKERS[kind], ms=5, label=f"{_LABELS[kind]}, {share:.0%}"
            )
            if share == 0.5:  # its range over rounds; those of all lines would hide the lines
                low, high = ([r[key] for r in chosen] for key in ("ratio_min", "ratio_max"))
                axes.fill_between(rows, low, high, color=color, alpha=0.08, lw=0)
    axes.axhline(1, color="black", lw=1)
    axes.annotate(
        *("below: stock is faster", (0.01, 1)),
        xycoords=("axes fraction", "data"),
        xytext=(0, -11),
        textcoords="offset points",
        fontsize=8,
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens at a time (rows)",
        ylabel="stock OpenVINO's time / ours, same weights",
    )
    axes.set_title("Where do zeros stop helping?", loc="left")
    _plain_ticks(axes.xaxis, sorted({r["rows"] for r in records}))
    _plain_ticks(axes.yaxis, (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7))
    axes.legend(frameon=False, fontsize=8.5, title="weights, zeros", ncols=3, loc="upper right")


def _plain_ticks(axis: Any, values: Iterable[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter

    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(FixedLocator([]))
