"""Loops: a network alone, and a super-network by progressive shrinking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nncf_ext
from super_networks.digits import Digits

BATCH, RATE = 64, 4e-3


def train(model: nn.Module, data: Digits, steps: int, seed: int, rate: float = RATE, teacher: Any = None) -> None:
    """
    A network learns alone.

    :param model: The network, trained in place; in evaluation mode afterwards.
    :param data: What it learns from.
    :param steps: Steps of 64 images.
    :param seed: Of the batches.
    :param rate: The largest learning rate; it falls to zero by half a cosine.
    :param teacher: A network whose answers it learns as well; None: labels alone.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    model.train()
    for images, labels in _batches(data, steps, seed, optimizer, rate):
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        if teacher is not None:
            loss = loss + nncf_ext.soft_cross_entropy(logits, _answers(teacher, images))
        loss.backward()
    model.eval()


def shrink(net: nncf_ext.SuperNetwork, data: Digits, steps: int, seed: int) -> None:
    """
    A super-network learns: in a fifth of the time depth and kernels alone shrink, in the rest widths as well. Each step
    runs the largest network, the smallest one and one between them. All of them learn what the trained network said
    before, the largest one also from the labels.

    :param net: The super-network of a trained model; its largest network is active afterwards.
    :param data: What it learns from.
    :param steps: Steps of 64 images.
    :param seed: Of batches and points.
    """
    teacher = net.extract(net.maximal()).eval()
    model, rate = net.model, RATE / 2
    modes = nncf_ext.ElasticMode
    stages = (
        nncf_ext.ShrinkingStage(modes.KERNEL | modes.DEPTH, epochs=1, depth=None),
        nncf_ext.ShrinkingStage(
            modes.KERNEL | modes.DEPTH | modes.WIDTH, epochs=4, depth=None, width=None, reorganize=True
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    batches = _batches(data, steps, seed, optimizer, rate)
    model.train()
    for stage in nncf_ext.shrinking_schedule(net, stages, seed=seed, optimizer=optimizer):
        while stage.steps_left(steps // 5):
            stage.next_point()
            images, labels = next(batches)
            points = nncf_ext.sandwich(stage, seed, stage.step)
            nncf_ext.sandwich_step(
                stage,
                points,
                lambda images=images: model(images),
                lambda logits, labels=labels: F.cross_entropy(logits, labels),
                teacher=_answers(teacher, images),
            )
    next(batches, None)
    model.eval()


@torch.no_grad()
def judge(model: Callable[[Tensor], Tensor], data: Digits) -> tuple[float, float]:
    """:return: Share of images named rightly, 0 to 1, and cross-entropy in nats."""
    logits = model(data.images)
    return (logits.argmax(1) == data.labels).float().mean().item(), F.cross_entropy(logits, data.labels).item()


@torch.no_grad()
def _answers(teacher: nn.Module, images: Tensor) -> Tensor:
    return teacher(images)


def _batches(data: Digits, steps: int, seed: int, optimizer: Any, rate: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches; when the next one is asked for, the optimizer takes its step."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * step / steps))
        yield data.batch(BATCH, draw)
        optimizer.step()
        optimizer.zero_grad()
