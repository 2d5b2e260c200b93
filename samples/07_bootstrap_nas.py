"""A trained network becomes a super-network, is shrunk and searched by time in OpenVINO, and the best part is kept.

Shows what a sub-network with at most a quarter of the multiplications is worth beside a network of equally scaled
widths trained alone, and beside one pruned by magnitude and fine-tuned, with as many steps and as many multiplications.
A small residual network on scikit-learn's digits; every seed draws its own 600 images to train on, 300 to choose by and
897 to report. Prints one table with paired differences over seeds; times and INT8 accuracy in OpenVINO; whether a
process with torch alone computes the same with what was extracted. Draws the front. Finished seeds are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import plot, quiet, table

QUICK: dict[str, Any] = {"dense": 8, "shrinking": 10, "tuning": 4, "budget": 14, "targets": (0.5,)}


def main(
    quick: Annotated[bool, typer.Option(help="One seed, a few steps: a minute. Its figures mean nothing.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs, each with its own parts of the data.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of records and models.")] = Path("samples/out/07"),
) -> None:
    """Runs what has no record yet, then prints and draws."""
    quiet()
    import optuna
    import torch
    from super_networks.arms import EXAMPLE, Plan, Run
    from super_networks.deployment import accuracy, ir_of, reloads, times
    from super_networks.network import load

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    plan, seeds, out = (Plan(**QUICK), 1, out / "quick") if quick else (Plan(), seeds, out)
    records = []
    for seed in range(seeds):
        file = out / f"seed-{seed}" / "record.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(Run(seed, plan, file.parent).record())
            file.with_suffix(".part").write_text(content)
            file.with_suffix(".part").replace(file)
        records.append(json.loads(file.read_text()))

    whole = records[0]["dense"]["macs"]
    rows = []
    for arm in (name for name in records[0] if name != "front"):
        accuracies = [100 * record[arm]["accuracy"] for record in records]
        losses = [record[arm]["loss"] for record in records]
        macs = sum(record[arm]["macs"] for record in records) / len(records)
        ours = f"searched {arm.split()[-1]}"
        against = [record["dense" if arm.startswith("searched") else ours] for record in records if arm != "dense"]
        apart = [a - 100 * each["accuracy"] for a, each in zip(accuracies, against, strict=False)]
        apart_loss = [a - each["loss"] for a, each in zip(losses, against, strict=False)]
        rows.append([arm, f"{macs / whole:.1%}", f"{sum(accuracies) / len(accuracies):.2f}", paired(apart, ".2f"),
                     f"{sum(losses) / len(losses):.4f}", paired(apart_loss, ".4f")])  # fmt: skip
    against = "difference: searched from dense, others from searched"
    table(
        f"Digits, test sets of {seeds} seeds; {against}, with 95 % intervals",
        ["", "MACs", "accuracy, %", "difference", "loss", "difference"],
        rows,
    )

    run, folder = Run(0, plan, out), out / "seed-0"
    names = {"dense": "dense"} | {f"searched {target:g}": f"searched-{target:g}" for target in plan.targets}
    models = {name: load(folder / path) for name, path in names.items()}
    irs = {name: ir_of(model) for name, model in models.items()}
    irs |= {f"{name}, INT8": ir_of(model, run.validation) for name, model in models.items()}
    found = {name: accuracy(ir, run.test) for name, ir in irs.items()}
    taken = times(irs, run.test.images[:EXAMPLE].numpy())
    table(
        f"OpenVINO, one thread, {EXAMPLE} images a call, seed 0",
        ["", "ms a call", "times faster", "accuracy, %"],
        [
            [name, f"{taken[name]:.3f}", f"{taken['dense'] / taken[name]:.2f}", f"{100 * found[name]:.2f}"]
            for name in irs
        ],
    )
    for name, path in names.items():
        same = reloads(folder / path, run.test.images)
        print(f"{name}: a process without this package {'computes the same' if same else 'DIFFERS'}")
    draw(records, out / "front.png")
    print(f"Pictures: {out / 'front.png'}, {folder / 'front.png'}")


def paired(apart: list[float], form: str) -> str:
    """:return: The mean of differences, and its 95 % interval by Student's distribution where there are several."""
    if not apart:
        return ""
    mean = sum(apart) / len(apart)
    if len(apart) < 2:
        return f"{mean:+{form}}"
    from scipy.stats import sem, t

    half = float(sem(apart) * t.ppf(0.975, len(apart) - 1))
    return f"{mean:+{form}} ± {half:{form}}"


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Test accuracy over multiplications, of all seeds and arms."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in (name for name in records[0] if name != "front"):
        points = [(record[arm]["macs"] / 1e6, 100 * record[arm]["accuracy"]) for record in records]
        middle = tuple(sum(each) / len(points) for each in zip(*points, strict=True))
        lines.setdefault(arm.split()[0], []).append((middle[0], middle[1]))
    lines = {name: sorted(points + (lines["dense"] if name != "dense" else [])) for name, points in lines.items()}
    plot(file, lines, ("million multiplications an image", "accuracy on the test set, %"))


if __name__ == "__main__":
    typer.run(main)
