"""The front door of one-shot compression: checks what was asked for, finds the layers, runs the method."""

import copy
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import nncf
from torch import nn

from nncf_ext.method import Method, Request
from nncf_ext.parameters import CompressMode, parse_choice
from nncf_ext.structure.blocks import survey
from nncf_ext.structure.wrappers import check_plain, leave_inference_mode, plain_arithmetic, unwrapped, without_shells
from nncf_ext.weights.records import plan_of

if TYPE_CHECKING:
    from nncf_ext.structure.plan import StructurePlan

TModel = TypeVar("TModel", bound=nn.Module)


@plain_arithmetic()
def compress(
    model: TModel,
    mode: CompressMode,
    *,
    ratio: float,
    dataset: nncf.Dataset | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    subset_size: int = 128,
    do_copy: bool = False,
    resume: str | os.PathLike[str] | None = None,
    advanced_parameters: Any = None,
) -> TModel:
    """
    Makes a model smaller in one shot: zeros in its weights, on request on an INT4 grid, or parts of it removed.

    The sparse modes treat linear layers of the repeated blocks, or all linear layers of a model without such blocks;
    embeddings and the output head keep their weights. The result is the same model with other weights; on the grid,
    NNCF's own torch form, which exports to OpenVINO like the result of ``nncf.compress_weights``.

    MULTIPRUNER and MAMBA_SHEDDER give a model of plain modules with smaller shapes; :func:`structure_plan` says what is
    gone.

    :param model: Torch model with linear layers; a Hugging Face model, or any other. MULTIPRUNER and MAMBA_SHEDDER: a
        causal language model of a known architecture.
    :param mode: The method.
    :param ratio: Fraction of each layer's weights to zero, ``0 <= ratio < 1``; with 0, only quantization changes them.
        MULTIPRUNER, MAMBA_SHEDDER: fraction of all parameters to remove; the last group removed may exceed it.
        ACTIVATION_SPARSITY: fraction of each layer's inputs to replace, at most 0.99.
    :param dataset: Calibration data: items (after its transform) are what the model takes, a dictionary, a tuple or a
        tensor. Not needed by SPARSE_MAGNITUDE without quantization. MULTIPRUNER, MAMBA_SHEDDER: ``input_ids``
        ``[sequences, tokens]``.
    :param ignored_scope: Layers to leave untouched, by module path, pattern or type.
    :param subset_size: How many items of the dataset to use.
    :param do_copy: Work on a copy and leave `model` as it is. By default the model is changed in place.
    :param resume: Folder in which finished blocks, or steps, are kept. If it holds those of an interrupted run with the
        same model, data and settings, they are taken from there; the result is the same, bit for bit.
    :param advanced_parameters: Pattern, quantization and everything else of the method, in the method's own class.
    :return: The compressed model: `model` itself unless `do_copy`. What ``torch.compile``, ``DataParallel`` or
        ``DistributedDataParallel`` put around it is taken off: the model inside is compressed and returned.
    :raises nncf.ValidationError: The ratio is out of range, data is missing or empty, the model has no linear layer or
        is already compressed, settings contradict each other or the layers' shapes.
    :raises nncf.InvalidGroupSizeError: A layer cannot be cut into groups.
    :raises nncf.ParameterNotSupportedError: The mode, quantization or scope is of a kind that is not supported.
    :raises nncf.UnsupportedModelError: The model is not a torch model, or of a kind that cannot be treated: sharded,
        offloaded, compiled in part, quantized by others, with masks of ``torch.nn.utils.prune``.
    :raises KeyboardInterrupt: If interrupted; finished blocks are compressed, the others untouched
        (ACTIVATION_SPARSITY: all are as before).
    """
    mode = parse_choice(mode, CompressMode)
    if not isinstance(model, nn.Module):
        msg = f"Asked to compress a {type(model).__name__}; compress() takes a torch.nn.Module."
        raise nncf.UnsupportedModelError(msg)
    model = unwrapped(model)  # type: ignore[assignment]  # what the user built the wrapper around
    check_plain(model)
    if hasattr(model, "peft_config"):
        msg = "The model carries adapters. Merge or remove them first: compress() would treat them as the model's own."
        raise nncf.UnsupportedModelError(msg)
    row = mode.method
    if not row.least <= ratio < row.below:
        msg = f"ratio is the fraction of {row.ratio} and must be in [{row.least:g}, {row.below:g}); got {ratio}."
        raise nncf.ValidationError(msg)
    if dataset is not None and not isinstance(dataset, nncf.Dataset):
        msg = (
            f"dataset must be an nncf.Dataset; got {type(dataset).__name__}: wrap it in nncf.Dataset(items, transform)."
        )
        raise nncf.ValidationError(msg)
    if subset_size < 1:
        msg = f"subset_size is a number of calibration items, at least 1; got {subset_size}."
        raise nncf.ValidationError(msg)

    expected = import_class(row.parameters)
    parameters = expected() if advanced_parameters is None else advanced_parameters
    if not isinstance(parameters, expected):
        msg = f"{mode.value} takes advanced_parameters of class {expected.__name__}; got {type(parameters).__name__}."
        raise nncf.ParameterNotSupportedError(msg)
    folder = None if resume is None else Path(resume)
    method: Method = import_class(row.home)(Request(mode, ratio, dataset, subset_size, folder, parameters))
    method.check(model, survey(model, ignored_scope))
    if do_copy:
        try:
            model = copy.deepcopy(model)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            msg = (
                f"{type(model).__name__} cannot be copied ({error}). Without do_copy it is changed in place; copy it "
                "in your own way before."
            )
            raise nncf.ValidationError(msg) from error
    else:
        leave_inference_mode(model)
    method.apply(model, survey(model, ignored_scope))
    return model


def import_class(place: str) -> Any:
    """
    :param place: ``"module:class"`` of a mode's row.
    :return: The class. Its module is imported now, and those of other methods are not.
    """
    module, _, name = place.partition(":")
    return getattr(import_module(f"nncf_ext.algorithms.{module}"), name)


def structure_plan(model: nn.Module) -> "StructurePlan":
    """
    :param model: Result of :func:`compress` with MULTIPRUNER or MAMBA_SHEDDER.
    :return: What of the dense model is left, step by step, with scores and costs. ``plan.save(path)`` keeps it.
    :raises nncf.ValidationError: The model was not cut in this process.
    """
    plan = plan_of(without_shells(model))
    if plan is None:
        msg = f"{type(model).__name__} was not cut by compress() in this process, so there is no plan of it."
        raise nncf.ValidationError(msg)
    return plan
