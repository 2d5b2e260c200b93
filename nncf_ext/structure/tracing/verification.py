"""
Is a dimension sound? The model with some of the units must give what the whole model gives when the others are zero.

Both are tried on the example, many dimensions at once; where they differ, halves of them are tried. In the second run
every tensor is zeroed where its labels are removed, and what counts along a whole axis (means, normalizations) counts
what stays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.slicing import sliced
from nncf_ext.structure.tracing.labels import Axis
from nncf_ext.structure.tracing.masks import MaskedRun
from nncf_ext.structure.tracing.rules import tensors_of
from nncf_ext.structure.tracing.run import Run

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}


def failures(
    model: nn.Module, dimensions: Dimensions, run: Run, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """
    :param model: The model, in evaluation mode.
    :param dimensions: What was found in it.
    :param run: The forward by which it was found.
    :param args: What the model is called with.
    :param kwargs: The same, by name.
    :return: Names of dimensions that are not sound, and why.
    """
    trial = _Trial(model, dimensions, run, args, kwargs)
    found: dict[str, str] = {}
    while True:
        left = [name for name in dimensions if name not in found]
        new = trial.failing(left)
        if not new:
            return found
        found |= new


class _Trial:
    def __init__(self, model: nn.Module, dimensions: Dimensions, run: Run, args: Any, kwargs: Any) -> None:
        self._model, self._dimensions, self._run = model, dimensions, run
        self._args, self._kwargs = args, kwargs
        generator = np.random.default_rng(0)
        self._kept: dict[str, list[int]] = {}
        for name, each in dimensions.items():
            units = generator.permutation(each.size)[: max(1, each.size // 2)]
            self._kept[name] = sorted(units.tolist())

    def failing(self, names: Sequence[str]) -> dict[str, str]:
        reason = self._reason(names) if names else None
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        half = len(names) // 2
        found = self.failing(names[:half]) | self.failing(names[half:])
        return found or {names[-1]: f"cannot change together with {names[0]}: {reason}"}

    def _reason(self, names: Sequence[str]) -> str | None:
        """Why the model does not work with some of the units of these dimensions."""
        kept = {name: self._kept[name] for name in names}
        try:
            with torch.no_grad(), sliced(self._model, self._dimensions, kept):
                small = tensors_of(self._model(*self._args, **self._kwargs))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return f"the model's code asks for the whole size ({type(error).__name__}: {lines[0][:120]})"
        run = MaskedRun(self._model, self._run.choices, self._removed(kept))
        masked = tensors_of(run.forward(self._args, self._kwargs))
        if [each.shape for each in small] != [each.shape for each in masked]:
            return "outputs would have another shape"
        for one, other in zip(small, masked, strict=True):
            if one.is_floating_point() and not _close(one, other):
                return "the model with a part of it differs from the model with the rest at zero"
        return None

    def _removed(self, kept: Mapping[str, Sequence[int]]) -> NDArray[np.bool_]:
        roots, _ = self._run.labels.classes()
        gone = np.zeros(len(roots), bool)
        for name, units in kept.items():
            dimension = self._dimensions[name]
            cut = dimension.cuts[0]
            axis: Axis = self._run.tensors[cut.tensor][cut.axis]
            assert axis is not None
            removed = sorted({*dimension.all_units} - {*units})
            gone[roots[axis[cut.indices(removed).numpy()]]] = True
        return gone[roots]


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = _TOLERANCES.get(one.dtype, 3e-2)
    scale = float(other.abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale + 1e-12, equal_nan=True)
