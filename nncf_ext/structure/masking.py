"""Try a plan without surgery: the dense model computes what the smaller one would, and is itself again afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nncf_ext.standalone.skipping import SkippedUnread
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


def mask_branch(
    block: nn.Module, coupling: Coupling, kept: Sequence[int], rows: Tensor | None = None
) -> Callable[[], None]:
    """
    Lets one branch of a block compute as if only some of its units were there.

    :param block: The block.
    :param coupling: The branch, with more units than are kept. It may be masked already: masks add up.
    :param kept: Units that stay; none takes the branch out.
    :param rows: Which rows of a batch this is for, bool ``[sequences]``. None: all, and what is taken out does not run.
    :return: What takes the mask off again. Masks come off in the opposite order.
    """
    stand_ins = coupling.stand_ins(kept)
    if not stand_ins:
        return _mask_inputs(block, coupling, kept, rows)
    with ExitStack() as undo:
        for path, stand_in in stand_ins.items():
            module = block.get_submodule(path)
            if rows is None:
                undo.callback(block.set_submodule, path, module)
                block.set_submodule(path, stand_in.standing_for(module))
            elif not issubclass(stand_in, SkippedUnread):
                undo.callback(_stand_in_for_rows(module, stand_in, rows).remove)
        return undo.pop_all().close


def _mask_inputs(block: nn.Module, coupling: Coupling, kept: Sequence[int], rows: Tensor | None) -> Callable[[], None]:
    output: Any = block.get_submodule(coupling.branch.output)
    mask = torch.zeros(output.in_features, dtype=torch.bool, device=output.weight.device)
    mask[coupling.cuts[-1].indices(kept, mask.device)] = True

    def zero_removed(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stays = mask if rows is None else mask | ~_rows_of(rows, inputs[0])
        return (torch.where(stays, inputs[0], inputs[0].new_zeros(())), *inputs[1:])

    return output.register_forward_pre_hook(zero_removed).remove


def _stand_in_for_rows(module: nn.Module, kind: Any, rows: Tensor) -> RemovableHandle:
    """The module runs; some rows get what the stand-in gives instead."""
    stand_in = kind.standing_for(module)

    def choose(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        instead = stand_in(*inputs, **named)
        if isinstance(output, tuple):
            return (torch.where(_rows_of(rows, output[0]), instead[0], output[0]), *output[1:])
        return torch.where(_rows_of(rows, output), instead, output)

    return module.register_forward_hook(choose, with_kwargs=True)


def _rows_of(rows: Tensor, values: Tensor) -> Tensor:
    """Bool, with as many dimensions as the values; some blocks put the tokens of all rows on one axis."""
    each = rows.to(values.device).repeat_interleave(len(values) // len(rows))
    return each.view(-1, *(1,) * (values.ndim - 1))
