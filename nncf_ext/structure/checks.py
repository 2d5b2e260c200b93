"""Does a plan fit a model? Checked before anything is computed or cut."""

import nncf
from torch import nn

from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.plan import StructurePlan, fingerprint
from nncf_ext.weights.sharing import names_of_parameters


def check_plan(model: nn.Module, plan: StructurePlan, dimensions: Dimensions) -> None:
    """
    :param model: The dense model.
    :param plan: A plan.
    :param dimensions: The model's dimensions.
    :raises nncf.ValidationError: The plan is for another model, names units that are not there, or leaves no attention
        by which a cache can tell positions.
    :raises nncf.UnsupportedModelError: A weight to be cut is shared.
    """
    own = fingerprint(model)
    if (own.model_type, own.shapes) != (plan.model.model_type, plan.model.shapes):
        msg = (
            f"The plan was made for a {plan.model.model_type!r} model of other shapes than this {own.model_type!r}. "
            "Load the dense model that was searched."
        )
        raise nncf.ValidationError(msg)
    if None not in (own.weights, plan.model.weights) and own.weights != plan.model.weights:
        msg = (
            "The plan was made for a model of the same shapes with other weights, so its kept units mean nothing here. "
            "Load the dense model that was searched."
        )
        raise nncf.ValidationError(msg)
    unknown = [name for name in plan.kept if name not in dimensions]
    missing = [name for name in dimensions if name not in plan.kept]
    if unknown or missing:
        what = f"names {', '.join(unknown[:4])}" if unknown else f"lacks {', '.join(missing[:4])}"
        msg = (
            f"The plan {what}; it has {len(plan.kept)} dimensions, the model {len(dimensions)}: "
            f"{', '.join(list(dimensions)[:4])}, ..."
        )
        raise nncf.ValidationError(msg)
    for name, kept in plan.kept.items():
        dimension = dimensions[name]
        if len(set(kept)) < len(kept) or any(not 0 <= unit < dimension.size for unit in kept):
            msg = (
                f"The plan keeps units {list(kept)[:8]} of {name}. Each must be one of 0..{dimension.size - 1}, once. "
                f"{dimension.unit}."
            )
            raise nncf.ValidationError(msg)
    check_cache(model, plan, dimensions)
    check_sharing(model, plan, dimensions)


def check_cache(model: nn.Module, plan: StructurePlan, dimensions: Dimensions) -> None:
    """
    :param model: The dense model.
    :param plan: A plan for it.
    :param dimensions: The model's dimensions.
    :raises nncf.ValidationError: Nothing is left by which a cache can tell positions, or that has a state.
    """
    dimensions.record.check(model, dimensions, plan.kept)


def check_sharing(model: nn.Module, plan: StructurePlan, dimensions: Dimensions) -> None:
    """
    :param model: The dense model.
    :param plan: A plan for it.
    :param dimensions: The model's dimensions.
    :raises nncf.ValidationError: Dimensions that share weights would keep other units of them.
    :raises nncf.UnsupportedModelError: A weight to be cut is used elsewhere, too.
    """
    names = names_of_parameters(model)
    for name, kept in plan.kept.items():
        dimension = dimensions[name]
        if not kept or kept == dimension.all_units:
            continue
        users = dimensions.users(name)
        others = {each: plan.kept[each] for each in users if plan.kept[each]}
        if len({*others.values()}) > 1:
            layers = ", ".join(str(dimensions[each].block) for each in users)
            counts = ", ".join(f"{len(units)} in layer {dimensions[each].block}" for each, units in others.items())
            msg = (
                f"Layers {layers} share the weights of their {dimension.part}, and the plan keeps other units in each: "
                f"{counts}. Keep the same ones, or remove the branch of a layer as a whole."
            )
            raise nncf.ValidationError(msg)
        for path in dimension.touched(kept):
            for parameter in model.get_submodule(path).parameters():
                if len(names[id(parameter)]) > len(users):
                    msg = f"Asked to cut a weight that is shared: {', '.join(names[id(parameter)])}. Untie it."
                    raise nncf.UnsupportedModelError(msg)
