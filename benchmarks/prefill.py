"""Many tokens at a time: the linear layers beside other engines, and the memory that a prompt leaves behind in a whole
model: ``python -m benchmarks.prefill --help``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from benchmarks import matmul
from benchmarks.arms import Settings
from benchmarks.comparison import running
from benchmarks.decode import Models
from benchmarks.ir_cache import SPARSE, STOCK
from benchmarks.llama import LLAMA_1B, TINY
from benchmarks.options import add_shared, add_work_dir, positive
from benchmarks.results import Record, show, surroundings, write_json

_MEMORY_COLUMNS = {
    "engine": "engine",
    "weights": "weights",
    "sparsity": "zeros|.0%",
    "prompt_tokens": "tokens|d",
    "resident_anonymous_before_mib": "private MiB before|.0f",
    "resident_anonymous_mib": "after|.0f",
    "growth_mib": "growth|.1f",
    "growth_over_stock_mib": "growth over stock|.1f",
    "over_stock_mib": "all over stock|.1f",
}


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``: of speed, then of memory.
    :raises WrongResult: An engine computes something else; nothing is timed then.
    :raises UnfairComparison: An engine does not run what it should.
    """
    options = _parser().parse_args(arguments)
    speed = matmul.measure(options)
    matmul.show_table(speed, options.layers)
    memory = [] if options.no_memory or options.isa else measure_memory(options)
    if memory:
        show("Private memory of a whole model before and after a prompt", memory, _MEMORY_COLUMNS)
    if options.json:
        write_json(options.json, speed + memory)
    return speed + memory


def measure_memory(options: argparse.Namespace) -> list[Record]:
    """Compare the private memory of packed models with that of stock ones, each IR mapped in a fresh process.

    Private is what the process does not share with the file system's cache (RssAnon): copies of weights would show.

    :param options: As :func:`_parser` makes them.
    :return: Two records for each kind and share of zeros.
    """
    shape = TINY if options.quick else replace(LLAMA_1B, layers=options.memory_depth)
    settings, tokens, records = Settings(options.threads, options.precision), max(options.rows), []
    console = Console(stderr=True)
    models = Models(shape, False, options.seed, options.work_dir, console.print)
    for kind in options.kinds:
        for sparsity in options.sparsity:
            pair = []
            for arm in (STOCK, SPARSE):
                entrant = models.openvino(kind, sparsity, arm, settings)
                with running([entrant], console.print) as engines:
                    engine = engines[entrant]
                    engine.call("generate", 2, 1)
                    before = engine.call("memory")["resident_anonymous_mib"]
                    engine.call("generate", tokens, 0)
                    after = engine.call("memory")
                    fields = {"resident_anonymous_before_mib": before, "prompt_tokens": tokens}
                    growth = {"growth_mib": after["resident_anonymous_mib"] - before, "what": "memory"}
                    pair.append(entrant.fields() | fields | after | growth | engine.call("about"))
            stock, ours = pair
            ours["growth_over_stock_mib"] = ours["growth_mib"] - stock["growth_mib"]
            ours["over_stock_mib"] = ours["resident_anonymous_mib"] - stock["resident_anonymous_mib"]
            records += [record | surroundings(settings) | {"decoder_layers": shape.layers} for record in pair]
    return records


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    matmul.add_linears(parser, rows=[128, 512, 2048], depth=4, rounds=5, calls=2)
    parser.add_argument("--memory-depth", type=positive, default=LLAMA_1B.layers, help="decoder layers of whole models")
    parser.add_argument("--no-memory", action="store_true", help="speed only")
    add_work_dir(parser)
    add_shared(parser)
    return parser


if __name__ == "__main__":
    main()
