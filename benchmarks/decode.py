"""Decoding with a whole 1B Llama, beside stock OpenVINO and other engines: ``python -m benchmarks.decode --help``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms import CAPS, Settings, candidates, cap, load_plugin
from benchmarks.check import check_network
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
from benchmarks.decoders import Generator, LlamaCppDecoder, TorchDecoder, load_openvino
from benchmarks.engines import Engine
from benchmarks.gguf_file import FORMATS
from benchmarks.ir_cache import DEFAULT, GGUF, SPARSE, ModelFiles, gguf_files, model_files, packed_by_default
from benchmarks.ir_cache import STOCK as STOCK_FILE
from benchmarks.llama import HEAD, LLAMA_1B, TINY, LlamaShape, RandomLlama, matmul_names
from benchmarks.options import add_shared, add_work_dir, fraction, positive
from benchmarks.results import Record, show, surroundings, write_json
from benchmarks.timing import fastest, paired_ratio
from benchmarks.weights import LABELS

_COLUMNS = COLUMNS | {
    "prefill_ms": "prompt ms|.0f",
    "prefill_ratio": "stock / this|.2f",
    "resident_mib": "resident MiB|.0f",
    "resident_anonymous_mib": "not file|.0f",
    "peak_mib": "peak|.0f",
}


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    :raises WrongResult: An engine computes something else; nothing is timed then.
    :raises UnfairComparison: An engine does not run what it should.
    """
    records = measure(parser().parse_args(arguments))
    show(title(records), rows_of_table(records), _COLUMNS)
    return records


def measure(options: argparse.Namespace) -> list[Record]:
    """Check and time whole models.

    :param options: As :func:`add_decoding` and :func:`add_shared` parse them.
    :return: A record for each engine in each setting.
    """
    shape = TINY if options.quick else replace(LLAMA_1B, layers=options.depth)
    settings = Settings(options.threads, options.precision, isa=options.isa)
    if options.isa:
        cap(options.isa)
    constant = surroundings(settings) | {"decoder_layers": shape.layers}
    records: list[Record] = []
    with Progress(console=Console(stderr=True)) as progress:
        race = Race(
            rounds=2 if options.quick else options.rounds,
            threads=settings.thread_count,
            buffer=bandwidth_buffer(options.quick),
            advance=lambda: progress.advance(task),
        )
        task = progress.add_task("", total=len(options.kinds) * race.rounds)
        for kind in options.kinds:

            def say(text: str, kind: str = kind) -> None:
                progress.update(task, description=f"{kind}: {text}")

            models = Models(shape, options.sparse_head, options.seed, options.work_dir, say)
            choose = models.by_default if options.default_policy else models.entrants
            entrants = choose(kind, options.sparsity, settings)
            tokens = 3 if options.quick else options.tokens
            measured = time_decoders(entrants, models, options.prompt, tokens, race)
            records += [record | {"beside": kind} | constant for record in measured]
            if options.json:
                write_json(options.json, records)  # an interrupted run keeps what it has
    return records


def title(records: Sequence[Record]) -> str:
    """:return: Heading of a table of these records."""
    return "One token with {decoder_layers} decoder layers, {kernel}, {threads} threads".format_map(records[0])


class Models:
    """The whole models of a run, on disk.

    :param shape: Sizes.
    :param sparse_head: Zeros in lm_head, too.
    :param seed: Of the weights.
    :param work_dir: Where they are kept.
    :param say: Told what happens now.
    """

    def __init__(
        self, shape: LlamaShape, sparse_head: bool, seed: int, work_dir: Path, say: Callable[[str], None]
    ) -> None:
        self.shape, self.say = shape, say
        self._sparse_head, self._seed, self._work_dir = sparse_head, seed, work_dir

    def llama(self, kind: str, sparsity: float) -> RandomLlama:
        """:return: Weights."""
        return RandomLlama(self.shape, kind, sparsity, self._sparse_head, self._seed)

    def files(self, kind: str, sparsity: float) -> ModelFiles:
        """:return: The IRs of these weights."""
        build = partial(self.say, f"building {kind}, {sparsity:.0%} zeros (kept in {self._work_dir})")
        return model_files(self.llama(kind, sparsity), self._work_dir, build)

    def openvino(self, kind: str, sparsity: float, arm: str, setting: Settings) -> Entrant:
        """:return: One IR in one setting; ``arm`` is a key of :class:`ModelFiles`."""
        return self._entrant(self.files(kind, sparsity), kind, sparsity, arm, setting)

    def _entrant(
        self, files: ModelFiles, kind: str, sparsity: float, arm: str, setting: Settings, weights: str = ""
    ) -> Entrant:
        stock_layers = [*matmul_names(self.shape), HEAD] if arm == STOCK_FILE else []
        load = partial(load_openvino, files.paths[arm], setting, kind, stock_layers)
        return Entrant(
            engine=STOCK if arm == STOCK_FILE else OURS,
            kind=kind,
            sparsity=sparsity,
            make=partial(Generator, load, self.shape.vocab),
            setting=setting.name,
            weights=weights or LABELS[kind],
            weight_bytes=files.weight_bytes[arm],
            prepare=load_plugin,
        )

    def by_default(self, kind: str, sparsities: Sequence[float], settings: Settings) -> list[Entrant]:
        """:return: Stock OpenVINO, and what the default policy makes of each share of zeros; see :meth:`entrants`."""
        first = sparsities[0]
        entrants = [self.openvino(kind, first, STOCK_FILE, each) for each in candidates(settings, kind, stock=True)]
        for sparsity in sparsities:
            files, report = packed_by_default(self.files(kind, sparsity))
            forms = Counter(layer.form for layer in report.layers)
            label = f"{LABELS[kind]}: " + ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
            self.say(report.expectation)
            stays = not report.replaced or "stock" in forms
            for each in candidates(settings, kind, stock=stays):
                entrants.append(self._entrant(files, kind, sparsity, DEFAULT, each, label))
        return entrants

    def entrants(self, kind: str, sparsities: Sequence[float], settings: Settings) -> list[Entrant]:
        """Choose who takes part.

        :param kind: Kind of the weights. Stock INT4 takes part anyway.
        :param sparsities: Fractions of zeros: each is an engine of ours; the others read zeros like all weights.
        :param settings: OpenVINO's threads and precision hint.
        """
        first, threads = sparsities[0], settings.thread_count
        arms = [(kind, first, STOCK_FILE)]
        arms += [(kind, sparsity, SPARSE) for sparsity in sparsities]
        if kind != "int4":
            arms.append(("int4", first, STOCK_FILE))
        entrants = [
            self.openvino(*arm, setting)
            for arm in arms
            for setting in candidates(settings, arm[0], stock=arm[2] == STOCK_FILE)
        ]
        llama = self.llama(kind, first)
        if kind == "bf16":
            make = partial(Generator, partial(TorchDecoder, llama, threads), self.shape.vocab)
            prepare = partial(import_module, "transformers")
            size = self.files(kind, first).weight_bytes[STOCK_FILE]
            entrants.append(Entrant("PyTorch", kind, first, make, weight_bytes=size, prepare=prepare))
        peer = Entrant("llama.cpp", kind, first, weights=FORMATS[kind])
        if not peer.missing:
            build = partial(self.say, f"writing {FORMATS[kind]} for llama.cpp (kept in {self._work_dir})")
            files = gguf_files(llama, self._work_dir, build)
            make = partial(Generator, partial(LlamaCppDecoder, files.paths[GGUF], threads), self.shape.vocab)
            prepare = partial(import_module, "llama_cpp")
            peer = replace(peer, make=make, weight_bytes=files.weight_bytes[GGUF], prepare=prepare)
        return [*entrants, peer]


def time_decoders(entrants: Sequence[Entrant], models: Models, prompt: int, tokens: int, race: Race) -> list[Record]:
    """Load, check and time engines.

    :param entrants: Who takes part.
    :param models: Their models.
    :param prompt: Tokens of the prompt before each generation.
    :param tokens: Timed steps of each engine in a round.
    :param race: How to time.
    :return: A record for each engine and setting.
    """
    records = [record | {"rows": 1} for record in absent(entrants)]
    with running(entrants, models.say) as engines:
        models.say("checking")
        records += [record | {"rows": 1} for record in check(engines, models, prompt)]
        models.say("decoding")
        prompts: dict[Entrant, list[float]] = {entrant: [] for entrant in engines}

        def turn(entrant: Entrant) -> list[float]:
            seconds, steps = engines[entrant].call("generate", prompt, tokens)
            prompts[entrant].append(seconds)
            return steps

        turns = {entrant: partial(turn, entrant) for entrant in engines}
        measured = race.run(turns, {entrant: entrant.weight_bytes for entrant in engines})
        prefill = {entrant: np.array(seconds)[:, None] for entrant, seconds in prompts.items()}
        for entrant, record in measured.items():
            stock = fastest({e: s for e, s in prefill.items() if (e.engine, e.kind) == (STOCK, entrant.kind)})
            ratio = paired_ratio(prefill[stock], prefill[entrant])
            record |= {
                "rows": 1,
                "tokens_per_s": 1e3 / record["ms"],
                "prompt_tokens": prompt,
                "prefill_ms": float(np.median(prefill[entrant])) * 1e3,
                "prefill_ratio": ratio.median,
                "prefill_ratio_min": ratio.low,
                "prefill_ratio_max": ratio.high,
            }
            engine = engines[entrant]
            records.append(entrant.fields() | record | engine.call("about") | engine.call("memory"))
    return records


def check(engines: dict[Entrant, Engine], models: Models, prompt: int) -> list[Record]:
    """Compare logits after the prompt and after one more token with those of stock OpenVINO with equal weights.

    :param engines: The engines; see :func:`benchmarks.comparison.checked`.
    :param models: Their models.
    :param prompt: Tokens of the prompt.
    :return: A record for each engine that was taken out.
    :raises WrongResult: An engine computes something else.
    """
    linears = len(matmul_names(models.shape)) + 1
    expected: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]] = {}

    def compare(entrant: Entrant, engine: Engine) -> None:
        weights = entrant.kind, entrant.sparsity
        if weights not in expected:
            if entrant.engine == STOCK:
                expected[weights] = engine.call("logits", prompt)
            else:  # nobody times stock with this share of zeros
                stock = models.openvino(*weights, STOCK_FILE, Settings())
                with running([stock], models.say) as alone:
                    expected[weights] = alone[stock].call("logits", prompt)
        for reference, y in zip(expected[weights], engine.call("logits", prompt), strict=True):
            check_network(entrant.name, reference, y, linears)

    return checked(engines, compare)


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`measure`."""
    parser.add_argument("--sparsity", type=fraction, nargs="+", default=[0.5], help="fractions of zeros; 0: no mask")
    parser.add_argument("--sparse-head", action="store_true", help="zeros in lm_head, too")
    parser.add_argument(
        "--default-policy",
        action="store_true",
        help="pack as the default policy does, not completely, and compare with stock OpenVINO alone",
    )
    parser.add_argument("--prompt", type=positive, default=32, help="tokens of the prompt")
    parser.add_argument("--depth", type=positive, default=LLAMA_1B.layers, help="decoder layers")
    parser.add_argument("--rounds", type=positive, default=8, help="samples of each ratio")
    parser.add_argument("--tokens", type=positive, default=12, help="timed tokens of each engine in a round")
    add_work_dir(parser)


def parser() -> argparse.ArgumentParser:
    """:return: Of this program's command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    add_decoding(result)
    result.add_argument("--isa", choices=("", *CAPS), default="", help="cap OpenVINO, stock and ours, to this")
    add_shared(result)
    return result


if __name__ == "__main__":
    main()
