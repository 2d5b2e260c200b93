"""
Is a dimension sound? The model with some of the units must give what the whole model gives when the others are zero.

Both are tried on the example, many dimensions at once; where they differ, halves of them are tried. In the second run
every tensor is zeroed where its labels are removed, and what counts along a whole axis (means, normalizations) counts
what stays.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nncf_ext.structure.dimensions import Dimensions, tensor_at
from nncf_ext.structure.slicing import sliced
from nncf_ext.structure.tracing.example import Example
from nncf_ext.structure.tracing.labels import Axis
from nncf_ext.structure.tracing.masks import MaskedRun
from nncf_ext.structure.tracing.rules import outputs_of, tensors_of
from nncf_ext.structure.tracing.run import Run

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}


def failures(
    model: nn.Module, dimensions: Dimensions, run: Run, example: Example, *, inside: bool = False
) -> dict[str, str]:
    """
    :param model: The model in evaluation mode, or a copy with other numbers.
    :param dimensions: What was found in it.
    :param run: The forward by which it was found.
    :param example: What the model is called with.
    :param inside: Compare what every module gives, not what the model gives alone; for what :func:`unheard` finds.
    :return: Names of dimensions that are not sound, and why.
    """
    trial = _Trial(model, dimensions, run, example, inside)
    found: dict[str, str] = {}
    while True:
        left = [name for name in dimensions if name not in found]
        new = trial.failing(left)
        if not new:
            return found
        found |= new


def unheard(model: nn.Module, dimensions: Dimensions, example: Example) -> list[str]:
    """
    Where no output depends on a dimension (a branch whose last scale is zero, a saturated gate), outputs say nothing
    about it: whatever is done to it, they are the same.

    :param model: The model in evaluation mode, or a copy with other numbers.
    :param dimensions: What was found in it.
    :param example: What the model is called with.
    :return: Names of dimensions whose weights have gradients that are zero throughout. None where the outputs have no
        gradients, such as indices.
    """
    weights = {
        cut.tensor: tensor
        for each in dimensions.values()
        for cut in each.cuts
        if cut.writes and isinstance(tensor := tensor_at(model, cut.tensor), nn.Parameter)
    }
    frozen = [each for each in weights.values() if not each.requires_grad]

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return model(*args, **kwargs)

    try:
        for each in frozen:
            each.requires_grad_(True)
        outputs = [each for each in outputs_of(example.run(model, forward)) if each.requires_grad]
        # Sums of normalized numbers are constant; sums of their products with others are not.
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
        found = torch.autograd.grad(outputs, [*weights.values()], seeds, allow_unused=True)
    except Exception:  # noqa: BLE001 - a forward that runs without gradients alone is judged by its outputs
        return []
    finally:
        for each in frozen:
            each.requires_grad_(False)
    silent = {path: each is not None and not each.any() for path, each in zip(weights, found, strict=True)}
    writers = {name: [cut.tensor for cut in each.cuts if cut.tensor in silent] for name, each in dimensions.items()}
    return [name for name, paths in writers.items() if paths and all(silent[path] for path in paths)]


class _Trial:
    def __init__(self, model: nn.Module, dimensions: Dimensions, run: Run, example: Example, inside: bool) -> None:
        self._model, self._dimensions, self._run, self._example = model, dimensions, run, example
        self._inside = inside
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
            with sliced(self._model, self._dimensions, kept), self._heard(Tensor.clone) as within:
                small = outputs_of(self._example.run(self._model)) + within
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return f"the model's code asks for the whole size ({type(error).__name__}: {lines[0][:120]})"
        run = MaskedRun(self._model, self._run.choices, self._removed(kept))
        with self._heard(run.without_removed) as within:
            masked = outputs_of(self._example.run(self._model, run.forward)) + within
        if [each.shape for each in small] != [each.shape for each in masked]:
            return f"outputs{' of modules' if self._inside else ''} would have another shape"
        if not same_results(small, masked):
            return "the model with a part of it differs from the model with the rest at zero"
        return None

    @contextmanager
    def _heard(self, of: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
        """What modules give while the model runs, the first tensor of each; nothing where outputs are enough."""
        found: list[Tensor] = []

        def hear(_module: nn.Module, _args: Any, result: Any) -> None:
            found.extend(of(each) for each in tensors_of(result)[:1])

        modules = [each for each in self._model.modules() if each is not self._model] if self._inside else []
        hooks = [each.register_forward_hook(hear) for each in modules]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

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


def same_results(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """
    :param ones: Results of one run.
    :param others: Results of another.
    :return: Whether they are the same: integers exactly, other numbers up to the order of sums.
    """
    if [each.shape for each in ones] != [each.shape for each in others]:
        return False
    return all(_close(one, other) for one, other in zip(ones, others, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    tolerance = _TOLERANCES.get(one.dtype, 3e-2)
    scale = float(other.abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale + 1e-12, equal_nan=True)
