"""``nncf-ext extract``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nncf_ext.cli.folders import (
    Dtype,
    Grid,
    ModelDir,
    OutDir,
    Overwrite,
    Start,
    TrainedAs,
    TrustRemoteCode,
    check_new_folder,
    load_adapted,
    load_model,
    new_folder,
    save_model,
    user_errors,
)


def extract_folder(
    model_dir: ModelDir,
    out_dir: OutDir,
    plan: Annotated[
        Path | None,
        typer.Option(help="What stays of the model: structure_plan.json of nncf-ext compress, or one like it."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Or: folder of a LoRA adapter, to be cut to ranks of --report.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="With --adapter: what nncf-ext search wrote.")] = None,
    point: Annotated[
        str, typer.Option(help="Of the report: chosen, or the number of one of its evaluations, from 0.")
    ] = "chosen",
    mode: TrainedAs = None,
    grid: Grid = None,
    start: Start = "grid",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """
    Make a smaller network real: the model of a plan, or the adapter of one point of a search.

    MODEL_DIR is the folder of the dense model, or of the model that the adapter was trained on; OUT_DIR a new folder.
    With --plan, OUT_DIR is a complete model of smaller tensors. With --adapter and --report, it is an ordinary adapter
    for PEFT. For example:
    nncf-ext extract model smaller --plan structure_plan.json
    """
    with user_errors():
        import nncf

        from nncf_ext.extraction import extract
        from nncf_ext.structure.plan import StructurePlan

        check_new_folder(out_dir, overwrite)
        if (plan is None) == (adapter is None) or (adapter is None) != (report is None):
            msg = "Say what to extract: either --plan structure_plan.json, or --adapter FOLDER with --report FILE."
            raise nncf.ValidationError(msg)
        if plan is not None:
            given = {"--point": point != "chosen", "--mode": mode is not None, "--grid": grid is not None}
            if wrong := [name for name, is_given in given.items() if is_given]:
                msg = f"{', '.join(wrong)}: for adapters only, not for a plan."
                raise nncf.ValidationError(msg)
            content = StructurePlan.load(plan)
            model, tokenizer = load_model(model_dir, dtype, trust_remote_code)
            save_model(extract(model, content), tokenizer, out_dir, overwrite, content)
            return
        from nncf_ext.elastic import make_elastic

        assert adapter is not None and report is not None  # checked above
        groups, chosen = _read(report, point)
        adapted, _ = load_adapted(model_dir, adapter, mode, grid, start, dtype, trust_remote_code)
        net = make_elastic(adapted, groups=groups)
        small: Any = extract(net, chosen)
        with new_folder(out_dir, overwrite) as folder:
            # Embeddings are not trained beside elastic ranks, so none need to be saved.
            small.save_pretrained(str(folder), save_embedding_layers=False)
        ranks = ", ".join(f"{name}: {rank}" for name, rank in chosen.items())
        size, whole = net.adapter_parameters(chosen), net.adapter_parameters(net.maximal())
        typer.echo(f"{size:,} of {whole:,} parameters. Ranks: {ranks}")


def _read(report: Path, point: str) -> tuple[list[Any], dict[str, int]]:
    """The groups of a search, and one of its points."""
    import nncf

    from nncf_ext.algorithms.elastic_lora.parameters import RankGroup

    try:
        content = json.loads(report.read_text())
        groups = [RankGroup(**each) for each in content["groups"]]
        points = [each["point"] for each in content["evaluations"]]
        chosen = content["chosen"] and content["chosen"]["point"]
        for each in (*points, chosen or {}):
            if not isinstance(each, dict) or any(type(size) is not int for size in each.values()):
                msg = f"{each!r} is no point"
                raise TypeError(msg)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"{report} is no report of nncf-ext search ({type(error).__name__}: {error})."
        raise nncf.ValidationError(msg) from error
    if point == "chosen" and chosen is None:
        msg = f"In {report} no point keeps the constraints. Name one by its number: --point 0."
        raise nncf.ValidationError(msg)
    if point != "chosen" and not (point.isdecimal() and int(point) < len(points)):
        msg = f"--point is 'chosen', or a number from 0 to {len(points) - 1}; got {point!r}."
        raise nncf.ValidationError(msg)
    return groups, chosen if point == "chosen" else points[int(point)]
