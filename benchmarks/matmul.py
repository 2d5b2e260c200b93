"""The linear layers of a 1B Llama, beside stock OpenVINO and other engines: ``python -m benchmarks.matmul --help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms import CAPS, Settings, candidates, cap, compile_model, load_plugin, pack
from benchmarks.check import check_linear
from benchmarks.comparison import (
    COLUMNS,
    OURS,
    STOCK,
    Entrant,
    Race,
    absent,
    bandwidth_buffer,
    checked,
    rows_of_table,
    running,
)
from benchmarks.engines import Engine
from benchmarks.linears import OnnxLinears, OpenVinoLinears, TorchLinears
from benchmarks.llama import ALL, LLAMA_1B, TINY, LlamaShape, RandomLlama, linear_model
from benchmarks.options import add_shared, fraction, positive
from benchmarks.results import Record, show, surroundings, write_json
from benchmarks.weights import LABELS


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    :raises WrongResult: An engine computes something else; nothing is timed then.
    :raises UnfairComparison: An engine does not run what it should.
    """
    options = parser().parse_args(arguments)
    records = measure(options)
    show_table(records, options.layers)
    return records


def show_table(records: Sequence[Record], layers: bool) -> None:
    """Print the records of :func:`measure`.

    :param records: The records.
    :param layers: They tell kinds of layers apart.
    """
    show(title(records), rows_of_table(records), ({"layer": "layer"} if layers else {}) | COLUMNS)


def measure(options: argparse.Namespace) -> list[Record]:
    """Check and time the linear layers.

    :param options: As :func:`add_linears` and :func:`add_shared` parse them.
    :return: A record for each engine, in each setting, number of rows and, with ``layers``, kind of layer.
    """
    shape = TINY if options.quick else replace(LLAMA_1B, layers=options.depth)
    settings = Settings(options.threads, options.precision, isa=options.isa)
    if options.isa:
        cap(options.isa)
    constant = surroundings(settings) | {"decoder_layers": shape.layers}
    records: list[Record] = []
    parts = [ALL, *(shape.linears if options.layers else ())]
    with Progress(console=Console(stderr=True)) as progress:
        race = Race(
            rounds=3 if options.quick else options.rounds,
            threads=settings.thread_count,
            buffer=bandwidth_buffer(options.quick),
            advance=lambda: progress.advance(task),
        )
        task = progress.add_task("", total=len(options.kinds) * len(parts) * len(options.rows) * race.rounds)
        for kind in options.kinds:
            progress.update(task, description=f"{kind}: checking each layer")
            llama = RandomLlama(shape, kind, options.sparsity[0], seed=options.seed)
            check_each_linear(llama, settings, max(options.rows))  # other shares are checked as whole networks
            for part in parts:
                say = partial(_describe, progress, task, f"{kind}, {part}")
                entrants = linear_entrants(shape, kind, options.sparsity, part, settings, options.seed)
                for record in time_linears(entrants, options.rows, options.calls, race, say):
                    records.append(record | {"layer": part, "beside": kind} | constant)
                if options.json:
                    write_json(options.json, records)  # an interrupted run keeps what it has
    return records


def title(records: Sequence[Record]) -> str:
    """:return: Heading of a table of these records."""
    return "Linear layers of {decoder_layers} decoder layers, {kernel}, {threads} threads".format_map(records[0])


def _describe(progress: Progress, task: object, what: str, text: str) -> None:
    progress.update(task, description=f"{what}: {text}")  # type: ignore[arg-type]


def check_each_linear(llama: RandomLlama, settings: Settings, rows: int) -> None:
    """Compare every linear layer of the first decoder layer with numpy, in OpenVINO's two arms.

    :param llama: The weights.
    :param settings: As for timing.
    :param rows: Tokens at a time.
    :raises WrongResult: An arm computes something else.
    """
    rng = np.random.default_rng(llama.seed)
    for name in llama.shape.linears:
        weight = llama.weight(0, name)
        x = rng.standard_normal((1, rows, weight.shape[1]), np.float32)
        model = linear_model(weight, name)
        stock = {s: compile_model(model, s) for s in candidates(settings, llama.kind, stock=True)}
        pack(model)
        packed = {s: compile_model(model, s) for s in candidates(settings, llama.kind, stock=False)}
        for arm, compiled in (("stock", stock), ("ours", packed)):
            for setting, one in compiled.items():
                label = f"{name}, {llama.kind}, {arm} {setting.name}, {rows} rows"
                check_linear(label, x[0], weight, one(x)[0][0])


def linear_entrants(
    shape: LlamaShape, kind: str, sparsities: Sequence[float], part: str, settings: Settings, seed: int
) -> list[Entrant]:
    """Choose who takes part.

    :param shape: Sizes.
    :param kind: Kind of the weights. Stock INT4 takes part anyway.
    :param sparsities: Fractions of zeros: each is an engine of ours; the others read zeros like all weights.
    :param part: Which layers, see :func:`benchmarks.llama.network`.
    :param settings: OpenVINO's threads and precision hint.
    :param seed: Of the weights.
    """
    threads = settings.thread_count

    def openvino(engine: str, kind: str, sparsity: float) -> list[Entrant]:
        llama = RandomLlama(shape, kind, sparsity, seed=seed)
        return [
            Entrant(
                *(engine, kind, sparsity, partial(OpenVinoLinears, llama, part, setting, engine == OURS)),
                setting=setting.name,
                weights=LABELS[kind],
                prepare=load_plugin,
            )
            for setting in candidates(settings, kind, engine == STOCK)
        ]

    llama = RandomLlama(shape, kind, sparsities[0], seed=seed)
    entrants = openvino(STOCK, kind, llama.sparsity)
    for sparsity in sparsities:
        entrants += openvino(OURS, kind, sparsity)
    if kind == "bf16":
        entrants.append(Entrant("PyTorch", kind, llama.sparsity, partial(TorchLinears, llama, part, threads)))
    if kind == "int4":
        make = partial(OnnxLinears, llama, part, threads)
        entrants.append(Entrant("ONNX Runtime", kind, llama.sparsity, make, weights="INT4 g128, accuracy 4"))
    else:
        entrants += openvino(STOCK, "int4", llama.sparsity)
    return entrants


def time_linears(
    entrants: Sequence[Entrant], rows_list: Sequence[int], calls: int, race: Race, say: Callable[[str], None]
) -> list[Record]:
    """Load, check and time engines.

    :param entrants: Who takes part.
    :param rows_list: Tokens at a time.
    :param calls: Timed calls of each in a round.
    :param race: How to time.
    :param say: Told what happens now.
    :return: A record for each engine, setting and number of rows.
    """
    records = [record | {"rows": rows} for rows in rows_list for record in absent(entrants)]
    with running(entrants, say) as engines:
        for rows in rows_list:
            say(f"checking {rows} rows")
            failed = checked(engines, partial(_check, rows))
            records += [record | {"rows": rows} for record in failed]
            about = {entrant: engine.call("about") for entrant, engine in engines.items()}
            say(f"timing {rows} rows")
            turns = {e: partial(engine.call, "seconds", rows, calls) for e, engine in engines.items()}
            measured = race.run(turns, {entrant: about[entrant]["weight_bytes"] for entrant in engines})
            for entrant, record in measured.items():
                rate = {"weights_per_ns": about[entrant]["weight_count"] * rows / record["ms"] / 1e6}
                records.append(entrant.fields() | {"rows": rows} | record | rate | about[entrant])
    return records


def _check(rows: int, entrant: Entrant, engine: Engine) -> None:
    engine.call("check", rows)


def add_linears(parser: argparse.ArgumentParser, rows: list[int], depth: int, rounds: int, calls: int) -> None:
    """Add the options of :func:`measure`.

    :param parser: Where to.
    :param rows: Default of ``--rows``.
    :param depth: Default of ``--depth``.
    :param rounds: Default of ``--rounds``.
    :param calls: Default of ``--calls``.
    """
    parser.add_argument("--sparsity", type=fraction, nargs="+", default=[0.5], help="fractions of zeros; 0: no mask")
    parser.add_argument("--rows", type=positive, nargs="+", default=rows, help="tokens at a time")
    parser.add_argument("--depth", type=positive, default=depth, help="decoder layers; below 16 INT4 fits into caches")
    parser.add_argument("--isa", choices=("", *CAPS), default="", help="cap OpenVINO, stock and ours, to this")
    parser.add_argument("--layers", action="store_true", help="a record for each kind of linear layer, too")
    parser.add_argument("--rounds", type=positive, default=rounds, help="samples of each ratio")
    parser.add_argument("--calls", type=positive, default=calls, help="calls of each engine in a round")


def parser() -> argparse.ArgumentParser:
    """:return: Of this program's command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.matmul", description=__doc__)
    add_linears(result, rows=[1], depth=LLAMA_1B.layers, rounds=15, calls=5)
    add_shared(result)
    return result


if __name__ == "__main__":
    main()
