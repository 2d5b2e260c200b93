"""Try a plan without surgery: the dense model computes what the smaller one would, and is itself again afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.structure.coupling import Coupling, layout_of
from nncf_ext.structure.plan import StructurePlan, check_plan
from nncf_ext.structure.surgery import cache_slots


@contextmanager
def masked(model: nn.Module, plan: StructurePlan) -> Iterator[None]:
    """
    Within the context the model computes as if the plan were carried out. Weights are neither copied nor changed:
    inputs of output projections are zeroed where units go, and removed branches are stood in for.

    Do not carry a cache of keys and values into or out of the context.

    :param model: The dense model.
    :param plan: What stays.
    :raises nncf.ValidationError: The plan does not fit the model.
    :raises nncf.UnsupportedModelError: The model's structure is unknown or shared.
    """
    layout = layout_of(model)
    check_plan(model, plan, layout)
    undo: list[Any] = []
    attends = [len(kept["attention"]) > 0 for kept in plan.layers]
    slots = cache_slots(model.config, layout, attends)
    try:
        for block, couplings, kept_units, slot in zip(layout.blocks, layout.couplings, plan.layers, slots, strict=True):
            core: Any = block.get_submodule(layout.family.branches["attention"].core)
            if getattr(core, "layer_idx", None) is not None and slot is not None:
                undo.append((setattr, core, "layer_idx", core.layer_idx))
                core.layer_idx = slot
            for name, coupling in couplings.items():
                kept = kept_units[name]
                if coupling.units and not kept:
                    for path, replacement in coupling.branch.skip.items():
                        undo.append((nn.Module.set_submodule, block, path, block.get_submodule(path)))
                        block.set_submodule(path, replacement())
                elif len(kept) < coupling.units:
                    undo.append((_mask_inputs(block, coupling, kept).remove,))
        yield
    finally:
        for action, *arguments in reversed(undo):
            action(*arguments)


def _mask_inputs(block: nn.Module, coupling: Coupling, kept: tuple[int, ...]) -> Any:
    output: Any = block.get_submodule(coupling.branch.output)
    mask = torch.zeros(output.in_features, dtype=torch.bool, device=output.weight.device)
    mask[coupling.cuts[-1].indices(kept, mask.device)] = True

    def zero_removed(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.where(mask, inputs[0], inputs[0].new_zeros(())), *inputs[1:])

    return output.register_forward_pre_hook(zero_removed)
