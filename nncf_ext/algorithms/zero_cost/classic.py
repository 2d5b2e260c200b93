"""
The classic proxies: a number for a network from one batch, higher = said to be better. Each is a function of a network,
its inputs, its labels; the network is a copy of its own, which it may spoil.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from nncf_ext.exploration.objectives import count_macs

Classic = Callable[[Any, Any, Tensor | None], float]

_SMALL = 1e-5
_SHIFT = 0.01
_PARTS = 4


def parameters(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """:return: Number of parameters, shared ones once."""
    return sum(each.numel() for each in model.parameters())


def macs(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """:return: Multiplications of one forward of all inputs."""
    with torch.no_grad():
        return count_macs(model, *call(inputs))


def grad_norm(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """:return: Sum over parameters of the norm of the loss's gradient."""
    return _total(torch.linalg.vector_norm(each) for each in _gradients(model, inputs, labels, [*model.parameters()]))


def snip(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """:return: ``sum |w * g|`` over weights. Source: arXiv 1810.02340."""
    weights = weights_of(model)
    gradients = _gradients(model, inputs, labels, weights)
    return _total((weight * each).abs().sum() for weight, each in zip(weights, gradients, strict=True))


def grasp(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """:return: ``-sum w * (H g)`` over weights, H the Hessian of the loss. Source: arXiv 2002.07376."""
    weights = weights_of(model)
    gradients = _gradients(model, inputs, labels, weights, create_graph=True)
    along = torch.stack([(each * each.detach()).sum() for each in gradients]).sum()
    products = torch.autograd.grad(along, weights, allow_unused=True)
    return -_total((w * each).sum() for w, each in zip(weights, products, strict=True) if each is not None)


def fisher(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """
    :return: Sum over channels of the outputs of convolutions and linear layers of ``(sum a * dL/da)^2``, the sum over
        positions, the mean over samples. Source: arXiv 1801.05787.
    """
    seen: list[Tensor] = []
    axes: list[int] = []  # where channels stand: last in linear layers, before the window in convolutions

    def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)
        axes.append(-1 if isinstance(module, nn.Linear) else -3)

    layers = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    hooks = [each.register_forward_hook(note) for each in layers]
    loss = _loss(model, inputs, labels)
    for hook in hooks:
        hook.remove()
    found = []
    for each, axis, gradient in zip(seen, axes, torch.autograd.grad(loss, seen, allow_unused=True), strict=True):
        if gradient is not None:
            product = (each * gradient).movedim(axis, 1)
            found.append(product.flatten(2).sum(2) if product.ndim > 2 else product)
    return _total(each.square().mean(0).sum() for each in found)


def synflow(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """
    :return: ``sum w * dR/dw``, all weights at their absolute values, batch norms left out, R the sum of the outputs for
        an input of ones. Source: arXiv 2006.05467.
    """
    model.double()
    for name, each in [*model.named_modules()]:
        if isinstance(each, _BatchNorm):
            model.set_submodule(name, nn.Identity())
    weights = [*model.parameters()]
    with torch.no_grad():
        for each in weights:
            each.abs_()
    images = _images(inputs, "synflow")
    flow = logits_of(model, torch.ones_like(images[:1], dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(flow, weights, allow_unused=True)
    return _total((w * each).sum() for w, each in zip(weights, gradients, strict=True) if each is not None)


def jacob_cov(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """
    :return: ``-sum log(l + k) + 1 / (l + k)`` over the eigenvalues l of the correlations of the samples' Jacobians (of
        the sum of outputs by the input), k = 1e-5. Source: arXiv 2006.04647, first version.
    """
    images = _images(inputs, "jacob_cov").detach().requires_grad_(True)
    (jacobian,) = torch.autograd.grad(logits_of(model, images).sum(), images)
    correlations = torch.corrcoef(jacobian.flatten(1).double())
    if not correlations.isfinite().all():  # a sample that the outputs do not depend on
        return math.nan
    values = torch.linalg.eigvalsh(correlations) + _SMALL
    return -float((values.log() + 1 / values).sum())


@torch.no_grad()
def naswot(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """
    :return: ``log det K``, ``K_ij`` the number of rectifiers that are in the same state for samples i and j. Source:
        arXiv 2006.04647.
    """
    kernel: list[Tensor] = []

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        codes = (output > 0).flatten(1).double()
        kernel.append(codes @ codes.T + (1 - codes) @ (1 - codes).T)

    rectifiers = [each for each in model.modules() if isinstance(each, nn.ReLU)]
    if not rectifiers:
        msg = f"naswot compares states of nn.ReLU modules, and {type(model).__name__} has none. Take another proxy."
        raise nncf.UnsupportedModelError(msg)
    for each in rectifiers:
        each.register_forward_hook(count)
    logits_of(model, inputs)
    return float(torch.linalg.slogdet(torch.stack(kernel).sum(0)).logabsdet)


@torch.no_grad()
def zen(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """
    :return: ``log ||f(x) - f(x + 0.01 e)||`` for x and e of normal noise, plus for each batch norm the logarithm of the
        root of the mean variance that it meets. Source: arXiv 2102.01063.
    """
    images = _images(inputs, "zen")
    draw = torch.Generator().manual_seed(0)
    x, e = (torch.randn(images.shape, generator=draw, dtype=images.dtype) for _ in range(2))
    variances: list[Tensor] = []
    for each in model.modules():
        if isinstance(each, _BatchNorm):
            each.register_forward_hook(
                lambda _module, given, _output: variances.append(given[0].transpose(0, 1).flatten(1).var(1).mean())
            )
    one = logits_of(model, x)
    deviations = [float(each.sqrt().log()) for each in variances]
    other = logits_of(model, x + _SHIFT * e)
    return float(torch.linalg.vector_norm(one - other).log()) + sum(deviations)


def zico(model: nn.Module, inputs: Any, labels: Tensor | None) -> float:
    """
    :return: Sum over weights of ``log sum E|g| / std|g|``, over up to four parts of the batch; where a gradient never
        changes, it does not count. Source: ZiCo, arXiv 2301.11300.
    """
    if labels is None or len(labels) < 2:
        msg = "zico compares the gradients of parts of a batch: give labels of at least two samples."
        raise nncf.ValidationError(msg)
    weights = weights_of(model)
    parts = labels.chunk(_PARTS)
    found, at = [], 0
    for part in parts:
        found.append(_gradients(model, _rows(inputs, at, at + len(part)), part, weights))
        at += len(part)
    values = []
    for each in zip(*found, strict=True):
        sizes = torch.stack(each).abs()
        deviation = sizes.std(0, unbiased=False)
        total = (sizes.mean(0)[deviation > 0] / deviation[deviation > 0]).sum()
        if total > 0:
            values.append(total.log())
    return _total(values)


CLASSIC: dict[str, Classic] = {
    "params": parameters,
    "macs": macs,
    "grad_norm": grad_norm,
    "snip": snip,
    "grasp": grasp,
    "fisher": fisher,
    "synflow": synflow,
    "jacob_cov": jacob_cov,
    "naswot": naswot,
    "zen": zen,
    "zico": zico,
}
NEED_LABELS = frozenset({"grad_norm", "snip", "grasp", "fisher", "zico"})


def weights_of(model: nn.Module) -> list[Tensor]:
    """:return: Weights of convolutions and linear layers."""
    layers = (each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear))
    return list({id(each.weight): each.weight for each in layers}.values())


def call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """:return: Arguments of a call, and named ones."""
    return ((), dict(inputs)) if isinstance(inputs, dict) else ((inputs,), {})


def logits_of(model: Any, inputs: Any) -> Tensor:
    """:return: What a network gives, ``[batch, classes]``."""
    args, named = call(inputs)
    output = model(*args, **named)
    return getattr(output, "logits", output)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Within the context batch norms use the statistics of the batch, and all else is in evaluation mode."""
    before = {each: each.training for each in model.modules()}
    for each in before:
        each.training = isinstance(each, _BatchNorm)
    try:
        yield
    finally:
        for each, was in before.items():
            each.training = was


def _loss(model: nn.Module, inputs: Any, labels: Tensor | None) -> Tensor:
    assert labels is not None, "checked before"
    return cross_entropy(logits_of(model, inputs), labels)


def _gradients(
    model: nn.Module, inputs: Any, labels: Tensor | None, tensors: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor]:
    loss = _loss(model, inputs, labels)
    found = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(one) if each is None else each for one, each in zip(tensors, found, strict=True)]


def _images(inputs: Any, name: str) -> Tensor:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        msg = f"{name} changes the input, which must be one tensor of real numbers; got {type(inputs).__name__}."
        raise nncf.ValidationError(msg)
    return inputs


def _rows(inputs: Any, begin: int, end: int) -> Any:
    if isinstance(inputs, dict):
        return {name: each[begin:end] for name, each in inputs.items()}
    return inputs[begin:end]


def _total(values: Iterable[Tensor]) -> float:
    return math.fsum(float(each.detach()) for each in values)
