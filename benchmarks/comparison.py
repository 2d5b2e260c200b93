"""Engines side by side: which take part, what is recorded about each, and against what it is held."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.engines import Engine, EngineDied
from benchmarks.results import Record
from benchmarks.timing import Turn, fastest, interleave, paired_ratio
from ov_ext.cpu_plugin.support import native
from ov_ext.machine import last_level_cache

logger = logging.getLogger("ov_ext")

STOCK, OURS = "stock OpenVINO", "ours"
PACKAGES = {
    "PyTorch": ("torch", "transformers"),
    "ONNX Runtime": ("onnxruntime", "onnx"),
    "llama.cpp": ("llama_cpp", "gguf"),
}
COLUMNS = {
    "engine": "engine",
    "weights": "weights",
    "sparsity": "zeros|.0%",
    "rows": "rows|d",
    "ms": "ms|.2f",
    "ratio": "stock / this|.2f",
    "ratio_range": "range",
    "ratio_int4": "stock INT4 / this|.2f",
    "ratio_int4_range": "range",
    "gbps": "GB/s|.1f",
    "bandwidth_share": "of bandwidth|.0%",
    "setting": "fastest setting",
}


@dataclass(frozen=True)
class Entrant:
    """An engine with weights of one kind, in one setting.

    :param engine: :data:`STOCK`, :data:`OURS`, or a key of :data:`PACKAGES`.
    :param kind: Value kind of the weights.
    :param sparsity: Fraction of zeros in them. Only :data:`OURS` makes use of zeros.
    :param make: Makes it in its process; None when it is not installed.
    :param setting: Name of the setting, of which the fastest counts.
    :param weights: How it stores weights.
    :param weight_bytes: What decoding a token reads, where that is known beforehand.
    :param prepare: See :class:`Engine`.
    """

    engine: str
    kind: str
    sparsity: float
    make: Callable[[], Any] | None = None
    setting: str = ""
    weights: str = ""
    weight_bytes: int = 0
    prepare: Callable[[], object] | None = None

    @property
    def group(self) -> tuple[str, str, float]:
        """Entrants of a group differ in their setting only."""
        return self.engine, self.kind, self.sparsity

    @property
    def name(self) -> str:
        """For messages."""
        return ", ".join(filter(None, (f"{self.engine} {self.kind}", f"{self.sparsity:.0%} zeros", self.setting)))

    @property
    def missing(self) -> str:
        """What to install for it; "" when nothing is missing."""
        packages = PACKAGES.get(self.engine, ())
        extra = "llama-cpp" if self.engine == "llama.cpp" else "bench"
        return "" if all(map(find_spec, packages)) else f"not installed: pip install 'nncf-ext[{extra}]'"

    def fields(self) -> Record:
        """:return: What identifies it in a record."""
        return {
            "engine": self.engine,
            "kind": self.kind,
            "weights": self.weights or self.kind,
            "sparsity": self.sparsity,
            "setting": self.setting,
        }


@contextmanager
def running(entrants: Sequence[Entrant], say: Callable[[str], None]) -> Iterator[dict[Entrant, Engine]]:
    """Load engines, one after another, each in a stopped process.

    :param entrants: The engines; those that miss a package are left out.
    :param say: Told which one is loading.
    :return: The processes, which end with the context, whatever ends it.
    """
    with ExitStack() as stack:
        engines = {}
        for entrant in entrants:
            if entrant.make and not entrant.missing:
                say(f"loading {entrant.name}")
                engines[entrant] = stack.enter_context(Engine(entrant.name, entrant.make, entrant.prepare))
        yield engines


def checked(engines: dict[Entrant, Engine], check: Callable[[Entrant, Engine], None]) -> list[Record]:
    """Check engines before they are timed.

    :param engines: The engines. Another project's engine whose process ends is taken out; ours and stock must not fail.
    :param check: Raises when an engine computes something else.
    :return: A record for each engine that was taken out.
    """
    failed = []
    for entrant, engine in list(engines.items()):
        try:
            check(entrant, engine)
        except EngineDied as error:
            if entrant.engine not in PACKAGES:
                raise
            logger.warning("%s", error)
            del engines[entrant]
            failed.append(entrant.fields() | {"fastest": True, "setting": "crashed while it was checked"})
    return failed


@dataclass(frozen=True)
class Race:
    """How engines are timed.

    :param rounds: Samples of each ratio.
    :param threads: Of the bandwidth measurement.
    :param buffer: Bytes of the buffer whose reading gives the machine's bandwidth.
    :param advance: Called after every round.
    """

    rounds: int
    threads: int
    buffer: int
    advance: Callable[[], None]

    def run(self, turns: Mapping[Entrant, Turn], weight_bytes: Mapping[Entrant, int]) -> dict[Entrant, Record]:
        """Time engines in interleaved rounds and compare them.

        :param turns: The engines.
        :param weight_bytes: What each reads in a timed call.
        :return: What was measured of each. ``fastest`` marks one setting of each group; ``ms_min`` and
            ``ms_max`` are medians of rounds, never single calls; ratios are times of stock's
            fastest setting / the engine's time: ``ratio`` against stock of the same kind, ``ratio_int4`` against INT4.
        """
        bandwidths: list[float] = []

        def read_memory() -> None:
            bandwidths.append(native.read_bandwidth(self.buffer, self.threads, 1)[1])

        seconds = interleave(turns, self.rounds, read_memory, self.advance)
        best = {
            group: fastest({e: s for e, s in seconds.items() if e.group == group}) for group in {e.group for e in turns}
        }
        stocks = {kind: seconds[e] for (engine, kind, _), e in best.items() if engine == STOCK}
        measured = {}
        for entrant, times in seconds.items():
            rates = weight_bytes[entrant] / np.median(times, axis=1) / 1e9
            record: Record = {
                "fastest": entrant == best[entrant.group],
                "ms": float(np.median(times)) * 1e3,
                "ms_min": float(np.median(times, axis=1).min()) * 1e3,
                "ms_max": float(np.median(times, axis=1).max()) * 1e3,
                "gbps": float(weight_bytes[entrant] / np.median(times) / 1e9),
                "bandwidth_gbps": float(np.median(bandwidths)),
                "bandwidth_min": float(np.min(bandwidths)),
                "bandwidth_max": float(np.max(bandwidths)),
                "bandwidth_share": float(np.median(rates / bandwidths)),
                "bandwidth_buffer_mib": self.buffer / 2**20,
                "weights_mib": weight_bytes[entrant] / 2**20,
                "rounds": self.rounds,
                "calls": times.shape[1],
            }
            for key, kind in (("ratio", entrant.kind), ("ratio_int4", "int4")):
                if kind in stocks:
                    ratio = paired_ratio(stocks[kind], times)
                    record |= {key: ratio.median, f"{key}_min": ratio.low, f"{key}_max": ratio.high}
            measured[entrant] = record
        return measured


def bandwidth_buffer(quick: bool) -> int:
    """:return: Bytes to read for the bandwidth: of memory, not of a cache, unless it is to be quick."""
    return 1 << 20 if quick else max(512 << 20, 2 * last_level_cache())


def absent(entrants: Sequence[Entrant]) -> list[Record]:
    """:return: A record for each engine that is not installed, so that none is missing without a word."""
    missing = {e.group: e for e in entrants if e.missing}
    return [e.fields() | {"fastest": True, "setting": e.missing} for e in missing.values()]


def rows_of_table(records: Sequence[Record]) -> list[Record]:
    """:return: The fastest setting of each engine, ranges as text. Stock INT4 is there once, not beside each kind."""
    rows = []
    for record in records:
        if record["fastest"] and record["kind"] == record["beside"]:
            ranges = {
                f"{key}_range": f"{record[f'{key}_min']:.2f} - {record[f'{key}_max']:.2f}"
                for key in ("ratio", "ratio_int4")
                if key in record
            }
            rows.append(record | ranges)
    return rows
