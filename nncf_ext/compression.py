"""The front door of one-shot compression: checks what was asked for, finds the layers, runs the method."""

import copy
import os
from typing import TypeVar

import nncf
from torch import nn

from nncf_ext.algorithms.mamba_shedder.algorithm import MambaShedder
from nncf_ext.algorithms.mamba_shedder.parameters import AdvancedMambaShedderParameters
from nncf_ext.algorithms.multipruner.algorithm import MultiPruner
from nncf_ext.algorithms.multipruner.parameters import AdvancedMultiPrunerParameters
from nncf_ext.algorithms.sparse_weights.algorithm import SparseWeights
from nncf_ext.algorithms.sparse_weights.parameters import AdvancedSparseWeightsParameters
from nncf_ext.parameters import CompressMode
from nncf_ext.structure.blocks import survey
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.weights.records import LayerRecord, plan_of, record_of, set_record

AdvancedParameters = AdvancedSparseWeightsParameters | AdvancedMultiPrunerParameters | AdvancedMambaShedderParameters

TModel = TypeVar("TModel", bound=nn.Module)


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
    advanced_parameters: AdvancedParameters | None = None,
) -> TModel:
    """
    Makes a model smaller in one shot: zeros in its weights, on request on an INT4 grid, or parts of it removed.

    The sparse modes treat linear layers of the repeated blocks, or all linear layers of a model without such blocks;
    embeddings and the output head keep their weights. The result is the same model with other weights; on the grid,
    NNCF's own torch form, which exports to OpenVINO like the result of ``nncf.compress_weights``.

    MULTIPRUNER and MAMBA_SHEDDER give a model of plain modules with smaller shapes; :func:`structure_plan` says what is
    gone.

    :param model: Torch model with linear layers; a Hugging Face model, or any other. MULTIPRUNER and MAMBA_SHEDDER: a
        causal language model of a known family.
    :param mode: The method.
    :param ratio: Fraction of each layer's weights to zero, ``0 <= ratio < 1``; with 0, only quantization changes them.
        MULTIPRUNER, MAMBA_SHEDDER: fraction of all parameters to remove; the last group removed may exceed it.
    :param dataset: Calibration data: items (after its transform) are what the model takes, a dictionary, a tuple or a
        tensor. Not needed by SPARSE_MAGNITUDE without quantization. MULTIPRUNER, MAMBA_SHEDDER: ``input_ids``
        ``[sequences, tokens]``.
    :param ignored_scope: Layers to leave untouched, by module path, pattern or type.
    :param subset_size: How many items of the dataset to use.
    :param do_copy: Work on a copy and leave `model` as it is. By default the model is changed in place.
    :param resume: Folder in which finished blocks, or steps, are kept. If it holds those of an interrupted run with the
        same model, data and settings, they are taken from there; the result is the same, bit for bit.
    :param advanced_parameters: Pattern, quantization and everything else of the method, in the method's own class.
    :return: The compressed model: `model` itself unless `do_copy`.
    :raises nncf.ValidationError: The ratio is out of range, data is missing or empty, the model has no linear layer or
        is already compressed, settings contradict each other or the layers' shapes.
    :raises nncf.InvalidGroupSizeError: A layer cannot be cut into groups.
    :raises nncf.ParameterNotSupportedError: The mode, quantization or scope is of a kind that is not supported.
    :raises nncf.UnsupportedModelError: The model is not a torch model, or of a kind that cannot be treated.
    :raises KeyboardInterrupt: If interrupted; finished blocks are compressed, the others untouched.
    """
    try:
        mode = CompressMode(mode)
    except ValueError:
        msg = f"Unknown mode {mode!r}. Modes: {', '.join(f'CompressMode.{each.name}' for each in CompressMode)}."
        raise nncf.ParameterNotSupportedError(msg) from None
    if not isinstance(model, nn.Module):
        msg = f"Asked to compress a {type(model).__name__}; compress() takes a torch.nn.Module."
        raise nncf.UnsupportedModelError(msg)
    if hasattr(model, "peft_config"):
        msg = "The model carries adapters. Merge or remove them first: zeros would go into the adapters as well."
        raise nncf.UnsupportedModelError(msg)
    if not 0 <= ratio < 1:
        msg = f"ratio is the fraction of weights to zero and must be in [0, 1); got {ratio}."
        raise nncf.ValidationError(msg)
    if dataset is not None and not isinstance(dataset, nncf.Dataset):
        msg = (
            f"dataset must be an nncf.Dataset; got {type(dataset).__name__}: wrap it in nncf.Dataset(items, transform)."
        )
        raise nncf.ValidationError(msg)
    if subset_size < 1:
        msg = f"subset_size is a number of calibration items, at least 1; got {subset_size}."
        raise nncf.ValidationError(msg)

    method = _method(mode, ratio, dataset, subset_size, resume, advanced_parameters)
    found = survey(model, ignored_scope)
    method.check(model, found)
    if do_copy:
        model = copy.deepcopy(model)
        found = survey(model, ignored_scope)
    for weight in found.weights if isinstance(method, SparseWeights) else ():
        earlier = record_of(weight.module)
        if weight.untouched is not None and (earlier is None or earlier.mode is None):
            set_record(weight.module, LayerRecord(untouched=weight.untouched, bytes_before=weight.parameter.nbytes))
    method.apply(model, found)
    return model


def structure_plan(model: nn.Module) -> StructurePlan:
    """
    :param model: Result of :func:`compress` with MULTIPRUNER or MAMBA_SHEDDER.
    :return: What of the dense model is left, step by step, with scores and costs. ``plan.save(path)`` keeps it.
    :raises nncf.ValidationError: The model was not cut in this process.
    """
    plan = plan_of(model)
    if plan is None:
        msg = f"{type(model).__name__} was not cut by compress() in this process, so there is no plan of it."
        raise nncf.ValidationError(msg)
    return plan


def _method(
    mode: CompressMode,
    ratio: float,
    dataset: nncf.Dataset | None,
    subset_size: int,
    resume: str | os.PathLike[str] | None,
    parameters: AdvancedParameters | None,
) -> SparseWeights | MultiPruner | MambaShedder:
    classes: dict[CompressMode, type[AdvancedParameters]] = {
        CompressMode.MULTIPRUNER: AdvancedMultiPrunerParameters,
        CompressMode.MAMBA_SHEDDER: AdvancedMambaShedderParameters,
    }
    expected = classes.get(mode, AdvancedSparseWeightsParameters)
    parameters = expected() if parameters is None else parameters
    if not isinstance(parameters, expected):
        msg = f"{mode.value} takes advanced_parameters of class {expected.__name__}; got {type(parameters).__name__}."
        raise nncf.ParameterNotSupportedError(msg)
    if isinstance(parameters, AdvancedMultiPrunerParameters):
        return MultiPruner(ratio, dataset, subset_size, resume, parameters)
    if isinstance(parameters, AdvancedMambaShedderParameters):
        return MambaShedder(ratio, dataset, subset_size, resume, parameters)
    return SparseWeights(mode, ratio, dataset, subset_size, resume, parameters)
