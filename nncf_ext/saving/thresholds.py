"""Thresholds as a file: SCAP's ``calibrated_thresholds.json``, with what this package has beyond it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.files import write_whole
from nncf_ext.structure.wrappers import without_shells
from nncf_ext.weights.activation_sparsity import (
    ActivationSparsity,
    activation_sparsity_of,
    set_activation_sparsity,
)
from nncf_ext.weights.identity import weights_digest

THRESHOLDS = "calibrated_thresholds.json"
"""The file in a model's folder, named as by SCAP."""

_DIGEST = "weights_digest"
_PUBLISHED = {"kde": "mode"}  # SCAP's name of a centering, and ours
_NAMES = {ours: theirs for theirs, ours in _PUBLISHED.items()}


def has_thresholds(model: nn.Module) -> bool:
    """
    :param model: Any model.
    :return: Whether a layer replaces some of its inputs.
    """
    return any(activation_sparsity_of(module) is not None for module in model.modules())


def save_thresholds(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """
    Writes the thresholds of a model's layers by their paths, as SCAP does: ``threshold``, ``mode`` (the centre),
    ``demode_method``, ``target_sparsity``; and, where it is not the centre, ``replacement``. A digest of the model's
    weights, ``weights_digest``, stands in each row, where readers of SCAP's format pass over it.

    :param model: A model with sparse inputs.
    :param path: A JSON file; replaced.
    :raises nncf.ValidationError: No layer has a threshold.
    """
    model = without_shells(model)
    known = weights_digest(model)
    rows = {
        name: {"module_name": name, **as_row(sparsity), "hook_type": "pre_hook", _DIGEST: known}
        for name, module in model.named_modules()
        if (sparsity := activation_sparsity_of(module)) is not None
    }
    if not rows:
        raise nncf.ValidationError(f"No layer of {type(model).__name__} has a threshold for its inputs.")
    write_whole(Path(path), lambda draft: draft.write_text(json.dumps(rows, indent=1)))


def load_thresholds(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """
    Gives layers the thresholds of a file by :func:`save_thresholds` or by SCAP. All thresholds that the model has go.

    :param model: The model, in any floating type; changed in place.
    :param path: The JSON file. Files of SCAP do not say which weights they were calibrated on, and are not checked.
    :raises nncf.ValidationError: It holds something else, thresholds of layers that the model has not, or those of a
        model with other weights. Nothing is changed then.
    :raises OSError: It cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise nncf.ValidationError(f"{path} cannot be read ({error}). A JSON object is needed.") from error
    if not isinstance(content, dict) or not content or not all(isinstance(row, dict) for row in content.values()):
        raise nncf.ValidationError(f"{path} holds no thresholds: an object of one object for each layer is needed.")
    model = without_shells(model)
    modules = dict(model.named_modules())
    found = {}
    for name, row in content.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            msg = f"{path} has a threshold for {name}, which is no linear layer of {type(model).__name__}."
            raise nncf.ValidationError(msg)
        try:
            found[name] = from_row(row, layer.in_features)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            msg = f"{path}: what is said of {name} is no threshold ({type(error).__name__}: {error})."
            raise nncf.ValidationError(msg) from error
    if wanted := {str(row[_DIGEST]) for row in content.values() if _DIGEST in row}:
        own = weights_digest(model)
        if wanted != {own}:
            msg = (
                f"{path} was calibrated on other weights: their digest is {', '.join(sorted(wanted))}, that of this "
                f"{type(model).__name__} is {own}. Calibrate ACTIVATION_SPARSITY on this model."
            )
            raise nncf.ValidationError(msg)
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            set_activation_sparsity(module, found.get(name))


def as_row(sparsity: ActivationSparsity) -> dict[str, Any]:
    """
    :param sparsity: Of a layer.
    :return: The same as plain data for JSON.
    """
    row = {
        "demode_method": _NAMES.get(sparsity.centering, sparsity.centering),
        "mode": sparsity.centre,
        "threshold": _plain(sparsity.threshold),
        "target_sparsity": sparsity.target,
    }
    if sparsity.achieved is not None:
        row["achieved_sparsity"] = sparsity.achieved
    if isinstance(sparsity.replacement, Tensor) or sparsity.replacement != sparsity.centre:
        row["replacement"] = _plain(sparsity.replacement)
    return row


def from_row(row: Mapping[str, Any], in_features: int | None = None) -> ActivationSparsity:
    """
    :param row: From :func:`as_row`, or of SCAP's file.
    :param in_features: Of the layer; None: not checked.
    :return: What it says.
    :raises ValueError: A number is missing, or is none that can be.
    """
    centre = _number(row["mode"], in_features)
    threshold = _number(row["threshold"], in_features)
    if isinstance(centre, Tensor) or bool(torch.as_tensor(threshold).lt(0).any()):
        raise ValueError("thresholds are not negative, and the centre is one number")
    method = str(row.get("demode_method", "zero"))
    replacement = _number(row["replacement"], in_features) if "replacement" in row else centre
    target, achieved = (float(row.get(f"{name}_sparsity") or 0.0) for name in ("target", "achieved"))
    if not (0.0 <= target <= 1.0 and 0.0 <= achieved <= 1.0):
        raise ValueError("a sparsity is a fraction from 0 to 1")
    known = achieved if "achieved_sparsity" in row else None
    return ActivationSparsity(threshold, centre, replacement, target, _PUBLISHED.get(method, method), known)


def _plain(value: float | Tensor) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _number(value: Any, in_features: int | None) -> float | Tensor:
    if not isinstance(value, list):
        if isinstance(value, bool):
            raise TypeError(f"{value} is no number")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{number} is not finite")
        return number
    vector = torch.tensor(value, dtype=torch.float32)
    if vector.dim() != 1 or not bool(vector.isfinite().all()) or in_features not in (None, len(vector)):
        raise ValueError(f"one finite number for each of {in_features} channels is needed")
    return vector
