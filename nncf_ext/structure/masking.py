"""Try a plan without surgery: the dense model computes what the smaller one would, and is itself again afterwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import nncf
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nncf_ext.standalone.skipping import SkippedUnread
from nncf_ext.structure.checks import check_plan
from nncf_ext.structure.dimensions import Cut, Dimension, Dimensions, axis_length, tensor_at
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.plan import StructurePlan

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def masked(model: nn.Module, plan: StructurePlan, dimensions: Dimensions | None = None) -> Iterator[None]:
    """
    Within the context the model computes as if the plan were carried out. Weights are neither copied nor changed:
    inputs of the layers that read removed units are zeroed there, and removed branches and state spaces are stood in
    for.

    Do not carry a cache into or out of the context.

    :param model: The dense model itself. Code that ``torch.compile`` made of it before does not see masks, so a model
        that is wrapped is refused: mask, and run, the model inside.
    :param plan: What stays.
    :param dimensions: The model's dimensions, from one who knows that the plan fits; None: find them, and check the
        plan.
    :raises nncf.ValidationError: The plan does not fit the model.
    :raises nncf.UnsupportedModelError: The model is wrapped, or its structure is unknown or shared.
    """
    if dimensions is None:
        dimensions = dimensions_of(model)
        check_plan(model, plan, dimensions)
    with ExitStack() as undo:
        for owner, slot in dimensions.record.cache_slots(model, dimensions, plan.kept).items():
            module: Any = model.get_submodule(owner)
            undo.callback(setattr, module, "layer_idx", module.layer_idx)
            module.layer_idx = slot
        for name, dimension in dimensions.items():
            if len(plan.kept[name]) < dimension.size:
                undo.callback(mask_dimension(model, dimension, plan.kept[name]))
        yield


def mask_dimension(
    model: nn.Module, dimension: Dimension, kept: Sequence[int], rows: Tensor | None = None
) -> Callable[[], None]:
    """
    Lets a model compute as if only some units of one dimension were there.

    :param model: The model.
    :param dimension: The dimension, with more units than are kept. It may be masked already: masks add up.
    :param kept: Units that stay; none takes the branch out.
    :param rows: Which rows of a batch this is for, bool ``[sequences]``. None: all, and what is taken out does not run.
    :return: What takes the mask off again. Masks come off in the opposite order.
    """
    with ExitStack() as undo:
        stand_ins = dimension.replaced(kept)
        for path, stand_in in stand_ins.items():
            module = model.get_submodule(path)
            if rows is None:
                undo.callback(model.set_submodule, path, module)
                model.set_submodule(path, stand_in.standing_for(module))
            # For some rows only, the module has to run; what nobody reads then needs no replacement.
            elif not issubclass(stand_in, SkippedUnread):
                undo.callback(_stand_in_for_rows(module, stand_in, rows).remove)
        for cut in () if stand_ins else dimension.readers:
            undo.callback(_mask_inputs(model, cut, kept, rows).remove)
        return undo.pop_all().close


def _mask_inputs(model: nn.Module, cut: Cut, kept: Sequence[int], rows: Tensor | None) -> RemovableHandle:
    reader: Any = model.get_submodule(cut.module)
    if getattr(reader, "groups", 1) > 1:
        msg = f"{cut.module} is a convolution in groups: no mask on its inputs takes single channels out."
        raise nncf.UnsupportedModelError(msg)
    mask = torch.zeros(axis_length(model, cut), dtype=torch.bool, device=tensor_at(model, cut.tensor).device)
    mask[cut.indices(kept, mask.device)] = True
    if isinstance(reader, _CONVOLUTIONS):  # channels stand before the positions
        mask = mask.view(-1, *(1,) * len(reader.kernel_size))

    # Where, not times: what a removed unit gives may be infinite or NaN, and zero times that is NaN.
    def zero_removed(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stays = mask if rows is None else mask | ~_rows_of(rows, inputs[0])
        return (torch.where(stays, inputs[0], inputs[0].new_zeros(())), *inputs[1:])

    return reader.register_forward_pre_hook(zero_removed)


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
