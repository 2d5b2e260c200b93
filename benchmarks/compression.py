"""How fast is the search of MultiPruner? Against one whole pass of the model for every candidate, with the branch's
output zeroed by a hook: ``python -m benchmarks.compression --help``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.options import positive
from benchmarks.results import Record, git_commit, show, write_json
from ov_ext.machine import cpu_name

if TYPE_CHECKING:
    from torch import nn

    from nncf_ext.pruning.candidates import Removal
    from nncf_ext.pruning.greedy import Elimination
    from nncf_ext.pruning.scoring import Scorer
    from nncf_ext.structure.plan import StructurePlan

WHOLE, EXACT, TOGETHER = "whole passes", "exact", "side by side"
RESCORED, RACED = f"{TOGETHER}, rescore_top", f"{TOGETHER}, racing"
_COLUMNS = {
    "search": "search",
    "step_s": "seconds a step|.2f",
    "ratio": "whole passes / this|.2f",
    "ratio_first": "at the first step|.2f",
    "evaluations": "evaluations",
    "agreement": "same removals",
}


def random_model(hidden: int, layers: int, vocabulary: int, seed: int) -> nn.Module:
    """:return: A Llama with random weights, large enough that every branch matters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config: Any = LlamaConfig(  # type: ignore[call-arg]
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        vocab_size=vocabulary,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class WholePasses:
    """What one writes without this package: hooks that zero a branch's output, and a pass for every candidate.

    :param model: A Llama.
    :param batches: As for ``Scorer``.
    :param losses: As for ``Scorer``.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Any]], losses: Callable[..., Any]) -> None:
        self._model: Any = model
        self._batches, self._losses = batches, losses
        self.evaluations = 0

    def score(self, plan: StructurePlan, candidates: Sequence[Removal]) -> Any:
        """:return: Losses ``[candidates, sequences]``."""
        import torch

        gone = [name for name, units in plan.kept.items() if not units]
        rows = []
        for candidate in candidates:
            hooks = [self._zero(each) for each in [*gone, candidate.dimension]]
            logits = ((batch, self._model(**batch, use_cache=False).logits) for batch in self._batches)
            rows.append(torch.cat([self._losses(each, batch, None) for batch, each in logits]))
            self.evaluations += len(self._batches)
            for hook in hooks:
                hook.remove()
        return torch.stack(rows)

    def _zero(self, dimension: str) -> Any:
        _, layer, branch = dimension.split(".")
        block = self._model.model.layers[int(layer)]
        if branch == "mlp":
            return block.mlp.register_forward_hook(lambda _module, _inputs, output: output * 0.0)
        zeroed = block.self_attn.register_forward_hook
        return zeroed(lambda _module, _inputs, output: (output[0] * 0.0, *output[1:]))


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    :raises AssertionError: Scores differ from those of whole passes in any bit.
    """
    options = _parser().parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    with torch.no_grad():
        records = measure(options)
    shape = f"{options.layers} layers, hidden size {options.hidden}, vocabulary {options.vocabulary}"
    show(f"{options.steps} steps of removing blocks: {shape}, {options.threads} threads", records, _COLUMNS)
    if options.json:
        write_json(options.json, records)
    return records


def measure(options: argparse.Namespace) -> list[Record]:
    """All searches take a step in turn, so that a slow minute of the machine hits them all.

    :param options: As :func:`main` parses them.
    :return: A record for each search.
    :raises AssertionError: Scores differ from those of whole passes in any bit.
    """
    import torch

    from nncf_ext.importance.metrics import PerplexityMetric
    from nncf_ext.pruning.greedy import Elimination
    from nncf_ext.pruning.scoring import Scorer, Scores
    from nncf_ext.structure.plan import StructurePlan

    class Recorded(Scorer):
        """Remembers its last scores."""

        def score(self, *arguments: Any) -> Scores:
            self.last = super().score(*arguments)
            return self.last

    model = random_model(options.hidden, options.layers, options.vocabulary, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    size = (options.batches, options.sequences, options.tokens)
    ids = torch.randint(0, options.vocabulary, size, generator=generator)
    batches, metric = [{"input_ids": each} for each in ids], PerplexityMetric()
    dense = StructurePlan.dense(model)
    whole = WholePasses(model, batches, metric.losses)
    together = {"candidates_per_pass": options.candidates_per_pass}
    own: dict[str, dict[str, Any]] = {
        EXACT: {},
        TOGETHER: together,
        RESCORED: together,
        RACED: {"racing": options.racing, **together},
    }
    scorers = {name: Recorded(model, batches, metric.losses, early_stop=False, **each) for name, each in own.items()}
    searches = {
        name: Elimination(dense, rescore_top=options.rescore_top if name == RESCORED else None) for name in scorers
    }
    seconds: dict[str, list[float]] = {name: [] for name in (WHOLE, *scorers)}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("steps", total=options.steps)
        for step in range(options.steps):
            plan = searches[EXACT].plan
            candidates = blocks_of(plan)
            start = time.perf_counter()
            expected = whole.score(plan, candidates)
            seconds[WHOLE].append(time.perf_counter() - start)
            for name in list(scorers)[:: 1 if step % 2 else -1]:
                seconds[name].append(timed_step(searches[name], scorers[name]))
            assert torch.equal(scorers[EXACT].last.losses, expected), "scores differ from those of whole passes"
            progress.advance(task)
    return [record_of(name, seconds, searches, whole if name == WHOLE else scorers[name], options) for name in seconds]


def blocks_of(plan: StructurePlan) -> list[Removal]:
    """:return: Every branch that is left, attention first."""
    from nncf_ext.pruning.candidates import Removal

    names = sorted((name for name, kept in plan.kept.items() if kept), key=lambda name: name.endswith("mlp"))
    return [Removal(name, ()) for name in names]


def timed_step(search: Elimination, scorer: Scorer) -> float:
    """:return: Seconds of one step."""
    start = time.perf_counter()
    search.step(scorer, blocks_of(search.plan), lambda loss: loss)
    return time.perf_counter() - start


def record_of(
    name: str,
    seconds: dict[str, list[float]],
    searches: dict[str, Elimination],
    counted: Any,
    options: argparse.Namespace,
) -> Record:
    """:return: Times of one search, beside whole passes in the same steps, and how much of the choice is the same."""
    ratios = np.array(seconds[WHOLE]) / np.array(seconds[name])
    removed = {each: {step.dimension for step in search.plan.steps} for each, search in searches.items()}
    same = len(removed[EXACT] & removed.get(name, removed[EXACT]))
    return {
        "search": name,
        "step_s": float(np.mean(seconds[name])),
        "ratio": float(np.sum(seconds[WHOLE]) / np.sum(seconds[name])),
        "ratio_first": float(ratios[0]),
        "evaluations": counted.evaluations,
        "agreement": f"{same} of {options.steps}",
        "steps": options.steps,
        "hidden": options.hidden,
        "layers": options.layers,
        "vocabulary": options.vocabulary,
        "batches": options.batches,
        "sequences": options.sequences,
        "tokens": options.tokens,
        "candidates_per_pass": 1 if name in (WHOLE, EXACT) else options.candidates_per_pass,
        "rescore_top": options.rescore_top if name == RESCORED else None,
        "racing": options.racing if name == RACED else None,
        "threads": options.threads,
        "cpu": cpu_name(),
        "git_commit": git_commit(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--layers", type=positive, default=24)
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--vocabulary", type=positive, default=4096)
    parser.add_argument("--batches", type=positive, default=2)
    parser.add_argument("--sequences", type=positive, default=1, help="of a batch")
    parser.add_argument("--tokens", type=positive, default=128, help="of a sequence")
    parser.add_argument("--steps", type=positive, default=8, help="blocks to remove, of two a layer")
    parser.add_argument("--candidates-per-pass", type=positive, default=16, help="of all but the exact search")
    parser.add_argument("--rescore-top", type=positive, default=8)
    parser.add_argument("--racing", type=float, default=3.0, help="standard errors")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the records")
    return parser


if __name__ == "__main__":
    main()
