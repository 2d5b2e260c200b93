"""
EFTNAS: what a fine-tuning says about weights becomes the sizes of a super-network.

Weights get scores while a task is learned. A threshold over all of them leaves a smaller network; one threshold for
each budget leaves some networks, and the sizes that these have are the sizes to choose from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import nncf
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from nncf_ext.algorithms.bootstrap_nas.algorithm import SuperNetwork
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from nncf_ext.algorithms.bootstrap_nas.structure import can_be_left_out
from nncf_ext.algorithms.bootstrap_nas.training import soft_cross_entropy
from nncf_ext.parameters import ElasticMode
from nncf_ext.structure.counting import ParameterNumbers
from nncf_ext.structure.dimensions import Cut, Dimension, Dimensions, tensor_at
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.modes import evaluation_mode
from nncf_ext.structure.tracing.example import call_of

BUDGETS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Shares of the multiplications; the published ones run from 11.2 down to 4.4 billion in five steps."""


class FirstOrderImportance:
    """
    First-order scores of the weights of a transformer, added up while a loop of yours trains it::

        importance = nncf_ext.FirstOrderImportance(model, example_input=batch)
        for batch in loader:
            model(**batch).loss.backward()
            importance.add()
            optimizer.step()
            optimizer.zero_grad()
        parameters = nncf_ext.AdvancedBootstrapNasParameters(widths=importance.widths())
        net = nncf_ext.make_elastic(model, ElasticMode.WIDTH, example_input=batch, advanced_parameters=parameters)
        net.reorganize(importance.scores())

    The model is not changed, and nothing of it is hooked. Scores take as much memory as the weights that can be cut.

    :param model: A model whose architecture has a record, such as BERT; any head.
    :param example_input: What it is called with: a tensor, a tuple of arguments, a dictionary of named ones. Its shapes
        are those for which multiplications are counted.
    :param movement: Scores are ``-sum w * dL/dw`` (movement: weights that move away from zero gain). Else they are
        ``sum |w * dL/dw|`` (what the loss would lose, to first order).
    :param block: Attention is judged in squares of so many weights a side.
    :raises nncf.UnsupportedModelError: The architecture has no record, or nothing of it can be cut.
    :raises nncf.ValidationError: The model does not run with the example, or `block` is below 1.
    Source: EFTNAS, LREC-COLING 2024; movement pruning, arXiv 2005.07683, section 3.
    """

    def __init__(self, model: nn.Module, example_input: Any, *, movement: bool = False, block: int = 32) -> None:
        if block < 1:
            msg = f"block is a number of weights, at least 1; got {block}."
            raise nncf.ValidationError(msg)
        dimensions_of(model)  # an architecture without a record is refused here, with those that have one
        every = AdvancedBootstrapNasParameters(min_width=1, width_step=1)
        net = SuperNetwork(model, ElasticMode.WIDTH, example_input, parameters=every)
        net.release()
        self._net, self._numbers = net, ParameterNumbers(model, net.dimensions)
        self._model, self._movement, self._block = model, movement, block
        self._scores = {
            cut.tensor: torch.zeros_like(tensor_at(model, cut.tensor), dtype=torch.float32)
            for name in net.space.dimensions
            for cut in self.dimensions[name].cuts
            if isinstance(tensor_at(model, cut.tensor), nn.Parameter)
        }
        self.steps = 0
        """How many gradients were added."""

    @property
    def dimensions(self) -> Dimensions:
        """The widths of the model: attention heads, channels of MLPs."""
        return self._net.dimensions

    # Collecting

    @torch.no_grad()
    def add(self, weight: float = 1.0) -> None:
        """
        Adds what the gradients in the model's parameters say; to be called between backward and the optimizer's step.

        :param weight: Factor of this step; the learning rate, where the sum shall be that of movement pruning.
        :raises nncf.ValidationError: A parameter that can be cut has no gradient, or one that is not finite.
        """
        found = {path: tensor_at(self._model, path) for path in self._scores}
        missing = [path for path, each in found.items() if each.grad is None]
        if len(missing) == len(found):
            msg = "No attention and no MLP has a gradient. Call add() behind backward() and before zero_grad()."
            raise nncf.ValidationError(msg)
        if missing:
            msg = (
                f"{len(missing)} of {len(found)} weights and biases have no gradient, such as {missing[0]}: they would "
                "seem to be worth nothing. Unfreeze them while scores are added up."
            )
            raise nncf.ValidationError(msg)
        if wrong := [path for path, each in found.items() if not torch.isfinite(each.grad).all()]:
            msg = f"The gradients of {', '.join(wrong[:3])} are not finite; lower the learning rate."
            raise nncf.ValidationError(msg)
        for path, each in found.items():
            product = each.float() * each.grad
            self._scores[path].add_(-product if self._movement else product.abs(), alpha=weight)
        self.steps += 1

    def add_dataset(self, data: nncf.Dataset | Iterable[Any], loss: Callable[[Any], Tensor] | None = None) -> int:
        """
        Adds the gradients of the loss on some batches, with the weights as they are, in evaluation mode. The model is
        left without gradients.

        :param data: Batches: what the model is called with. It is gone through twice: labels are checked first.
        :param loss: From what the model gives to the loss, a scalar; None: its attribute ``loss``, which models of
            transformers give where a batch has ``labels``.
        :return: How many batches there were.
        :raises nncf.ValidationError: There are no batches, they are over after one pass, labels do not match the
            model's classes or are all the same, or there is no loss.
        """
        if isinstance(data, Iterator):
            msg = f"data is a {type(data).__name__}, which is over after one pass. Give a list or a data loader."
            raise nncf.ValidationError(msg)
        check_labels(self._model, _batches(data))
        count = 0
        with evaluation_mode(self._model), torch.enable_grad():
            for item in _batches(data):
                self._model.zero_grad()
                args, named = call_of(item)
                output = self._model(*args, **named)
                value = getattr(output, "loss", None) if loss is None else loss(output)
                if not isinstance(value, Tensor):
                    msg = (
                        f"{type(self._model).__name__} gave no loss: put labels into the batches, or give loss=, a "
                        "function from what the model gives to a scalar."
                    )
                    raise nncf.ValidationError(msg)
                value.backward()
                self.add()
                count += 1
        self._model.zero_grad()
        if not count:
            msg = "Asked to score weights, and the data are empty. Give at least one batch."
            raise nncf.ValidationError(msg)
        return count

    # What it says

    def scores(self) -> dict[str, Tensor]:
        """
        :return: For each width the score of its units, ``[units]`` float32: the sum over the weights that write into
            them (query, key and value rows of a head; rows of the first linear layer of an MLP). For
            :meth:`SuperNetwork.reorganize`.
        :raises nncf.ValidationError: Nothing was added yet.
        """
        self._check_added()
        scores = {id(tensor_at(self._model, path)): each for path, each in self._scores.items()}
        weights = {
            name: self.dimensions.unit_weights(self._model, name, of=lambda weight: scores[id(weight)])
            for name in self._net.space.dimensions
        }
        return {name: torch.stack([each.flatten(1).sum(1) for each in parts]).sum(0) for name, parts in weights.items()}

    def peaks(self) -> dict[str, Tensor]:
        """
        At which threshold does a unit go? It stays as long as one of its cells is above: of an MLP's channel its row in
        what writes it and its column in what reads it; of a head the squares of weights in query, key, value and output
        projections; and biases. The score of a cell is the sum over its weights.

        :return: For each width ``[units]`` float32.
        :raises nncf.ValidationError: Nothing was added yet.
        """
        self._check_added()
        found = {}
        for name in self._net.space.dimensions:
            dimension = self.dimensions[name]
            cells = [
                _highest_cells(self._scores[cut.tensor], cut, dimension.size, self._block)
                for cut in dimension.cuts
                if cut.tensor in self._scores
            ]
            found[name] = torch.stack(cells).amax(0)
        return found

    def widths(
        self, budgets: Sequence[float] = BUDGETS, *, multiple: int = 8, discard: float = 0.02
    ) -> dict[str, list[int]]:
        """
        The search space: for each budget one threshold leaves some units of every width, and these numbers, with the
        whole width, are the sizes to choose from.

        :param budgets: Shares of the whole model's multiplications, above 0 and up to 1.
        :param multiple: Channels of MLPs are rounded to multiples of this, which kernels like; heads stay whole.
        :param discard: Where less than this share of a width is left, its branch is left out as a whole (width 0),
            unless the model generates with a cache. Branches of the first block stay.
        :return: For each width, in channels, the whole one first: for ``AdvancedBootstrapNasParameters(widths=...)``.
        :raises nncf.ValidationError: Nothing was added yet, or a number is out of range.
        """
        points = [self.point(budget, multiple=multiple, discard=discard) for budget in budgets]
        if not points:
            msg = "budgets are shares of the multiplications; got none."
            raise nncf.ValidationError(msg)
        found = {}
        for name in self._net.space.dimensions:
            dimension = self.dimensions[name]
            sizes = sorted({dimension.size, *(point[name] for point in points)}, reverse=True)
            found[name] = [size * dimension.granularity for size in sizes]
        return found

    def point(self, budget: float, *, multiple: int = 8, discard: float = 0.02) -> dict[str, int]:
        """
        The sizes that one threshold leaves.

        :param budget: See :meth:`widths`.
        :param multiple: See there.
        :param discard: See there.
        :return: Units of each width; of all thresholds those whose multiplications are nearest to the budget.
        :raises nncf.ValidationError: Nothing was added yet, or a number is out of range.
        """
        if not 0 < budget <= 1 or multiple < 1 or not 0 <= discard < 1:
            msg = (
                "budgets are shares above 0 and up to 1, multiple is at least 1, discard is at least 0 and below 1; "
                f"got {budget}, {multiple}, {discard}."
            )
            raise nncf.ValidationError(msg)
        peaks = self.peaks()

        def left(threshold: float) -> dict[str, int]:
            return {
                name: _size(self.dimensions[name], int((each > threshold).sum()), multiple, self._least(name, discard))
                for name, each in peaks.items()
            }

        # Only at a peak does anything change, and costs fall with the threshold: the first one that keeps the budget is
        # found by bisection, and it or the one before is the nearest.
        thresholds = [-np.inf, *np.unique(torch.cat([*peaks.values()]).cpu().numpy()).tolist()]
        target = budget * self.macs(left(-np.inf))
        low, high = 0, len(thresholds) - 1
        while low < high:
            middle = (low + high) // 2
            if self.macs(left(thresholds[middle])) > target:
                low = middle + 1
            else:
                high = middle
        nearby = [left(each) for each in thresholds[max(low - 1, 0) : low + 1]]
        return min(nearby, key=lambda point: abs(self.macs(point) - target))

    def macs(self, point: Mapping[str, int]) -> int:
        """
        :param point: Units of each width, any number of them.
        :return: Multiplications with weights in one forward of the example; see :meth:`SuperNetwork.macs`.
        """
        left = self._numbers.left(point)
        return round(sum(count * left[path] for path, count in self._net.products.items() if path in left))

    def _least(self, name: str, discard: float) -> float:
        """Units below which a branch goes; 0 where it must stay."""
        dimension = self.dimensions[name]
        can_go = can_be_left_out(self._model, self.dimensions, name)
        return discard * dimension.size if can_go and dimension.block > 0 else 0.0

    def _check_added(self) -> None:
        if not self.steps:
            msg = "No gradient was added yet. Call add() in your loop behind each backward(), or add_dataset()."
            raise nncf.ValidationError(msg)


def eftnas_loss(labels: Tensor, weight: float = 0.9, temperature: float = 2.0) -> Callable[[Tensor, Tensor], Tensor]:
    """
    What every network of a sandwich learns in EFTNAS: ``(1 - weight) * CE(labels) + weight * T^2 * CE(teacher)``, the
    latter with softened answers, whose gradient is that of their divergence. For
    ``sandwich_step(..., loss=None, teacher=..., distance=eftnas_loss(labels))``.

    :param labels: ``[batch]`` int64.
    :param weight: Share of the teacher, 0 to 1.
    :param temperature: T.
    :return: From logits and those of the teacher, ``[batch, classes]`` each, to the loss, a scalar.
    Source: EFTNAS, LREC-COLING 2024 (weight 0.9, temperature 2).
    """

    def loss(logits: Tensor, teacher: Tensor) -> Tensor:
        own = cross_entropy(logits, labels)
        return (1 - weight) * own + weight * soft_cross_entropy(logits, teacher, temperature)

    return loss


def check_labels(model: nn.Module, batches: Iterable[Any]) -> None:
    """
    :param model: A model; of transformers, it knows its number of classes (``config.num_labels``).
    :param batches: What it is called with; ``labels`` are read where a batch names them. Classes are integers.
    :raises nncf.ValidationError: Classes that the model does not have, or one class only.
    """
    found: set[int] = set()
    for item in batches:
        labels = item.get("labels") if isinstance(item, Mapping) else None
        if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim <= 1:
            found |= {*labels.flatten().tolist()}
    if not found:
        return
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if classes is not None and (min(found) < 0 or max(found) >= max(classes, 2)):
        msg = (
            f"The labels are {min(found)} to {max(found)}, and {type(model).__name__} has {classes} classes. Load it "
            f"with num_labels={max(found) + 1}, or number the classes from 0."
        )
        raise nncf.ValidationError(msg)
    if len(found) == 1 or classes == 1:
        msg = (
            f"A task of one class says nothing about weights: the labels are {sorted(found)[:4]}, and the model has "
            f"{classes} classes. Give batches of at least two classes and a model with as many."
        )
        raise nncf.ValidationError(msg)


def _batches(data: nncf.Dataset | Iterable[Any]) -> Iterable[Any]:
    return data.get_inference_data() if isinstance(data, nncf.Dataset) else data


def _size(dimension: Dimension, count: int, multiple: int, least: float) -> int:
    """How many units stay of those that survived a threshold."""
    if count == dimension.size:
        return count
    if count < least:
        return 0
    step = min(max(multiple // dimension.granularity, 1), dimension.size)
    return min(max(round(count / step) * step, step), dimension.size)


def _highest_cells(score: Tensor, cut: Cut, units: int, block: int) -> Tensor:
    """Of each unit the highest score of a cell in one tensor, ``[units]``."""
    rows = score.movedim(cut.axis, 0).flatten(1) if score.ndim > 1 else score[:, None]
    found = []
    for offset, size in cut.segments:
        own = rows[offset : offset + units * size].reshape(units, size, -1)
        if size == 1 or score.ndim == 1:
            found.append(own.sum((1, 2)))
        else:
            # Sums over squares; those at the edges may have fewer weights.
            sums = avg_pool2d(own[:, None], block, ceil_mode=True, divisor_override=1)
            found.append(sums.flatten(1).amax(1))
    return torch.stack(found).amax(0)
