"""Try a plan without surgery: the dense model computes what the smaller one would, and is itself again afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.structure.coupling import Coupling, Layout, layout_of
from nncf_ext.structure.plan import StructurePlan, check_plan
from nncf_ext.structure.surgery import cache_slots, indexed_modules


@contextmanager
def masked(model: nn.Module, plan: StructurePlan, layout: Layout | None = None) -> Iterator[None]:
    """
    Within the context the model computes as if the plan were carried out. Weights are neither copied nor changed:
    inputs of output projections are zeroed where units go, and removed branches and state spaces are stood in for.

    Do not carry a cache into or out of the context.

    :param model: The dense model.
    :param plan: What stays.
    :param layout: The model's layout, from one who knows that the plan fits; None: find it, and check the plan.
    :raises nncf.ValidationError: The plan does not fit the model.
    :raises nncf.UnsupportedModelError: The model's structure is unknown or shared.
    """
    if layout is None:
        layout = layout_of(model)
        check_plan(model, plan, layout)
    undo: list[Any] = []
    slots = cache_slots(model.config, layout, plan.layers)
    try:
        for block, couplings, kept_units, slot in zip(layout.blocks, layout.couplings, plan.layers, slots, strict=True):
            for module in indexed_modules(layout, block) if slot is not None else ():
                undo.append((setattr, module, "layer_idx", module.layer_idx))
                module.layer_idx = slot
            for name, coupling in couplings.items():
                if len(kept_units[name]) < coupling.units:
                    undo.append((mask_branch(block, coupling, kept_units[name]),))
        yield
    finally:
        for action, *arguments in reversed(undo):
            action(*arguments)


def mask_branch(block: nn.Module, coupling: Coupling, kept: Sequence[int]) -> Callable[[], None]:
    """
    Lets one branch of a block compute as if only some of its units were there.

    :param block: The block.
    :param coupling: The branch, with more units than are kept. It may be masked already: masks add up.
    :param kept: Units that stay; none takes the branch out.
    :return: What takes the mask off again. Masks come off in the opposite order.
    """
    stand_ins = coupling.stand_ins(kept)
    if not stand_ins:
        return _mask_inputs(block, coupling, kept)
    modules = {path: block.get_submodule(path) for path in stand_ins}
    for path, stand_in in stand_ins.items():
        block.set_submodule(path, stand_in.standing_for(modules[path]))

    def put_back() -> None:
        for path, module in modules.items():
            block.set_submodule(path, module)

    return put_back


def _mask_inputs(block: nn.Module, coupling: Coupling, kept: Sequence[int]) -> Callable[[], None]:
    output: Any = block.get_submodule(coupling.branch.output)
    mask = torch.zeros(output.in_features, dtype=torch.bool, device=output.weight.device)
    mask[coupling.cuts[-1].indices(kept, mask.device)] = True

    def zero_removed(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.where(mask, inputs[0], inputs[0].new_zeros(())), *inputs[1:])

    return output.register_forward_pre_hook(zero_removed).remove
