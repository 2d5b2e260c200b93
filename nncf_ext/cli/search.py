"""``nncf-ext search``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from nncf_ext.cli.folders import (
    Adapter,
    Dtype,
    Grid,
    ModelDir,
    Overwrite,
    Start,
    TrainedAs,
    TrustRemoteCode,
    check_new,
    hush,
    load_adapted,
    user_errors,
)
from nncf_ext.cli.text import SOURCES, Column, DatasetConfig, Samples, Source, Split, Window, read_windows
from nncf_ext.parameters import SearchSampler


def search_folder(
    model_dir: ModelDir,
    out: Annotated[
        Path | None,
        typer.Argument(help="Report to write (JSON), for nncf-ext extract; must not exist. Not with --worker."),
    ] = None,
    *,
    adapter: Adapter,
    dataset: Annotated[str, typer.Option(help=f"What to validate on: {SOURCES}.")],
    ranks: Annotated[
        str | None, typer.Option(help="Ranks to choose from for all layers, such as 32,24,16; the adapter's first.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help=r"PATTERN=RANKS: layers that share a rank, such as '.*\.[qkv]_proj$=32,24,16'; repeatable."),
    ] = None,
    per: Annotated[str, typer.Option(help="block: a rank for each block of the model; model: one for all.")] = "block",
    sampler: Annotated[SearchSampler, typer.Option(help="How the next ranks are chosen.")] = (
        SearchSampler.HILL_CLIMBING
    ),
    budget: Annotated[int, typer.Option(help="Number of points to measure.")] = 100,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="Look for small adapters, too (not with hill_climbing).")
    ] = False,
    constraint: Annotated[
        list[str] | None,
        typer.Option(help="What the chosen ranks keep to: 'perplexity <= 30', 'parameters <= 60%'; repeatable."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Another text, to measure the chosen point on at the end.")] = None,
    dataset_config: DatasetConfig = None,
    split: Split = None,
    test_split: Annotated[str | None, typer.Option(help="Split of the dataset of --test.")] = None,
    column: Column = None,
    storage: Annotated[
        str | None, typer.Option(help="File or URL of a data base that keeps results; continues from it.")
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(help="Take part in the search in this storage (file or URL): measure, but write no report."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Table of all points to write.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    samples: Samples = 32,
    window: Window = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of all points, with --parameters (.png, .svg).")] = None,
    mode: TrainedAs = None,
    grid: Grid = None,
    start: Start = "grid",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """
    Find the best ranks of a LoRA adapter that was trained with elastic ranks, by perplexity on validation text.

    MODEL_DIR is the folder of the model that the adapter was trained on, OUT the report to write (JSON). For example:
    nncf-ext search model report.json --adapter adapter --ranks 32,24,16 --dataset validation.txt --budget 50

    nncf-ext extract then cuts the adapter to the ranks that were found.

    Several machines search together if one has --storage and the others the same as --worker, all other arguments
    being equal: --storage postgresql+psycopg://user@host/search. Each may be killed and started again at any time.
    """
    with user_errors():
        import nncf

        from nncf_ext.elastic import make_elastic
        from nncf_ext.exploration.engine import search
        from nncf_ext.exploration.objectives import Objective
        from nncf_ext.files import write_whole

        hush("optuna")
        if (out is None) != (worker is not None) or (worker is not None and (storage or test or plot or csv)):
            msg = (
                "Name a report OUT to write, or with --worker nothing to write and nothing to test: the process with "
                "--storage does that."
            )
            raise nncf.ValidationError(msg)
        for file in (out, plot, csv):
            if file is not None:
                check_new(file, overwrite)
        if plot is not None:
            if not parameters:
                msg = "--plot draws two objectives, and there is perplexity alone. Add --parameters."
                raise nncf.ValidationError(msg)
            import matplotlib  # noqa: F401  better missed now than after the search
        groups = _groups(ranks, group, per)
        model, tokenizer = load_adapted(model_dir, adapter, mode, grid, start, dtype, trust_remote_code)
        texts = [
            read_windows(Source(each, dataset_config, part, column, "validation"), tokenizer, samples, window, model)
            for each, part in ((dataset, split), (test, test_split))
            if each is not None
        ]
        net = make_elastic(model, groups=groups)
        objectives = [Objective("perplexity", lambda point: perplexity(model, texts[0]), maximize=False)]
        if parameters:
            objectives.append(Objective("parameters", net.adapter_parameters, maximize=False))
        report = search(
            net,
            objectives,
            sampler=sampler,
            budget=budget,
            constraints=constraint or (),
            test=None if test is None else lambda point: perplexity(model, texts[1]),
            storage=worker or storage,
            seed=seed,
        )
        if out is not None:
            content = json.dumps(report.to_dict() | {"groups": [asdict(each) for each in groups]}, indent=1)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, lambda aside: aside.write_text(content))
        if csv is not None:
            report.to_csv(csv)
        if plot is not None:
            report.plot(plot)
        typer.echo(str(report))


def perplexity(model: Any, items: list[dict[str, Any]]) -> float:
    """
    :param model: A causal language model.
    :param items: Model inputs with ``input_ids`` ``[sequences, tokens]``.
    :return: Exponential of the mean negative log-likelihood of the next token.
    """
    import torch

    from nncf_ext.importance.metrics import PerplexityMetric

    metric = PerplexityMetric()
    with torch.no_grad():
        losses = [metric.losses(model(**item, use_cache=False).logits, item, None) for item in items]
    return metric.shown(float(torch.cat(losses).mean()))


def _groups(ranks: str | None, group: list[str] | None, per: str) -> list[Any]:
    import nncf

    from nncf_ext.algorithms.elastic_lora.parameters import RankGroup

    if (ranks is None) == (not group):
        msg = "Say which ranks there are: either --ranks 32,24,16 for all layers, or --group PATTERN=RANKS."
        raise nncf.ValidationError(msg)
    groups = []
    for each in [f".*={ranks}"] if ranks is not None else group or ():
        pattern, _, numbers = each.rpartition("=")
        try:
            sizes = [int(number) for number in numbers.split(",")]
        except ValueError:
            sizes = []
        if not pattern or not sizes:
            msg = f"Ranks are whole numbers with commas, such as 32,24,16, after PATTERN= of a group; got {each}."
            raise nncf.ValidationError(msg)
        groups.append(RankGroup([pattern], sizes, per))  # type: ignore[arg-type]  # RankGroup says what is wrong
    return groups
