"""A pretrained encoder learns a task, and what it learns says where the encoder can be smaller (EFTNAS).

MiniLM (6 layers, 22.7 million parameters) is fine-tuned on labelled texts. First-order importance, added up along the
way, makes the sizes of a super-network and the order of its heads and channels. It is trained by sandwiches with
distillation, searched, cut and tuned. At a half and a quarter of the multiplications it stands beside the same with the
order of magnitudes, beside equal widths in all layers, and beside the pretrained encoder that was cut blindly and
fine-tuned, each for as many steps. Prints accuracies and losses on test texts with paired intervals, then milliseconds
and accuracies in OpenVINO, floating and INT8. Finished seeds are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import in_words, quiet, table

QUICK: dict[str, Any] = {"training": 32, "validation": 16, "test": 48, "dense": 1, "shrinking": 1, "tuning": 1}
QUICK |= {"budget": 10, "targets": (0.5,)}
REVIEWS: dict[str, Any] = {"training": 480, "validation": 120, "test": 379, "length": 48}


def main(
    model: Annotated[Path, typer.Option(help="From `python -m samples.real_models minilm OUT`.")] = Path("minilm"),
    task: Annotated[str, typer.Option(help="libraries or reviews")] = "libraries",
    texts: Annotated[int | None, typer.Option(help="Texts to learn from; fewer take less time.")] = None,
    quick: Annotated[bool, typer.Option(help="One seed, a few steps: a minute. Its figures mean nothing.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs, each with its own texts to learn from.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of texts, records and models.")] = Path("samples/out/11"),
) -> None:
    """Runs what has no record yet, then prints."""
    if task not in ("libraries", "reviews"):
        raise typer.BadParameter(f"{task} is neither libraries nor reviews.")
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} holds no model. `python -m samples.real_models minilm {model}` writes one.")
    quiet()
    import optuna
    import torch
    from encoders.arms import Plan, Run
    from encoders.deployment import accuracy, ir_of, times

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    task = "reviews" if quick else task  # the libraries take minutes to read
    settings = {"task": task, **(REVIEWS if task == "reviews" else {}), **(QUICK if quick else {})}
    settings |= {"training": texts} if texts and not quick else {}
    plan, folder = Plan(**settings), out / ("quick" if quick else f"{task}-{texts}" if texts else task)
    runs = [Run(seed, plan, model, folder / f"seed-{seed}", out) for seed in range(1 if quick else seeds)]
    records = []
    for run in runs:
        file = run.folder / "record.json"
        if not file.is_file() or json.loads(file.read_text()).get("of") != run.of:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"of": run.of, **run.record()})
            file.with_suffix(".part").write_text(content)
            file.with_suffix(".part").replace(file)
        records.append(json.loads(file.read_text()))
    compare(task, records)

    run = runs[0]
    names = {"dense": "dense"} | {f"EFTNAS {target:g}": f"EFTNAS-{target:g}" for target in plan.targets}
    files = {name: ir_of(run, path, False) for name, path in names.items()}
    files |= {f"{name}, INT8": ir_of(run, path, True) for name, path in names.items()}
    taken = times(run, files)
    table(
        f"OpenVINO, one thread, one text of {plan.length} tokens, seed 0",
        ["", "ms", "times faster", "accuracy, %", "MB"],
        [
            [name, f"{taken[name]:.2f}", f"{taken['dense'] / taken[name]:.2f}", f"{100 * accuracy(run, file):.1f}",
             f"{file.with_suffix('.bin').stat().st_size / 1e6:.1f}"]
            for name, file in files.items()
        ],
    )  # fmt: skip


def compare(task: str, records: list[dict[str, Any]]) -> None:
    """Prints accuracies and losses of all arms, and how far EFTNAS is from each, over the texts of all seeds."""
    import numpy as np
    from evidence.scores import difference, interval

    arms = {
        arm: {
            # The seeds share their test texts: the mean over seeds of each text, or intervals would be too narrow.
            key: np.mean([record["arms"][arm][key] for record in records], axis=0)
            for key in ("losses", "right")
        }
        for arm in records[0]["arms"]
    }
    whole = records[0]["arms"]["dense"]["macs"]
    rows = []
    for arm, found in arms.items():
        share = np.mean([record["arms"][arm]["macs"] for record in records]) / whole
        row = [arm, f"{share:.1%}", f"{100 * found['right'].mean():.1f}", f"{found['losses'].mean():.3f}"]
        if arm != "dense" and not arm.startswith("EFTNAS"):
            ours = arms[f"EFTNAS {arm.split()[-1]}"]
            each = [np.mean(record["arms"][f"EFTNAS {arm.split()[-1]}"]["right"]) for record in records]
            each = [one - np.mean(record["arms"][arm]["right"]) for one, record in zip(each, records, strict=True)]
            row += [
                ", ".join(f"{100 * one:+.1f}" for one in each),
                in_words(interval(difference, 100 * ours["right"], 100 * found["right"]), "+.1f"),
                in_words(interval(difference, ours["losses"], found["losses"]), "+.3f"),
            ]
        rows.append([*row, "", "", ""][:7])
    table(
        f"{task}: test texts of {len(records)} seed(s); differences: EFTNAS less the arm",
        ["", "MACs", "right, %", "loss", "by seed", "right, difference", "loss, difference"],
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
