"""Which times does packing reckon with: those measured on this CPU, or the built-in ones of another?"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

from ov_ext import runtime
from ov_ext.sparse_weights import calibration
from ov_ext.sparse_weights.cost import CostTable, entry, read_table
from ov_ext.sparse_weights.policy import SparsePolicy

SWITCH = "OV_EXT_CALIBRATE"  # environment variable: 0 switches off what policies allow
_NOTHING = CostTable("no CPU", 1, {})


@cache
def builtin() -> dict[str, CostTable]:
    """:return: The tables of ``builtin_costs.json``, by target."""
    text = Path(__file__).with_name("builtin_costs.json").read_text(encoding="utf-8")
    return {target: read_table(table) for target, table in json.loads(text).items()}


def costs(policy: SparsePolicy, kinds: Collection[str]) -> tuple[CostTable, str]:
    """Find the times that hold for a policy, measuring them if it allows that.

    :param policy: Its target may be ``"this-cpu"``. Where nothing is known about its kind of activations, those that
        are quantized in groups of 128 stand for them.
    :param kinds: Kinds of weights that matter.
    :return: The table, by kind of weight, and in words where its times come from.
    """
    table, said = _all_costs(policy, {entry(kind, policy.activation_group) for kind in kinds})
    if policy.activation_group == 0 and not all(entry(kind, 0) in table.kinds for kind in kinds):
        said += "; with quantized activations"
    return table.with_activations(policy.activation_group), said


def _all_costs(policy: SparsePolicy, kinds: Collection[str]) -> tuple[CostTable, str]:
    if policy.target != "this-cpu":
        table = builtin().get(policy.target, _NOTHING)
        return table, f"built-in times of {table.cpu}"
    known = similar()
    said = f"built-in times of {known.cpu}"
    if not kinds or not known.kinds or not policy.calibrate or os.environ.get(SWITCH) == "0":
        return known, said
    measured = calibration.known_or_measured(sorted(kinds))
    if measured is None or not set(kinds) & measured.kinds.keys():
        return known, said
    here = f"times measured on this CPU, {measured.threads} threads"
    missing = sorted(set(kinds) - measured.kinds.keys())
    return replace(
        measured, kinds=known.kinds | measured.kinds
    ), f"{here}; {', '.join(missing)}: {said}" if missing else here


def similar() -> CostTable:
    """:return: The built-in times that fit this CPU best: those of our kernels by the instructions that we may use,
    those of stock by the instructions that OpenVINO may use."""
    ours, theirs = runtime.this_cpu(), runtime.stock_cpu()
    table = builtin().get(ours, _NOTHING)
    return table if ours == theirs or theirs not in builtin() else table.with_stock_of(builtin()[theirs])
