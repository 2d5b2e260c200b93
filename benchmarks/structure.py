"""Is a model with removed structure as much faster as it is smaller? A 1B Llama with random weights, dense and cut in
the proportions that MultiPruner found on a trained model, in OpenVINO: ``python -m benchmarks.structure --help``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms import Settings
from benchmarks.decoders import Generator, load_openvino
from benchmarks.llama import LLAMA_1B, TINY, LlamaShape
from benchmarks.options import add_work_dir, fraction, positive
from benchmarks.results import Record, show, surroundings, write_json
from benchmarks.timing import interleave, paired_ratio

if TYPE_CHECKING:
    from torch import nn

    from nncf_ext.structure.plan import StructurePlan

DENSE, SMALL = "dense", "cut"
TOKENIZER = Path(__file__).parents[1] / "samples" / "assets" / "tiny_lm"
# What `samples/03_multipruner.py` removes of the MLP of each layer of the committed model, one pool with repairs;
# attention stays whole.
REMOVED_MLP = (4, 6, 5, 4, 5, 2)  # twelfths
_COLUMNS = {
    "model": "model",
    "parameters": "million parameters|.0f",
    "weight_mb": "weights, MB|.0f",
    "bytes_ratio": "bytes, dense / this",
    "ms": "ms a token|.2f",
    "speedup": "time, dense / this|.3f",
    "of_bytes": "(speed-up - 1) / (bytes - 1)",
}


def random_llama(shape: LlamaShape, seed: int) -> nn.Module:
    """:return: A bfloat16 model with random weights; the output head is the embedding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(  # type: ignore[call-arg]
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def plan_of(model: nn.Module, removed: float, multiple: int) -> StructurePlan:
    """Takes channels off the MLPs in :data:`REMOVED_MLP`'s proportions until enough parameters are gone.

    :param model: The dense model.
    :param removed: Fraction of all parameters.
    :param multiple: Channels that go together.
    """
    from nncf_ext.structure.counting import count_costs
    from nncf_ext.structure.plan import StructurePlan

    dense_plan, dense = StructurePlan.dense(model), count_costs(model).parameters
    layers = len(dense_plan.kept) // 2
    shares = [REMOVED_MLP[layer * len(REMOVED_MLP) // layers] for layer in range(layers)]
    for step in range(1, 1000):
        sizes = {}
        for layer, share in enumerate(shares):
            units = len(dense_plan.kept[f"layers.{layer}.mlp"])
            gone = round(units * share * step / 2000 / multiple) * multiple
            sizes[f"layers.{layer}.mlp"] = max(units - gone, multiple)
        plan = dense_plan.at(sizes)
        if count_costs(model, plan).parameters <= (1 - removed) * dense:
            return plan
    raise ValueError(f"{removed:.0%} of the parameters cannot be removed from the MLPs alone")


def export(options: argparse.Namespace, shape: LlamaShape) -> dict[str, Path]:
    """:return: The folders of both models, kept between runs."""
    folders = {name: options.work_dir / f"structure-{shape.hidden}-{options.removed}-{name}" for name in (DENSE, SMALL)}
    if all(folder.is_dir() for folder in folders.values()):
        return folders
    from transformers import AutoTokenizer

    import nncf_ext
    import ov_ext.optimum

    model: Any = random_llama(shape, options.seed)
    small = nncf_ext.extract(model, plan_of(model, options.removed, 8 if options.quick else 128))
    models: dict[str, Any] = {DENSE: model, SMALL: small}
    for name, each in models.items():
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        ov_ext.optimum.export(each, tokenizer, folders[name], overwrite=folders[name].is_dir())
    return folders


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark.

    :param arguments: Command line without the program; None: the process's own.
    :return: The records, as written to ``--json``.
    """
    options = _parser().parse_args(arguments)
    # The tokenizer that lies beside the IR has 8,192 tokens.
    shape = LlamaShape(**{**vars(TINY), "vocab": 8192}) if options.quick else LLAMA_1B
    settings = Settings(options.threads, "")
    paths = {name: folder / "openvino_model.xml" for name, folder in export(options, shape).items()}
    generators = {
        name: Generator(partial(load_openvino, path, settings, "bf16", []), shape.vocab) for name, path in paths.items()
    }
    rounds, tokens = (2, 3) if options.quick else (options.rounds, options.tokens)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("decoding", total=rounds)

        def turn(name: str) -> list[float]:
            return generators[name].generate(32, tokens)[1]

        turns = {name: partial(turn, name) for name in generators}
        seconds = interleave(turns, rounds, after_round=lambda: progress.advance(task))
    size = {name: path.with_suffix(".bin").stat().st_size for name, path in paths.items()}
    records = []
    for name in paths:
        speedup = paired_ratio(seconds[DENSE], seconds[name])
        ratio = size[DENSE] / size[name]
        found = {
            "model": name,
            "parameters": size[name] / 2e6,
            "weight_mb": size[name] / 1e6,
            "bytes_ratio": f"{ratio:.3f}",
            "ms": float(np.median(seconds[name])) * 1e3,
            "speedup": speedup.median,
            "speedup_min": speedup.low,
            "speedup_max": speedup.high,
            "of_bytes": "" if name == DENSE else f"{(speedup.median - 1) / (ratio - 1):.2f}",
            "removed": options.removed,
        }
        records.append(found | surroundings(settings))
    show(
        f"One token, {shape.layers} layers of {shape.hidden}, bf16, {records[0]['threads']} threads", records, _COLUMNS
    )
    if options.json:
        write_json(options.json, records)
    return records


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=__doc__)
    parser.add_argument("--removed", type=fraction, default=0.2, help="fraction of all parameters")
    parser.add_argument("--rounds", type=positive, default=20, help="samples of the ratio")
    parser.add_argument("--tokens", type=positive, default=12, help="timed tokens of each model in a round")
    parser.add_argument("--threads", type=positive, default=0, help="default: all CPUs of this process")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows only that it works")
    add_work_dir(parser)
    return parser


if __name__ == "__main__":
    main()
