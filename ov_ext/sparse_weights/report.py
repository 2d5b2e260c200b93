"""What happened to each weight: the report of ``pack_sparse_weights``."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from ov_ext.sparse_weights.cost import Form
from ov_ext.sparse_weights.workload import Expected, Workload


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
    :param speedup: Expected time of stock / time of our form, or of our best one where it stays, for the policy's
        workload (:mod:`ov_ext.sparse_weights.cost`); None where nothing was estimated.
    :param before: Expected times of the stock layer; None where nothing is known about it.
    :param after: Expected times of what it became.
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
    before: Expected | None = None
    after: Expected | None = None

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
    :param workload: That of the policy: what expected times are about.
    :param costs: Where the expected times come from, in words.
    :param model_bytes_before: Bytes of all constants of the stock model, those of embeddings and norms too.
    :param model_bytes_after: The same of the packed model.
    """

    layers: tuple[LayerReport, ...]
    target: str
    activation_group: int
    workload: Workload
    costs: str
    model_bytes_before: int
    model_bytes_after: int

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

    @property
    def before(self) -> Expected | None:
        """Expected times of all layers about which something is known, one after another, in the stock model."""
        return _sum([layer.before for layer in self.layers])

    @property
    def after(self) -> Expected | None:
        """The same in the packed model."""
        return _sum([layer.after for layer in self.layers])

    @property
    def expectation(self) -> str:
        """What to expect of packing, in one sentence."""
        if not self.replaced:
            return "Nothing was packed: the model is as fast as it was."
        before, after = self.before, self.after
        if before is None or after is None:
            return "Nothing is known about the speed of these layers on this target."
        tokens = f"tokens {before.token / after.token:.2f}x"
        known = before.prompt is not None and after.prompt is not None
        prompts = f" and prompts {before.prompt / after.prompt:.2f}x" if known else ""  # type: ignore[operator]
        unknown = "" if known else "; nothing is known about prompts"
        return f"Packing is expected to make {tokens}{prompts} as fast (linear layers alone{unknown})."

    def to_dict(self) -> dict[str, Any]:
        """:return: Plain data for JSON."""
        return asdict(self) | {"expectation": self.expectation}

    def summary(self) -> Group:
        """:return: For rich: a table with a row for each kind of weight and form, and the sum."""
        groups: dict[tuple[str, str], list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.form), []).append(layer)
        table = Table(title=f"Packed weights (target {self.target})")
        left = ("kind", "form", "note")
        headings = ("kind", "form", "MatMuls", "zeros", "MiB before", "MiB after", "ms before", "ms after", "x stock")
        for heading in (*headings, "note"):
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
                self._ms(_sum([layer.before for layer in layers])),
                self._ms(_sum([layer.after for layer in layers])),
                _range(speedups, ".2f"),
                Text(most + (f" (and {len(notes) - 1} other notes)" if len(notes) > 1 else "")),
            )
        return Group(table, *self._last_lines())

    def _last_lines(self) -> list[Text]:
        packed = f"{len(self.replaced)} of {len(self.layers)} weights packed"
        sizes = f"{_mib(self.bytes_before)} -> {_mib(self.bytes_after)} MiB"
        whole = f"the whole model {_mib(self.model_bytes_before)} -> {_mib(self.model_bytes_after)} MiB"
        times = f"{self._ms(self.before) or '?'} -> {self._ms(self.after) or '?'} ms for {self.workload}"
        lines = [f"{packed}: {sizes}, {whole}", f"expected: {times}; {self.costs}", self.expectation]
        return [Text(line) for line in lines]

    def _ms(self, expected: Expected | None) -> str:
        return "" if expected is None else f"{self.workload.seconds(expected) * 1e3:.3g}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"Packed weights (target {self.target})")
        headings = (
            "MatMul",
            "shape",
            "kind",
            "form",
            "zeros",
            "KiB before",
            "KiB after",
            "ms before",
            "ms after",
            "x stock",
        )
        for heading in (*headings, "note"):
            left = heading in (*headings[:4], "note")
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        remarks: dict[str, int] = {}  # long notes repeat on every layer: they are numbered and listed once
        for layer in self.layers:
            note = layer.note
            if len(note) > 48:
                note = f"[{remarks.setdefault(note, len(remarks) + 1)}]"
            table.add_row(
                Text(layer.name),
                "x".join(map(str, layer.shape)),
                layer.kind,
                layer.form,
                "?" if layer.sparsity is None else f"{layer.sparsity:.1%}",
                f"{layer.bytes_before / 1024:.0f}",
                f"{layer.bytes_after / 1024:.0f}",
                self._ms(layer.before),
                self._ms(layer.after),
                "" if layer.speedup is None else f"{layer.speedup:.2f}",
                Text(note),
            )
        yield table
        for note, number in remarks.items():
            yield Text(f"[{number}] {note}")
        if self.replaced and self.activation_group:
            yield Text(
                "Packed layers round activations to 8 bits (bf16 weights: to bf16), also under "
                "EXECUTION_MODE_HINT=ACCURACY and DYNAMIC_QUANTIZATION_GROUP_SIZE=0. activation_group=0 keeps them."
            )

        yield from self._last_lines()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=220).print(self)
        return text.getvalue().rstrip()


def _sum(times: Sequence[Expected | None]) -> Expected | None:
    known = [each for each in times if each is not None]
    if not known:
        return None
    prompts = [each.prompt for each in known if each.prompt is not None]
    return Expected(sum(each.token for each in known), sum(prompts) if len(prompts) == len(known) else None)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _range(values: list[float], form: str) -> str:
    """:return: The lowest and the highest value; one of them where they read the same, "" where there is none."""
    return " - ".join(dict.fromkeys(format(end(values), form) for end in (min, max))) if values else ""
