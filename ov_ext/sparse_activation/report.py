"""What became of each layer that replaces small inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Table


@dataclass(frozen=True)
class ActivationLayer:
    """One MatMul behind the pattern.

    :param name: Its friendly name.
    :param shape: (N, K), outputs and inputs.
    :param kind: How its stock weight is stored: ``f32``, ``int4_sym``, ...
    :param replaced: Whether our operation is in its place.
    :param speedup: Expected gain over the dense layer at one token; None where it is not known.
    :param bytes_before: Of its stock constants.
    :param bytes_after: Of its blob.
    :param note: Why it stays, or what packing changed.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    replaced: bool
    speedup: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""


@dataclass(frozen=True)
class ActivationReport:
    """What ``pack_sparse_activations`` did.

    :param layers: Those behind the pattern, in the order in which they run.
    :param skipped: Fraction of inputs that was expected.
    """

    layers: tuple[ActivationLayer, ...]
    skipped: float

    @property
    def replaced(self) -> tuple[ActivationLayer, ...]:
        """The layers that skip inputs."""
        return tuple(layer for layer in self.layers if layer.replaced)

    def to_dict(self) -> dict[str, Any]:
        """:return: The same for JSON."""
        return {"activations": [asdict(layer) for layer in self.layers], "skipped": self.skipped}

    def summary(self) -> str:
        """:return: One sentence, and a line for each reason why layers stay."""
        ours = self.replaced
        lines = [f"Activations: {len(ours)} of {len(self.layers)} layers with thresholds skip inputs."]
        reasons = Counter(layer.note for layer in self.layers if not layer.replaced)
        return "\n".join([*lines, *(f"{count} stay: {reason}" for reason, count in reasons.items())])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | str]:
        table = Table()
        for heading in ("layer", "shape", "weights", "KiB before", "after", "expected gain", "note"):
            table.add_column(heading, justify="left" if heading in ("layer", "weights", "note") else "right")
        for layer in self.layers:
            sizes = (f"{layer.bytes_before / 1024:.0f}", f"{layer.bytes_after / 1024:.0f}" if layer.replaced else "")
            gain = "" if layer.speedup is None else f"{layer.speedup:.2f}"
            table.add_row(layer.name, "x".join(map(str, layer.shape)), layer.kind, *sizes, gain, layer.note)
        yield table
        yield self.summary()

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as captured:
            console.print(self)
        return captured.get()
