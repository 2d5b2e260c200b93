"""Resident memory of one decoder, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from benchmarks.arms import core
from benchmarks.decoders import Decoder, generation

Load = Callable[[], Decoder]


@dataclass(frozen=True)
class Memory:
    """MiB that a model adds to a process which has imported everything, after it has decoded.

    :param resident: All of it.
    :param anonymous: The part that is not a mapping of the IR file, so cannot be dropped and read again.
    :param peak: Highest value of ``resident`` while loading and decoding.
    """

    resident: float
    anonymous: float
    peak: float


def measure(load: Load, vocab: int, modules: Sequence[str] = ()) -> Memory:
    """Load and run a decoder in a fresh process.

    :param load: Makes the decoder; must be picklable.
    :param vocab: Size of its vocabulary.
    :param modules: What it imports: code is no part of a model.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_here, load, vocab, modules).result()


def _measure_here(load: Load, vocab: int, modules: Sequence[str]) -> Memory:
    core().get_property("CPU", "FULL_DEVICE_NAME")  # loads the CPU plug-in
    for name in modules:
        import_module(name)
    before = _status()
    decoder = load()
    generation(decoder, vocab, tokens=4)
    after = _status()
    return Memory(
        resident=(after["VmRSS"] - before["VmRSS"]) / 1024,
        anonymous=(after["RssAnon"] - before["RssAnon"]) / 1024,
        peak=(after["VmHWM"] - before["VmRSS"]) / 1024,
    )


def _status() -> dict[str, int]:
    """:return: KiB by the names of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
