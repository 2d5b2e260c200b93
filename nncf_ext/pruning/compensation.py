"""
Repair without training: a branch that has lost units gives, by least squares, what it gave with all of them.

Only the columns of its output projection change that read the units which stay. The smaller model has the same shapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import StructurePlan

RIDGE = 0.1
"""How much a changed weight costs, as a share of the mean square of the inputs. Keeps few tokens from being learned by
heart."""


class _Seen(Exception):
    """Ends a pass as soon as what it was run for has been seen."""


class Compensator:
    """
    Refits the output projections of a model's branches. Holds the dense weights of those that it has changed.

    With ``a`` the inputs of the output projection over all calibration tokens, ``a_S`` those of the units that stay and
    ``W`` the dense weight, the new weight of the units that stay is
    ``argmin_V |W a - V a_S|^2 + RIDGE * mean(a_S^2) * |V - W_S|^2``. A bias takes up the difference of the means.

    :param model: The dense model, in evaluation mode and without gradients; its weights are changed in place.
    :param batches: Inputs of the model by name.
    :param dimensions: The model's dimensions; None: find them.

    Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks (arXiv 1707.06168), section 3.1,
    reconstruction; An et al., FLAP (arXiv 2312.11983), section 3.3, for the bias.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], dimensions: Dimensions | None = None
    ) -> None:
        self._model = model
        self._batches = batches
        self._dimensions = dimensions_of(model) if dimensions is None else dimensions
        self._dense: dict[str, tuple[Tensor, Tensor | None]] = {}

    def refit(self, plan: StructurePlan, name: str) -> None:
        """
        Repairs one branch. What stands before it is as the plan and earlier repairs left it.

        :param plan: What stays of the model.
        :param name: Name of its dimension. Where all or none of it stays nothing happens.
        """
        dimension, kept = self._dimensions[name], plan.kept[name]
        if not kept or len(kept) == dimension.size:
            return
        output, cut = self._output(name), dimension.readers[0]
        if name not in self._dense:
            bias = None if output.bias is None else output.bias.detach().clone()
            self._dense[name] = output.weight.detach().clone(), bias
        weight, bias = self._dense[name]
        products, sums, count = self._moments(plan, output)
        if bias is not None:
            # The bias takes up the means, so the weights need to fit only what varies: centred products, a covariance.
            products -= sums.outer(sums) / count
        columns = cut.indices(kept, products.device)
        # The gradient is zero where V (a_S a_S^T + r I) = W a a_S^T + r W_S, with r the ridge: one linear system.
        own = products[columns][:, columns]
        ridge = RIDGE * own.diagonal().mean()
        own.diagonal().add_(ridge)
        # Always from the dense weight: a fit on a fit would add up their errors.
        wide = weight.double()
        target = wide @ products[:, columns] + ridge * wide[:, columns]
        refitted = torch.linalg.solve(own, target.T).T  # own is symmetric: V own = target is own V^T = target^T
        with torch.no_grad():
            output.weight.copy_(weight)
            output.weight[:, columns] = refitted.to(weight.dtype)
            if bias is not None:
                output.bias.copy_(bias + (wide @ sums - refitted @ sums[columns]) / count)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within the context the model has its dense weights."""
        places = [(self._output(name), weights) for name, weights in self._dense.items()]
        now: list[tuple[Any, Tensor, Any]] = [(each, each.weight.data, each.bias) for each, _ in places]
        biases = [None if bias is None else bias.data for _, _, bias in now]
        for (module, _, _), (_, (weight, bias)) in zip(now, places, strict=True):
            module.weight.data = weight
            if bias is not None:
                module.bias.data = bias
        try:
            yield
        finally:
            for (module, weight, _), bias in zip(now, biases, strict=True):
                module.weight.data = weight
                if bias is not None:
                    module.bias.data = bias

    def _output(self, name: str) -> Any:
        """The output projection of a branch."""
        (reader,) = self._dimensions[name].readers
        return self._model.get_submodule(reader.module)

    def _moments(self, plan: StructurePlan, output: nn.Module) -> tuple[Tensor, Tensor, int]:
        """Sums over tokens of ``a a^T`` and of ``a``, float64, and the number of tokens."""
        weight: Any = output.weight
        products = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
        sums, count = products[0].clone(), 0
        rows = weight.new_empty(0)

        def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal rows
            rows = inputs[0].detach().flatten(0, -2).float()
            raise _Seen

        handle = output.register_forward_pre_hook(look)  # before the mask's own, so that it sees all units
        try:
            with masked(self._model, plan, self._dimensions):
                for batch in self._batches:
                    try:
                        self._model(**batch, use_cache=False)
                    except _Seen:
                        if "attention_mask" in batch:
                            rows = rows[batch["attention_mask"].flatten().to(rows.device) != 0]
                        products += (rows.T @ rows).double()
                        sums += rows.sum(dim=0, dtype=torch.float64)
                        count += len(rows)
        finally:
            handle.remove()
        return products, sums, count
