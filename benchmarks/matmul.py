"""The linear layers of a 1B Llama, sparse against stock OpenVINO: ``python -m benchmarks.matmul --help``."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import openvino as ov
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms import GROUPS, Settings, check_compressed, compile_model, pack, precision
from benchmarks.check import check_linear, check_network
from benchmarks.llama import LLAMA_1B, TINY, RandomLlama, copies, linear_model, matmul_names, stack
from benchmarks.options import add_shared, fraction, positive
from benchmarks.results import Record, last_level_cache, show, surroundings, write_json
from benchmarks.timing import Turn, fastest, interleave, paired_ratio, timed
from ov_ext.cpu_plugin.sparse_matmul import native

Run = Callable[[np.ndarray], list[np.ndarray]]

_COLUMNS = {
    "kind": "weights",
    "layer": "layer",
    "rows": "rows|d",
    "sparsity": "zeros|.0%",
    "ours_ms": "ours ms|.2f",
    "stock_ms": "stock ms|.2f",
    "ratio": "stock / ours|.2f",
    "ratio_min": "min|.2f",
    "ratio_max": "max|.2f",
    "gbps": "GB/s|.1f",
    "bandwidth_gbps": "of GB/s|.1f",
    "bandwidth_share": "share|.0%",
    "ours_mib": "ours MiB|.0f",
    "stock_mib": "stock MiB|.0f",
}


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    :raises WrongResult: An arm computes something else; nothing is timed then.
    :raises UnfairComparison: An arm does not run what it should.
    """
    options = _parser().parse_args(arguments)
    shape = TINY if options.quick else LLAMA_1B
    settings = Settings(options.threads, options.precision)
    constant, records = surroundings(settings), []
    models = ["all", *(shape.linears if options.layers else ())]
    with Progress(console=Console(stderr=True)) as progress:
        bench = Bench(
            settings,
            rounds=3 if options.quick else options.rounds,
            calls=2 if options.quick else options.calls,
            buffer=1 << 20 if options.quick else max(512 << 20, 2 * last_level_cache()),
            advance=lambda: progress.advance(task),
        )
        timed_rounds = len(models) * len(options.rows) * bench.rounds
        task = progress.add_task("", total=len(options.kinds) * len(options.sparsity) * timed_rounds)
        for sparsity in options.sparsity:
            for kind in options.kinds:
                llama = RandomLlama(shape, kind, sparsity, seed=options.seed)
                progress.update(task, description=f"{kind}, {sparsity:.0%} zeros: checking")
                check_each_linear(llama, settings, max(options.rows))
                for layer in models:
                    progress.update(task, description=f"{kind}, {sparsity:.0%} zeros: {layer}")
                    records += [record | constant for record in bench.measure(llama, layer, options.rows)]
                    if options.json:
                        write_json(options.json, records)  # an interrupted run keeps what it has
    columns = {key: heading for key, heading in _COLUMNS.items() if key != "layer" or options.layers}
    show(
        f"Linear layers of a {shape.layers}-layer decoder, {constant['kernel']}, {settings.thread_count} threads",
        records,
        columns,
    )
    return records


def check_each_linear(llama: RandomLlama, settings: Settings, rows: int) -> None:
    """Compare every linear layer of the first decoder layer with numpy, in both arms.

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
        arms = {f"stock {group}": compile_model(model, settings, group) for group in GROUPS[llama.kind]}
        pack(model)
        arms["ours"] = compile_model(model, settings)
        for arm, compiled in arms.items():
            check_linear(f"{name}, {llama.kind}, {arm}", x[0], weight, compiled(x)[0][0])


@dataclass(frozen=True)
class Bench:
    """How to time.

    :param settings: What both arms share.
    :param rounds: Samples of each ratio.
    :param calls: Calls of each arm in a round.
    :param buffer: Bytes of the buffer whose reading gives the machine's bandwidth.
    :param advance: Called after every round.
    """

    settings: Settings
    rounds: int
    calls: int
    buffer: int
    advance: Callable[[], None]

    def measure(self, llama: RandomLlama, layer: str, rows_list: list[int]) -> list[Record]:
        """Check a whole graph, then time it at each number of rows.

        :param llama: The weights.
        :param layer: Key of ``LlamaShape.linears`` for all layers of this kind, or ``"all"``.
        :param rows_list: Tokens at a time.
        :return: A record for each number of rows.
        """
        everything = layer == "all"
        model = stack(llama) if everything else copies(llama, layer)
        names = matmul_names(llama.shape) if everything else [f"{i}.{layer}" for i in range(llama.shape.layers)]
        k = model.input(0).get_partial_shape()[2].get_length()
        stock = {group: compile_model(model, self.settings, group) for group in GROUPS[llama.kind]}
        runs = {name: _run(compiled) for name, compiled in stock.items()}
        report = pack(model)  # in place: only the compiled stock arms keep stock weights
        runs["ours"] = _run(compile_model(model, self.settings))
        del model
        gc.collect()
        fixed = {
            "kind": llama.kind,
            "sparsity": llama.sparsity,
            "layer": layer,
            "ours_mib": report.bytes_after / 2**20,
            "stock_mib": report.bytes_before / 2**20,
            "precision": precision(stock["default"]),
        }
        groups = {name: int(c.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) for name, c in stock.items()}
        records = []
        for rows in rows_list:
            x = np.random.default_rng([llama.seed, rows]).standard_normal((1, rows, k), np.float32)
            outputs = {name: run(x) for name, run in runs.items()}
            for reference, y in zip(outputs["default"], outputs["ours"], strict=True):
                check_network(f"{llama.kind}, {layer}", reference, y, len(report.layers) if everything else 1)
            for compiled in stock.values():  # primitives are known after the first call
                check_compressed(compiled, llama.kind, names)
            turns = {name: timed(partial(run, x)) for name, run in runs.items()}
            times = self.times(turns, report.bytes_after)
            best = times.pop("stock_arm")
            records.append(fixed | {"rows": rows} | times | {"stock_dynamic_quantization_group": groups[best]})
        return records

    def times(self, turns: dict[str, Turn], weight_bytes: int) -> Record:
        """Time one graph.

        :param turns: ``"ours"``, and the stock settings by name.
        :param weight_bytes: What ours reads in a call.
        :return: Fields of the record; ``stock_arm`` names the fastest stock setting.
        """
        bandwidths: list[float] = []

        def read_memory() -> None:
            bandwidths.append(native.read_bandwidth(self.buffer, self.settings.thread_count, 1)[1])

        seconds = interleave(turns, self.rounds, self.calls, before_round=read_memory, after_round=self.advance)
        ours = seconds.pop("ours")
        best = fastest(seconds)
        ratio = paired_ratio(seconds[best], ours)
        rates = weight_bytes / np.median(ours, axis=1) / 1e9
        return {
            "ours_ms": float(np.median(ours)) * 1e3,
            "stock_ms": float(np.median(seconds[best])) * 1e3,
            "ratio": ratio.median,
            "ratio_min": ratio.low,
            "ratio_max": ratio.high,
            "gbps": float(weight_bytes / np.median(ours) / 1e9),
            "bandwidth_gbps": float(np.median(bandwidths)),
            "bandwidth_share": float(np.median(rates / bandwidths)),
            "bandwidth_buffer_mib": self.buffer / 2**20,
            "rounds": self.rounds,
            "calls": self.calls,
            "stock_arm": best,
        }


def _run(compiled: ov.CompiledModel) -> Run:
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> list[np.ndarray]:
        result = request.infer([x], share_inputs=True, share_outputs=True)
        return [result[port] for port in compiled.outputs]

    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matmul", description="The linear layers of a 1B Llama, ours against stock OpenVINO."
    )
    parser.add_argument("--sparsity", type=fraction, nargs="+", default=[0.5], help="fractions of zeros")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1], help="tokens at a time")
    parser.add_argument("--layers", action="store_true", help="a record for each kind of linear layer, too")
    parser.add_argument("--rounds", type=positive, default=15, help="samples of each ratio")
    parser.add_argument("--calls", type=positive, default=5, help="calls of each arm in a round")
    add_shared(parser)
    return parser


if __name__ == "__main__":
    main()
