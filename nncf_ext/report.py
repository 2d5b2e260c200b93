"""What is a model made of now: sparsity, bytes and error of every weight, and why a weight was left alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import nncf
import torch
from rich.table import Table
from torch import Tensor, nn

from nncf_ext.showing import as_text
from nncf_ext.structure.blocks import Weight, survey
from nncf_ext.structure.wrappers import without_shells
from nncf_ext.upstream import INT4SymmetricWeightsDecompressor
from nncf_ext.weights.activation_sparsity import activation_sparsity_of
from nncf_ext.weights.int4 import codes_and_scales, weight_hooks
from nncf_ext.weights.records import LayerRecord, record_of

_TEXT, _NUMBER = (str, type(None)), (int, float)
_KINDS: dict[str, Any] = {
    "name": str,
    "shape": list,
    "sparsity": _NUMBER,
    "bytes_before": int,
    "bytes_after": int,
    "precision": str,
    "mode": _TEXT,
    "error": (*_NUMBER, type(None)),
    "error_of": _TEXT,
    "note": _TEXT,
    "input_sparsity": (*_NUMBER, type(None)),
}
_LATER = ("input_sparsity",)  # reports of earlier releases lack it


@dataclass(frozen=True)
class WeightReport:
    """
    :param name: Path of the parameter.
    :param shape: Its shape as the forward sees it.
    :param sparsity: Fraction of exact zeros in the weight that the forward sees, 0..1; on a grid, of zero codes.
    :param bytes_before: Size before compression, bytes; equal to `bytes_after` if compression never came by.
    :param bytes_after: Size as stored now, bytes: packed codes and scales, or the dense tensor with its zeros.
    :param precision: ``"int4"``, or the stored type.
    :param mode: Compression mode that treated the weight, or None.
    :param error: Relative error (dimensionless) or None if unknown.
    :param error_of: ``"output"`` (of the layer's output on calibration tokens), ``"weight"``, or None.
    :param note: Why the weight is untouched, or what could not be done; None for a weight treated as asked.
    :param input_sparsity: Fraction of the layer's inputs that are replaced on calibration tokens, 0..1, or None.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    bytes_before: int
    bytes_after: int
    precision: str
    mode: str | None
    error: float | None
    error_of: str | None
    note: str | None
    input_sparsity: float | None = None


@dataclass(frozen=True)
class CompressionReport:
    """
    :param weights: Every weight of the model with at least two axes, in the model's order.

    ``str(report)`` is a table ("inputs": which part of them is replaced), :meth:`summary` a short one; :meth:`to_dict`
    gives plain data, :meth:`from_dict` reads it.
    """

    weights: tuple[WeightReport, ...]

    @property
    def compressed(self) -> tuple[WeightReport, ...]:
        """The weights that compression treated."""
        return tuple(weight for weight in self.weights if weight.mode is not None)

    @property
    def untouched(self) -> tuple[WeightReport, ...]:
        """The weights that compression did not treat; their notes say why."""
        return tuple(weight for weight in self.weights if weight.mode is None)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the treated weights, 0..1; in all weights if none was treated."""
        weights = self.compressed or self.weights
        sizes = [torch.Size(weight.shape).numel() for weight in weights]
        return sum(weight.sparsity * size for weight, size in zip(weights, sizes, strict=True)) / max(sum(sizes), 1)

    @property
    def bytes_before(self) -> int:
        """Size of all listed weights before compression, bytes."""
        return sum(weight.bytes_before for weight in self.weights)

    @property
    def bytes_after(self) -> int:
        """Size of all listed weights as stored now, bytes."""
        return sum(weight.bytes_after for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """
        :return: Totals and one dictionary for each weight; only numbers, strings, lists and None.
        """
        return {
            "sparsity": self.sparsity,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "weights": [{**asdict(weight), "shape": list(weight.shape)} for weight in self.weights],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CompressionReport":
        """
        :param content: As :meth:`to_dict` gives it. Totals are computed anew.
        :return: The report.
        :raises nncf.ValidationError: It is something else.
        """
        rows = content.get("weights")
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            msg = f"A report lists its weights, each with {', '.join(_KINDS)}. This is something else."
            raise nncf.ValidationError(msg)
        known = ({name: row.get(name) for name in _KINDS} for row in rows)
        return cls(tuple(WeightReport(**{**row, "shape": tuple(row["shape"])}) for row in known))

    def table(self) -> Table:
        """
        :return: The report as a rich table.
        """
        table = Table(title="Compression report")
        table.add_column("weight", overflow="fold", min_width=24)
        for name in ("shape", "type", "zeros", "bytes before", "after", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        inputs = any(weight.input_sparsity is not None for weight in self.weights)
        if inputs:
            table.add_column("inputs", justify="right", no_wrap=True)
        table.add_column("note", overflow="fold", min_width=12)
        for weight in self.weights:
            error = "" if weight.error is None else f"{weight.error:.3f}{'' if weight.error_of == 'output' else ' (w)'}"
            table.add_row(
                weight.name,
                " x ".join(map(str, weight.shape)),
                weight.precision,
                f"{weight.sparsity:.1%}",
                f"{weight.bytes_before:,}",
                f"{weight.bytes_after:,}",
                error,
                *([f"{weight.input_sparsity:.1%}" if weight.input_sparsity is not None else ""] if inputs else []),
                weight.note or "",
            )
        table.add_section()
        count = f"{len(self.compressed)} of {len(self.weights)} treated"
        sizes = f"{self.bytes_before:,}", f"{self.bytes_after:,}"
        table.add_row("total", count, "", f"{self.sparsity:.1%}", *sizes)
        return table

    def summary(self) -> Table:
        """
        :return: A rich table with a row for all weights of one type and note, and the total.
        """
        groups: dict[tuple[str, str], list[WeightReport]] = {}
        for weight in self.weights:
            groups.setdefault((weight.precision, weight.note or ""), []).append(weight)
        table = Table(title="Compression report")
        table.add_column("type")
        for name in ("weights", "zeros", "bytes before", "after", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold", min_width=12)
        for (precision, note), weights in groups.items():
            table.add_row(
                precision,
                str(len(weights)),
                _range([weight.sparsity for weight in weights], ".1%"),
                f"{sum(weight.bytes_before for weight in weights):,}",
                f"{sum(weight.bytes_after for weight in weights):,}",
                _range([weight.error for weight in weights if weight.error is not None], ".3f"),
                note,
            )
        table.add_section()
        count = f"{len(self.compressed)} of {len(self.weights)} treated"
        table.add_row("total", count, f"{self.sparsity:.1%}", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "", "")
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def compression_report(model: nn.Module) -> CompressionReport:
    """
    Looks at every weight of a model; works on any torch model, compressed by anyone or not at all.

    Sparsity and bytes are read from the weights themselves (INT4 codes included). Errors are those noted during
    ``compress()``: relative error of the layer's output on calibration tokens, or, without data, of the weight
    (marked ``(w)`` in the table). They are saved with the model, by ``save_pretrained()`` and ``load_pretrained()``.

    :param model: Any torch model.
    :return: The report.
    """
    model = without_shells(model)
    hooks = weight_hooks(model)
    counted: set[int] = set()
    rows = []
    for weight in survey(model).weights:
        hook = hooks.get(weight.name)
        stored = 0 if id(weight.parameter) in counted else weight.parameter.nbytes
        counted.add(id(weight.parameter))
        if hook is not None:
            stored += sum(tensor.nbytes for tensor in hook.state_dict().values())
        values = _values(weight, hook)
        record = record_of(weight.module) or LayerRecord()
        treated = record.mode is not None and weight.name.endswith(".weight")
        sparsity = activation_sparsity_of(weight.module) if weight.name.endswith(".weight") else None
        rows.append(
            WeightReport(
                name=weight.name,
                shape=tuple(values.shape),
                sparsity=0.0 if values.is_meta else float((values == 0).sum()) / max(values.numel(), 1),
                bytes_before=record.bytes_before if treated else stored,
                bytes_after=stored,
                precision=_precision(weight, hook),
                mode=record.mode if treated else None,
                error=record.error if treated else None,
                error_of=record.error_of if treated else None,
                note=record.note if treated else reason_untouched(weight, hook, record),
                input_sparsity=None if sparsity is None else sparsity.achieved,
            )
        )
    return CompressionReport(tuple(rows))


def _values(weight: Weight, hook: nn.Module | None) -> Tensor:
    """The weight as the forward sees it; codes where it is on the INT4 grid."""
    if hook is None:
        return weight.parameter.detach()
    if isinstance(hook, INT4SymmetricWeightsDecompressor):
        return codes_and_scales(weight.parameter, hook)[0]
    with torch.no_grad():
        return hook(weight.parameter)


def _precision(weight: Weight, hook: nn.Module | None) -> str:
    if isinstance(hook, INT4SymmetricWeightsDecompressor):
        return "int4"
    return str(weight.parameter.dtype).removeprefix("torch.")


def reason_untouched(weight: Weight, hook: nn.Module | None, record: LayerRecord | None = None) -> str:
    """
    :param weight: A weight that `compress()` did not treat.
    :param hook: NNCF's hook behind it.
    :param record: What was noted about its layer.
    :return: Why it was not treated.
    """
    if hook is not None:
        return f"compressed by NNCF ({type(hook).__name__})"
    noted = None if record is None else record.untouched
    return noted or weight.untouched or "not compressed"


def _range(values: list[float], form: str) -> str:
    """The lowest and the highest value; one of them where they read the same, nothing where there is none."""
    return " - ".join(dict.fromkeys(format(end(values), form) for end in (min, max))) if values else ""


def _is_row(row: Any) -> bool:
    """Whether plain data is that of a :class:`WeightReport`."""
    return (
        isinstance(row, dict)
        and all((name in row or name in _LATER) and isinstance(row.get(name), kinds) for name, kinds in _KINDS.items())
        and all(isinstance(size, int) for size in row["shape"])
    )
