"""``nncf-ext merge``."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from nncf_ext.cli.folders import (
    Adapter,
    Dtype,
    Grid,
    ModelDir,
    OutDir,
    Overwrite,
    Start,
    TrustRemoteCode,
    check_new_folder,
    load_adapted,
    save_model,
    user_errors,
)
from nncf_ext.parameters import MergeMode


class Merging(StrEnum):
    """The modes of ``nncf_ext.merge``, and PEFT's own merge, which keeps no zeros."""

    SPARSE = MergeMode.SPARSE.value
    QUANT_AWARE = MergeMode.QUANT_AWARE.value
    PLAIN = "plain"


def merge_folder(
    model_dir: ModelDir,
    out_dir: OutDir,
    adapter: Adapter,
    mode: Annotated[
        Merging,
        typer.Option(help="What must stay: sparse: zeros; quant_aware: zeros and the INT4 grid; plain: nothing."),
    ] = Merging.SPARSE,
    masked: Annotated[
        bool, typer.Option("--masked", help="With sparse: the adapter was trained with its zeros (make_mergeable).")
    ] = False,
    grid: Grid = None,
    start: Start = "grid",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """
    Merge a LoRA adapter into its model, without losing a zero, or a point of the INT4 grid; save the model.

    MODEL_DIR is the folder of the model that the adapter was trained on (with quant_aware the floating partner of
    --grid), OUT_DIR a new folder. For example: nncf-ext merge sparse_model merged --adapter adapter
    """
    with user_errors():
        import nncf

        from nncf_ext.algorithms.sqft.merging import merge

        check_new_folder(out_dir, overwrite)
        if masked and mode is not Merging.SPARSE:
            msg = f"--masked goes with --mode sparse; got --mode {mode.value}, which says how the adapter was trained."
            raise nncf.ValidationError(msg)
        contract = None if mode is Merging.PLAIN else MergeMode(mode.value)
        # A delta that was trained without a mask is masked by merge(), and the report tells the error of that.
        trained = contract if masked or contract is MergeMode.QUANT_AWARE else None
        model, tokenizer = load_adapted(model_dir, adapter, trained, grid, start, dtype, trust_remote_code)
        merged = _merge_plainly(model) if contract is None else merge(model, contract)
        save_model(merged, tokenizer, out_dir, overwrite)


def _merge_plainly(model: Any) -> Any:
    import nncf

    from nncf_ext.weights.int4 import decompressors

    if decompressors(model.get_base_model()):
        msg = "The weights of MODEL_DIR are packed: a delta cannot be added to codes. Use --mode quant_aware --grid."
        raise nncf.ValidationError(msg)
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        msg = f"The adapter cannot be merged: {error}"
        raise nncf.ValidationError(msg) from error
