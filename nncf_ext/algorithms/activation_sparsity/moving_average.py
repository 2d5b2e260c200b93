"""
Thresholds as NNCF finds them: one pass, in which each item moves them and is made sparse by what they are by then.

Source: ``nncf.experimental.torch.sparsify_activations``, NNCF 3.4.0.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.algorithms.activation_sparsity.order_statistics import quantiles
from nncf_ext.calibration.stream import call_model
from nncf_ext.weights.activation_sparsity import ActivationSparsity, set_activation_sparsity

_NEWEST = 0.2  # what the newest batch counts; NNCF's, which it does not let anybody choose


def moving_averages(
    model: nn.Module, items: Iterable[Any], layers: Mapping[str, nn.Linear], targets: Mapping[str, float], sparse: bool
) -> dict[str, float]:
    """
    Runs the model on each item once. A threshold is the weighted mean of the quantiles of ``|x|`` in each call of its
    layer; a call counts 0.8 times as much as the next.

    :param model: The model, in evaluation mode. Its layers have no thresholds, now and afterwards.
    :param items: Model inputs. Their order matters.
    :param layers: Layers by path.
    :param targets: Fraction of inputs, 0..1, by path.
    :param sparse: Layers get inputs that the thresholds so far have made sparse, as in NNCF; False: dense ones.
    :return: Thresholds by path, in the type of the inputs, of the layers that saw a value.
    :raises nncf.ValidationError: Some inputs are not finite.
    """
    found: dict[str, float] = {}
    counts = dict.fromkeys(targets, 0)

    def look(name: str, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: Tensor = args[0] if args else kwargs["input"]
        if not inputs.numel():
            return
        (newest,) = quantiles(lambda see: see(inputs.abs()), (targets[name],))
        before = 1.0 - (1.0 - _NEWEST) ** counts[name]  # sum of the weights
        older = (1.0 - _NEWEST) * before
        mean = (older * found.get(name, 0.0) + _NEWEST * newest) / (older + _NEWEST)
        counts[name] += 1
        found[name] = float(torch.tensor(mean, dtype=inputs.dtype))
        if sparse:
            set_activation_sparsity(layer, ActivationSparsity(found[name]))

    with ExitStack() as undo:
        for name in targets:
            layer = layers[name]
            # Before the first call: hooks that are put on during one do not act in it.
            set_activation_sparsity(layer, ActivationSparsity(0.0))
            undo.callback(set_activation_sparsity, layer, None)
            hook = layer.register_forward_pre_hook(partial(look, name), prepend=True, with_kwargs=True)
            undo.callback(hook.remove)
        for item in items:
            call_model(model, item)
    return found
