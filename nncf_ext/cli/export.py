"""
``nncf-ext export``: from a folder of Hugging Face to one of OpenVINO.

The one place where the two packages meet: what ``nncf_ext`` loads goes to ``ov_ext`` as an ordinary model in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nncf_ext.cli.folders import Dtype, ModelDir, OutDir, TrustRemoteCode, load_model, show, user_errors


def export_folder(
    model_dir: ModelDir,
    out_dir: OutDir,
    pack: Annotated[bool, typer.Option("--pack", help="Pack sparse weights, as ov-ext pack does by default.")] = False,
    rest: Annotated[
        str,
        typer.Option(
            help="Embedding and head of a compressed model, where they are not: int8, int4, or none to keep them."
        ),
    ] = "int8",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the whole OpenVINO folder OUT_DIR.")] = False,
) -> None:
    """
    Export a language model, compressed or not, to OpenVINO: the model, its tokenizer and its settings in one folder.

    MODEL_DIR is a Hugging Face folder, or one that nncf-ext wrote; OUT_DIR a new folder, for OpenVINO, OpenVINO GenAI
    and Optimum-Intel. For example:
    nncf-ext export smaller ir --pack
    """
    with user_errors():
        check_extension(out_dir, overwrite, pack)
        model, tokenizer = load_model(model_dir, dtype, trust_remote_code)
        write_folder(model, tokenizer, out_dir, rest=None if rest == "none" else rest, pack=pack, overwrite=overwrite)
    typer.echo(f"{out_dir}: run it by ov-ext generate {out_dir} --prompt TEXT, OpenVINO GenAI or Optimum-Intel.")


def check_extension(out_dir: Path, overwrite: bool, pack: bool = True) -> None:
    """
    What must be so before long work.

    :param out_dir: The folder to write.
    :param overwrite: Whether to replace one that is there.
    :param pack: Whether weights will be packed, which needs the extension.
    :raises nncf.ValidationError: The folder cannot be written, or there is no extension.
    """
    import ov_ext
    from ov_ext.folder import refuse_existing

    with _said_to_users():
        refuse_existing(out_dir, overwrite)
        if pack:
            ov_ext.extension_path()


def write_folder(
    model: Any,
    tokenizer: Any,
    out_dir: Path,
    *,
    rest: str | None,
    pack: bool,
    overwrite: bool,
    also: Callable[[Path], None] | None = None,
) -> None:
    """
    Exports a model as a complete OpenVINO folder.

    :param model: A Hugging Face model.
    :param tokenizer: Its tokenizer.
    :param out_dir: The folder.
    :param rest: What embedding and head of a compressed model are put on.
    :param pack: Pack weights for the extension.
    :param overwrite: Replace a folder that is there.
    :param also: Writes further files into the folder before it takes its place.
    :raises nncf.ValidationError: It cannot be exported or written.
    """
    import openvino as ov

    import ov_ext
    import ov_ext.optimum
    from ov_ext.card import PACKED, write_card
    from ov_ext.folder import whole_folder

    reports = []

    def pack_weights(ir: ov.Model) -> bool:
        reports.append(ov_ext.pack_sparse_weights(ir)[1])
        return bool(reports[-1].replaced)

    with _said_to_users():
        with whole_folder(out_dir, overwrite) as draft:
            ov_ext.optimum.export(model, tokenizer, draft, rest=rest, change=pack_weights if pack else None)
            if any(report.replaced for report in reports):
                write_card(draft, PACKED)
            if also is not None:
                also(draft)
        show(*(report.summary() for report in reports))


def in_openvino(model: Any, example: dict[str, Any]) -> Any:
    """
    A language model as it will be run, without its cache: for timing a token.

    :param model: A Hugging Face model in float32.
    :param example: Its inputs.
    :return: An ``openvino.Model``, packed, with the shapes of the example.
    """
    import ov_ext

    return ov_ext.convert_packed(model, example)


@contextmanager
def _said_to_users() -> Iterator[None]:
    """What ov_ext says to users, as an error of NNCF."""
    import nncf

    import ov_ext

    try:
        yield
    except (ValueError, ov_ext.ExtensionUnavailableError) as error:
        raise nncf.ValidationError(str(error)) from error
