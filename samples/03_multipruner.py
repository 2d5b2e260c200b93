"""A language model loses a fifth of its parameters: searched, repaired, recovered, exported and run in OpenVINO.

Proves on the committed model that MultiPruner's choice costs less perplexity than removing whole blocks or making all
MLPs equally narrower; that repair by least squares and a short distillation close the gap to the dense model; that a
model of the same shape trained from scratch on as much text is far behind; and that sparsity, INT4 and packing work on
the result. Prints tables, the text that the exported IR writes, and draws a picture. Finished parts are kept in
`samples/out/03` and not repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import quiet
from removal.models import kept, load, speed

SAMPLES = Path(__file__).parent
SOURCE = SAMPLES / "assets" / "tiny_lm"
PROMPT = "def read_file(path):\n    "
POOL, REPAIRED, STAGED = "MultiPruner, one pool", "MultiPruner, one pool, repaired", "MultiPruner, staged 44:52:4"
BLOCKS, EQUAL = "blocks only", "equal widths, L1"
GROUP = 64  # MLP channels that go together; also those that share an INT4 scale


class Removal:
    """
    The arms of the comparison, made when they are asked for.

    :param out: Folder where they are kept.
    :param ratio: Fraction of all parameters to remove.
    :param calibration: ``[windows, tokens]``.
    :param group: MLP channels that go together.
    """

    def __init__(self, out: Path, ratio: float, calibration: Any, group: int) -> None:
        self.out, self.ratio, self.calibration, self.group = out, ratio, calibration, group
        self.dense = load(SOURCE)

    def arm(self, name: str) -> Any:
        """:return: The model without a fifth of its parameters."""
        return kept(self.out / "models" / slug(name), lambda: self._equal() if name == EQUAL else self._searched(name))

    def plan(self, name: str) -> Any:
        """:return: What is left in an arm."""
        import nncf_ext

        self.arm(name)
        return nncf_ext.StructurePlan.load(self.out / f"{slug(name)}.plan.json")

    def trials(self, name: str) -> list[Any]:
        """:return: The plans of a search, from the dense model on."""
        import nncf_ext

        self.arm(name)
        files = sorted((self.out / "search" / slug(name)).glob("plan.*.json"))
        return [nncf_ext.StructurePlan.dense(self.dense), *map(nncf_ext.StructurePlan.load, files)]

    def _searched(self, name: str) -> Any:
        import nncf
        from evidence.text import batches

        import nncf_ext

        options: dict[str, Any] = {
            STAGED: {},
            BLOCKS: {"distribution": (1, 0, 0)},
            POOL: {"joint_cost": "parameters"},
            REPAIRED: {"joint_cost": "parameters", "compensate": True},
        }[name]
        model = nncf_ext.compress(
            load(SOURCE),
            nncf_ext.CompressMode.MULTIPRUNER,
            ratio=self.ratio,
            dataset=nncf.Dataset(batches(self.calibration, 4)),
            resume=self.out / "search" / slug(name),
            advanced_parameters=nncf_ext.AdvancedMultiPrunerParameters(mlp_group=self.group, **options),
        )
        nncf_ext.structure_plan(model).save(self.out / f"{slug(name)}.plan.json")
        return model

    def _equal(self) -> Any:
        """All MLPs alike, the channels with the least weights gone."""
        import nncf_ext
        from nncf_ext.importance.blocks import l1_norm
        from nncf_ext.structure.lookup import dimensions_of
        from nncf_ext.structure.order import units_by_score

        dimensions, dense = dimensions_of(self.dense), nncf_ext.StructurePlan.dense(self.dense)
        whole = nncf_ext.count_costs(self.dense).parameters
        order = {
            each.name: units_by_score(self.dense, dimensions, each.name, l1_norm) for each in dimensions.of_part("mlp")
        }
        for width in range(self.dense.config.intermediate_size, 0, -8):
            plan = dense.at(dict.fromkeys(order, width), order)
            if nncf_ext.count_costs(self.dense, plan).parameters <= (1 - self.ratio) * whole:
                break
        plan.save(self.out / f"{slug(EQUAL)}.plan.json")
        return nncf_ext.extract(self.dense, plan)


def slug(name: str) -> str:
    """:return: A name for a file."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def from_scratch(removal: Removal, plan: Any, tokens: Any, steps: int, batch: int, seed: int) -> Any:
    """:return: A model of the plan's shape that has seen nothing but the text of a recovery."""
    from train_tiny_lm import Plan, Training
    from transformers import AutoModelForCausalLM

    from nncf_ext.structure.lookup import dimensions_of
    from nncf_ext.structure.surgery import cut_structure

    def build(config: Any) -> Any:
        model = AutoModelForCausalLM.from_config(config)
        cut_structure(model, plan.kept, dimensions_of(model))
        return model

    training = Training(
        removal.dense.config,
        Plan(steps=steps, batch=batch, seed=seed),
        tokens,
        compiled=False,
        build=build,
    )
    checkpoint = removal.out / f"scratch-{seed}.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    for _ in training.run(checkpoint):
        pass
    return training.model.eval()


def steps_table(removal: Removal, name: str, speeds: tuple[float, float]) -> list[Sequence[str]]:
    """:return: One row for each step of an arm's search."""
    from nncf_ext import count_costs

    rows = []
    trials = removal.trials(name)
    for number, trial in enumerate(trials):
        what, score = "dense", ""
        if number:
            step = trial.steps[-1]
            unit = "channels" if step.dimension.endswith("mlp") else "KV heads"
            what = f"{step.dimension}: {f'{step.kept} {unit} left' if step.kept else 'removed'}"
            score = f"{step.score:.3f}"
        costs = count_costs(removal.dense, trial)
        ends = {0: speeds[0], len(trials) - 1: speeds[1]}
        rows.append(
            (
                *(str(number), what, score),
                *(f"{costs.parameters:,}", f"{costs.parameters_without_embeddings:,}"),
                *(f"{costs.bytes / 2e6:.2f}", str(costs.kv_bytes_per_token // 2)),
                f"{ends[number]:.0f}" if number in ends else "",
            )
        )
    return rows


def frontier(removal: Removal, name: str, held_out: Any) -> list[tuple[float, float]]:
    """:return: Million parameters and perplexity on held-out text after each step of an arm's search, by masks."""
    from evidence.scores import losses

    from nncf_ext import count_costs, masked

    points = []
    for trial in removal.trials(name):
        with masked(removal.dense, trial):
            loss = float(losses(removal.dense, held_out).mean())
        points.append((count_costs(removal.dense, trial).parameters / 1e6, math.exp(loss)))
    return points


def deploy(model: Any, tokenizer: Any, folder: Path) -> Any:
    """:return: The model in OpenVINO, weights in bfloat16."""
    import copy

    import ov_ext.optimum

    half = copy.deepcopy(model).bfloat16()
    ov_ext.optimum.export(half, tokenizer, folder, overwrite=folder.exists())
    return ov_ext.optimum.load(folder)


def composed(model: Any, tokenizer: Any, calibration: Any, folder: Path) -> Any:
    """:return: Half zeros on an INT4 grid on top of what was removed, packed, in OpenVINO."""
    import nncf
    import openvino as ov
    from evidence.text import batches

    import nncf_ext
    import ov_ext
    import ov_ext.optimum

    sparse = nncf_ext.compress(
        model,
        nncf_ext.CompressMode.SPARSE_GPT,
        ratio=0.5,
        dataset=nncf.Dataset(batches(calibration, 1)),
        do_copy=True,
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP
        ),
    )
    ov_ext.optimum.export(sparse, tokenizer, folder, overwrite=folder.exists())
    core = ov_ext.add_extension(ov.Core())
    ir = core.read_model(folder / ov_ext.optimum.MODEL)
    ir, _ = ov_ext.pack_sparse_weights(nncf.compress_weights(ir, mode=nncf.CompressWeightsMode.INT8_SYM))
    ov_ext.save_model(ir, folder / ov_ext.optimum.MODEL)
    return ov_ext.optimum.load(folder)


def megabytes(folder: Path) -> str:
    """:return: Of the weights in an IR."""
    return f"{(folder / 'openvino_model.bin').stat().st_size / 1e6:.2f}"


def main(
    out: Annotated[Path, typer.Option(help="Folder of models and searches.")] = SAMPLES / "out" / "03",
    quick: Annotated[bool, typer.Option(help="Less text, a short recovery, one seed: minutes.")] = False,
    ratio: Annotated[float, typer.Option(help="Fraction of all parameters to remove.")] = 0.2,
    steps: Annotated[int, typer.Option(help="Of the recovery, and of training from scratch; 0 is the default.")] = 0,
) -> None:
    quiet()
    import torch
    from evidence import recovery, scores, show
    from removal import text
    from rich.console import Console
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    out = out / "quick" if quick else out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    windows = {"calibration": 2, "heldout": 8} if quick else {"calibration": 32, "heldout": 96}
    steps, batch, seeds = steps or (20 if quick else 200), 16, range(1 if quick else 3)
    calibration, held_out = (text.windows(tokenizer, name, count) for name, count in windows.items())
    removal = Removal(out, ratio, calibration, 3 * GROUP if quick else GROUP)
    arms = (BLOCKS, EQUAL, STAGED, POOL, REPAIRED)
    models = {"dense": removal.dense, **{name: removal.arm(name) for name in arms}}
    found = {name: scores.losses(model, held_out) for name, model in models.items()}

    package_bytes = 4_000 if quick else text.MAX_PACKAGE_BYTES
    tokens = text.training_tokens(out / f"tokens-{package_bytes}.npy", SOURCE / "tokenizer.json", package_bytes)
    for name in (STAGED, REPAIRED):
        recovered = f"{name}, LoRA merged"

        def recover(name: str = name) -> Any:
            stream = recovery.Stream(tokens, batch, seed=0)
            options = {"steps": steps, "learning_rate": 2e-3, "rank": 32}
            return recovery.recover(removal.arm(name), removal.dense, stream, **options)

        models[recovered] = kept(out / "models" / f"{slug(recovered)}-{steps}", recover)
        found[recovered] = scores.losses(models[recovered], held_out)
    best = f"{REPAIRED}, LoRA merged"
    for seed in seeds:
        scratch = from_scratch(removal, removal.plan(REPAIRED), tokens, steps, batch, seed)
        found[f"the same shape from scratch, seed {seed}"] = scores.losses(scratch, held_out)

    folders = {"dense": out / "dense-ir", best: out / "small-ir"}
    deployed = {name: deploy(models[name], tokenizer, folder) for name, folder in folders.items()}
    folders["sparse"] = out / "sparse-int4-ir"
    sparse = composed(models[best], tokenizer, calibration, folders["sparse"])
    name = "SparseGPT 50 % + INT4 on the repaired and recovered one, packed, in OpenVINO"
    prompt = tokenizer(PROMPT, return_tensors="pt")
    speeds = tuple(speed(model, prompt) for model in deployed.values())

    headings = ("step", "what", "perplexity", "parameters", "without embeddings", "MB", "KV bytes/token", "tokens/s")
    title = f"{REPAIRED}: perplexity on calibration text, bytes in bfloat16"
    show.table(title, headings, steps_table(removal, REPAIRED, (speeds[0], speeds[1])))
    rows = []
    for arm, each in found.items():
        size = f"{sum(parameter.numel() for parameter in models[arm].parameters()):,}" if arm in models else ""
        low_high = scores.interval(scores.difference, each, found["dense"])
        gap = "" if arm == "dense" else show.in_words(low_high, "+.3f")
        rows.append((arm, size, f"{math.exp(each.mean()):.3f}", gap))
    loss = scores.losses(sparse, held_out, batch=1)
    gap = show.in_words(scores.interval(scores.difference, loss, found["dense"]), "+.3f")
    rows.append((name, f"{megabytes(folders['sparse'])} MB", f"{math.exp(loss.mean()):.3f}", gap))
    show.table(
        f"{len(held_out)} held-out windows", ("model", "parameters", "perplexity", "nats to dense (paired)"), rows
    )
    facts = {
        "one pool and repair close of the staged gap": (found[REPAIRED], found[STAGED], found["dense"]),
        "recovery closes of the staged gap": (found[f"{STAGED}, LoRA merged"], found[STAGED], found["dense"]),
        "repair and recovery close of the pool's gap": (found[best], found[POOL], found["dense"]),
        "recovery closes of what repair left": (found[best], found[REPAIRED], found["dense"]),
    }
    shares = {name: scores.interval(scores.closed, *samples) for name, samples in facts.items()}
    console = Console(width=140)
    for name, share in shares.items():
        console.print(f"{name}: {show.in_words(share, '.0%')}", highlight=False)
    record = {name: {"loss": float(each.mean())} for name, each in found.items()}
    record |= {name: {"closed": share} for name, share in shares.items()}
    (out / "record.json").write_text(json.dumps(record | {"tokens_per_s": speeds}, indent=1))

    size = {name: sum(each.numel() for each in models[name].parameters()) / 1e6 for name in models}
    lines = {name: frontier(removal, name, held_out[::4]) for name in (BLOCKS, STAGED, POOL)}
    marks = {name: [(size[name], math.exp(found[name][::4].mean()))] for name in (EQUAL, REPAIRED, best)}
    show.plot(out / "frontier.png", lines | marks, ("million parameters", "perplexity"))
    console.print(f"Picture: {out / 'frontier.png'}", highlight=False)
    console.print(f"\nText by {folders[best].name}, greedy:\n", style="bold")
    written = deployed[best].generate(**prompt, max_new_tokens=48, do_sample=False)[0]
    console.print(tokenizer.decode(written), markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
