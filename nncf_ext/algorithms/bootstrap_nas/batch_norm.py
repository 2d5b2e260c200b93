"""Statistics of batch norms belong to one sub-network: they are estimated for it, and put back afterwards."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nncf_ext.structure.tracing.example import call_of


def adapt_batch_norm(model: nn.Module, data: nncf.Dataset | Iterable[Any], batches: int | None = None) -> int:
    """
    Estimates means and variances of all batch norms anew, for what the model computes now: the mean over all batches.

    :param model: The model; its batch norms change, nothing else.
    :param data: Inputs: tensors, tuples of arguments or dictionaries of named ones. Each counts as one batch, whatever
        its size.
    :param batches: How many of them to take; None: all.
    :return: How many were taken. Norms of blocks that did not run keep their statistics, and so do channels that are
        not active.
    :raises nncf.ValidationError: There are none; nothing has changed then.
    """
    norms = _norms(model)
    before = _statistics(norms)
    training = {module: module.training for module in model.modules()}
    momenta = [each.momentum for each in norms]
    taken = 0
    model.eval()
    for each in norms:
        # With the momentum None, batches have equal shares, and the first takes the place of what was there: of the
        # channels that are active, and of no others.
        assert each.num_batches_tracked is not None
        each.num_batches_tracked.zero_()
        for tensor in (each.running_mean, each.running_var):
            assert tensor is not None
            tensor.nan_to_num_()  # no share of it stays, but that of NaN would be NaN
        each.momentum = None
        each.training = True
    try:
        for item in data.get_inference_data() if isinstance(data, nncf.Dataset) else data:
            if taken == batches:
                break
            args, kwargs = call_of(item)
            with torch.no_grad():
                model(*args, **kwargs)
            taken += 1
        if not taken:
            msg = "Asked to estimate batch norms, and the data are empty. Give at least one batch."
            raise nncf.ValidationError(msg)
    except BaseException:
        _put_back(before)
        raise
    finally:
        for each, momentum in zip(norms, momenta, strict=True):
            each.momentum = momentum
        for module, was in training.items():
            module.training = was
    _put_back([each for each in before if not each[0].num_batches_tracked])
    return taken


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [each for each in model.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]


def _statistics(norms: Sequence[_BatchNorm]) -> list[tuple[_BatchNorm, dict[str, Tensor]]]:
    return [
        (norm, {name: tensor.clone() for name, tensor in norm._buffers.items() if tensor is not None}) for norm in norms
    ]


def _put_back(statistics: Sequence[tuple[_BatchNorm, dict[str, Tensor]]]) -> None:
    with torch.no_grad():
        for norm, tensors in statistics:
            for name, tensor in tensors.items():
                norm._buffers[name].copy_(tensor)  # type: ignore[union-attr]


@contextmanager
def adapted_batch_norm(
    model: nn.Module, data: nncf.Dataset | Iterable[Any], batches: int | None = None
) -> Iterator[None]:
    """
    Within the context batch norms have the statistics of what the model computes now; afterwards those they had, bit
    for bit. So what one sub-network leaves behind reaches no other, in whatever order they are judged::

        net.activate(point)
        with nncf_ext.adapted_batch_norm(model, batches):
            accuracy = evaluate(model)
            small = net.extract(point)  # with these statistics

    :param model: The model.
    :param data: As for :func:`adapt_batch_norm`.
    :param batches: How many of them to take; None: all.
    :raises nncf.ValidationError: There are none.
    """
    before = _statistics(_norms(model))
    try:
        adapt_batch_norm(model, data, batches)
        yield
    finally:
        _put_back(before)
