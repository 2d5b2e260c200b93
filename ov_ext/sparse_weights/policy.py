"""Which weights are packed, and what happened to each: the options and the report of ``pack_sparse_weights``."""

from __future__ import annotations

import fnmatch
import io
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from ov_ext.runtime import TARGETS, InstructionSet
from ov_ext.sparse_weights.cost import Choice, Form, bytes_per_weight, cheapest

Target = Literal["this-cpu"] | InstructionSet
_TARGETS = ("this-cpu", *reversed(TARGETS))


@dataclass(frozen=True)
class SparsePolicy:
    """What ``pack_sparse_weights`` may replace.

    :param min_sparsity: Fraction 0..1 of zeros that a weight needs to be packed. 0 packs everything that can be packed;
        a weight for which a bitmap does not save bytes gets none. None: each layer gets the form that
        :mod:`ov_ext.sparse_weights.cost` expects to be the fastest at one token: stock, or ours with or without a
        bitmap.
    :param target: Instruction set that will run the IR: the fastest form depends on it, the contents of blobs do not.
        It is recorded in the IR, and loading the IR on a weaker CPU warns once.
    :param activation_group: Number of inputs that share one dynamic quantization scale at run time, for int8 and int4
        weights: 128, 64, -1 (one scale per token) or 0 (activations stay in floating point: slower, but exact). A value
        smaller than the group of the weight is raised to that group. For bf16 weights, 0 keeps f32 activations and any
        other value rounds them to bf16. It is fixed in the packed model: OpenVINO shows its settings to built-in
        layers only, so ``EXECUTION_MODE_HINT=ACCURACY`` and ``DYNAMIC_QUANTIZATION_GROUP_SIZE=0`` do not change it.
    :param min_weights: Matrices with fewer elements stay. A call of our operation costs 1 to 7 microseconds more than a
        call of a built-in layer. A matrix of half a million weights at 50 % zeros makes up for that. Smaller ones are
        slower and only save memory; below this number of elements they do not save enough to be worth it.
    :param requantize: Round asymmetric weights that cannot be packed losslessly to a symmetric grid; the report shows
        the relative error of each. Otherwise they stay.
    :param ignored_names: Friendly names of MatMul operations, or of their weights, that stay.
    :param ignored_patterns: The same as shell patterns, such as ``*lm_head*``.
    :raises ValueError: A value outside its range.
    """

    min_sparsity: float | None = None
    target: Target = "this-cpu"
    activation_group: int = 128
    min_weights: int = 1 << 14
    requantize: bool = False
    ignored_names: tuple[str, ...] = ()
    ignored_patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_sparsity is not None and not 0.0 <= self.min_sparsity <= 1.0:
            raise ValueError(f"min_sparsity is a fraction between 0 and 1, got {self.min_sparsity}.")
        if self.activation_group not in (0, 64, 128, -1):
            raise ValueError(f"activation_group must be 0, 64, 128 or -1 (per token), got {self.activation_group}.")
        if self.target not in _TARGETS:
            raise ValueError(f"target must be one of {', '.join(_TARGETS)}; got {self.target!r}.")
        if self.min_weights < 0:
            raise ValueError(f"min_weights is a number of elements, got {self.min_weights}.")

    def choose(self, kind: str, zeros: float, group: int) -> Choice:
        """Choose the form of a weight. ``target`` must name an instruction set, not ``"this-cpu"``.

        :param kind: Value kind: ``"bf16"``, ``"int8"`` or ``"int4"``.
        :param zeros: Fraction of zeros, 0..1.
        :param group: Inputs that share a scale; 0 for one scale per output.
        :return: The form, with the reason when it is stock.
        """
        if self.min_sparsity is None:
            return cheapest(self.target, kind, zeros, group)
        if zeros < self.min_sparsity:
            return Choice("stock", None, f"too few zeros: {self.min_sparsity:.0%} are needed")
        smaller = bytes_per_weight("sparse", kind, zeros, group) < bytes_per_weight("dense", kind, zeros, group)
        return Choice("sparse" if smaller else "dense", None, "")

    def ignores(self, *names: str) -> bool:
        """:return: True when one of the names is listed or matches a pattern."""
        return any(
            name in self.ignored_names or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored_patterns)
            for name in names
        )


@dataclass(frozen=True)
class LayerReport:
    """What became of one MatMul with a constant weight.

    :param name: Friendly name of the MatMul.
    :param shape: (outputs, inputs) of a matrix, the plain shape of anything else.
    :param kind: How the weight was stored: ``f32``, ``bf16``, ``int8_sym``, ``int4_asym``, ...
    :param sparsity: Fraction 0..1 of zeros; None when the weight could not be read.
    :param bytes_before: Bytes of weight, scales and zero points in the stock model. A constant that several MatMuls
        read is counted at the first one.
    :param bytes_after: Bytes after packing: those of the blob, at the first MatMul that reads it, and those of
        ``bytes_before`` that some operation still needs.
    :param form: ``"stock"``: it stays; ``"sparse"``, ``"dense"``: a SparseMatMul with or without a bitmap.
    :param note: Why it stays, or what to know about the replacement.
    :param speedup: Expected time of stock / time of our best form at one token (:mod:`ov_ext.sparse_weights.cost`);
        None where nothing was estimated.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    sparsity: float | None
    bytes_before: int
    bytes_after: int
    form: Form
    note: str = ""
    speedup: float | None = None

    @property
    def replaced(self) -> bool:
        """Whether the MatMul became a SparseMatMul."""
        return self.form != "stock"


@dataclass(frozen=True)
class PackReport:
    """Every MatMul with a constant weight, in graph order.

    :param layers: One entry per MatMul.
    :param target: Instruction set recorded in the model.
    :param activation_group: That of the policy: how packed layers treat activations, whatever OpenVINO is told.
    """

    layers: tuple[LayerReport, ...]
    target: str
    activation_group: int

    @property
    def replaced(self) -> tuple[LayerReport, ...]:
        """The layers that run sparse now."""
        return tuple(layer for layer in self.layers if layer.replaced)

    @property
    def bytes_before(self) -> int:
        """Bytes of all listed weights in the stock model."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all listed weights in the packed model."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """:return: Plain data for JSON."""
        return asdict(self)

    def summary(self) -> Group:
        """:return: For rich: a table with a row for each kind of weight and form, and the sum."""
        groups: dict[tuple[str, str], list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.form), []).append(layer)
        table = Table(title=f"Packed weights (target {self.target})")
        left = ("kind", "form", "note")
        for heading in ("kind", "form", "MatMuls", "zeros", "MiB before", "MiB after", "x stock", "note"):
            table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
        for (kind, form), layers in sorted(groups.items()):
            zeros = [layer.sparsity for layer in layers if layer.sparsity is not None]
            speedups = [layer.speedup for layer in layers if layer.speedup is not None]
            notes = Counter(layer.note for layer in layers if layer.note)
            most = "".join(note for note, _ in notes.most_common(1))
            table.add_row(
                kind,
                form,
                str(len(layers)),
                _range(zeros, ".0%"),
                _mib(sum(layer.bytes_before for layer in layers)),
                _mib(sum(layer.bytes_after for layer in layers)),
                _range(speedups, ".2f"),
                Text(most + (f" (and {len(notes) - 1} other notes)" if len(notes) > 1 else "")),
            )
        return Group(table, self._sum())

    def _sum(self) -> Text:
        sizes = f"{_mib(self.bytes_before)} MiB -> {_mib(self.bytes_after)} MiB"
        return Text(f"{len(self.replaced)} of {len(self.layers)} weights packed, {sizes}")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"Packed weights (target {self.target})")
        for heading in ("MatMul", "shape", "kind", "zeros", "KiB before", "KiB after", "form", "x stock", "note"):
            right = heading in ("zeros", "KiB before", "KiB after", "x stock")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        remarks: dict[str, int] = {}  # long notes repeat on every layer: they are numbered and listed once
        for layer in self.layers:
            note = layer.note
            if len(note) > 48:
                note = f"[{remarks.setdefault(note, len(remarks) + 1)}]"
            table.add_row(
                Text(layer.name),
                "x".join(map(str, layer.shape)),
                layer.kind,
                "?" if layer.sparsity is None else f"{layer.sparsity:.1%}",
                f"{layer.bytes_before / 1024:.0f}",
                f"{layer.bytes_after / 1024:.0f}",
                layer.form,
                "" if layer.speedup is None else f"{layer.speedup:.2f}",
                Text(note),
            )
        yield table
        yield self._sum()
        for note, number in remarks.items():
            yield Text(f"[{number}] {note}")
        if self.replaced and self.activation_group:
            yield Text(
                "Packed layers round activations to 8 bits (bf16 weights: to bf16), also under "
                "EXECUTION_MODE_HINT=ACCURACY and DYNAMIC_QUANTIZATION_GROUP_SIZE=0. activation_group=0 keeps them."
            )

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=200).print(self)
        return text.getvalue().rstrip()


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _range(values: list[float], form: str) -> str:
    """:return: The lowest and the highest value; one of them where they read the same, "" where there is none."""
    return " - ".join(dict.fromkeys(format(end(values), form) for end in (min, max))) if values else ""
