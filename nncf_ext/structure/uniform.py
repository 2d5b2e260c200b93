"""Give every layer of a plan the same sizes, so that the result is an ordinary model that any library loads."""

from collections.abc import Callable, Sequence
from typing import Any

import nncf
from torch import Tensor, nn

from nncf_ext.structure.coupling import Layout, layout_of
from nncf_ext.structure.plan import StructurePlan, check_plan, units_by_score


def snap_to_uniform(
    model: nn.Module,
    plan: StructurePlan,
    *,
    multiple: int = 1,
    score: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> StructurePlan:
    """
    Spreads what a plan keeps evenly over the layers that stay. Layers without any branch stay away; one that has lost
    one branch gets it back, as wide as everywhere. So the size is nearly that of the plan, and its choice among layers
    is lost: score the result again.

    :param model: The dense model.
    :param plan: A plan for it.
    :param multiple: Round the number of MLP channels to a multiple of this; 128 keeps INT4 groups whole.
    :param score: Which units of a layer to keep, such as :func:`nncf_ext.importance.blocks.l1_norm`; None: the first.
    :return: A plan whose layers are alike. The number of heads is one that stock classes accept.
    :raises nncf.ValidationError: The plan does not fit the model, or `multiple` is out of range.
    """
    layout = layout_of(model)
    check_plan(model, plan, layout)
    staying = [index for index, kept in enumerate(plan.layers) if any(kept.values())]
    widths = {name: layout.couplings[staying[0]][name].units for name in layout.family.branches}
    if not 1 <= multiple <= widths["mlp"]:
        msg = f"multiple={multiple} must lie from 1 to the {widths['mlp']} channels of an MLP."
        raise nncf.ValidationError(msg)
    result = StructurePlan.dense(model)
    choices = {
        "attention": _head_counts(model, layout, widths["attention"]),
        "mlp": list(range(multiple, widths["mlp"] + 1, multiple)),
    }
    for name, counts in choices.items():
        mean = sum(len(plan.layers[index][name]) for index in staying) / len(staying)
        _, count = min((abs(each - mean), each) for each in counts)
        for index in range(len(plan.layers)):
            kept = units_by_score(layout, index, name, score)[:count] if index in staying else []
            result = result.keep(index, name, sorted(kept))
    return result


def _head_counts(model: nn.Module, layout: Layout, units: int) -> list[int]:
    """Key/value heads that a configuration can say: its number of query heads divides the hidden size."""
    config: Any = model.config
    if not layout.family.head_dim_in_config:
        return [units]
    return [each for each in range(1, units + 1) if each == units or config.hidden_size % (each * layout.group) == 0]
