"""What does a model cost, and what would it cost after a plan? From shapes alone: the meta device will do."""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

from torch import nn

from nncf_ext.structure.dimensions import Dimensions, Kept, axis_length, tensor_at
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.plan import Costs, StructurePlan
from nncf_ext.structure.wrappers import without_shells
from nncf_ext.weights.sharing import names_of_parameters


def count_costs(model: nn.Module, plan: StructurePlan | None = None, *, dimensions: Dimensions | None = None) -> Costs:
    """
    Counts without carrying the plan out; equal to counting the extracted model.

    :param model: A model of a known architecture, on any device.
    :param plan: What would stay; None: the model as it is.
    :param dimensions: The model's dimensions; None: find them.
    :return: Its costs.
    :raises nncf.UnsupportedModelError: The model's structure is unknown.
    """
    model = without_shells(model)
    dimensions = dimensions_of(model) if dimensions is None else dimensions
    kept = dimensions.all_units() if plan is None else plan.kept
    parameters = {id(each): each for each in model.parameters()}
    embeddings = {id(each) for module in _embeddings(model) for each in module.parameters()}
    lost = lost_numbers(model, kept, dimensions)
    left = {key: each.numel() - lost[key] for key, each in parameters.items()}
    cache_type = next(_block_parameters(model, dimensions)).element_size()
    tokens = sum(len(kept[name]) * each.token_numbers for name, each in dimensions.items())
    states = sum(each.state_numbers[len(kept[name])] for name, each in dimensions.items() if each.state_numbers)
    return Costs(
        parameters=sum(left.values()),
        parameters_without_embeddings=sum(count for key, count in left.items() if key not in embeddings),
        bytes=sum(count * parameters[key].element_size() for key, count in left.items()),
        kv_bytes_per_token=tokens * cache_type,
        state_bytes=states * cache_type,
    )


def lost_numbers(model: nn.Module, kept: Kept, dimensions: Dimensions) -> dict[int, int]:
    """
    :param model: A model.
    :param kept: Units of each dimension that stay.
    :param dimensions: The model's dimensions.
    :return: How many numbers each parameter loses, by its id. One that is shared loses what all of its users lose.
    """
    lost = lost_by_path(model, kept, dimensions)
    # One user that keeps more of a shared weight than the others keeps it for all of them.
    return {key: min(lost.get(path, 0) for path in paths) for key, paths in names_of_parameters(model).items()}


def lost_by_path(model: nn.Module, kept: Kept, dimensions: Dimensions) -> Mapping[str, int]:
    """
    :param model: A model.
    :param kept: Units of each dimension that stay.
    :param dimensions: The model's dimensions.
    :return: How many numbers each tensor loses that loses some, by path.
    """
    lost: dict[str, int] = {}
    replaced: dict[str, int] = {}
    left: dict[tuple[str, int], Fraction] = {}  # of each axis that is cut
    for name, dimension in dimensions.items():
        gone = dimension.size - len(kept[name])
        if not gone:
            continue
        stand_ins = dimension.replaced(kept[name])
        for path, stand_in in stand_ins.items():
            module = model.get_submodule(path)
            stays = {own: each.numel() for own, each in stand_in.standing_for(module).named_parameters()}
            every = module.named_parameters(remove_duplicate=False)
            replaced |= {f"{path}.{own}": each.numel() - stays.get(own, 0) for own, each in every}
        for cut in () if stand_ins else dimension.cuts:
            share = Fraction(gone * cut.indices_per_unit, axis_length(model, cut))
            left[cut.tensor, cut.axis] = left.get((cut.tensor, cut.axis), Fraction(1)) - share
    for tensor in dict.fromkeys(tensor for tensor, _ in left):
        numbers = tensor_at(model, tensor).numel()  # packed codes of a grid count as they are stored
        shares = [share for (other, _), share in left.items() if other == tensor]
        lost[tensor] = numbers - int(numbers * math.prod(shares))
    return lost | replaced


def _block_parameters(model: nn.Module, dimensions: Dimensions) -> Iterator[nn.Parameter]:
    """Those of the first block that has some; else those of the model."""
    yield from model.get_submodule(f"{dimensions.blocks}.0").parameters()
    yield from model.parameters()


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Tables of embeddings, the output head included."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [*tables, *([head] if isinstance(head, nn.Module) else [])]
