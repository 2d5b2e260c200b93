"""Does memory grow from generation to generation? Many of them with the state reset in between, in one process:
``python -m benchmarks.drift --help``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms import Settings
from benchmarks.comparison import running
from benchmarks.decode import Models
from benchmarks.ir_cache import SPARSE, STOCK
from benchmarks.llama import LLAMA_1B, TINY
from benchmarks.options import add_shared, add_work_dir, fraction, positive
from benchmarks.results import Record, show, surroundings, write_json

SETTLED = 10  # generations before memory counts
_PROMPT = 32
_COLUMNS = {
    "engine": "engine",
    "weights": "weights",
    "sparsity": "zeros|.0%",
    "generations": "generations|d",
    "first_mib": "MiB after the tenth|.1f",
    "last_mib": "after the last|.1f",
    "slope_mib": "slope, MiB a generation|.3f",
    "anonymous_slope_mib": "without the file|.3f",
}


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    """
    options = _parser().parse_args(arguments)
    shape = TINY if options.quick else replace(LLAMA_1B, layers=options.depth)
    settings, records = Settings(options.threads, options.precision), []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(options.kinds) * len(options.arms) * options.generations)

        def say(text: str) -> None:
            progress.update(task, description=text)

        models = Models(shape, False, options.seed, options.work_dir, say)
        for kind in options.kinds:
            for arm in options.arms:
                entrant = models.openvino(kind, options.sparsity, arm, settings)
                resident, anonymous = [], []
                with running([entrant], say) as engines:
                    for _ in range(options.generations):
                        engines[entrant].call("generate", _PROMPT, options.tokens)
                        memory = engines[entrant].call("memory")
                        resident.append(memory["resident_mib"])
                        anonymous.append(memory["resident_anonymous_mib"])
                        progress.advance(task)
                record = {
                    "generations": options.generations,
                    "tokens": options.tokens,
                    "first_mib": resident[SETTLED - 1],
                    "last_mib": resident[-1],
                    "slope_mib": slope(resident),
                    "anonymous_slope_mib": slope(anonymous),
                    "decoder_layers": shape.layers,
                }
                records.append(entrant.fields() | record | surroundings(settings))
    show("Resident memory from generation to generation", records, _COLUMNS)
    if options.json:
        write_json(options.json, records)
    return records


def slope(mib: Sequence[float]) -> float:
    """:return: MiB a generation after the first :data:`SETTLED`: least squares."""
    settled = np.array(mib[SETTLED:])
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def _generations(text: str) -> int:
    value = positive(text)
    if value < SETTLED + 2:
        raise argparse.ArgumentTypeError(f"at least {SETTLED + 2} are needed, the first {SETTLED} do not count")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=(STOCK, SPARSE), default=[SPARSE], help="which models")
    parser.add_argument("--sparsity", type=fraction, default=0.5, help="fraction of zeros")
    parser.add_argument("--generations", type=_generations, default=100)
    parser.add_argument("--tokens", type=positive, default=100, help="of each generation")
    parser.add_argument("--depth", type=positive, default=LLAMA_1B.layers, help="decoder layers")
    add_work_dir(parser)
    add_shared(parser)
    return parser


if __name__ == "__main__":
    main()
