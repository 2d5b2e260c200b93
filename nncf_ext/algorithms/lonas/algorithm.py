"""
LoNAS: the adapters of a PEFT model are trained while their ranks and the widths of the frozen base change together, so
that the search can choose a smaller base and an adapter that fits it.
"""

from collections.abc import Mapping
from typing import Any

import nncf
from torch import nn

from nncf_ext.algorithms.bootstrap_nas.algorithm import SuperNetwork
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from nncf_ext.algorithms.elastic_lora.algorithm import ElasticLora
from nncf_ext.algorithms.elastic_lora.extraction import extract_ranks
from nncf_ext.exploration.space import Point, SearchSpace
from nncf_ext.parameters import ElasticMode
from nncf_ext.structure.counting import ParameterNumbers
from nncf_ext.structure.dimensions import Dimensions, Kept
from nncf_ext.structure.order import units_at
from nncf_ext.structure.slicing import remove_slices


class ElasticBaseAndLora:
    """
    A PEFT model whose base and adapters can be smaller: widths of the base first, then ranks, in one space. The adapter
    of a layer follows the layer: B loses the outputs, A the inputs that the layer loses.

    :param model: PEFT model with a LoRA adapter.
    :param mode: ``RANK`` with ``WIDTH``, ``DEPTH`` or both.
    :param groups: Groups of adapters that share a rank; see :class:`ElasticLora`.
    :param adapter: Name of the adapter; None for the active one.
    :param example_input: What the base is called with; see :class:`SuperNetwork`.
    :param ignored_scope: Layers of the base that keep their shapes.
    :param parameters: Which widths there are.
    :raises nncf.ValidationError: See :func:`nncf_ext.make_elastic`.
    :raises nncf.UnsupportedModelError: See there.
    Source: LoNAS, LREC-COLING 2024; with real extraction, which its reference does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: ElasticMode,
        groups: Any,
        adapter: str | None,
        example_input: Any,
        ignored_scope: nncf.IgnoredScope | None = None,
        parameters: AdvancedBootstrapNasParameters | None = None,
    ) -> None:
        self._ranks = ElasticLora(model, groups, adapter)
        self._base = self._ranks.model.get_base_model()
        sizes = mode & ~ElasticMode.RANK
        self._sizes = SuperNetwork(self._base, sizes, example_input, ignored_scope, parameters)
        self._space = SearchSpace({**self._sizes.space.dimensions, **self._ranks.space.dimensions})
        self._numbers = ParameterNumbers(self._base, self.dimensions)

    @property
    def model(self) -> Any:
        """The PEFT model."""
        return self._ranks.model

    @property
    def space(self) -> SearchSpace:
        """Sizes of the base's dimensions, then ranks, the largest first."""
        return self._space

    @property
    def dimensions(self) -> Dimensions:
        """What each dimension cuts, by path from the base model."""
        own = self._sizes.dimensions
        return Dimensions([*own.values(), *self._ranks.dimensions.values()], scopes=own.scopes)

    @property
    def refused(self) -> dict[str, str]:
        """What of the base cannot change, and why."""
        return self._sizes.refused

    @property
    def active(self) -> Point:
        """The active point."""
        return {**self._sizes.active, **self._ranks.active}

    def activate(self, point: Mapping[str, int]) -> None:
        """
        Sets sizes and ranks that forward and backward use from now on.

        :param point: A size for every dimension.
        :raises nncf.ValidationError: It is not a point of the space; nothing has changed then.
        """
        point = self._space.check(point)
        self._sizes.activate({name: point[name] for name in self._sizes.space.dimensions})
        self._ranks.activate({name: point[name] for name in self._ranks.space.dimensions})

    def macs(self, point: Mapping[str, int]) -> int:
        """
        :param point: A point.
        :return: Multiplications with weights in one forward of the example, adapters included.
        """
        left = self._left(self._space.check(point))
        return round(sum(count * left[path] for path, count in self._sizes.products.items() if path in left))

    def parameter_count(self, point: Mapping[str, int]) -> int:
        """
        :param point: A point.
        :return: Parameters of the extracted model, base and adapters.
        """
        left = self._left(self._space.check(point))
        return sum(left[name] for name, _ in self._base.named_parameters())

    def extract(self, point: Mapping[str, int]) -> Any:
        """
        :param point: A point.
        :return: A PEFT model with a smaller base and an ordinary adapter: ``merge_and_unload()`` merges it,
            ``save_pretrained`` writes the adapter; this one is not changed.
        :raises nncf.ValidationError: It is not a point of the space.
        """
        kept = self._kept(self._space.check(point))
        model = extract_ranks(self.model, self._ranks.adapter_name, self.dimensions, kept, self._ranks.layers)
        remove_slices(model)
        module: Any
        for module in model.modules():
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Linear):
                module.in_features, module.out_features = base.in_features, base.out_features
        return model

    def release(self) -> None:
        """Takes all hooks off: the model is the PEFT model that it was."""
        self._sizes.release()
        self._ranks.release()

    def _kept(self, point: Mapping[str, int]) -> Kept:
        return units_at(self.dimensions.all_units(), point)

    def _left(self, point: Mapping[str, int]) -> dict[str, int]:
        return self._numbers.left(point)
