"""The published pipelines of sparse fine-tuning, one call each, with fixed ranks (LoRA) or searched ones (NLS).

=====================  ===========================================  ===========================
pipeline               base while training                          what comes out
=====================  ===========================================  ===========================
``lora``               dense                                        dense base, separate adapter
``shears``             sparse                                       sparse base, separate adapter
``sqft``               sparse, INT4                                 INT4 base, separate adapter
``sqft_sparse_peft``   sparse, adapter masked                       one sparse model
``sqft_qa_sparse_peft``  sparse, adapter masked, sum put on the grid  one sparse INT4 model
=====================  ===========================================  ===========================

Source: Shears (arXiv 2404.10934), SQFT (arXiv 2410.03750).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nncf
import torch
from peft import PeftModel
from torch import nn

import nncf_ext
from adapters.training import Settings, add_adapter, add_elastic_ranks, train
from nncf_ext.weights.int4 import decompressors, unpack

Rows = Sequence[dict[str, list[int]]]


@dataclass(frozen=True)
class Data:
    """
    :param rows: Tokens and labels to learn from.
    :param calibration: What the pruning sees: int64 [windows, tokens].
    :param padding: Id of the padding token.
    :param accuracy: Of a model on validation items, 0..1; chooses the ranks of NLS.
    :param group_size: Columns that share an INT4 scale.
    """

    rows: Rows
    calibration: torch.Tensor
    padding: int
    accuracy: Callable[[nn.Module], float]
    group_size: int = 128


@dataclass(frozen=True)
class Tuned:
    """
    What a pipeline gives.

    :param model: As trained, the adapter beside its base; with NLS cut to the chosen ranks.
    :param merged: One model without an adapter, or None if the pipeline does not merge.
    :param point: Ranks chosen by NLS; empty for LoRA.
    """

    model: PeftModel
    merged: nn.Module | None
    point: dict[str, int]


def lora(model: nn.Module, data: Data, settings: Settings, *, nls: bool = False) -> Tuned:
    """
    The dense control: an adapter on the model as it is.

    :param model: Language model; stays as it is below the adapter.
    :param data: Data.
    :param settings: Settings.
    :param nls: Ranks are searched.
    :return: The model with a separate adapter.
    """
    return _tune(add_adapter(model, settings), data, settings, nls)


def shears(
    model: nn.Module, data: Data, settings: Settings, *, nls: bool = True, ratio: float = 0.5, keep: Path | None = None
) -> Tuned:
    """
    Shears: a sparse base, and an adapter that stays beside it, because merging would fill the zeros.

    :param model: Dense language model; becomes sparse.
    :param data: Data.
    :param settings: Settings.
    :param nls: Ranks are searched, as published; otherwise fixed.
    :param ratio: Fraction of zeros.
    :param keep: Folder of the pruned layers, so that another run need not prune anew.
    :return: The sparse model with a separate adapter.
    """
    sparsify(model, data, ratio, int4=False, keep=keep)
    return _tune(add_adapter(model, settings), data, settings, nls)


def sqft(
    model: nn.Module, data: Data, settings: Settings, *, nls: bool = True, ratio: float = 0.5, keep: Path | None = None
) -> Tuned:
    """
    SQFT: a sparse INT4 base, and a floating adapter beside it.

    :param model: Dense language model; becomes sparse, its weights on the INT4 grid.
    :param data: Data.
    :param settings: Settings.
    :param nls: Ranks are searched; otherwise fixed.
    :param ratio: Fraction of zeros.
    :param keep: Folder of the compressed layers, so that another run need not compress anew.
    :return: The INT4 model with a separate adapter.
    """
    sparsify(model, data, ratio, int4=True, keep=keep)
    for name in decompressors(model):  # PEFT moves the weights away from their decompressors: the adapter learns
        unpack(model, name)  # beside the same numbers in floating point
    return _tune(add_adapter(model, settings), data, settings, nls)


def sqft_sparse_peft(
    model: nn.Module, data: Data, settings: Settings, *, nls: bool = True, ratio: float = 0.5, keep: Path | None = None
) -> Tuned:
    """
    SQFT with SparsePEFT: the adapter is masked like its base while it learns, and merges without a loss.

    :param model: Dense language model; becomes sparse.
    :param data: Data.
    :param settings: Settings.
    :param nls: Ranks are searched; otherwise fixed.
    :param ratio: Fraction of zeros.
    :param keep: Folder of the pruned layers, so that another run need not prune anew.
    :return: The adapted model and the merged sparse one.
    """
    sparsify(model, data, ratio, int4=False, keep=keep)
    adapted = nncf_ext.make_mergeable(add_adapter(model, settings), nncf_ext.MergeMode.SPARSE)
    return _merged(_tune(adapted, data, settings, nls), nncf_ext.MergeMode.SPARSE)


def sqft_qa_sparse_peft(
    model: nn.Module, data: Data, settings: Settings, *, nls: bool = True, ratio: float = 0.5, keep: Path | None = None
) -> Tuned:
    """
    SQFT with QA-SparsePEFT: the forward of the training is that of the merged sparse INT4 model.

    :param model: Dense language model; becomes sparse, its weights on the INT4 grid.
    :param data: Data.
    :param settings: Settings.
    :param nls: Ranks are searched; otherwise fixed.
    :param ratio: Fraction of zeros.
    :param keep: Folder of the compressed layers, so that another run need not compress anew.
    :return: The adapted model and the merged one, sparse INT4 in NNCF's form.
    """
    sparsify(model, data, ratio, int4=True, keep=keep)
    adapted = add_adapter(nncf_ext.prerounding(model), settings)
    adapted = nncf_ext.make_mergeable(adapted, nncf_ext.MergeMode.QUANT_AWARE, grid=model)
    return _merged(_tune(adapted, data, settings, nls), nncf_ext.MergeMode.QUANT_AWARE)


def sparsify(model: nn.Module, data: Data, ratio: float, *, int4: bool, keep: Path | None = None) -> nn.Module:
    """
    The first step of all pipelines: SparseGPT, and GPTQ that keeps the zeros.

    :param model: Dense language model; changed in place.
    :param data: Data.
    :param ratio: Fraction of zeros.
    :param int4: Also put the weights on the INT4 grid.
    :param keep: Folder of finished layers.
    :return: The model.
    """
    items = [{"input_ids": window[None]} for window in data.calibration]
    quantization = nncf.CompressWeightsMode.INT4_SYM if int4 else None
    return nncf_ext.compress(
        model,
        nncf_ext.CompressMode.SPARSE_GPT,
        ratio=ratio,
        dataset=nncf.Dataset(items),
        subset_size=len(items),
        resume=keep,
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=quantization, group_size=data.group_size, keep_prerounding=int4
        ),
    )


def _merged(tuned: Tuned, mode: nncf_ext.MergeMode) -> Tuned:
    return replace(tuned, merged=nncf_ext.merge(tuned.model, mode))


def _tune(model: PeftModel, data: Data, settings: Settings, nls: bool) -> Tuned:
    """Trains the adapter; with NLS all its ranks, of which the validation items choose."""
    if not nls:
        train(model, data.rows, data.padding, settings)
        return Tuned(model, None, {})
    net = add_elastic_ranks(model, settings)
    train(model, data.rows, data.padding, settings, net)
    report = nncf_ext.search(
        net,
        [nncf_ext.Objective("accuracy", lambda point: data.accuracy(model))],
        sampler=nncf_ext.SearchSampler.HILL_CLIMBING,
        budget=settings.search,
        seed=settings.seed,
    )
    return Tuned(nncf_ext.extract(net, report.best), None, dict(report.best))
