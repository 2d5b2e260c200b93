"""Give every layer of a plan the same sizes, so that the result is an ordinary model that any library loads."""

import nncf
from torch import nn

from nncf_ext.structure.checks import check_plan
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.order import Score, units_by_score
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.wrappers import without_shells


def snap_to_uniform(
    model: nn.Module,
    plan: StructurePlan,
    *,
    multiple: int = 1,
    score: Score | None = None,
) -> StructurePlan:
    """
    Spreads what a plan keeps evenly over the layers that stay. Layers without any branch stay away; one that has lost
    one branch, or the state space of its mixer, gets it back, as wide as everywhere. So the size is nearly that of the
    plan, and its choice among layers is lost: score the result again.

    :param model: The dense model.
    :param plan: A plan for it.
    :param multiple: Round the number of single channels, those of MLPs, to a multiple of this; 128 keeps INT4 groups
        whole.
    :param score: Which units of a layer to keep, such as :func:`nncf_ext.importance.blocks.l1_norm`; None: the first.
    :return: A plan whose layers are alike. The number of heads is one that stock classes accept.
    :raises nncf.ValidationError: The plan does not fit the model, or `multiple` is out of range.
    """
    model = without_shells(model)
    dimensions = dimensions_of(model)
    check_plan(model, plan, dimensions)
    staying = {index for index, parts in enumerate(dimensions.by_block) if any(plan.kept[each.name] for each in parts)}
    if not staying:
        msg = "The plan keeps nothing of any layer, so there is nothing to spread. Keep a branch of one."
        raise nncf.ValidationError(msg)
    sizes: dict[str, int] = {}
    order: dict[str, list[int]] = {}
    for part in dict.fromkeys(each.part for each in dimensions.values()):
        alike = [each for each in dimensions.of_part(part) if each.block in staying]
        sizes |= {each.name: 0 for each in dimensions.of_part(part)}
        if not alike:
            continue
        counts = dimensions.record.uniform_sizes(model, alike[0])
        if alike[0].cuts and alike[0].granularity == 1:
            if not 1 <= multiple <= alike[0].size:
                msg = f"multiple={multiple} must lie from 1 to the {alike[0].size} channels of an MLP."
                raise nncf.ValidationError(msg)
            counts = [count for count in counts if count % multiple == 0]
        mean = sum(len(plan.kept[each.name]) for each in alike) / len(alike)
        _, count = min((abs(each - mean), each) for each in counts)
        for each in alike:
            sizes[each.name] = count
            order[each.name] = units_by_score(model, dimensions, each.name, score)
    return StructurePlan.dense(model, dimensions).at(sizes, order)
