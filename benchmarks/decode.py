"""Decoding with a whole 1B Llama, sparse against stock OpenVINO: ``python -m benchmarks.decode --help``."""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms import GROUPS, Settings, check_compressed, compile_model, precision
from benchmarks.check import check_network
from benchmarks.decoders import PROMPT_TOKENS, Decoder, OpenVinoDecoder, TorchDecoder, generation
from benchmarks.ir_cache import SPARSE, SPARSE_HEAD, STOCK, ModelFiles, model_files
from benchmarks.llama import HEAD, LLAMA_1B, TINY, RandomLlama, matmul_names
from benchmarks.memory import measure
from benchmarks.options import add_shared, fraction, positive
from benchmarks.results import Record, show, surroundings, write_json
from benchmarks.timing import fastest, interleave, paired_ratio

logger = logging.getLogger("ov_ext")

TORCH = "torch"
_COLUMNS = {
    "variant": "variant",
    "ms_per_token": "ms / token|.2f",
    "tokens_per_s": "tokens / s|.1f",
    "ratio_to_stock": "stock / this|.2f",
    "ratio_min": "min|.2f",
    "ratio_max": "max|.2f",
    "prefill_ms": f"{PROMPT_TOKENS} tokens in ms|.0f",
    "weights_mib": "weights MiB|.0f",
    "gbps": "GB/s|.1f",
    "resident_mib": "resident MiB|.0f",
    "resident_anonymous_mib": "not file|.0f",
    "peak_mib": "peak|.0f",
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
    with_torch = "bf16" in options.kinds and find_spec("transformers") is not None and find_spec("torch") is not None
    if "bf16" in options.kinds and not with_torch:
        logger.warning("torch-bf16 is left out: torch or transformers is not installed.")
    with Progress(console=Console(stderr=True)) as progress:
        bench = Bench(
            settings,
            options.work_dir,
            rounds=2 if options.quick else options.rounds,
            tokens=3 if options.quick else options.tokens,
            advance=lambda: progress.advance(task),
            say=lambda text: progress.update(task, description=text),
        )
        task = progress.add_task("", total=len(options.kinds) * bench.rounds)
        for kind in options.kinds:
            llama = RandomLlama(shape, kind, options.sparsity, options.sparse_head, options.seed)
            measured = bench.measure(llama, with_torch=with_torch and kind == "bf16")
            records += [constant | record for record in measured]
            if options.json:
                write_json(options.json, records)  # an interrupted run keeps what it has
    show(
        f"Decoding with {shape.layers} layers, {options.sparsity:.0%} zeros, {constant['kernel']}, "
        f"{settings.thread_count} threads",
        records,
        _COLUMNS,
    )
    return records


@dataclass(frozen=True)
class Arm:
    """One variant in one setting.

    :param variant: ``stock``, ``sparse``, ``sparse+head`` or ``torch``.
    :param group: Key of ``arms.GROUPS``; "" for torch.
    :param properties: What a record says about its settings.
    """

    variant: str
    group: str
    properties: Record


class Timer:
    """A turn of :func:`interleave`: the median step of one generation. Times of prompts are kept aside, in seconds."""

    def __init__(self, decoder: Decoder, vocab: int, tokens: int) -> None:
        self._decoder, self._vocab, self._tokens = decoder, vocab, tokens
        self.prompts: list[float] = []

    def __call__(self) -> float:
        prompt, step = generation(self._decoder, self._vocab, self._tokens)
        self.prompts.append(prompt)
        return step


@dataclass(frozen=True)
class Bench:
    """How to time.

    :param settings: What all arms share.
    :param work_dir: Where IRs are kept.
    :param rounds: Samples of each ratio.
    :param tokens: Timed steps of an arm in a round.
    :param advance: Called after every round.
    :param say: Told what happens now.
    """

    settings: Settings
    work_dir: Path
    rounds: int
    tokens: int
    advance: Callable[[], None]
    say: Callable[[str], None]

    def measure(self, llama: RandomLlama, with_torch: bool) -> list[Record]:
        """Build, check and time the variants of one kind, then measure their memory.

        :param llama: The weights.
        :param with_torch: Add PyTorch.
        :return: A record for each variant, each in its fastest setting.
        """
        kind = llama.kind
        files = model_files(llama, self.work_dir, lambda: self.say(f"{kind}: building (kept in {self.work_dir})"))
        self.say(f"{kind}: compiling")
        decoders = self._decoders(llama, files, with_torch)
        self.say(f"{kind}: checking")
        check({f"{arm.variant} {arm.group}": decoder for arm, decoder in decoders}, llama)
        self.say(f"{kind}: decoding")
        timers = {str(i): Timer(decoder, llama.shape.vocab, self.tokens) for i, (_, decoder) in enumerate(decoders)}
        seconds = interleave(dict(timers), self.rounds, 1, warmup=1, after_round=self.advance)
        arms = {str(i): arm for i, (arm, _) in enumerate(decoders)}
        prompts = {name: float(np.median(timer.prompts[1:])) for name, timer in timers.items()}
        decoders.clear()
        timers.clear()
        gc.collect()  # the memory of each is measured in another process

        variants = dict.fromkeys(arm.variant for arm in arms.values())
        best = {v: fastest({n: s for n, s in seconds.items() if arms[n].variant == v}) for v in variants}
        records = []
        for variant, name in best.items():
            self.say(f"{kind}: memory of {variant}")
            step, ratio = float(np.median(seconds[name])), paired_ratio(seconds[best[STOCK]], seconds[name])
            weight_bytes = files.weight_bytes[STOCK if variant == TORCH else variant]
            head = "+head" if variant == SPARSE_HEAD else ""
            record = {
                "variant": f"{variant.removesuffix('+head')}-{kind}{head}",
                "kind": kind,
                "rows": 1,
                "sparsity": llama.sparsity,
                "lm_head": "sparse" if head else "dense",
                "ms_per_token": step * 1e3,
                "tokens_per_s": 1 / step,
                "ratio_to_stock": ratio.median,
                "ratio_min": ratio.low,
                "ratio_max": ratio.high,
                "prefill_ms": prompts[name] * 1e3,
                "prompt_tokens": PROMPT_TOKENS,
                "weights_mib": weight_bytes / 2**20,
                "gbps": weight_bytes / step / 1e9,
                "rounds": self.rounds,
                "tokens": self.tokens,
            }
            records.append(record | arms[name].properties | self._memory(llama, files, arms[name]))
        return records

    def _memory(self, llama: RandomLlama, files: ModelFiles, arm: Arm) -> Record:
        """:return: What one arm adds to a process of its own, in MiB."""
        vocab = llama.shape.vocab
        if arm.variant == TORCH:
            load = partial(TorchDecoder, llama, self.settings.thread_count)
            memory = measure(load, vocab, modules=("torch", "transformers"))
        else:
            memory = measure(partial(_load, files.paths[arm.variant], self.settings, arm.group), vocab)
        return {
            "resident_mib": memory.resident,
            "resident_anonymous_mib": memory.anonymous,
            "peak_mib": memory.peak,
        }

    def _decoders(self, llama: RandomLlama, files: ModelFiles, with_torch: bool) -> list[tuple[Arm, Decoder]]:
        """:return: Every variant in every setting."""
        decoders: list[tuple[Arm, Decoder]] = []
        properties: Record
        for variant, path in files.paths.items():
            dense = {STOCK: [*matmul_names(llama.shape), HEAD], SPARSE: [HEAD]}.get(variant, [])
            for group in GROUPS[llama.kind]:
                compiled = compile_model(path, self.settings, group)
                decoder = OpenVinoDecoder(compiled)
                decoder.start(np.zeros((1, 1), np.int64))  # primitives are known after the first call
                check_compressed(compiled, llama.kind, dense)
                properties = {
                    "dynamic_quantization_group": int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")),
                    "kv_cache_precision": compiled.get_property("KV_CACHE_PRECISION").get_type_name(),
                    "precision": precision(compiled),
                }
                if variant == STOCK:
                    properties["kernel"] = None  # ours has no part in it
                decoders.append((Arm(variant, group, properties), decoder))
        if with_torch:
            threads = self.settings.thread_count
            properties = {
                "kernel": None,
                "settings": f"threads={threads}",
                "kv_cache_precision": "bf16",
                "precision": "bf16",
            }
            decoders.append((Arm(TORCH, "", properties), TorchDecoder(llama, threads)))
        return decoders


def check(decoders: dict[str, Decoder], llama: RandomLlama) -> None:
    """Compare logits after the prompt and after one more token with those of the first decoder.

    :param decoders: By name, stock first.
    :param llama: Their weights.
    :raises WrongResult: A decoder computes something else.
    """
    linears = llama.shape.layers * len(llama.shape.linears) + 1
    prompt = np.arange(PROMPT_TOKENS, dtype=np.int64)[None] % llama.shape.vocab
    logits = {name: (decoder.start(prompt).copy(), decoder.step(1).copy()) for name, decoder in decoders.items()}
    for name, values in logits.items():
        for reference, y in zip(next(iter(logits.values())), values, strict=True):
            check_network(f"{name}, {llama.kind}", reference, y, linears)


def _load(path: Path, settings: Settings, group: str) -> Decoder:
    return OpenVinoDecoder(compile_model(path, settings, group))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description="Decoding with a whole 1B Llama, ours against stock OpenVINO."
    )
    parser.add_argument("--sparsity", type=fraction, default=0.5, help="fraction of zeros in the linear layers")
    parser.add_argument(
        "--sparse-head", action="store_true", help="zeros in lm_head, too, and a variant that uses them"
    )
    parser.add_argument("--rounds", type=positive, default=8, help="samples of each ratio")
    parser.add_argument("--tokens", type=positive, default=12, help="timed tokens of each variant in a round")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "ov_ext_benchmarks",
        help="folder that keeps the models between runs (6 GB)",
    )
    add_shared(parser)
    return parser


if __name__ == "__main__":
    main()
