"""Adapters that survive the merge: the SQFT pipelines on a task from real source code, and on arithmetic.

Proves that an adapter trained on a sparse INT4 base can be merged into it without losing a zero or a grid point, at
the accuracy of an adapter on the dense model. The language model in `assets/` learns to write, for the signature of a
function it has never seen, the call that passes all arguments on; an answer counts if it is right to the letter. One
table: dense LoRA, sparse LoRA merged naively, Shears, SQFT, SparsePEFT, QA-SparsePEFT, each with fixed ranks (LoRA) and
searched ones (NLS). Every finished run is kept in `samples/out/02`, and not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import quiet

OUT = Path(__file__).parent / "out" / "02"
QUICK = {"steps": 60, "training": 3000, "validation": 128, "test": 512}
FULL = {"steps": 120, "training": 8000, "validation": 256, "test": 2048}


def main(
    quick: Annotated[bool, typer.Option(help="Two arms, one seed, fewer steps and items: minutes.")] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="signatures, arithmetic, libraries; the first two by default.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Another language model; see python -m samples.real_models. Takes longer.")
    ] = None,
    sparse_base: Annotated[
        Path | None, typer.Option(help="A sparse floating form of it, such as a recovered one, to start from.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Pipelines to run; all by default.")] = None,
    form: Annotated[list[str] | None, typer.Option(help="lora, nls; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every arm.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of every run; 0 is the default.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of records and models.")] = OUT,
    train: Annotated[bool, typer.Option(help="Run what has no record yet; otherwise only print the table.")] = True,
) -> None:
    quiet()
    import optuna
    import torch
    from adapters import comparison, table

    from nncf_ext.upstream import has_fast_products

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    budget: dict[str, Any] = dict(QUICK if quick else FULL)
    if steps:
        budget["steps"] = steps
    if quick:
        out, arm, form, seeds = out / "quick", arm or ["lora", "sqft_qa_sparse_peft"], form or ["lora"], 1
    if model is not None:  # larger models learn at lower rates; groups of 128 do not divide every size
        half = has_fast_products(torch.bfloat16)
        budget |= {"base": model, "learning_rate": 1e-3, "group_size": 64, "half": half}
        out = out / model.name
    if sparse_base is not None and model is None:
        raise typer.BadParameter("--sparse-base is a sparse form of --model, which is missing.")
    if sparse_base is not None:
        out = out / f"from-{sparse_base.name}"
    plan = comparison.Plan(
        tasks=tuple(task or ["signatures", *([] if quick else ["arithmetic"])]),
        arms=tuple(arm or comparison.ARMS),
        forms=tuple(form or comparison.FORMS),
        seeds=seeds,
        sparse_base=sparse_base,
        **budget,
    )
    records = comparison.run(plan, out, train=train)
    comparison.measure(records, out)
    for name in plan.tasks:
        table.show(name, [record for record in records if record["task"] == name])
    merged = [r for r in records if r["arm"] == "sqft_qa_sparse_peft" and r["task"] == plan.tasks[0]]
    if merged:
        accuracy = sum(record["merged"]["accuracy"] for record in merged) / len(merged)
        sparsity = min(record["merged"]["sparsity"] for record in merged)
        print(f"After the QA merge: accuracy {accuracy:.1%}, sparsity {sparsity:.1%}")


if __name__ == "__main__":
    typer.run(main)
