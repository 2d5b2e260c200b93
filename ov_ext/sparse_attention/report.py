"""What became of each layer's attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Table

STOCK_SCALE = 8  # bytes of scale and zero point with which stock OpenVINO stores each token of a head in 8 bits


@dataclass(frozen=True)
class AttentionLayer:
    """One layer of attention.

    :param name: Friendly name of its ScaledDotProductAttention.
    :param replaced: Whether our operation is in its place.
    :param note: Why not, where it is not.
    :param heads: Heads of keys and values; 0 where they are not known.
    :param head_dim: Elements of a key.
    :param k: Fraction of each key that is pruned.
    :param v: The same of each value.
    :param values: ``"int8"`` or ``"int4"``.
    :param pack_from: Nothing is pruned while a sequence has fewer tokens.
    """

    name: str
    replaced: bool
    note: str = ""
    heads: int = 0
    head_dim: int = 0
    k: float = 0.0
    v: float = 0.0
    values: str = ""
    pack_from: int = 0

    @property
    def token_bytes(self) -> float:
        """Bytes of one packed token, with its masks and scales; of stock's 8 bits where it was not replaced."""
        if not self.replaced:
            return self.stock_token_bytes
        kept = sum(self.head_dim - math.floor(self.head_dim * level) for level in (self.k, self.v))
        return self.heads * (2 * self.head_dim / 8 + kept * (1 if self.values == "int8" else 0.5) + 8)

    @property
    def stock_token_bytes(self) -> float:
        """Bytes of one token as stock OpenVINO keeps it by default: u8."""
        return self.heads * 2 * (self.head_dim + STOCK_SCALE)


@dataclass(frozen=True)
class AttentionReport:
    """What ``sparsify_attention`` did.

    :param layers: In the order in which they run.
    """

    layers: tuple[AttentionLayer, ...]

    @property
    def replaced(self) -> tuple[AttentionLayer, ...]:
        """The layers that attend over pruned keys and values."""
        return tuple(layer for layer in self.layers if layer.replaced)

    def to_dict(self) -> dict[str, Any]:
        """:return: The same for JSON."""
        return {"attention": [asdict(layer) | {"token_bytes": layer.token_bytes} for layer in self.layers]}

    def summary(self) -> str:
        """:return: One sentence, and a line for each reason why layers stay stock."""
        ours, stock = (sum(each) for each in zip((0.0, 0.0), *self._bytes(), strict=True))
        saved = f": {ours / 1024:.1f} KiB a token where stock OpenVINO (u8) has {stock / 1024:.1f}" if stock else ""
        lines = [f"Attention: {len(self.replaced)} of {len(self.layers)} layers keep pruned keys and values{saved}."]
        reasons = Counter(layer.note for layer in self.layers if not layer.replaced)
        return "\n".join([*lines, *(f"{count} stay stock: {reason}" for reason, count in reasons.items())])

    def _bytes(self) -> list[tuple[float, float]]:
        return [(layer.token_bytes, layer.stock_token_bytes) for layer in self.layers if layer.heads]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | str]:
        table = Table()
        for heading in ("attention", "K pruned", "V pruned", "values", "from", "bytes/token", "stock u8", "note"):
            table.add_column(heading, justify="left" if heading in ("attention", "values", "note") else "right")
        for layer in self.layers:
            levels = (f"{layer.k:.0%}", f"{layer.v:.0%}", layer.values) if layer.replaced else ("", "", "stock")
            size = [f"{each:.0f}" if layer.heads else "" for each in (layer.token_bytes, layer.stock_token_bytes)]
            table.add_row(layer.name, *levels, str(layer.pack_from or ""), *size, layer.note)
        yield table
        yield self.summary()

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as captured:
            console.print(self)
        return captured.get()
