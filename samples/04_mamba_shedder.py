"""Parts of a Mamba-2 are removed: blocks or only their state spaces; searched, recovered, exported, run in OpenVINO.

Proves on the committed Mamba-2 that Mamba-Shedder's choice costs less than removing the last or random parts, that a
mixer without its state space is faster and keeps a smaller state in OpenVINO, that fine-tuning closes most of the gap
to the dense model, and that the exported IR writes the same tokens as torch. Prints tables and the text, and draws a
picture. Finished parts are kept in `samples/out/04` and not repeated.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import quiet
from removal.models import kept, load

SAMPLES = Path(__file__).parent
SOURCE = SAMPLES / "assets" / "tiny_mamba2"
PROMPT = "def read_file(path):\n    "
UNITS = {"mamba_block": 0, "ssm": 1}  # what is left of the mixer
NAMES = {"mamba_block": "blocks", "ssm": "state spaces"}


def searched(unit: str, count: int, calibration: Any, folder: Path) -> list[Any]:
    """:return: The plans of a search, from the dense model on."""
    import nncf
    from evidence.text import batches
    from train_tiny_mamba import fast

    import nncf_ext

    model = load(SOURCE)
    plans = [nncf_ext.StructurePlan.dense(model)]
    stages = (nncf_ext.PruningStage((unit,), count),)
    with fast(model):
        nncf_ext.compress(
            model,
            nncf_ext.CompressMode.MAMBA_SHEDDER,
            ratio=0.0,
            dataset=nncf.Dataset(batches(calibration, 4)),
            resume=folder,
            advanced_parameters=nncf_ext.AdvancedMambaShedderParameters(stages=stages),
        )
    return plans + [nncf_ext.StructurePlan.load(file) for file in sorted(folder.glob("plan.*.json"))]


def without(dense: Any, unit: str, layers: Iterable[int]) -> Any:
    """:return: The plan that removes a unit of some layers."""
    import nncf_ext

    plan = nncf_ext.StructurePlan.dense(dense)
    for layer in layers:
        plan = plan.keep(f"layers.{layer}.mamba", range(UNITS[unit]))
    return plan


def sensitivity(dense: Any, calibration: Any) -> list[tuple[float, float]]:
    """:return: For each layer, nats a token that the loss grows by without its block, and without its state space."""
    import torch
    from evidence.text import batches
    from train_tiny_mamba import fast

    import nncf_ext
    from nncf_ext.pruning.candidates import Removal
    from nncf_ext.pruning.scoring import Scorer

    layers = range(dense.config.num_hidden_layers)
    candidates = [Removal(f"layers.{layer}.mamba", tuple(range(left))) for left in UNITS.values() for layer in layers]
    scorer = Scorer(dense, batches(calibration, 4), nncf_ext.PerplexityMetric().losses, early_stop=False)
    with torch.no_grad(), fast(dense):
        scores = scorer.score(nncf_ext.StructurePlan.dense(dense), candidates)
    grown = (scores.totals - scores.base).tolist()
    return list(zip(grown[: len(layers)], grown[len(layers) :], strict=True))


def evaluate(model: Any, ids: Any) -> Any:
    """:return: Mean loss of each window."""
    from evidence.scores import losses
    from train_tiny_mamba import fast

    with fast(model):
        return losses(model, ids)


def recovered(small: Any, dense: Any, stream: Any, steps: int) -> Any:
    """:return: The smaller model after fine-tuning of all its weights."""
    from evidence.recovery import recover
    from train_tiny_mamba import fast

    with fast(small), fast(dense):
        return recover(small, dense, stream, steps=steps, learning_rate=1e-3, rank=None)


class Decoder:
    """
    A model in OpenVINO, called without anything between.

    :param model: The torch model; exported in bfloat16.
    :param tokenizer: Its tokenizer.
    :param folder: Where the IR goes.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        import copy

        import openvino as ov

        import ov_ext.optimum

        self.folder = folder
        ov_ext.optimum.export(copy.deepcopy(model).bfloat16(), tokenizer, folder, overwrite=folder.exists())
        self._request = ov.Core().compile_model(folder / "openvino_model.xml", "CPU").create_infer_request()

    def call(self, tokens: int) -> float:
        """:return: Seconds of one pass over so many tokens, from the present state on."""
        import time

        import numpy as np

        inputs = {name: np.ones((1, tokens), np.int64) for name in ("input_ids", "attention_mask")}
        start = time.perf_counter()
        self._request.infer(inputs | {"beam_idx": np.zeros(1, np.int32)})
        return time.perf_counter() - start

    def reset(self) -> None:
        """Forgets the text."""
        self._request.reset_state()

    @property
    def state_bytes(self) -> int:
        """:return: Of all variables, for one sequence."""
        return sum(state.state.byte_size for state in self._request.query_state())


def speeds(decoders: dict[str, Decoder], rounds: int) -> dict[str, dict[str, Any]]:
    """:return: For each model, medians over rounds in which all take turns: ms a token, ms a prompt, and the ratios of
    the first one's times to its own."""
    import numpy as np

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for number in range(rounds + 1):
        for name in list(decoders)[:: 1 if number % 2 else -1]:
            decoder = decoders[name]
            decoder.reset()
            prompt = decoder.call(512)
            token = float(np.median([decoder.call(1) for _ in range(100)]))
            if number:  # the first round compiles
                times[name].append((token * 1e3, prompt * 1e3))
    first = np.array(times[next(iter(times))])
    found = {}
    for name, each in times.items():
        ratios = np.median(first / np.array(each), axis=0)
        found[name] = {
            "token_ms": float(np.median([token for token, _ in each])),
            "prompt_ms": float(np.median([prompt for _, prompt in each])),
            "token_ratio": float(ratios[0]),
            "prompt_ratio": float(ratios[1]),
            "state_kb": decoders[name].state_bytes / 1e3,
        }
    return found


def large(layers: int) -> Any:
    """:return: A Mamba-2 of the published 130M shape with random weights."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=768,
        num_hidden_layers=layers,
        num_heads=24,
        head_dim=64,
        state_size=128,
        n_groups=1,
        vocab_size=3072,  # that of the tokenizer here
        tie_word_embeddings=True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    )
    return Mamba2ForCausalLM(config).eval()


def main(
    out: Annotated[Path, typer.Option(help="Folder of models and searches.")] = SAMPLES / "out" / "04",
    quick: Annotated[bool, typer.Option(help="Less text, fewer steps: minutes.")] = False,
    blocks: Annotated[int, typer.Option(help="Blocks to remove.")] = 3,
    states: Annotated[int, typer.Option(help="State spaces to remove.")] = 6,
    steps: Annotated[int, typer.Option(help="Of the recovery; 0 is the default.")] = 0,
) -> None:
    quiet()
    import torch
    from evidence import scores, show
    from evidence.recovery import Stream
    from removal import text
    from rich.console import Console
    from transformers import AutoTokenizer

    import nncf_ext
    import ov_ext.optimum
    from nncf_ext import count_costs

    torch.manual_seed(0)
    out = out / "quick" if quick else out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    sizes = {"calibration": 2, "heldout": 4} if quick else {"calibration": 32, "heldout": 96}
    steps, rounds, draws = steps or (10 if quick else 150), 1 if quick else 9, 1 if quick else 5
    calibration, held_out = (text.windows(tokenizer, name, count) for name, count in sizes.items())
    dense, console = load(SOURCE), Console(width=140)
    count = dense.config.num_hidden_layers
    found = {"dense": evaluate(dense, held_out)}

    grown = sensitivity(dense, calibration)
    show.table(
        "What each layer is worth: nats a token lost on calibration text without ...",
        ("layer", "its block", "its state space"),
        [(str(layer), f"{block:.3f}", f"{ssm:.3f}") for layer, (block, ssm) in enumerate(grown)],
    )
    chosen, rows, lines = {}, [], {}
    generator = random.Random(0)
    for unit, number in (("mamba_block", blocks), ("ssm", states)):
        trials = searched(unit, number, calibration, out / "search" / unit)
        costs = [count_costs(dense, trial) for trial in trials]
        chosen[unit] = nncf_ext.extract(dense, trials[-1])
        rest = [range(count - number, count), *(generator.sample(range(count), number) for _ in range(draws))]
        for name, layers in zip(("last", *["random"] * draws), rest, strict=True):
            # Of different draws: the mean, window by window.
            key = f"{NAMES[unit]}: {name}"
            each = evaluate(nncf_ext.extract(dense, without(dense, unit, layers)), held_out)
            found[key] = found.get(key, 0) + each / (draws if name == "random" else 1)
        frontier = []
        for step, (trial, cost) in enumerate(zip(trials, costs, strict=True)):
            loss = evaluate(nncf_ext.extract(dense, trial), held_out)
            frontier.append((cost.parameters / 1e6, math.exp(loss.mean())))
            last = trial.steps[-1] if step else None
            what = f"{NAMES[unit]}: {last.dimension}" if last else f"{NAMES[unit]}: none"
            score = f"{last.score:.3f}" if last else ""
            kilobytes = cost.state_bytes // 2 / 1e3
            numbers = (f"{cost.parameters:,}", f"{cost.parameters_without_embeddings:,}", f"{kilobytes:.1f}")
            rows.append((what, score, f"{frontier[-1][1]:.3f}", *numbers))
        found[f"{NAMES[unit]}: searched"] = loss
        lines[f"{NAMES[unit]}, searched"] = frontier
    headings = ("removed", "perplexity, calibration", "held out", "parameters", "without embeddings", "state, kB")
    show.table("Step by step (state in bfloat16)", headings, rows)

    package_bytes = 4_000 if quick else text.MAX_PACKAGE_BYTES
    tokens = text.training_tokens(out / f"tokens-{package_bytes}.npy", SOURCE / "tokenizer.json", package_bytes)
    models = {"dense": dense}
    for unit, small in chosen.items():
        key = f"{NAMES[unit]}: searched, fine-tuned"
        make = partial(recovered, small, dense, Stream(tokens, 16, seed=0), steps)
        models[key] = kept(out / f"{unit}-recovered-{steps}", make)
        found[key] = evaluate(models[key], held_out)
    rows = []
    for name, each in found.items():
        gap = scores.interval(scores.difference, each, found["dense"])
        rows.append((name, f"{math.exp(each.mean()):.3f}", "" if name == "dense" else show.in_words(gap, "+.3f")))
    show.table(f"{len(held_out)} held-out windows", ("model", "perplexity", "nats to dense (paired)"), rows)
    shares: dict[str, Any] = {}
    for name in NAMES.values():
        best = found[f"{name}: searched"]
        for other in ("last", "random"):
            gain = scores.interval(scores.difference, found[f"{name}: {other}"], best)
            shares[f"{name}: searched better than {other} by, nats"] = gain
            console.print(f"{name}: searched better than {other} by {show.in_words(gain, '.3f')} nats")
        share = scores.interval(scores.closed, found[f"{name}: searched, fine-tuned"], best, found["dense"])
        shares[f"{name}: fine-tuning closes"] = share
        console.print(f"{name}: fine-tuning closes {show.in_words(share, '.0%')} of the gap")

    folders = {name: out / f"ir-{index}" for index, name in enumerate(models)}
    decoders = {name: Decoder(model, tokenizer, folders[name]) for name, model in models.items()}
    measured = {"the committed model": speeds(decoders, rounds)}
    wide = large(3 if quick else 24)
    third = range(0, wide.config.num_hidden_layers, 3)
    wider = {
        "dense": wide,
        "a third of the state spaces gone": nncf_ext.extract(wide, without(wide, "ssm", third)),
        "a third of the blocks gone": nncf_ext.extract(wide, without(wide, "mamba_block", third)),
    }
    decoders = {
        name: Decoder(model, tokenizer, out / f"ir-large-{index}") for index, (name, model) in enumerate(wider.items())
    }
    measured["130M shape, random weights"] = speeds(decoders, rounds)
    for title, table in measured.items():
        show.table(
            f"OpenVINO, bfloat16 weights, {title}: dense time / time",
            ("model", "ms a token", "ratio", "ms a prompt of 512", "ratio", "state, kB"),
            [
                (name, f"{each['token_ms']:.2f}", f"{each['token_ratio']:.2f}", f"{each['prompt_ms']:.1f}")
                + (f"{each['prompt_ratio']:.2f}", f"{each['state_kb']:.1f}")
                for name, each in table.items()
            ],
        )
    means = {name: float(each.mean()) for name, each in found.items()}
    record = {"losses": means, "shares": shares, "sensitivity": grown, "speeds": measured}
    (out / "record.json").write_text(json.dumps(record, indent=1))
    marks = {
        name: [(sum(each.numel() for each in model.parameters()) / 1e6, math.exp(found[name].mean()))]
        for name, model in models.items()
    }
    show.plot(out / "frontier.png", lines | marks, ("million parameters", "perplexity, held out"))
    console.print(f"Picture: {out / 'frontier.png'}", highlight=False)

    name = list(models)[-1]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    asked = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    there = ov_ext.optimum.load(folders[name], ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    written = there.generate(**prompt, **asked)
    same = torch.equal(written, models[name].bfloat16().float().generate(**prompt, **asked))
    console.print(
        f"\nText by the IR of '{name}', greedy; 64 tokens, {'the same as' if same else 'OTHER than'} torch:\n"
    )
    console.print(tokenizer.decode(written[0]), markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
