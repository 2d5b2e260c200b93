"""``nncf-ext compress``."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from nncf_ext.cli.folders import (
    Dtype,
    ModelDir,
    OutDir,
    Overwrite,
    TrustRemoteCode,
    check_new_folder,
    load_model,
    save_model,
    user_errors,
)
from nncf_ext.cli.text import SOURCES, Column, DatasetConfig, Samples, Source, Split, Window, read_windows
from nncf_ext.parameters import CompressMode


def _ratio_help() -> str:
    words: dict[str, list[str]] = {}
    for mode in CompressMode:
        words.setdefault(mode.method.ratio, []).append(mode.value)
    return "Fraction of " + "; ".join(f"{ratio} ({', '.join(modes)})" for ratio, modes in words.items()) + "."


def compress_folder(
    model_dir: ModelDir,
    out_dir: OutDir,
    mode: Annotated[CompressMode, typer.Option(help="The method.")] = CompressMode.SPARSE_ADMM,
    ratio: Annotated[float, typer.Option(help=_ratio_help())] = 0.5,
    pattern: Annotated[str | None, typer.Option(help="N:M: keep N of every M weights, such as 2:4.")] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How many zeros each layer gets: uniform (default); sensitivity: fewer where the model suffers more, "
            "which is measured first; outliers."
        ),
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="int4_sym, or nothing for floating weights.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input columns with one scale: 64 or 128 (default).")] = None,
    group_size_fallback: Annotated[
        str | None,
        typer.Option(
            help="Layers whose inputs the group does not divide: error (default); adjust: smaller groups, or floating "
            "where none divides them; ignore: floating."
        ),
    ] = None,
    reconstruction_epochs: Annotated[
        int | None,
        typer.Option(
            help="Train each block's weights that stay to give what the dense model gives, so often on all windows. "
            "Default: 0, not at all."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help=f"What to calibrate on: {SOURCES}.")] = None,
    dataset_config: DatasetConfig = None,
    split: Split = None,
    column: Column = None,
    samples: Samples = 128,
    window: Window = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of layer names to leave alone; repeatable.")] = None,
    dtype: Dtype = "auto",
    resume: Annotated[Path | None, typer.Option(help="Folder that keeps finished work; continues from it.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """
    Make weights of a language model zero, optionally put the rest on the INT4 grid, or remove parts; save the model.

    MODEL_DIR is a Hugging Face folder with safetensors weights and a tokenizer, OUT_DIR a new folder. For example:
    nncf-ext compress model smaller --mode sparse_admm --ratio 0.5 --quantization int4_sym --dataset text.txt

    Load OUT_DIR by nncf_ext.load_pretrained(OUT_DIR). Without quantization, and where all layers have one size, it is
    an ordinary Hugging Face folder. Where parts were removed, structure_plan.json says what is left.
    """
    with user_errors():
        import nncf

        from nncf_ext.compression import compress
        from nncf_ext.weights.records import plan_of

        check_new_folder(out_dir, overwrite)
        parameters = _parameters(
            mode,
            pattern=pattern,
            allocation=allocation,
            quantization=quantization,
            group_size=group_size,
            group_size_fallback_mode=group_size_fallback,
            reconstruction_epochs=reconstruction_epochs,
        )
        model, tokenizer = load_model(model_dir, dtype, trust_remote_code)
        source = None if dataset is None else Source(dataset, dataset_config, split, column)
        items = None if source is None else read_windows(source, tokenizer, samples, window, model)
        model = compress(
            model,
            mode,
            ratio=ratio,
            dataset=None if items is None else nncf.Dataset(items),
            ignored_scope=nncf.IgnoredScope(patterns=ignore) if ignore else None,
            subset_size=samples,
            resume=resume,
            advanced_parameters=parameters,
        )
        save_model(model, tokenizer, out_dir, overwrite, plan_of(model))


def _parameters(mode: CompressMode, **options: Any) -> Any:
    """Advanced parameters of the mode, with the options that were given."""
    import nncf

    from nncf_ext.compression import import_class

    given = {name: value for name, value in options.items() if value is not None}

    def takes(other: CompressMode) -> bool:
        return given.keys() <= {field.name for field in fields(import_class(other.method.parameters))}

    if not takes(mode):
        names = ", ".join(f"--{name.removesuffix('_mode').replace('_', '-')}" for name in given)
        able = ", ".join(other.value for other in CompressMode if takes(other))
        msg = f"Asked for {names} with mode {mode.value}, which does not take it; {able or 'no mode'} would."
        raise nncf.ParameterNotSupportedError(msg)
    return import_class(mode.method.parameters)(**given)
