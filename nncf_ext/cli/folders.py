"""What all commands share: folders in, a folder out that is whole or not there, and errors in one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from nncf_ext.parameters import MergeMode

ModelDir = Annotated[Path, typer.Argument(help="Hugging Face folder with safetensors weights and a tokenizer.")]
OutDir = Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from MODEL_DIR.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the whole model folder, or file, that is there.")]
Adapter = Annotated[Path, typer.Option(help="Folder of the LoRA adapter, as PEFT saves it.")]
TrainedAs = Annotated[
    MergeMode | None,
    typer.Option(help="How the adapter was made mergeable for training (make_mergeable); nothing for plain LoRA."),
]
Grid = Annotated[
    Path | None, typer.Option(help="With quant_aware: folder of the INT4 model whose grid the adapter was trained on.")
]
Start = Annotated[str, typer.Option(help="With quant_aware: grid or nearest, as in training.")]

UNLIMITED = 10_000  # columns of a file or a pipe, which has no width of its own; tables take what they need
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_EXTRAS = {
    **dict.fromkeys(
        ("torch", "nncf", "safetensors", "transformers", "peft", "optimum", "openvino_tokenizers", "datasets"), "llm"
    ),
    "optuna": "search",
    "gguf": "samples",
    "matplotlib": "plots",
}


@contextmanager
def user_errors() -> Iterator[None]:
    """
    Ends the command with exit code 2 and one line on stderr where the user, or what was given, is to blame.
    """
    try:
        import nncf

        hush("nncf")
        yield
    except (typer.Exit, typer.Abort):
        raise
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            _refuse(str(error), error)
        _refuse(f"{error.name} is not installed. Use: pip install 'nncf-ext[{_EXTRAS[error.name]}]'.", error)
    except BrokenPipeError:  # nobody reads what is printed any more: as with any command, no error
        raise
    except OSError as error:
        _refuse(str(error), error)
    except Exception as error:
        import nncf

        known = (
            nncf.ValidationError,
            nncf.UnsupportedModelError,
            nncf.ParameterNotSupportedError,
            nncf.InvalidGroupSizeError,
        )
        # Of what nobody expected, the kind says more than the text; the rest is for the log.
        _refuse(str(error) if isinstance(error, known) else f"{type(error).__name__}: {error}", error)


def hush(library: str) -> None:
    """
    Without ``--verbose``, a library logs errors only, from now on. For those that set their level when imported.

    :param library: Name of its logger; it has been imported.
    """
    if not _is_verbose():
        logging.getLogger(library).setLevel(logging.ERROR)


def _is_verbose() -> bool:
    return logging.getLogger("nncf_ext").isEnabledFor(logging.DEBUG)


def _refuse(text: str, error: Exception) -> NoReturn:
    from rich.console import Console
    from rich.markup import escape

    logging.getLogger("nncf_ext").debug("Where the error came from:", exc_info=error)
    Console(stderr=True).print(f"[red]Error:[/red] {escape(text)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2) from error


def check_new(out: Path, overwrite: bool) -> None:
    """
    :param out: The file that a command will write.
    :param overwrite: Whether it may replace one that is there.
    :raises nncf.ValidationError: Something is there.
    """
    import nncf

    if out.exists() and not overwrite:
        msg = f"{out} exists. Name a new {'folder' if out.is_dir() else 'file'}, or pass --overwrite."
        raise nncf.ValidationError(msg)
    if out.is_dir():
        msg = f"{out} is a folder. Name a file."
        raise nncf.ValidationError(msg)


def check_new_folder(out: Path, overwrite: bool) -> None:
    """
    :param out: The folder that a command will write.
    :param overwrite: Whether it may replace a model, or an adapter, that is there.
    :raises nncf.ValidationError: Something is there, and may not be replaced, or is none of these.
    """
    import nncf

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
        msg = f"{out} exists and holds no model, so it is not overwritten. Remove it first, or name a new folder."
        raise nncf.ValidationError(msg)
    if not overwrite:
        msg = f"{out} exists. Name a new folder, or pass --overwrite."
        raise nncf.ValidationError(msg)


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """
    :param out: The folder to write.
    :param overwrite: Whether to replace a model that is there.
    :return: An empty folder, which gets this name when the block has ended without an error.
    :raises nncf.ValidationError: See :func:`check_new_folder`.
    """
    from nncf_ext.drafts import whole_folder
    from nncf_ext.files import let_others_read

    check_new_folder(out, overwrite)
    with whole_folder(out) as draft:
        yield draft
        let_others_read(draft)
        check_new_folder(out, overwrite)  # it may have appeared meanwhile


def save_model(model: Any, tokenizer: Any, out: Path, overwrite: bool, plan: Any = None) -> None:
    """
    Writes a complete folder: weights, their report, tokenizer. Prints the report: its summary, with ``--verbose`` every
    weight.

    :param model: A Hugging Face model.
    :param tokenizer: Its tokenizer.
    :param out: The folder to write.
    :param overwrite: Whether to replace a model that is there.
    :param plan: The :class:`nncf_ext.StructurePlan` by which the model was cut, kept as ``structure_plan.json``.
    """
    from nncf_ext.saving.checkpoint import save_pretrained
    from nncf_ext.saving.report_file import REPORT, read_report

    with new_folder(out, overwrite) as folder:
        save_pretrained(model, folder)
        report = read_report(folder)
        tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / "structure_plan.json")
    show(report.table() if _is_verbose() else report.summary())
    typer.echo(f"{out}: every weight in {REPORT}.")


def show(*what: Any) -> None:
    """
    Prints tables and text: as wide as the terminal, or unbroken where there is none.

    :param what: Anything that rich prints.
    """
    import sys

    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(*what)


def load_model(folder: Path, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """
    Loads a model and its tokenizer, from safetensors files that lie in the folder, and checks that they match.

    :param folder: Hugging Face folder, or one of ``nncf_ext.save_pretrained``.
    :param dtype: A name of a floating type, or ``"auto"``.
    :param trust_remote_code: Run code that lies in the folder.
    :return: The model in evaluation mode, and the tokenizer.
    :raises nncf.ValidationError: One of them cannot be loaded, or they do not match.
    :raises nncf.UnsupportedModelError: The weights were quantized by another tool.
    """
    import nncf

    if dtype not in _DTYPES:
        msg = f"Unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16."
        raise nncf.ValidationError(msg)
    import torch
    from transformers import AutoTokenizer

    from nncf_ext.saving.loading import load_pretrained

    try:
        model: Any = load_pretrained(
            folder, dtype=None if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, ImportError) as error:
        msg = f"{folder} cannot be loaded as a causal language model with a tokenizer: {error}"
        if not trust_remote_code and _brings_code(folder):
            msg += " It names code that lies in the folder. If you trust that code, pass --trust-remote-code."
        raise nncf.ValidationError(msg) from error
    rows: int = model.get_input_embeddings().weight.shape[0]
    numbers = tokenizer.get_vocab().values()
    highest: int = max(numbers, default=-1) + 1
    # A few tokens without a row are harmless until one occurs. Embeddings are padded to a round size, by up to about
    # 1000 rows or some percent.
    without = sum(number >= rows for number in numbers)
    if without > max(64, rows // 20) or rows > highest + max(1024, rows // 20):
        msg = (
            f"The tokenizer of {folder} does not match the model: it has {highest} tokens and the embedding has "
            f"{rows} rows. Put the tokenizer the model was trained with into the folder."
        )
        raise nncf.ValidationError(msg)
    return model, tokenizer


def _brings_code(folder: Path) -> bool:
    from nncf_ext.saving.folder import read_object

    files = (folder / name for name in ("config.json", "tokenizer_config.json"))
    return any("auto_map" in read_object(file) for file in files if file.is_file())


def load_adapted(
    folder: Path, adapter: Path, mode: MergeMode | None, grid: Path | None, start: str, dtype: str, trust: bool
) -> tuple[Any, Any]:
    """
    Loads a model and puts a saved adapter on it, as it was in training.

    :param folder: Folder of the model.
    :param adapter: Folder of the adapter.
    :param mode: How it was made mergeable; None: not at all.
    :param grid: QUANT_AWARE: folder of the packed model.
    :param start: QUANT_AWARE: ``"grid"`` or ``"nearest"``.
    :param dtype: A name of a floating type, or ``"auto"``.
    :param trust: Run code that lies in the folder of the model.
    :return: PEFT model in evaluation mode, and the tokenizer.
    :raises nncf.ValidationError: There is no adapter in safetensors, it does not fit the model, or see
        :func:`load_model`.
    """
    import nncf

    weights = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not weights.is_file():
        msg = f"{adapter} is no folder of an adapter: it needs adapter_config.json and adapter_model.safetensors."
        raise nncf.ValidationError(msg)
    if grid is not None and mode is not MergeMode.QUANT_AWARE:
        msg = "--grid belongs to --mode quant_aware."
        raise nncf.ParameterNotSupportedError(msg)
    base, tokenizer = load_model(folder, dtype, trust)
    from peft import PeftModel
    from safetensors import safe_open

    from nncf_ext.algorithms.sqft.algorithm import make_mergeable
    from nncf_ext.algorithms.sqft.parameters import AdvancedSqftParameters
    from nncf_ext.memory import is_out_of_memory
    from nncf_ext.saving.loading import load_pretrained

    try:
        model = PeftModel.from_pretrained(base, adapter)
    except (ValueError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        msg = f"The adapter of {adapter} does not fit the model of {folder}: {error}"
        raise nncf.ValidationError(msg) from error
    if mode is MergeMode.SPARSE:
        make_mergeable(model, mode)
    elif mode is MergeMode.QUANT_AWARE:
        with safe_open(weights, "pt") as file:
            trained = any("lora_scales" in name for name in file.keys())  # noqa: SIM118
        parameters = AdvancedSqftParameters(trainable_scales=trained, start=start)  # type: ignore[arg-type]
        packed = None if grid is None else load_pretrained(grid)
        make_mergeable(model, mode, grid=packed, advanced_parameters=parameters)
        if trained:
            # Scales have a place only now.
            model.load_adapter(str(adapter), "default")
    return model.eval(), tokenizer
