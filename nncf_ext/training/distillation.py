"""A smaller model learns to predict what the model it was made from predicts."""

from typing import Any

import nncf
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, softmax
from transformers import Trainer

IGNORED_LABEL = -100
"""A label that counts nowhere, as in transformers."""

# Elements of the distributions that exist at a time.
_BLOCK_ON_CPU, _BLOCK_ELSEWHERE = 1 << 18, 1 << 24


class DistillationTrainer(Trainer):
    """
    A transformers Trainer whose loss is the divergence of the predicted distributions from a teacher's:
    ``(1 - label_weight) * KL(p_teacher || p_model) + label_weight * loss on the labels``.

    The divergence is averaged over the places that count: those with a label if there are labels, else those that the
    attention mask leaves, else all. Devices, precision, accumulation, checkpoints and resuming are the Trainer's. While
    it evaluates, the loss is that on the labels where there are labels.

    :param args: As for the Trainer.
    :param teacher: The model to learn from, as a rule the dense one. It is moved to the device of the training, put
        into evaluation mode, and needs no gradients any more; its weights stay.
    :param label_weight: From 0 (the teacher alone) to 1 (the labels alone).
    :param kwargs: As for the Trainer.
    :raises nncf.ValidationError: The weight is not in the range, or the teacher is the model itself.
    """

    def __init__(self, *args: Any, teacher: nn.Module, label_weight: float = 0.0, **kwargs: Any) -> None:
        if not 0.0 <= label_weight <= 1.0:
            msg = f"label_weight is a fraction from 0 to 1; got {label_weight}."
            raise nncf.ValidationError(msg)
        super().__init__(*args, **kwargs)
        assert self.model is not None  # the Trainer refuses to be made without
        student = {parameter.data_ptr() for parameter in self.model.parameters() if parameter.requires_grad}
        if any(parameter.data_ptr() in student for parameter in teacher.parameters()):
            msg = (
                "The teacher shares trainable weights with the model, so it would change with it. Give a copy: "
                "copy.deepcopy(model) before the model is compressed."
            )
            raise nncf.ValidationError(msg)
        self._teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self._label_weight = label_weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """
        :param model: The model as the Trainer wraps it.
        :param inputs: What the model takes.
        :param return_outputs: Whether to return the model's outputs, too.
        :param num_items_in_batch: Labels in all micro-batches of a step; None: those of these inputs.
        :return: The loss, a scalar; with the outputs where asked for.
        :raises nncf.ValidationError: The labels have a weight, but there are none; the vocabularies differ.
        """
        labels = inputs.get("labels")
        if not model.training and labels is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._label_weight and labels is None:
            msg = f"label_weight is {self._label_weight}, but the inputs have no labels: {list(inputs)}."
            raise nncf.ValidationError(msg)
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        loss: Any = 0.0
        if self._label_weight:
            label_loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            loss = self._label_weight * label_loss
        else:
            outputs = model(**unlabelled)
        if self._label_weight < 1.0:
            with torch.no_grad():
                wanted = self._teacher(**unlabelled).logits
            there = _places(inputs, outputs.logits)
            items = num_items_in_batch if labels is not None else None
            loss = loss + (1.0 - self._label_weight) * divergence(outputs.logits, wanted, there, items)
        return (loss, outputs) if return_outputs else loss


def _places(inputs: dict[str, Any], logits: Tensor) -> Tensor:
    """Bool ``[batch, tokens]`` (``[batch]`` for one prediction an item): where a prediction counts."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    shape = logits.shape[:-1]
    if labels is not None and labels.shape == shape:
        counts = labels != IGNORED_LABEL
        if len(shape) == 2:  # the logits at one place predict the label at the next
            counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
        return counts
    if mask is not None and mask.shape == shape:
        return mask.bool()
    return torch.ones(shape, dtype=torch.bool, device=logits.device)


def divergence(logits: Tensor, wanted: Tensor, there: Tensor, items: Tensor | int | None = None) -> Tensor:
    """
    :param logits: ``[.., classes]``: predictions.
    :param wanted: ``[.., classes]``: what they should be.
    :param there: Bool ``[..]``: where a prediction counts.
    :param items: What the sum is divided by; None: the number of predictions that count.
    :return: ``KL(p_wanted || p_logits)``, nats for an item, a scalar in float32.
    :raises nncf.ValidationError: The shapes differ.
    """
    if logits.shape != wanted.shape:
        msg = f"The model predicts {[*logits.shape]}, its teacher {[*wanted.shape]}: they must have one vocabulary."
        raise nncf.ValidationError(msg)
    there = there.to(logits.device).reshape(-1)
    classes = logits.shape[-1]
    places = there.nonzero().flatten()
    total = _Divergence.apply(logits.reshape(-1, classes), wanted.to(logits.device).reshape(-1, classes), places)
    return total / (max(len(places), 1) if items is None else items)


class _Divergence(torch.autograd.Function):
    """
    The sum of ``KL(p_wanted || p_logits)`` over some rows, in float32: in half precision the rounding of the logits may
    be larger than the divergence. A few rows at a time, twice, so that no distribution is kept: those of 2,048 tokens
    over 49,152 words take 400 MB each.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, places: Tensor) -> Tensor:
        """
        :param ctx: Autograd context.
        :param logits: ``[rows, classes]``.
        :param wanted: ``[rows, classes]``; gets no gradient.
        :param places: int64 ``[places]``: rows that count.
        :return: A scalar, float32.
        """
        ctx.save_for_backward(logits, wanted, places)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for rows in _blocks(logits, places):
            expected = log_softmax(wanted[rows].float(), dim=-1)
            far = expected - log_softmax(logits[rows].float(), dim=-1)
            total += far.mul_(expected.exp_()).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """
        :param ctx: Autograd context.
        :param grad: Gradient of the sum, a scalar.
        :return: ``p_logits - p_wanted`` for the rows that count, in the type of the logits.
        """
        logits, wanted, places = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for rows in _blocks(logits, places):
            far = softmax(logits[rows].float(), dim=-1).sub_(softmax(wanted[rows].float(), dim=-1))
            result[rows] = far.mul_(grad).to(result.dtype)
        return result, None, None


def _blocks(logits: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    elements = _BLOCK_ON_CPU if logits.device.type == "cpu" else _BLOCK_ELSEWHERE
    return places.split(max(1, elements // logits.shape[-1]))
