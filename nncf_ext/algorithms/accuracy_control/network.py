"""A model whose layers can take different forms, as an elastic network: for any search, and for extraction."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import nncf
import torch
from torch import nn

from nncf_ext.algorithms.accuracy_control.catalogue import Catalogue
from nncf_ext.algorithms.accuracy_control.forms import DENSE, REMOVED
from nncf_ext.exploration.space import Point, SearchSpace
from nncf_ext.structure.dimensions import Dimension, Dimensions
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import mask_dimension
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from nncf_ext.weights.records import set_plan

PRESENT = 1
_LAYER = "nncf_ext_form_of"


class FormNetwork:
    """
    An elastic network (:class:`nncf_ext.exploration.space.Elastic`). Its dimensions are groups of layers, whose sizes
    are forms, and the attentions and MLPs that can be left out, whose sizes are 1 and 0. What stands in one that is
    left out has no form.

    :param model: The dense model; while a point is active, its weights are those of that point.
    :param catalogue: Every layer's weight in every form.
    :param removable: Whether attentions and MLPs can be left out, where the architecture is known.
    :param example_input: What objectives that run a network give it.
    """

    def __init__(
        self, model: nn.Module, catalogue: Catalogue, *, removable: bool = True, example_input: Any = None
    ) -> None:
        self.model, self.catalogue, self.example_input = model, catalogue, example_input
        self._dimensions = _known_dimensions(model) if removable else None
        groups = {group.name: group for group in catalogue.groups}
        self.branches = self._removable(groups.values())
        self.groups = groups
        self._inside = {name: {g for g in groups if _within(g, branch)} for name, branch in self.branches.items()}
        sizes = {**{name: (PRESENT, REMOVED) for name in self.branches}, **{n: [*g.forms] for n, g in groups.items()}}
        self.space = SearchSpace(sizes, inactive=self.silent if self.branches else None)
        self._active = self.space.maximal()
        # Held, since what stands in for a branch hides its layers.
        self.layers = {name: _linear(model, name) for group in groups.values() for name in group.layers}
        self._originals = {name: layer.weight.data for name, layer in self.layers.items()}
        self._masks: dict[str, Callable[[], None]] = {}

    @property
    def active(self) -> Point:
        """The point that the model computes now."""
        return dict(self._active)

    def activate(self, point: Mapping[str, int]) -> None:
        """
        :param point: The point to compute from now on.
        :raises nncf.ValidationError: It is not a point of the space.
        """
        point = self.space.canonical(self.space.check(point))
        if any(point[name] != self._active[name] for name in self.branches):
            self._unmask()
            for name, branch in self.branches.items():
                if point[name] == REMOVED:
                    self._masks[name] = mask_dimension(self.model, branch, ())
                    self._active[name] = REMOVED
        with torch.no_grad():
            for name, group in self.groups.items():
                if point[name] != self._active[name]:
                    for layer in group.layers:
                        self._put(layer, point[name])
                    self._active[name] = point[name]

    def restore(self) -> None:
        """Makes the model dense again, whatever was interrupted."""
        self._unmask()
        for name, layer in self.layers.items():
            layer.weight.data = self._originals[name]
        self._active = self.space.maximal()

    def _unmask(self) -> None:
        for name in reversed([*self._masks]):  # masks come off in the opposite order
            self._masks.pop(name)()
            self._active[name] = PRESENT

    def silent(self, point: Mapping[str, int]) -> set[str]:
        """
        :param point: A point.
        :return: Groups that stand in what is left out.
        """
        return {group for name in self.branches if point[name] == REMOVED for group in self._inside[name]}

    def everywhere(self, size: int) -> Point:
        """
        :param size: Size of a form.
        :return: The point with that form in every group; where a group does not have it, the next larger one.
        """
        fitting = {name: min(each for each in group.forms if each >= size) for name, group in self.groups.items()}
        return self.space.check({**dict.fromkeys(self.branches, PRESENT), **fitting})

    def extract(self, point: Mapping[str, int]) -> Any:
        """
        :param point: A point.
        :return: A new model of that point alone: packed weights in NNCF's torch form, zeros in floating weights, and
            without what is left out. Its computation is that of this model with the point active.
        :raises nncf.ValidationError: It is not a point of the space.
        """
        point = self.space.canonical(self.space.check(point))
        before = self.active
        self.restore()
        try:
            for name, layer in self.layers.items():
                layer.__dict__[_LAYER] = name
            model = self._copy(point)
        finally:
            for layer in self.layers.values():
                layer.__dict__.pop(_LAYER, None)
            self.activate(before)
        size_of = {layer: point[name] for name, group in self.groups.items() for layer in group.layers}
        for path, module in [*model.named_modules()]:
            name = module.__dict__.pop(_LAYER, None)
            if name is not None and isinstance(module, nn.Linear):
                self.catalogue.entry(name, size_of[name]).install(model, path, module)
        return model.eval()

    def _copy(self, point: Point) -> Any:
        gone = [self.branches[name].name for name in self.branches if point[name] == REMOVED]
        if not gone or self._dimensions is None:
            return copy.deepcopy(self.model)
        plan = StructurePlan.dense(self.model, self._dimensions)
        for name in gone:
            plan = plan.keep(name, ())
        model = extract_structure(self.model, plan, self._dimensions)
        set_plan(model, plan)
        return model

    def _put(self, layer: str, size: int) -> None:
        parameter, original = self.layers[layer].weight, self._originals[layer]
        parameter.data = original if size == DENSE.size else self.catalogue.entry(layer, size).dense().to(original)

    def _removable(self, groups: Any) -> dict[str, Dimension]:
        if self._dimensions is None:
            return {}
        found = {}
        for name, dimension in self._dimensions.items():
            # The first block stays: without any attention a cache could not tell positions.
            if (
                dimension.block
                and REMOVED in dimension.replacements
                and any(_within(group.name, dimension) for group in groups)
            ):
                found[name] = dimension
        return found


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def _known_dimensions(model: nn.Module) -> Dimensions | None:
    try:
        return dimensions_of(model)
    except nncf.UnsupportedModelError:
        return None


def _within(layer: str, branch: Dimension) -> bool:
    return any(layer == path or layer.startswith(f"{path}.") for path in branch.replaced(()))
