"""
``nncf-ext export``: from a folder of Hugging Face to one of OpenVINO.

The one place where the two packages meet: what ``nncf_ext`` loads goes to ``ov_ext`` as an ordinary model in memory.
"""

from typing import Annotated

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
        import nncf
        import openvino as ov

        import ov_ext
        import ov_ext.optimum
        from ov_ext.card import PACKED, write_card
        from ov_ext.folder import refuse_existing, whole_folder

        reports = []

        def pack_weights(ir: ov.Model) -> bool:
            reports.append(ov_ext.pack_sparse_weights(ir)[1])
            return bool(reports[-1].replaced)

        left = None if rest == "none" else rest
        try:
            refuse_existing(out_dir, overwrite)
            if pack:
                ov_ext.extension_path()  # or an error before the work
            model, tokenizer = load_model(model_dir, dtype, trust_remote_code)
            with whole_folder(out_dir, overwrite) as draft:
                ov_ext.optimum.export(model, tokenizer, draft, rest=left, change=pack_weights if pack else None)
                if any(report.replaced for report in reports):
                    write_card(draft, PACKED)
            show(*(report.summary() for report in reports))
        except (ValueError, ov_ext.ExtensionUnavailableError) as error:  # what ov_ext says to users
            raise nncf.ValidationError(str(error)) from error
    typer.echo(f"{out_dir}: run it by ov-ext generate {out_dir} --prompt TEXT, OpenVINO GenAI or Optimum-Intel.")
