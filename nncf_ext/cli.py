"""The command ``nncf-ext``: the public functions on folders of Hugging Face models."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nncf_ext.parameters import CompressMode

if TYPE_CHECKING:
    import nncf

app = typer.Typer(help="Compress PyTorch language models for OpenVINO and NNCF.", no_args_is_help=True)


_REMOVAL = (CompressMode.MULTIPRUNER, CompressMode.MAMBA_SHEDDER)


@app.callback()
def main() -> None:
    """Compress PyTorch language models for OpenVINO and NNCF."""


@app.command()
def compress(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face folder with safetensors weights and a tokenizer.")],
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    mode: Annotated[
        CompressMode, typer.Option(help="Which weights become zero, or what goes.")
    ] = CompressMode.SPARSE_GPT,
    ratio: Annotated[float, typer.Option(help="Fraction of zeros, or of parameters to remove.")] = 0.5,
    pattern: Annotated[str | None, typer.Option(help="N:M: keep N of every M weights, such as 2:4.")] = None,
    quantization: Annotated[str | None, typer.Option(help="int4_sym, or nothing for floating weights.")] = None,
    group_size: Annotated[int, typer.Option(help="Input columns with one scale: 64 or 128.")] = 128,
    dataset: Annotated[Path | None, typer.Option(help="UTF-8 text file to calibrate on.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows, spread over the text.")] = 128,
    window: Annotated[int | None, typer.Option(help="Tokens in a window; default: the model's, 2048 at most.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of layer names to leave alone; repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    resume: Annotated[Path | None, typer.Option(help="Folder that keeps finished blocks; continues from it.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code from MODEL_DIR.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT_DIR if it exists.")] = False,
) -> None:
    """
    Make weights of a language model zero, optionally put the rest on the INT4 grid, or remove parts; save the model.

    Load OUT_DIR by nncf_ext.load_pretrained(OUT_DIR). Without quantization, and where all layers have one size, it is
    an ordinary Hugging Face folder. With multipruner and mamba_shedder, structure_plan.json says what is left.
    """
    import nncf
    from rich.console import Console
    from rich.markup import escape

    from nncf_ext.compression import structure_plan
    from nncf_ext.report import compression_report
    from nncf_ext.saving.checkpoint import save_pretrained

    try:
        if out_dir.exists() and not overwrite:
            msg = f"{out_dir} exists. Name a new folder, or pass --overwrite."
            raise nncf.ValidationError(msg)
        model, tokenizer = _load(model_dir, dtype, trust_remote_code)
        model = _compress(
            model,
            mode,
            ratio=ratio,
            dataset=None if dataset is None else _text_dataset(dataset, tokenizer, samples, window, model),
            ignored_scope=nncf.IgnoredScope(patterns=ignore) if ignore else None,
            subset_size=samples,
            resume=resume,
            pattern=pattern,
            quantization=quantization,
            group_size=group_size,
        )
        report = compression_report(model)
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as aside:
            save_pretrained(model, Path(aside) / "model")
            tokenizer.save_pretrained(Path(aside) / "model")
            (Path(aside) / "model" / "compression_report.json").write_text(json.dumps(report.to_dict(), indent=1))
            if mode in _REMOVAL:
                structure_plan(model).save(Path(aside) / "model" / "structure_plan.json")
            if overwrite and out_dir.exists():
                shutil.rmtree(out_dir)
            (Path(aside) / "model").rename(out_dir)
    except _user_errors() as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
    # A file or a pipe has no width of its own, and names of weights are long.
    Console(width=None if sys.stdout.isatty() else 160).print(report.table())


def _compress(
    model: Any, mode: CompressMode, *, pattern: str | None, quantization: str | None, group_size: int, **settings: Any
) -> Any:
    import nncf

    from nncf_ext.algorithms.sparse_weights.parameters import AdvancedSparseWeightsParameters
    from nncf_ext.compression import compress

    if mode in _REMOVAL:
        if pattern is not None or quantization is not None:
            msg = f"{mode.value} removes structure; it takes no --pattern and no --quantization. Compress its result."
            raise nncf.ParameterNotSupportedError(msg)
        return compress(model, mode, **settings)
    try:
        grid = None if quantization is None else nncf.CompressWeightsMode(quantization)
    except ValueError:
        msg = f"Unknown quantization {quantization!r}; int4_sym is supported."
        raise nncf.ParameterNotSupportedError(msg) from None
    advanced = AdvancedSparseWeightsParameters(pattern=pattern, quantization=grid, group_size=group_size)
    return compress(model, mode, advanced_parameters=advanced, **settings)


def _load(model_dir: Path, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Loads a model and its tokenizer, from safetensors files that lie in the folder, and checks that they match."""
    import nncf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nncf_ext.saving.checkpoint import check_weight_files

    check_weight_files(model_dir)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        msg = f"Unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16."
        raise nncf.ValidationError(msg)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, **options)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, use_safetensors=True, **options)
    except (ValueError, KeyError, ImportError) as error:
        msg = (
            f"{model_dir} cannot be loaded as a causal language model with a tokenizer: {error} If it needs code that "
            "lies in the folder, and you trust that code, pass --trust-remote-code."
        )
        raise nncf.ValidationError(msg) from error
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.weight.shape[0]
    highest: int = max(tokenizer.get_vocab().values(), default=-1) + 1
    # Embeddings are padded to a round size, by up to about 1000 rows or some percent.
    if not highest <= rows <= highest + max(1024, rows // 20):
        msg = (
            f"The tokenizer of {model_dir} does not match the model: it has {highest} tokens and the embedding has "
            f"{rows} rows. Put the tokenizer the model was trained with into the folder."
        )
        raise nncf.ValidationError(msg)
    return model, tokenizer


def _text_dataset(path: Path, tokenizer: Any, samples: int, window: int | None, model: Any) -> "nncf.Dataset":
    """Cuts a text into windows of equal length, as many as asked for, evenly spread over the text."""
    import nncf
    import torch

    if not path.is_file():
        msg = f"There is no calibration text {path}."
        raise nncf.ValidationError(msg)
    longest = getattr(model.config, "max_position_embeddings", 2048)
    length = min(longest, 2048) if window is None else window
    if not 1 <= length <= longest:
        msg = f"--window is a number of tokens from 1 to the model's {longest}; got {length}."
        raise nncf.ValidationError(msg)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text: {error}."
        raise nncf.ValidationError(msg) from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(samples, len(tokens) // length)
    if count < 1:
        msg = f"{path} gives {len(tokens)} tokens, less than one window of {length}. Use a longer text or --window."
        raise nncf.ValidationError(msg)
    stride = (len(tokens) - length) // max(count - 1, 1)
    starts = [index * max(stride, length) for index in range(count)]
    return nncf.Dataset([{"input_ids": torch.tensor([tokens[start : start + length]])} for start in starts])


def _user_errors() -> tuple[type[Exception], ...]:
    import nncf

    return (
        nncf.ValidationError,
        nncf.UnsupportedModelError,
        nncf.ParameterNotSupportedError,
        nncf.InvalidGroupSizeError,
        OSError,
    )


if __name__ == "__main__":
    app()
