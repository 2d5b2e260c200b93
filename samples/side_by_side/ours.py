"""Arms of this project: zeros, INT4, blocks trained to give what the dense ones gave, smaller structures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side.subject import GROUP, Subject

MLP_GROUP = 384  # MLP channels that go together: a quarter of a layer's

Recipe = Callable[[Subject], Any]
"""Makes a torch model in float32 of the subject."""


def sparse(
    subject: Subject,
    *,
    ratio: float,
    int4: bool = False,
    epochs: int = 0,
    allocation: str = "sensitivity",
    base: Recipe | None = None,
) -> Any:
    """
    :param subject: What is compressed.
    :param ratio: Share of zeros.
    :param int4: Put the other weights on the INT4 grid.
    :param epochs: Of reconstruction, block by block. The model then computes in bfloat16 where PyTorch is fast at it.
    :param allocation: How many zeros each layer gets.
    :param base: Compress this model in the place of the dense one.
    :return: The model by SPARSE_ADMM.
    """

    def make(journal: Path) -> Any:
        return _admm(subject, journal, ratio=ratio, int4=int4, epochs=epochs, allocation=allocation, base=base)

    kind, trained = "int4" if int4 else "", f"trained {epochs}" if epochs else ""
    name = f"{'' if base is None else base_name(base)} admm {ratio:.0%} {allocation} {kind} {trained}"
    return subject.compressed(name, make)


def _admm(
    subject: Subject,
    journal: Path,
    *,
    ratio: float,
    int4: bool,
    epochs: int = 0,
    allocation: str = "sensitivity",
    base: Recipe | None = None,
    keep_prerounding: bool = False,
) -> Any:
    import nncf
    import torch
    from evidence.text import batches

    import nncf_ext

    options: dict[str, Any] = {"quantization": nncf.CompressWeightsMode.INT4_SYM} if int4 else {}
    half = epochs > 0 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return nncf_ext.compress(
        subject.load(torch.bfloat16 if half else torch.float32) if base is None else base(subject),
        nncf_ext.CompressMode.SPARSE_ADMM,
        ratio=ratio,
        dataset=nncf.Dataset(batches(subject.calibration, 1)),
        subset_size=len(subject.calibration),
        resume=journal,
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            group_size=GROUP,
            reconstruction_epochs=epochs,
            allocation=allocation,
            keep_prerounding=keep_prerounding,
            **options,
        ),
    )


def recovered(subject: Subject, *, ratio: float, int4: bool = False, steps: int = 160) -> Any:
    """
    :param subject: What is compressed.
    :param ratio: Share of zeros.
    :param int4: Then put the other weights on the INT4 grid.
    :param steps: Of the recovery, 2,048 tokens each.
    :return: The model by SPARSE_ADMM, whose other weights then learned to predict what the dense model predicts.
    """

    def make(journal: Path) -> Any:
        import torch
        from evidence.recovery import Stream, recover

        from nncf_ext.upstream import has_fast_products

        student = sparse(subject, ratio=ratio)
        student.get_input_embeddings().requires_grad_(False)  # which is the head, too
        half = has_fast_products(torch.bfloat16)
        dense = subject.load(torch.bfloat16 if half else torch.float32)
        stream = Stream(subject.reading, batch=2048 // subject.length, seed=0, window=subject.length)
        options: dict[str, Any] = {"steps": steps, "learning_rate": 2e-4, "rank": None}
        return recover(student, dense, stream, **options, half=half, folder=journal)

    if int4:
        return sparse(subject, ratio=ratio, int4=True, base=partial(recovered, ratio=ratio, steps=steps))
    return subject.compressed(f"recovered {ratio:.0%} {steps}", make)


def recovered_on_grid(
    subject: Subject, *, ratio: float, steps: int = 120, rank: int = 64, base: Recipe | None = None
) -> Any:
    """
    :param subject: What is compressed.
    :param ratio: Share of zeros.
    :param steps: Of the recovery, 2,048 tokens each.
    :param rank: Of the adapters that learn.
    :param base: Put this model on the grid in the place of the dense one, which stays the teacher.
    :return: The model by SPARSE_ADMM and on the INT4 grid, whose codes then learned to predict what the dense model
        predicts.
    """

    def make(journal: Path) -> Any:
        import torch
        from evidence.recovery import Stream, recover_on_grid

        from nncf_ext.upstream import has_fast_products

        grid = _admm(subject, journal / "grid", ratio=ratio, int4=True, base=base, keep_prerounding=True)
        half = has_fast_products(torch.bfloat16)
        dense = subject.load(torch.bfloat16 if half else torch.float32)
        stream = Stream(subject.reading, batch=2048 // subject.length, seed=0, window=subject.length)
        options: dict[str, Any] = {"steps": steps, "learning_rate": 1e-3, "rank": rank}
        return recover_on_grid(grid, dense, stream, **options, half=half, folder=journal / "recovery")

    first = "" if base is None else f"{base_name(base)} "
    return subject.compressed(f"{first}recovered {ratio:.0%} int4 {steps} rank {rank}", make)


def pruned(subject: Subject, *, ratio: float) -> Any:
    """
    :param subject: What is compressed.
    :param ratio: Share of all parameters that goes.
    :return: The model by MultiPruner: one pool of parts, repaired by least squares.
    """

    def make(journal: Path) -> Any:
        import nncf
        import torch
        from evidence.text import batches

        import nncf_ext

        # Of the search alone: a quarter of the windows, and those cut in half.
        few = subject.calibration[::8, : subject.length // 2]
        return nncf_ext.compress(
            subject.load(torch.float32),
            nncf_ext.CompressMode.MULTIPRUNER,
            ratio=ratio,
            dataset=nncf.Dataset(batches(few, 4)),
            resume=journal,
            advanced_parameters=nncf_ext.AdvancedMultiPrunerParameters(
                joint_cost="parameters", compensate=True, mlp_group=MLP_GROUP, rescore_top=8
            ),
        )

    return subject.compressed(f"pruned {ratio:.0%}", make)


def packed(subject: Subject, folder: Path, *, model: Recipe, int8: bool = False, rest: str = "int8") -> None:
    """
    Writes a model as a packed OpenVINO folder.

    :param subject: What is compressed.
    :param folder: An empty folder.
    :param model: Makes the torch model.
    :param int8: Put weights that are still floating on INT8; zeros stay zero.
    :param rest: What the embedding, which is the head, too, is put on where other weights are sparse or quantized.
    """
    import nncf
    import openvino as ov

    import ov_ext.optimum
    from nncf_ext.upstream import is_wrapped

    made = model(subject)
    if not is_wrapped(made):  # NNCF's INT4 form is exported from float32, everything else as it is deployed
        made = made.bfloat16()
    ov_ext.optimum.export(made, subject.tokenizer, folder, rest=rest, overwrite=True)
    ir = ov.Core().read_model(folder / ov_ext.optimum.MODEL)
    _pack(nncf.compress_weights(ir, mode=nncf.CompressWeightsMode.INT8_SYM) if int8 else ir, folder)


def repacked(subject: Subject, folder: Path, *, stock: Callable[[Subject, Path], None]) -> None:
    """
    Writes a model of stock OpenVINO on the kernels of this project: the same codes and scales, so the same losses.

    :param subject: What is compressed.
    :param folder: An empty folder.
    :param stock: Writes it as a stock folder.
    """
    import openvino as ov

    import ov_ext.optimum

    stock(subject, folder)
    _pack(ov.Core().read_model(folder / ov_ext.optimum.MODEL), folder)


def _pack(ir: Any, folder: Path) -> None:
    import ov_ext
    import ov_ext.optimum

    ir, report = ov_ext.pack_sparse_weights(ir)
    (folder / "packing.txt").write_text(f"{report}\n", encoding="utf-8")
    ov_ext.save_model(ir, folder / ov_ext.optimum.MODEL)


def base_name(base: Recipe) -> str:
    """:return: Name of a recipe with its arguments."""
    if isinstance(base, partial):
        rest = "".join(f" {name} {value}" for name, value in base.keywords.items() if name != "ratio")
        return f"{base.func.__name__} {base.keywords['ratio']:.0%}{rest}"
    return base.__name__
