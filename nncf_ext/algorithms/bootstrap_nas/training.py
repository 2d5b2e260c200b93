"""What a training step of a super-network does: which points it draws, and what the smaller ones learn from."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

import nncf
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from nncf_ext.exploration.space import Elastic, Point


class Weighed(Elastic, Protocol):
    """An elastic network that knows what its points cost."""

    def macs(self, point: Any) -> int:
        """:return: Multiplications of a point."""


def sandwich(net: Elastic, seed: int, step: int, between: int = 1) -> list[Point]:
    """
    The points of a sandwich: the largest, the smallest, and some between them.

    :param net: The network.
    :param seed: Seed.
    :param step: Number of the training step.
    :param between: How many are drawn, uniformly.
    :return: The points, the largest first, each once.
    Source: universally slimmable networks, arXiv 1903.05134 (sandwich rule).
    """
    drawn = [net.space.draw(seed, step * between + number) for number in range(between)]
    found: list[Point] = []
    for point in (net.space.maximal(), net.space.minimal(), *drawn):
        if point not in found:
            found.append(point)
    return found


def uniform_over_macs(net: Weighed, seed: int, step: int, candidates: int = 16) -> Point:
    """
    A point whose cost is drawn uniformly between the smallest and the largest. Where there are many dimensions, points
    that are drawn uniformly themselves nearly all cost about the same.

    :param net: The network.
    :param seed: Seed.
    :param step: Number of the draw.
    :param candidates: So many points are drawn, between the smallest and the largest; the one nearest to the cost is
        taken.
    :return: The point; it depends on nothing else.
    """
    random = Random(f"macs {seed} {step}")
    least, most = net.macs(net.space.minimal()), net.macs(net.space.maximal())
    target = least + random.random() * (most - least)
    found = []
    for number in range(candidates):
        # From each candidate on, places in the lists lean to the small or to the large end.
        lean = 4.0 ** (2 * (number + 0.5) / candidates - 1)
        places = [int(len(sizes) * random.random() ** lean) for sizes in net.space.dimensions.values()]
        point = net.space.decode(places)
        found.append((abs(net.macs(point) - target), number, point))
    return min(found)[2]


def soft_cross_entropy(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """
    ``T^2 * CE(softmax(target / T), softmax(logits / T))``, the mean over the batch.

    :param logits: Of the network that learns, ``[batch, classes]``.
    :param target: Of the one it learns from, likewise; a constant.
    :param temperature: T.
    :return: The loss, a scalar.
    Source: Hinton et al., arXiv 1503.02531, section 2.
    """
    probabilities = (target.detach() / temperature).softmax(-1)
    return temperature**2 * cross_entropy(logits / temperature, probabilities)


def squared_error(logits: Tensor, target: Tensor) -> Tensor:
    """
    :param logits: Of the network that learns, of any shape.
    :param target: Of the one it learns from, of the same shape; a constant.
    :return: The mean squared difference, a scalar.
    """
    return mse_loss(logits, target.detach())


def sandwich_step(
    net: Elastic,
    points: Sequence[Point],
    forward: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor] | None,
    *,
    teacher: Tensor | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] = soft_cross_entropy,
) -> Tensor:
    """
    Forwards and backwards of one optimizer step: the first point learns from the labels, the others from the first
    (in-place distillation), or all of them from a teacher, too. Gradients add up; the optimizer's step is yours::

        sandwich_step(net, sandwich(net, seed, step), lambda: model(images), lambda logits: criterion(logits, labels))
        optimizer.step()

    Each backward comes right behind its forward, so one network's activations are in memory at a time.

    :param net: The network. The first point is active afterwards.
    :param points: The points, the largest first; see :func:`sandwich`.
    :param forward: Runs the model on the batch; gives logits ``[batch, classes]``.
    :param loss: The loss of logits on the labels; None: all learn from the teacher, by `distance` alone.
    :param teacher: Logits of a teacher for the batch, likewise: then the first point learns from them as well, and the
        others from them alone.
    :param distance: How far logits are from those they learn from.
    :return: The sum of the losses, a scalar without a graph.
    :raises nncf.ValidationError: There are no points, nothing to learn from, or the loss is not finite.
    Source: BigNAS, arXiv 2003.11142, section 3.1; universally slimmable networks, arXiv 1903.05134.
    """
    if not points:
        msg = "A sandwich needs at least one point; got none."
        raise nncf.ValidationError(msg)
    if loss is None and teacher is None:
        msg = "There is nothing to learn from: give a loss on the labels, or teacher=, logits of a teacher."
        raise nncf.ValidationError(msg)
    target, total = teacher, None
    for number, point in enumerate(points):
        net.activate(point)
        logits = forward()
        own = None if number or loss is None else loss(logits)
        if target is not None:
            far = distance(logits, target)
            own = far if own is None else own + far
        assert own is not None
        if not torch.isfinite(own):
            msg = f"The loss of {'the first' if not number else 'a smaller'} network is {float(own)}; lower the rate."
            raise nncf.ValidationError(msg)
        own.backward()
        target = logits.detach() if target is None else target
        total = own.detach() if total is None else total + own.detach()
    net.activate(points[0])
    assert total is not None
    return total
