"""The same under the name, and with the scopes, that NNCF has."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import nncf
from torch import nn

from nncf_ext.algorithms.activation_sparsity.parameters import AdvancedActivationSparsityParameters
from nncf_ext.compression import compress
from nncf_ext.parameters import CompressMode
from nncf_ext.structure.blocks import ignored_modules, survey
from nncf_ext.structure.wrappers import unwrapped

TModel = TypeVar("TModel", bound=nn.Module)


def sparsify_activations(
    model: TModel,
    dataset: nncf.Dataset,
    target_sparsity_by_scope: Mapping[Any, float],
    ignored_scope: nncf.IgnoredScope | None = None,
    *,
    subset_size: int = 128,
    advanced_parameters: AdvancedActivationSparsityParameters | None = None,
) -> TModel:
    """
    Like ``nncf.experimental.torch.sparsify_activations.sparsify_activations``, with thresholds that are exact quantiles
    over the whole of the calibration data, and layers behind calibrated on sparse inputs. With NNCF's own thresholds:
    ``advanced_parameters=AdvancedActivationSparsityParameters(moving_average=True)``.

    :param model: As for :func:`nncf_ext.compress`; changed in place.
    :param dataset: Calibration data.
    :param target_sparsity_by_scope: Fractions of inputs to replace, by scopes: NNCF's ``TargetScope``, or
        ``nncf.IgnoredScope`` taken for what it names. Layers in none of them keep their inputs.
    :param ignored_scope: Layers to leave out all the same.
    :param subset_size: How many items of the dataset to use.
    :param advanced_parameters: Everything else; ``targets`` stay empty.
    :return: The model.
    :raises nncf.ValidationError: As :func:`nncf_ext.compress`; a layer is in two scopes, or a scope names none.
    """
    parameters = advanced_parameters or AdvancedActivationSparsityParameters()
    if parameters.targets:
        raise nncf.ValidationError("Targets are given by scopes here; advanced_parameters.targets must be empty.")
    model = unwrapped(model)  # type: ignore[assignment]  # as compress() does
    layers = survey(model, ignored_scope).targets
    by_target: dict[float, list[str]] = {}
    taken: set[str] = set()
    for scope, target in target_sparsity_by_scope.items():
        if not isinstance(scope, nncf.IgnoredScope):
            msg = f"Scopes are nncf.IgnoredScope or NNCF's TargetScope; got {type(scope).__name__}."
            raise nncf.ValidationError(msg)
        named = ignored_modules(model, scope) & layers.keys()
        if twice := sorted(named & taken):
            raise nncf.ValidationError(f"{twice[0]} is in two scopes. One target for each layer is needed.")
        if not named:
            msg = f"{scope} names no linear layer that can be treated: only embeddings, heads, or what is ignored."
            raise nncf.ValidationError(msg)
        taken |= named
        by_target.setdefault(target, []).extend(sorted(named))
    if not taken:
        raise nncf.ValidationError("The scopes name no linear layer that can be treated.")
    # One expression for each target: there may be thousands of layers.
    targets = {"|".join(map(re.escape, names)): target for target, names in by_target.items()}
    return compress(
        model,
        CompressMode.ACTIVATION_SPARSITY,
        ratio=0.0,
        dataset=dataset,
        ignored_scope=ignored_scope,
        subset_size=subset_size,
        advanced_parameters=replace(parameters, targets=targets),
    )
