"""Ways to leave out inputs of gated MLPs. Each says what share of the MLPs' weights the tokens it saw did not need."""

from __future__ import annotations

from functools import partial
from typing import Any

import nncf
import torch
from evidence.text import batches
from torch import Tensor

import nncf_ext
from skipped_inputs.counting import Skipped

CATS, NNCF, SCAP, GREEDY = "CATS", "NNCF", "SCAP", "SCAP, allocated greedily"
WAYS: dict[str, dict[str, Any]] = {
    NNCF: {"moving_average": True},
    SCAP: {},
    GREEDY: {"allocation": nncf_ext.ActivationAllocation.GREEDY},
    "equal targets": {},
    "SCAP, calibrated on dense inputs": {"sequential": False},
    "SCAP, centres by density": {"centering": "mode"},
    "with column norms": {"weight_norms": True},
    "with means": {"mean_replacement": True},
    "with column norms and means": {"weight_norms": True, "mean_replacement": True},
}
"""Options of the mode, by the name in the table."""
_SHARED = (GREEDY, "equal targets")  # one target for all three layers


def scap(model: Any, calibration: Tensor, share: float, name: str) -> Skipped:
    """
    Thresholds for the inputs of all three layers. Where they do not share a target, more for the one that is peaked
    most, as published.

    :param model: Changed in place.
    :param calibration: int64 ``[windows, tokens]``.
    :param share: Of MLP weights, 0..1.
    :param name: One of the ways.
    :return: What tokens from now on do not need.
    """
    wide, narrow = (share, share) if name in _SHARED else (max(0.0, share - 0.1), min(0.95, share + 0.2))
    nncf_ext.compress(
        model,
        nncf_ext.CompressMode.ACTIVATION_SPARSITY,
        ratio=0.0,
        dataset=nncf.Dataset(batches(calibration, 1)),
        subset_size=len(calibration),
        advanced_parameters=nncf_ext.AdvancedActivationSparsityParameters(
            targets={r".*\.(gate|up)_proj": wide, r".*\.down_proj": narrow}, **WAYS[name]
        ),
    )
    return Skipped.inputs_of(model)


def cats(model: Any, calibration: Tensor, share: float) -> Skipped:
    """
    Channels whose activated gate is small are left out of up and down; the gate itself is dense. Source: CATS,
    arXiv 2404.08763.

    :param model: With gated MLPs of the names that Llama has; changed in place.
    :param calibration: int64 ``[windows, tokens]``.
    :param share: Of MLP weights, 0..2/3: two of three matrices are sparse.
    :return: What tokens from now on do not need.
    """
    mlps = [module for module in model.modules() if hasattr(module, "gate_proj") and hasattr(module, "down_proj")]
    seen: list[list[Tensor]] = [[] for _ in mlps]
    hooks = [
        mlp.gate_proj.register_forward_hook(
            lambda _, __, output, kept=kept, mlp=mlp: kept.append(mlp.act_fn(output).abs().flatten())
        )
        for mlp, kept in zip(mlps, seen, strict=True)
    ]
    with torch.no_grad():
        for row in calibration:
            model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    skipped = Skipped()

    def forward(mlp: Any, threshold: Tensor, x: Tensor) -> Any:
        gate = mlp.act_fn(mlp.gate_proj(x))
        small = gate.abs() <= threshold
        skipped.add(torch.zeros_like(small), mlp.gate_proj.in_features)
        skipped.add(small, mlp.up_proj.in_features + mlp.down_proj.out_features)
        return mlp.down_proj(torch.where(small, torch.zeros_like(gate), gate * mlp.up_proj(x)))

    for mlp, kept in zip(mlps, seen, strict=True):
        values = torch.cat(kept)
        threshold = values.kthvalue(max(1, round(min(1.0, 1.5 * share) * len(values)))).values
        mlp.forward = partial(forward, mlp, threshold)
    return skipped
