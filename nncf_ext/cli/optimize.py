"""``nncf-ext optimize``: to a folder of OpenVINO that is as fast as an accepted loss allows."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from nncf_ext.cli.export import check_extension, in_openvino, write_folder
from nncf_ext.cli.folders import (
    ModelDir,
    OutDir,
    TrustRemoteCode,
    check_new,
    hush,
    load_model,
    show,
    user_errors,
)
from nncf_ext.cli.text import SOURCES, Column, DatasetConfig, Samples, Source, Split, Window, read_windows

PLAN, REPORT = "forms.json", "accuracy_control.json"


class Goal(StrEnum):
    """What shall be small."""

    LATENCY = "latency"
    BYTES = "bytes"


def optimize_folder(
    model_dir: ModelDir,
    out_dir: OutDir,
    *,
    dataset: Annotated[str, typer.Option(help=f"What to calibrate on and to judge by, a part of it each: {SOURCES}.")],
    max_drop: Annotated[
        str, typer.Option(help="What may be lost: a percentage of perplexity, such as 1%, or nats of divergence.")
    ] = "1%",
    objective: Annotated[
        Goal, typer.Option(help="What shall be small: the time of a token, measured here, or bytes.")
    ] = Goal.LATENCY,
    form: Annotated[
        list[str] | None,
        typer.Option(help="A form that weights may take, such as float16, int8, int8-s50, int4-g64-s30; repeatable."),
    ] = None,
    keep_structure: Annotated[
        bool, typer.Option("--keep-structure", help="Leave no attention and no MLP out.")
    ] = False,
    budget: Annotated[int, typer.Option(help="Combinations to try on little text.")] = 60,
    storage: Annotated[Path | None, typer.Option(help="Folder that keeps finished work; continues from it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of what was found (.png, .svg).")] = None,
    dataset_config: DatasetConfig = None,
    split: Split = None,
    column: Column = None,
    samples: Samples = 64,
    window: Window = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of layer names to leave alone; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the whole OpenVINO folder OUT_DIR.")] = False,
) -> None:
    """
    Make a language model as fast on this CPU as it can be within a loss: each layer gets bits and zeros of its own.

    MODEL_DIR is a Hugging Face folder, OUT_DIR a new folder for OpenVINO, OpenVINO GenAI and Optimum-Intel, packed for
    the extension. For example:
    nncf-ext optimize model fast --dataset text.txt --max-drop 1%

    OUT_DIR/forms.json says what each layer became, OUT_DIR/accuracy_control.json what else was found.
    """
    with user_errors():
        import json

        import nncf
        import torch

        from nncf_ext.algorithms.accuracy_control.control import compress_with_accuracy_control
        from nncf_ext.algorithms.accuracy_control.objectives import packed_bytes
        from nncf_ext.algorithms.accuracy_control.parameters import AdvancedAccuracyControlParameters
        from nncf_ext.exploration.openvino_latency import latency

        hush("optuna")
        limit = _drop(max_drop)
        check_extension(out_dir, overwrite)
        if plot is not None:
            check_new(plot, overwrite)
            import matplotlib  # noqa: F401  better missed now than after the search
        options: dict[str, Any] = {} if form is None else {"forms": form}
        parameters = AdvancedAccuracyControlParameters(removable=not keep_structure, **options)
        parameters.check()
        # OpenVINO converts weights on a grid from float32.
        model, tokenizer = load_model(model_dir, "float32", trust_remote_code)
        source = Source(dataset, dataset_config, split, column)
        items = read_windows(source, tokenizer, samples, window, model)
        token = torch.tensor([[items[0]["input_ids"][0, 0]]])
        result = compress_with_accuracy_control(
            model,
            nncf.Dataset(items),
            max_drop=limit,
            objective=latency("CPU", convert=lambda each: in_openvino(each, {"input_ids": token}))
            if objective is Goal.LATENCY
            else packed_bytes(),
            budget=budget,
            storage=storage,
            ignored_scope=nncf.IgnoredScope(patterns=ignore) if ignore else None,
            subset_size=samples,
            seed=seed,
            advanced_parameters=parameters,
        )

        def describe(folder: Path) -> None:
            result.plan.save(folder / PLAN)
            (folder / REPORT).write_text(json.dumps(result.report.to_dict(), indent=1))

        show(result.report.table())
        write_folder(result.model, tokenizer, out_dir, rest="int8", pack=True, overwrite=overwrite, also=describe)
        if plot is not None:
            result.report.plot(plot)
    typer.echo(f"{out_dir}: run it by ov-ext generate {out_dir} --prompt TEXT, OpenVINO GenAI or Optimum-Intel.")


def _drop(text: str) -> float:
    """Nats: of a percentage, so much more perplexity."""
    import math

    import nncf

    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"--max-drop is a percentage of perplexity, such as 1%, or nats, such as 0.01; got {text!r}."
        raise nncf.ValidationError(msg)
    return math.log1p(number / 100) if text.endswith("%") else number
