"""What does a model cost, and what would it cost after a plan? From shapes alone: the meta device will do."""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from nncf_ext.structure.dimensions import Dimensions, Kept, axis_length
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
    lost = ParameterNumbers(model, dimensions).lost({name: len(units) for name, units in kept.items()})
    # One user that keeps more of a shared weight than the others keeps it for all of them.
    return {key: min(lost.get(path, 0) for path in paths) for key, paths in names_of_parameters(model).items()}


class ParameterNumbers:
    """
    How many numbers the parameters of one model have at any sizes of its dimensions. What depends on the model alone is
    looked up once, so that a search may ask for thousands of points.

    :param model: The model, whole.
    :param dimensions: Its dimensions.
    """

    def __init__(self, model: nn.Module, dimensions: Dimensions) -> None:
        self._model = model
        self._dimensions = dimensions
        self._whole = {path: each.numel() for path, each in model.named_parameters(remove_duplicate=False)}
        self._cuts: dict[str, list[tuple[str, int, int, int]]] = {}
        self._replaced: dict[tuple[str, int], dict[str, int]] = {}

    def left(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """
        :param sizes: How many units of dimensions stay; of one that is not named, all.
        :return: How many numbers of each parameter stay, by path.
        """
        lost = self.lost(sizes)
        return {path: count - lost.get(path, 0) for path, count in self._whole.items()}

    def lost(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """
        :param sizes: The same.
        :return: How many numbers each parameter loses that loses some, by path.
        """
        replaced: dict[str, int] = {}
        lengths: dict[str, dict[int, tuple[int, int]]] = {}  # by tensor and axis: the whole length, and what is left
        for name, size in sizes.items():
            dimension = self._dimensions[name]
            if size == dimension.size:
                continue
            if size in dimension.replacements:
                replaced |= self._lost_with(name, size)
                continue
            for tensor, axis, length, each in self._cuts_of(name):
                axes = lengths.setdefault(tensor, {})
                left = axes[axis][1] if axis in axes else length
                axes[axis] = length, left - (dimension.size - size) * each
        lost = {}
        for tensor, axes in lengths.items():
            numbers = self._whole[tensor]  # packed codes of a grid count as they are stored
            whole = math.prod(length for length, _ in axes.values())
            lost[tensor] = numbers - numbers * math.prod(left for _, left in axes.values()) // whole
        return lost | replaced

    def _cuts_of(self, name: str) -> list[tuple[str, int, int, int]]:
        """Of each parameter that a dimension cuts: its path, the axis, its length, how many indices one unit has."""
        if name not in self._cuts:
            self._cuts[name] = [
                (cut.tensor, cut.axis, axis_length(self._model, cut), cut.indices_per_unit)
                for cut in self._dimensions[name].cuts
                if cut.tensor in self._whole
            ]
        return self._cuts[name]

    def _lost_with(self, name: str, size: int) -> dict[str, int]:
        """What the parameters of modules lose that are replaced, by path."""
        if (name, size) not in self._replaced:
            found: dict[str, int] = {}
            for path, stand_in in self._dimensions[name].replacements[size].items():
                module = self._model.get_submodule(path)
                stays = {own: each.numel() for own, each in stand_in.standing_for(module).named_parameters()}
                every = module.named_parameters(remove_duplicate=False)
                found |= {f"{path}.{own}": each.numel() - stays.get(own, 0) for own, each in every}
            self._replaced[name, size] = found
        return self._replaced[name, size]


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
