"""
Elastic ranks (neural low-rank adapter search): one pair (A, B) of the largest rank holds every lower rank as its
leading rows and columns. All of them are trained, one at a time; a search chooses; extraction cuts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import nncf
from peft import PeftModel
from torch import nn

from nncf_ext.algorithms.elastic_lora.adapter import ElasticRank, attach_rank, detach_rank
from nncf_ext.algorithms.elastic_lora.extraction import extract_ranks
from nncf_ext.algorithms.elastic_lora.inspection import factors, find_adapter, lora_layers
from nncf_ext.algorithms.elastic_lora.layers import REFUSED, group_layers
from nncf_ext.algorithms.elastic_lora.parameters import RankGroup
from nncf_ext.exploration.space import Point, SearchSpace
from nncf_ext.structure.dimensions import Cut, Dimension, DimensionKind, Dimensions
from nncf_ext.structure.order import units_at

_VERSION = 1


class ElasticLora:
    """
    A PEFT model whose adapters' ranks can be set: one dimension for each group of adapters that share a rank.

    Nothing is drawn here, and nothing changes but by :meth:`activate`. At first the maximal point is active, which is
    the model as it was. The hooks follow the model through copies and devices; they are not part of its state dict, so
    saving the model saves the full adapter.

    :param model: PEFT model with a LoRA adapter.
    :param groups: What shares a rank, and the ranks to choose from.
    :param adapter: Name of the adapter; None for the active one.
    :raises nncf.ValidationError: See :func:`nncf_ext.make_elastic`.
    :raises nncf.UnsupportedModelError: See there.
    """

    def __init__(self, model: nn.Module, groups: Sequence[RankGroup], adapter: str | None = None) -> None:
        self._model, self._adapter = find_adapter(model, adapter, "Only the rank of LoRA can be elastic.", REFUSED)
        dimensions = list(group_layers(self._model, self._adapter, groups))
        self._space = SearchSpace({name: sorted(group.ranks, reverse=True) for name, group, _ in dimensions})
        self._paths = {name: tuple(paths) for name, _, paths in dimensions}
        layers = lora_layers(self._model, self._adapter)
        self._hooks: dict[str, list[ElasticRank]] = {
            name: [attach_rank(layers[path].lora_A[self._adapter]) for path in paths]
            for name, paths in self._paths.items()
        }

    @property
    def model(self) -> PeftModel:
        """The PEFT model."""
        return self._model

    @property
    def adapter_name(self) -> str:
        """Name of the adapter whose ranks are elastic."""
        return self._adapter

    @property
    def space(self) -> SearchSpace:
        """The ranks of every dimension, largest first."""
        return self._space

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Paths of the layers of every dimension, in the base model."""
        return dict(self._paths)

    @property
    def dimensions(self) -> Dimensions:
        """The ranks as dimensions: rows of A and columns of B, by path from the base model."""
        found = []
        for name, paths in self._paths.items():
            cuts = [
                Cut(f"{path}.lora_{each}.{self._adapter}.weight", "AB".index(each)) for path in paths for each in "AB"
            ]
            rank = self._hooks[name][0].maximum
            found.append(Dimension(name, DimensionKind.RANK, rank, cuts=tuple(cuts), unit="A unit is one rank"))
        return Dimensions(found)

    @property
    def active(self) -> Point:
        """The active rank of every dimension."""
        return {name: hooks[0].active for name, hooks in self._hooks.items()}

    def activate(self, point: Mapping[str, int]) -> None:
        """
        Sets the ranks that forward and backward use from now on. Do it before a forward, never between a forward and
        its backward: under gradient checkpointing the backward runs parts of the forward once more.

        :param point: A rank for every dimension.
        :raises nncf.ValidationError: It is not a point of the space; nothing has changed then.
        """
        for name, rank in self._space.check(point).items():
            for hook in self._hooks[name]:
                hook.active = rank

    def maximal(self) -> Point:
        """
        :return: The point of largest ranks: all of the adapter.
        """
        return self._space.maximal()

    def minimal(self) -> Point:
        """
        :return: The point of smallest ranks.
        """
        return self._space.minimal()

    def heuristic(self) -> Point:
        """
        :return: The point of middle ranks; of an even number of ranks, the larger one of the two in the middle.
        """
        return self._space.heuristic()

    def random(self, seed: int, step: int = 0) -> Point:
        """
        :param seed: Seed.
        :param step: Number of the draw.
        :return: A uniform point that depends on nothing else: the same in every process and after every restart.
        """
        return self._space.draw(seed, step)

    def adapter_parameters(self, point: Mapping[str, int]) -> int:
        """
        The size of the extracted adapter, as an objective:
        ``Objective("parameters", net.adapter_parameters, maximize=False)``.

        :param point: A point.
        :return: Number of parameters of A and B at these ranks, layers outside all groups included.
        """
        ranks = {
            path: (rank, self._hooks[name][0].maximum)
            for name, rank in self._space.check(point).items()
            for path in self._paths[name]
        }
        count = 0
        for path, layer in lora_layers(self._model, self._adapter).items():
            rank, maximum = ranks.get(path, (1, 1))
            count += sum(factor.numel() for factor in factors(layer, self._adapter)) * rank // maximum
        return count

    def extract(self, point: Mapping[str, int]) -> PeftModel:
        """
        The network of one point as a PEFT model with an ordinary adapter; see :func:`nncf_ext.extract`.

        :param point: A rank for every dimension.
        :return: A new model; this one is not changed.
        :raises nncf.ValidationError: It is not a point of the space.
        """
        dimensions = self.dimensions
        kept = units_at(dimensions.all_units(), self._space.check(point))
        return extract_ranks(self._model, self._adapter, dimensions, kept, self._paths)

    def state_dict(self) -> dict[str, Any]:
        """
        :return: Space, layers and active point as plain data for JSON. The weights are the model's to save.
        """
        return {
            "version": _VERSION,
            "adapter": self._adapter,
            "space": self._space.to_dict(),
            "layers": {name: list(paths) for name, paths in self._paths.items()},
            "active": self.active,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        :param state: From :meth:`state_dict` of a network with the same space; its active point becomes active.
        :raises nncf.ValidationError: It is of another version, or of other dimensions, ranks or layers.
        """
        own = self.state_dict()
        for key in ("version", "adapter", "space", "layers"):
            if state.get(key) != own[key]:
                msg = f"The state is of another network: its {key} is {state.get(key)}, this network's {own[key]}."
                raise nncf.ValidationError(msg)
        self.activate(state["active"])

    def release(self) -> None:
        """Takes the hooks off: the model is an ordinary PEFT model with adapters of the largest rank again."""
        layers = lora_layers(self._model, self._adapter)
        for paths in self._paths.values():
            for path in paths:
                detach_rank(layers[path].lora_A[self._adapter])
