"""The comparison as one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = {
    "lora": "dense LoRA",
    "shears": "Shears",
    "sqft": "SQFT",
    "sqft_sparse_peft": "SQFT + SparsePEFT",
    "sqft_qa_sparse_peft": "SQFT + QA-SparsePEFT",
}
# Student's t at 97.5 % for 1, 2, 3, ... degrees of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def show(task: str, records: Sequence[dict[str, Any]]) -> None:
    """
    :param task: Name of the task.
    :param records: Its records.
    """
    if not records:
        return
    items, seeds = records[0]["items"], len({record["seed"] for record in records})
    table = Table(title=f"{task}: exact match on {items} held-out items, mean of {seeds} runs (least to most)")
    for heading in ("pipeline", "ranks", "what runs"):
        table.add_column(heading)
    for heading in ("accuracy", "against dense LoRA", "in OpenVINO", "zeros", "MB", "tokens/s"):
        table.add_column(heading, justify="right")
    reference = _runs(records, "lora", "lora")
    for arm, name in NAMES.items():
        for form in ("lora", "nls"):
            runs = _runs(records, arm, form)
            if not runs:
                continue
            ranks = {"lora": "fixed", "nls": "searched"}[form]
            if arm != "lora":
                separate = {"shears": "sparse + adapter", "sqft": "INT4 + adapter"}.get(arm)
                if separate:
                    _row(table, name, ranks, separate, runs, reference, "separate")
            if arm == "shears":
                _row(table, "sparse LoRA, naive merge", ranks, "dense", runs, reference, "merged")
            elif arm != "sqft":
                what = {"lora": "dense", "sqft_sparse_peft": "sparse", "sqft_qa_sparse_peft": "sparse INT4"}[arm]
                _row(table, name, ranks, f"{what}, merged", runs, reference, "merged")
    Console(width=140).print(table)


def difference(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], part: str) -> tuple[float, float]:
    """
    Paired: run by run of the same seed.

    :param runs: Records of one arm.
    :param reference: Records to compare with.
    :param part: ``"separate"`` or ``"merged"``.
    :return: Mean difference of the accuracy, and half the width of its 95 % interval over runs (0 for a single run).
    """
    theirs = {record["seed"]: record["merged"]["accuracy"] for record in reference}
    gaps = [_part(record, part)["accuracy"] - theirs[record["seed"]] for record in runs if record["seed"] in theirs]
    if not gaps:
        return math.nan, math.nan
    half = _T[len(gaps) - 2] * stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return mean(gaps), half


def _row(
    table: Table,
    name: str,
    ranks: str,
    what: str,
    runs: Sequence[dict[str, Any]],
    reference: Sequence[dict[str, Any]],
    part: str,
) -> None:
    accuracies = [_part(record, part)["accuracy"] for record in runs]
    gap, half = difference(runs, reference, part)
    sparsity = [_part(record, part).get("sparsity") for record in runs]
    there = [r["deployed"][part]["accuracy"] for r in runs if "accuracy" in r["deployed"].get(part, {})]
    speeds = [record["deployed"][part] for record in runs if "bytes" in record["deployed"].get(part, {})]
    table.add_row(
        name,
        ranks,
        what,
        f"{mean(accuracies):.1%} ({min(accuracies):.1%} - {max(accuracies):.1%})",
        "" if runs is reference else f"{gap * 100:+.1f} ± {half * 100:.1f}",
        f"{mean(there):.1%}" if there else "",
        "" if None in sparsity else f"{min(sparsity):.1%}",
        f"{speeds[0]['bytes'] / 1e6:.1f}" if speeds else "",
        f"{speeds[0]['tokens_per_s']:.0f}" if speeds else "",
    )


def _runs(records: Sequence[dict[str, Any]], arm: str, form: str) -> list[dict[str, Any]]:
    return [record for record in records if record["arm"] == arm and record["form"] == form]


def _part(record: dict[str, Any], part: str) -> dict[str, Any]:
    return record["merged"] if part == "merged" else record["separate"]
