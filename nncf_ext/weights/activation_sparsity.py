"""What a layer does with its inputs: those near a centre are replaced, the others pass."""

from dataclasses import dataclass
from typing import Any

import nncf
import torch
from torch import Tensor, nn

_ATTRIBUTE = "nncf_ext_activation_sparsity"
_HOOKED = "nncf_ext_activation_sparsity_hooked"


@dataclass(frozen=True)
class ActivationSparsity:
    """
    An input x of a channel becomes ``replacement`` where ``|x - centre| <= threshold``, and passes otherwise; NaN
    passes. With replacement = centre = 0 it is zeroed. A decoder that adds ``W replacement`` to the bias once need
    multiply only by the channels that pass, minus their replacement.

    Each is a number for all channels, or float32 ``[in_features]``.

    :param threshold: Not negative.
    :param centre: Where inputs are densest.
    :param replacement: What stands in for those near it.
    :param target: Fraction of inputs that was asked for, 0..1.
    :param centering: Name of the way in which the centre was found.
    :param achieved: Fraction of inputs that are replaced on calibration tokens, 0..1; None: unknown.
    """

    threshold: float | Tensor
    centre: float = 0.0
    replacement: float | Tensor = 0.0
    target: float = 0.0
    centering: str = "zero"
    achieved: float | None = None

    def replaced(self, inputs: Tensor) -> Tensor:
        """
        :param inputs: ``[.., in_features]``.
        :return: Bool, same shape: which inputs are replaced.
        """
        distance = inputs.abs() if self.centre == 0.0 else (inputs - self.centre).abs()
        return distance <= _like(self.threshold, inputs)

    def __call__(self, inputs: Tensor) -> Tensor:
        """
        :param inputs: ``[.., in_features]``.
        :return: What the layer multiplies by, same shape and type.
        """
        return torch.where(self.replaced(inputs), _like(self.replacement, inputs), inputs)


def _like(value: float | Tensor, inputs: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(inputs.device, inputs.dtype)
    return torch.full((), value, dtype=inputs.dtype, device=inputs.device)


def set_activation_sparsity(layer: nn.Linear, sparsity: ActivationSparsity | None) -> None:
    """
    Follows the layer through copies, and into an export.

    :param layer: A linear layer.
    :param sparsity: What it does with its inputs from now on; None: it takes them as they are.
    """
    own = layer.__dict__
    own[_ATTRIBUTE] = sparsity
    if sparsity is not None and not own.get(_HOOKED):
        own[_HOOKED] = True
        layer.register_forward_pre_hook(_replace, with_kwargs=True)


def activation_sparsity_of(layer: nn.Module) -> ActivationSparsity | None:
    """
    :param layer: Any module.
    :return: What it does with its inputs, or None.
    """
    return layer.__dict__.get(_ATTRIBUTE)


def refuse_sparse_inputs(model: nn.Module, doing: str) -> None:
    """
    :param model: Any model.
    :param doing: What is asked for, and does not know thresholds: "cut", "make elastic".
    :raises nncf.UnsupportedModelError: A layer replaces some of its inputs.
    """
    for name, module in model.named_modules():
        if activation_sparsity_of(module) is not None:
            msg = (
                f"Asked to {doing} a model whose layers replace some of their inputs, such as {name}. Do that first, "
                "and calibrate ACTIVATION_SPARSITY on the result."
            )
            raise nncf.UnsupportedModelError(msg)


def _replace(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    sparsity = activation_sparsity_of(layer)
    if sparsity is None:
        return None
    if args:
        return (sparsity(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": sparsity(kwargs["input"])}
