"""How long does a linear layer take in each of its forms? Tables of measured times, and what follows from them.

A cost is a property of a CPU, not of an instruction set: :mod:`ov_ext.sparse_weights.calibration` measures a table on
the CPU at hand; ``builtin_costs.json`` holds those of other CPUs. Between measured rows and shares of zeros, times are
interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ov_ext.sparse_weights.workload import Expected, Workload

Form = Literal["stock", "dense", "sparse"]
OURS: tuple[Form, Form] = ("dense", "sparse")
KINDS = ("bf16", "int8", "int4")
MEASURED_GROUP = {"bf16": 0, "int8": 0, "int4": 128}  # inputs that share a scale in the layers behind a table
_FLOAT = "_f32"  # behind a kind: times of our forms with activations that stay in floating point
MEASURABLE = (*KINDS, *(kind + _FLOAT for kind in KINDS))

# Ours must be faster than stock by this factor: a stock layer needs no extension.
MARGIN = 1.1

_MOST_ROWS, _MOST_PICOSECONDS, _MOST_COLUMNS = 1 << 20, 1e9, 64


def entry(kind: str, activation_group: int) -> str:
    """:return: Of a table: where the times of a kind of weight with such activations are, one of :data:`MEASURABLE`."""
    return kind if activation_group else kind + _FLOAT


def weights_and_activations(name: str) -> tuple[str, bool]:
    """:return: What an entry is about: kind of weight, whether activations stay in floating point."""
    return name.removesuffix(_FLOAT), name.endswith(_FLOAT)


@dataclass(frozen=True)
class KindCosts:
    """Times of one kind of weight, in picoseconds for one weight in one call, with all threads.

    :param rows: Rows of activations, ascending.
    :param zeros: Shares of zeros, 0..1, ascending.
    :param stock: ``[rows]``: stock OpenVINO, in the fastest of the settings that were tried.
    :param dense: ``[rows]``: our operation without a bitmap.
    :param sparse: ``[zeros][rows]``: our operation with a bitmap.
    :param error: Relative error, 0..1, of these times: the mean over forms, at the rows where it is largest.
    """

    rows: tuple[int, ...]
    zeros: tuple[float, ...]
    stock: tuple[float, ...]
    dense: tuple[float, ...]
    sparse: tuple[tuple[float, ...], ...]
    error: float = 0.0

    def picoseconds(self, form: Form, zeros: float, rows: int) -> float | None:
        """:return: The time of one weight; None for more rows than the measured ones tell about."""
        if rows > self.rows[-1]:
            # Where arithmetic is the limit, time follows the number of rows; below, it need not.
            most = self.picoseconds(form, zeros, self.rows[-1])
            return None if self.rows[-1] < 64 or most is None else most * rows / self.rows[-1]
        if form == "sparse":
            column = [float(np.interp(rows, self.rows, times)) for times in self.sparse]
            return float(np.interp(zeros, self.zeros, column))
        return float(np.interp(rows, self.rows, self.stock if form == "stock" else self.dense))


@dataclass(frozen=True)
class CostTable:
    """Times of linear layers on one CPU.

    :param cpu: Where they were measured, in words.
    :param threads: With so many threads.
    :param kinds: By kind of weight, or by :func:`entry`; any may be missing.
    """

    cpu: str
    threads: int
    kinds: dict[str, KindCosts]

    def expected(self, kind: str, zeros: float, group: int, weights: int, workload: Workload) -> dict[Form, Expected]:
        """Estimate the time of a layer in each form.

        :param kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
        :param zeros: Fraction of zeros, 0..1.
        :param group: Inputs that share a scale; 0 for one scale per output.
        :param weights: Number of elements.
        :param workload: Its rows.
        :return: Times, in seconds; empty where the table does not tell.
        """
        costs = self.kinds.get(kind)
        if costs is None:
            return {}
        measured, times = MEASURED_GROUP[kind], {}
        per_byte = costs.dense[0] / bytes_per_weight("dense", kind, 0.0, measured)  # picoseconds
        for form in ("stock", *OURS):
            bytes_more = bytes_per_weight(form, kind, zeros, group) - bytes_per_weight(form, kind, zeros, measured)
            token = costs.picoseconds(form, zeros, workload.batch)
            prompt = costs.picoseconds(form, zeros, workload.prompt_rows)
            if token is None or (prompt is None and not workload.generated):
                return {}
            more, unit = bytes_more * per_byte, weights * 1e-12
            times[form] = Expected((token + more) * unit, None if prompt is None else (prompt + more) * unit)
        return times

    def with_activations(self, activation_group: int) -> CostTable:
        """:return: By kind of weight alone: times with such activations, where they are known, else the usual ones."""
        kinds = {kind: self.kinds.get(entry(kind, activation_group), self.kinds.get(kind)) for kind in KINDS}
        return replace(self, kinds={kind: costs for kind, costs in kinds.items() if costs is not None})

    def with_stock_of(self, other: CostTable) -> CostTable:
        """:return: Our forms as here, stock as on another CPU: for kernels that are held below what the CPU has. The
        times are brought together at our dense form at one row, which reads memory at the same rate on both."""
        kinds = {}
        for kind, ours in self.kinds.items():
            if (theirs := other.kinds.get(weights_and_activations(kind)[0])) is None:
                continue
            scale = ours.dense[0] / theirs.dense[0]
            stock = tuple(scale * float(np.interp(rows, theirs.rows, theirs.stock)) for rows in ours.rows)
            kinds[kind] = replace(ours, stock=stock)
        return replace(self, cpu=f"{self.cpu}; stock: {other.cpu}", kinds=kinds)

    def to_dict(self) -> dict[str, Any]:
        """:return: Plain data for JSON."""
        return asdict(self)


def read_table(data: Any) -> CostTable:
    """Check what a JSON file holds.

    :param data: Untrusted.
    :return: The table.
    :raises ValueError: It is none: what is wrong with it.
    """
    fields = _mapping(data, {"cpu", "threads", "kinds"})
    if not isinstance(fields["cpu"], str) or not _is_count(fields["threads"]):
        raise ValueError("cpu is a text and threads a number from 1")
    kinds = _mapping(fields["kinds"])
    if unknown := kinds.keys() - set(MEASURABLE):
        raise ValueError(f"{', '.join(sorted(map(str, unknown)))} is no kind of weight")
    return CostTable(fields["cpu"], fields["threads"], {kind: _read_kind(each) for kind, each in kinds.items()})


def _read_kind(data: Any) -> KindCosts:
    fields = _mapping(data, {"rows", "zeros", "stock", "dense", "sparse", "error"})
    rows, zeros = _list(fields["rows"]), _list(fields["zeros"])
    if not all(map(_is_count, rows)) or rows != sorted(set(rows)):
        raise ValueError("rows are ascending numbers from 1")
    if not all(map(_is_number, zeros)) or zeros != sorted(set(zeros)) or not 0 <= zeros[0] <= zeros[-1] <= 1:
        raise ValueError("zeros are ascending fractions from 0 to 1")
    if not _is_number(fields["error"]) or not 0 <= fields["error"] <= 1:
        raise ValueError("error is a fraction from 0 to 1")
    sparse = _list(fields["sparse"])
    if len(sparse) != len(zeros):
        raise ValueError("sparse has a list of times for each share of zeros")
    stock, dense, *columns = (_times(each, len(rows)) for each in (fields["stock"], fields["dense"], *sparse))
    return KindCosts(tuple(rows), tuple(map(float, zeros)), stock, dense, tuple(columns), float(fields["error"]))


def _mapping(data: Any, names: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(data, dict) or (names is not None and data.keys() != names):
        raise ValueError(f"a mapping of {', '.join(sorted(names))} is needed" if names else "a mapping is needed")
    return data


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list) or not 1 <= len(data) <= _MOST_COLUMNS:
        raise ValueError(f"a list of 1 to {_MOST_COLUMNS} entries is needed")
    return data


def _times(data: Any, count: int) -> tuple[float, ...]:
    times = _list(data)
    if len(times) != count or not all(_is_number(each) and 0 < each <= _MOST_PICOSECONDS for each in times):
        raise ValueError(f"{count} times above 0 and up to {_MOST_PICOSECONDS:g} picoseconds are needed")
    return tuple(map(float, times))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_ROWS


def bytes_per_weight(form: Form, kind: str, zeros: float, group: int) -> float:
    """Bytes that one token reads.

    :param form: ``"stock"``, ``"dense"`` or ``"sparse"``.
    :param kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
    :param zeros: Fraction of zeros, 0..1.
    :param group: Inputs that share a scale; 0 for one scale per output.
    :return: Bytes a weight, with scales of 2 bytes.
    """
    value = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}[kind]
    scales = 2 / group if group else 0.0
    return (1 / 8 + value * (1 - zeros) if form == "sparse" else value) + scales


def fastest(times: dict[Form, Expected], workload: Workload, forms: Sequence[Form] = OURS) -> tuple[Form, float]:
    """Choose among our forms.

    :param times: Of all forms, from :meth:`CostTable.expected`.
    :param workload: What counts.
    :param forms: Those to choose from.
    :return: The fastest, and time of stock / its time.
    """
    best = min(forms, key=lambda form: workload.seconds(times[form]))
    return best, workload.seconds(times["stock"]) / workload.seconds(times[best])


def break_even(table: CostTable, kind: str, group: int, workload: Workload) -> float | None:
    """:return: The smallest share of zeros, in whole percents, from which one of our forms is chosen; None if there is
    none."""
    for percent in range(100):
        times = table.expected(kind, percent / 100, group, 1, workload)
        if times and fastest(times, workload)[1] >= MARGIN:
            return percent / 100
    return None
