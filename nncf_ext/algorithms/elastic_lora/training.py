"""Training of elastic networks by somebody else's trainer: a callback that chooses points, and a loss over several."""

import logging
from collections.abc import Mapping
from typing import Any

import nncf
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nncf_ext.exploration.space import Elastic, Point
from nncf_ext.training.distillation import IGNORED_LABEL, divergence

logger = logging.getLogger("nncf_ext")

_KEY = "nncf_ext.ElasticCallback"


class ElasticCallback(TrainerCallback):
    """
    Draws one point for every optimizer step of a transformers Trainer, uniformly and independently for each dimension.

    The point of a step depends on the seed and the step's number alone: all processes of a distributed training draw
    the same, all micro-batches of an accumulated step use the same, and a resumed training goes on as if it had not
    stopped. Between steps, and so whenever the Trainer evaluates or saves, the maximal point is active. Seed and space
    are kept in the Trainer's checkpoints; on resuming, the seed of the checkpoint counts.

    :param net: Elastic network.
    :param seed: Seed of the draws.
    Source: Shears, arXiv 2404.10934 (training of the super-adapter).
    """

    def __init__(self, net: Elastic, seed: int = 0) -> None:
        self._net = net
        self._seed = seed
        self._point: Point = net.space.maximal()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        :raises nncf.ValidationError: The checkpoint that the training resumes from has another search space.
        """
        kept: Any = state.stateful_callbacks
        space = self._net.space.to_dict()
        if _KEY in kept:
            if kept[_KEY]["space"] != space:
                msg = f"The checkpoint was trained over the space {kept[_KEY]['space']}; this network has {space}."
                raise nncf.ValidationError(msg)
            if kept[_KEY]["seed"] != self._seed:
                logger.warning("Resuming with the checkpoint's seed %s, not %s.", kept[_KEY]["seed"], self._seed)
            self._seed = kept[_KEY]["seed"]
        kept[_KEY] = {"seed": self._seed, "space": space}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Activates the point of this optimizer step."""
        self._point = self._net.space.draw(self._seed, state.global_step)
        self._net.activate(self._point)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Activates it again for the next micro-batch: a loss may have activated others."""
        self._net.activate(self._point)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Activates the maximal point."""
        self._net.activate(self._net.space.maximal())


def sandwich_loss(
    net: Elastic,
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    num_items_in_batch: Tensor | int | None = None,
    causal: bool = True,
) -> Tensor:
    """
    The loss of the maximal point on the labels, plus the divergence of the minimal and of the active point from it:
    ``loss(maximal) + KL(p_maximal || p_minimal) + KL(p_maximal || p_active)``, p being the predicted distributions. In
    the divergences, p_maximal is a constant: the smaller points learn from the largest one, which learns from the
    labels alone.

    For the loss of a Trainer, in a subclass of three lines::

        class SandwichTrainer(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                if not model.training:
                    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                return sandwich_loss(net, model, inputs, num_items_in_batch=num_items_in_batch)

    With an :class:`ElasticCallback` the active point is the one drawn for the step. On several processes set
    ``average_tokens_across_devices=False`` in the training arguments, or multiply by their number.

    The forwards share one backward, so scaling, accumulation and distribution remain the Trainer's; activations of
    three forwards are in memory unless checkpointed. While the backward runs it activates the point of each forward
    before anything of it is recomputed. After it, the maximal point is active: activate another before the next loss.

    :param net: Elastic network.
    :param model: Its model, as the Trainer wraps it.
    :param inputs: What the model takes, with ``labels`` (integers; -100 is ignored).
    :param num_items_in_batch: Number of labels over which the losses are averaged; None for those of `inputs`.
    :param causal: Whether logits at one place belong to the label at the next (language models) or at the same.
    :return: The sum of the losses, a scalar.
    :raises nncf.ValidationError: There are no labels.
    :raises nncf.ParameterNotSupportedError: The parameters are on several devices, whose backwards are not in order.
    Source: universally slimmable networks, arXiv 1903.05134 (sandwich rule, in-place distillation).
    """
    if inputs.get("labels") is None:
        msg = f"The sandwich loss needs labels; the inputs are {list(inputs)}."
        raise nncf.ValidationError(msg)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        msg = f"The sandwich loss needs all parameters on one device; they are on {sorted(devices)}."
        raise nncf.ParameterNotSupportedError(msg)
    maximal, minimal, active = net.space.maximal(), net.space.minimal(), net.active
    items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    net.activate(maximal)
    outputs = model(**inputs, **items)
    loss = _Activation.apply(outputs.loss, net, maximal)
    target = outputs.logits.detach()  # else the largest point would be pulled towards the smaller ones
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    # An active point that is the maximal or the minimal one would add nothing, or the same term twice.
    for point in (minimal, active) if active not in (maximal, minimal) else (minimal,):
        net.activate(point)
        logits = model(**unlabelled).logits
        far = _divergence(logits, target, inputs["labels"], num_items_in_batch, causal)
        loss = loss + _Activation.apply(far, net, point)
    return loss


class _Activation(torch.autograd.Function):
    """
    Passes a loss and its gradient through unchanged. In the backward it activates the point of the loss, before the
    gradient goes on into the forward of that point.

    Why the points do not get mixed up: of all nodes that are ready, autograd runs the one that was made last. The
    forwards are made one after the other, each with such a node at its end. So the backward of the last forward runs
    completely, recomputation under gradient checkpointing included, before the node of the forward before it. This
    holds within one device, as each device has a queue of its own.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, net: Elastic, point: Point) -> Tensor:
        ctx.net, ctx.point = net, point
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.net.activate(ctx.point)
        return gradients[0], None, None


def _divergence(
    logits: Tensor, target: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None, causal: bool
) -> Tensor:
    """Mean KL divergence of predictions [.., classes] from targets of that shape, where there is a label."""
    if causal:
        logits, target, labels = logits[..., :-1, :], target[..., :-1, :], labels[..., 1:]
    return divergence(logits, target, labels != IGNORED_LABEL, num_items_in_batch)
