"""One layer of attention with its cache: stock OpenVINO's caches against pruned keys and values.

``python -m benchmarks.attention --help``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

import ov_ext
from benchmarks.arms import Settings
from benchmarks.check import WrongResult
from benchmarks.options import fraction, positive
from benchmarks.results import Record, show, surroundings, write_json
from benchmarks.timing import fastest, interleave, paired_ratio
from ov_ext.sparse_attention.trials import GROUP, HEADS, layer, tokens

STOCK = ("f16", "u8", "u4")
SINK, RECENT = 4, 64
_CHECKED = 300  # tokens of the past with which results are checked
_COLUMNS = {
    "what": "",
    "head_dim": "head|d",
    "context": "context|d",
    "engine": "engine",
    "token_bytes": "bytes/token|.0f",
    "us": "us|.0f",
    "us_least": "least|.0f",
    "ratio": "fastest stock / this|.2f",
    "ratio_low": "low|.2f",
    "ratio_high": "high|.2f",
    "ratio_same": "stock of these bits / this|.2f",
}


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    :raises WrongResult: An engine computes something else; nothing is timed then.
    """
    options = _parser().parse_args(arguments)
    constant = surroundings(Settings(options.threads, ""))
    records: list[Record] = []
    for head_dim in options.head_dim:
        engines = dict(_engines(head_dim, options))
        for name, engine in engines.items():
            engine.check(name)
        for context in options.context:
            records += [record | constant for record in _measure(engines, context, options)]
            if options.json:
                write_json(options.json, records)
    show("One layer of attention, 32 query heads and 8 of keys and values", records, _COLUMNS)
    return records


class Engine:
    """A compiled layer and its request.

    :param model: The layer.
    :param head_dim: Elements of a key.
    :param properties: OpenVINO's.
    :param token_bytes: What one token of the past takes, all heads.
    :param prune: What its keys, and its values, are before they are stored.
    """

    def __init__(
        self,
        model: ov.Model,
        head_dim: int,
        properties: dict[str, Any],
        token_bytes: float,
        prune: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        core = ov_ext.add_extension(ov.Core())
        self.request = core.compile_model(model, "CPU", properties).create_infer_request()
        self.head_dim, self.token_bytes, self._prune = head_dim, token_bytes, prune
        # OpenVINO 2026.4 writes behind its memory when a cache of 4 bits is set.
        self._takes_states = not prune and properties["KV_CACHE_PRECISION"] != "u4"

    def check(self, name: str) -> None:
        """Compare one token with float64.

        :param name: For the error.
        :raises WrongResult: It is further away than a cache of 4 bits explains.
        """
        rng = np.random.default_rng(1)
        prompt = tokens(rng, self.head_dim, _CHECKED, 0)
        token = tokens(rng, self.head_dim, 1, _CHECKED)
        self.request.reset_state()
        self.request.infer(prompt)
        found = self.request.infer(token)[0]
        past = {name: prompt[name].astype(np.float64) for name in ("k", "v")}
        if self._prune:
            packed = slice(SINK, SINK + (_CHECKED - SINK - RECENT) // 64 * 64)
            for x in past.values():
                x[:, :, packed] = self._prune(x[:, :, packed])
        k, v = (np.repeat(np.concatenate([past[name], token[name]], 2), GROUP, 1) for name in ("k", "v"))
        scores = np.einsum("bhqd,bhkd->bhqk", token["q"], k) * self.head_dim**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not error < 0.25:  # a step of 4 bits is a fifteenth of the range; unpruned results differ by 0.5 and more
            raise WrongResult(f"{name}: off by {error:.1%} of the largest output.")

    def fill(self, count: int) -> None:
        """Begin anew with so many tokens of the past: a state where that works, which saves time, else a prompt."""
        self.request.reset_state()
        past = tokens(np.random.default_rng(0), self.head_dim, count, 0, causal=False)
        if not self._takes_states:
            self.request.infer(past)
            return
        for state in self.request.query_state():
            state.state = ov.Tensor(past["k" if "k" in state.name else "v"])


def pruned(x: np.ndarray, level: float) -> np.ndarray:
    """:return: ``x`` with this fraction of each ``[..., head_dim]`` row set to zero, the smallest magnitudes."""
    drop = int(x.shape[-1] * level)
    order = np.argsort(np.abs(x), -1)[..., :drop]
    result = x.copy()
    np.put_along_axis(result, order, 0, -1)
    return result


def _engines(head_dim: int, options: argparse.Namespace) -> Iterator[tuple[str, Engine]]:
    threads = {"INFERENCE_NUM_THREADS": options.threads} if options.threads else {}
    scale = {"f16": 0, "u8": 8, "u4": 8}  # bytes of scale and zero point of a key, or value, of one head
    for kind, size in {"f16": 2, "u8": 1, "u4": 0.5}.items():
        token_bytes = 2 * HEADS * (head_dim * size + scale[kind])
        yield f"stock {kind}", Engine(layer(head_dim), head_dim, threads | {"KV_CACHE_PRECISION": kind}, token_bytes)
    for values, level in product(options.values, options.sparsity):
        policy = ov_ext.SparseAttentionPolicy(k=level, v=level, values=values, sink=SINK, recent=RECENT, pack_from=0)
        model, report = ov_ext.sparsify_attention(layer(head_dim), policy)
        token_bytes = report.layers[0].token_bytes
        yield f"ours {level:.0%} {values}", Engine(model, head_dim, threads, token_bytes, partial(pruned, level=level))


def _measure(engines: dict[str, Engine], context: int, options: argparse.Namespace) -> Iterator[Record]:
    for engine in engines.values():
        engine.fill(context)
    rng = np.random.default_rng(2)
    head_dim = next(iter(engines.values())).head_dim
    calls = options.tokens + 1
    inputs = [tokens(rng, head_dim, 1, context + i) for i in range(calls * options.rounds)]
    done = dict.fromkeys(engines, 0)

    def token(name: str) -> list[float]:
        mine = inputs[done[name] : done[name] + calls]
        done[name] += calls
        return [_seconds(partial(engines[name].request.infer, each)) for each in mine][1:]

    yield from _records(
        "token", engines, context, interleave({name: partial(token, name) for name in engines}, options.rounds)
    )
    if options.prompts:
        whole = tokens(rng, head_dim, context, 0)

        def prompt(name: str) -> list[float]:
            engines[name].request.reset_state()
            return [_seconds(partial(engines[name].request.infer, whole))]

        turns = {name: partial(prompt, name) for name in engines}
        yield from _records("prompt", engines, context, interleave(turns, options.prompts))


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _records(what: str, engines: dict[str, Engine], context: int, seconds: dict[str, np.ndarray]) -> Iterator[Record]:
    best = fastest({name: each for name, each in seconds.items() if name.startswith("stock")})
    for name, engine in engines.items():
        ratio = paired_ratio(seconds[best], seconds[name])
        same = {"int8": "stock u8", "int4": "stock u4"}.get(name.split()[-1], name)
        yield {
            **{"what": what, "head_dim": engine.head_dim, "context": context, "engine": name},
            **{"token_bytes": engine.token_bytes, "us": 1e6 * float(np.median(seconds[name]))},
            **{"us_least": 1e6 * float(seconds[name].min()), "beside": best, "ratio": ratio.median},
            **{"ratio_low": ratio.low, "ratio_high": ratio.high},
            **{"ratio_same": paired_ratio(seconds[same], seconds[name]).median},
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    add = parser.add_argument
    add("--context", type=positive, nargs="+", default=[2048, 8192, 16384], help="tokens of the past")
    add("--sparsity", type=fraction, nargs="+", default=[0.5, 0.7], help="of keys and values")
    add("--values", choices=("int8", "int4"), nargs="+", default=["int8", "int4"], help="how ours stores the rest")
    add("--head-dim", type=positive, nargs="+", default=[64, 128], help="elements of a key")
    add("--rounds", type=positive, default=9)
    add("--tokens", type=positive, default=5, help="that an engine is timed for in a round, after one that is not")
    add("--prompts", type=int, default=0, help="rounds of whole prompts of each length, too")
    add("--threads", type=positive, default=0, help="default: all CPUs of this process")
    add("--json", type=Path, help="file for the records")
    return parser


if __name__ == "__main__":
    main()
