"""
A super-network of any trained model: one set of weights, whose leading parts are the weights of many smaller networks.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import nncf
import torch
from torch import nn

from nncf_ext.algorithms.bootstrap_nas.kernel import ElasticKernel, elastic_kernel, fix_kernel
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from nncf_ext.algorithms.bootstrap_nas.reorder import importance_order, reorder
from nncf_ext.algorithms.bootstrap_nas.structure import Found, find
from nncf_ext.exploration.space import Point, SearchSpace
from nncf_ext.parameters import ElasticMode, UnitImportance
from nncf_ext.structure.counting import ParameterNumbers
from nncf_ext.structure.dimensions import DimensionKind, Dimensions, Kept
from nncf_ext.structure.slicing import Slices, is_sliced, remove_slices
from nncf_ext.structure.surgery import cut_structure, cut_tensors

_VERSION = 1
_KERNEL = ".kernel"


class SuperNetwork:
    """
    A model whose sizes can be set: widths, kernels, and how many blocks of each chain run.

    At first the maximal point is active, which is the model as it was, bit for bit. A smaller width uses the leading
    channels of every tensor that it touches, as views: gradients land in the whole weights, and any optimizer and loop
    trains them. The model's modules and parameters stay the same objects; elastic kernels add their matrices to them.

    :param model: Any torch model that runs with the example.
    :param mode: What becomes elastic.
    :param example_input: What the model is called with: a tensor, a tuple of arguments, a dictionary of named ones. Its
        shapes are those for which multiplications are counted.
    :param ignored_scope: What keeps its shape.
    :param parameters: Which sizes there are.
    :raises nncf.ValidationError: See :func:`nncf_ext.make_elastic`.
    :raises nncf.UnsupportedModelError: See there.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: ElasticMode,
        example_input: Any,
        ignored_scope: nncf.IgnoredScope | None = None,
        parameters: AdvancedBootstrapNasParameters | None = None,
    ) -> None:
        parameters = AdvancedBootstrapNasParameters() if parameters is None else parameters
        if is_sliced(model) or any(elastic_kernel(each) is not None for each in model.modules()):
            msg = (
                f"{type(model).__name__} is already elastic: release() its super-network first. A copy that nothing "
                "releases becomes a plain model by extract(maximal()) of its super-network."
            )
            raise nncf.ValidationError(msg)
        self._model = model
        self._released = False
        self._mode = mode
        self._found: Found = find(model, mode, example_input, ignored_scope, parameters)
        self._silences = _silences(self.dimensions, self._found.sizes)
        self._space = SearchSpace(self._found.sizes, inactive=self._inactive if self._silences else None)
        self._active = self._space.maximal()
        self._slices = Slices(model, self.dimensions)
        # Before kernels get their matrices, which no extracted network has.
        self._numbers = ParameterNumbers(model, self.dimensions)
        self._kernels: dict[str, ElasticKernel] = {
            name: ElasticKernel(self._convolution(name), list(sizes))  # type: ignore[arg-type]
            for name, sizes in self._found.sizes.items()
            if self.dimensions[name].kind is DimensionKind.KERNEL
        }

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def space(self) -> SearchSpace:
        """Sizes of every dimension, the largest first: units of widths, sizes of kernels, blocks of chains."""
        return self._space

    @property
    def dimensions(self) -> Dimensions:
        """What each dimension cuts or leaves out."""
        return self._found.dimensions

    @property
    def products(self) -> Mapping[str, float]:
        """For each weight, how many products each of its numbers takes part in, in one forward of the example."""
        return self._found.products

    @property
    def refused(self) -> dict[str, str]:
        """What cannot change, and why."""
        return dict(self._found.refused)

    @property
    def active(self) -> Point:
        """The active point."""
        return dict(self._active)

    def activate(self, point: Mapping[str, int]) -> None:
        """
        Sets the sizes that forward and backward use from now on; not between a forward and its backward where
        activations are checkpointed.

        :param point: A size for every dimension.
        :raises nncf.ValidationError: It is not a point of the space, nothing has changed then; or the network is
            released.
        """
        self._check_not_released()
        point = self._space.check(point)
        self._slices.keep(self._kept(point))
        for name, kernel in self._kernels.items():
            kernel.active = point[name]
        self._active = point

    def maximal(self) -> Point:
        """:return: The largest point: the whole model."""
        return self._space.maximal()

    def minimal(self) -> Point:
        """:return: The smallest point."""
        return self._space.minimal()

    def heuristic(self) -> Point:
        """:return: The point of middle sizes."""
        return self._space.heuristic()

    def random(self, seed: int, step: int = 0) -> Point:
        """
        :param seed: Seed.
        :param step: Number of the draw.
        :return: A uniform point that depends on nothing else.
        """
        return self._space.draw(seed, step)

    def reorganize(
        self,
        importance: UnitImportance | Any = UnitImportance.L1,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """
        Puts the most important units of every width first, in place. The whole model computes what it did.

        :param importance: What scores units; see
            :func:`nncf_ext.algorithms.bootstrap_nas.reorder.importance_order`. First-order importance reads the
            gradients that a backward of yours left in the parameters. Or scores by width, such as
            :meth:`FirstOrderImportance.scores` gives.
        :param optimizer: An optimizer that trains the model: its momenta move along.
        :raises nncf.ValidationError: There are no gradients for first-order importance, or scores do not fit.
        """
        if importance is UnitImportance.FIRST_ORDER and all(each.grad is None for each in self._model.parameters()):
            msg = (
                "First-order importance multiplies weights with gradients, and no parameter has one. Run a loss and "
                "its backward on some batches first."
            )
            raise nncf.ValidationError(msg)
        reorder(self._model, self.dimensions, importance_order(self._model, self.dimensions, importance), optimizer)

    # Costs

    def macs(self, point: Mapping[str, int]) -> int:
        """
        Multiplications with weights in one forward of the example: of convolutions, linear layers and whatever else
        multiplies by a parameter. As an objective: ``Objective("macs", net.macs, maximize=False)``.

        :param point: A point.
        :return: Their number; products of activations with each other (attention scores) are not among them.
        """
        left = self._left(self._space.check(point))
        return round(sum(count * left[path] for path, count in self._found.products.items() if path in left))

    def parameter_count(self, point: Mapping[str, int]) -> int:
        """
        :param point: A point.
        :return: Parameters of the extracted network, shared ones once.
        """
        left = self._left(self._space.check(point))
        return sum(left[name] for name, _ in self._model.named_parameters() if name in left)

    def weight_bytes(self, point: Mapping[str, int]) -> int:
        """
        :param point: A point.
        :return: Size of the extracted network's parameters in their present types, bytes.
        """
        left = self._left(self._space.check(point))
        return sum(left[name] * each.element_size() for name, each in self._model.named_parameters() if name in left)

    # The networks inside

    def extract(self, point: Mapping[str, int]) -> Any:
        """
        The network of one point as a plain model; see :func:`nncf_ext.extract`.

        :param point: A size for every dimension.
        :return: A new model; this one is not changed.
        :raises nncf.ValidationError: It is not a point of the space, or the network is released.
        """
        self._check_not_released()
        self._slices.settle()
        for name, kernel in self._kernels.items():
            kernel.settle(self._convolution(name))  # type: ignore[arg-type]
        point = self._space.check(point)
        model = copy.deepcopy(self._model)
        remove_slices(model)
        for name in self._kernels:
            convolution: Any = model.get_submodule(name.removesuffix(_KERNEL))
            fix_kernel(convolution, point[name])
        kept = self.dimensions.all_units() | {name: tuple(units) for name, units in self._kept(point).items()}
        if self._found.has_record:
            cut_structure(model, kept, self.dimensions)
        else:
            cut_tensors(model, kept, self.dimensions)
        return model

    def release(self) -> None:
        """The model is what it was made of again: bare modules, with the weights that it has now."""
        self._slices.remove()
        self._released = True
        for name in self._kernels:
            convolution: Any = self._convolution(name)
            if (kernel := elastic_kernel(convolution)) is not None:
                kernel.remove(convolution)
        self._active = self._space.maximal()

    def state_dict(self) -> dict[str, Any]:
        """
        :return: Space and active point as plain data for JSON. Weights and matrices of kernels are the model's to save.
        """
        return {"version": _VERSION, "space": self._space.to_dict(), "active": self.active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        :param state: From :meth:`state_dict` of a network with the same space; its active point becomes active.
        :raises nncf.ValidationError: It is of another version or space.
        """
        own = self.state_dict()
        for key in ("version", "space"):
            if state.get(key) != own[key]:
                msg = f"The state is of another network: its {key} is {state.get(key)}, this network's {own[key]}."
                raise nncf.ValidationError(msg)
        self.activate(state["active"])

    def __str__(self) -> str:
        lines = [f"{name}: {', '.join(map(str, sizes))}" for name, sizes in self._space.dimensions.items()]
        return "\n".join([*lines, *(f"{name}: not elastic, {why}" for name, why in self._found.refused.items())])

    # Its own

    def _check_not_released(self) -> None:
        if self._released:
            msg = "The super-network was released: its model is plain. Make it elastic anew with nncf_ext.make_elastic."
            raise nncf.ValidationError(msg)

    def _inactive(self, point: Mapping[str, int]) -> set[str]:
        """Dimensions of what is left out."""
        return {name for chosen in point.items() for name in self._silences.get(chosen, ())}

    def _convolution(self, name: str) -> nn.Module:
        return self._model.get_submodule(name.removesuffix(_KERNEL))

    def _kept(self, point: Mapping[str, int]) -> Kept:
        return {
            name: range(size)
            for name, size in point.items()
            if self.dimensions[name].kind is not DimensionKind.KERNEL and size < self.dimensions[name].size
        }

    def _left(self, point: Mapping[str, int]) -> dict[str, int]:
        """How many numbers of each parameter stay, by path; matrices of kernels are not among them."""
        left = self._numbers.left({name: size for name, size in point.items() if name not in self._kernels})
        for name, kernel in self._kernels.items():
            path = f"{name.removesuffix(_KERNEL)}.weight"
            left[path] = left[path] // kernel.maximum**2 * point[name] ** 2
        return left


def _silences(dimensions: Dimensions, sizes: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], set[str]]:
    """For each size of a dimension that leaves modules out: other dimensions that touch nothing else."""
    # A kernel, or a chain of blocks, has no cuts, and is named after what it is of.
    modules = {name: [cut.module for cut in dimensions[name].cuts] or [name.rpartition(".")[0]] for name in sizes}
    found: dict[tuple[str, int], set[str]] = {}
    for name, each in sizes.items():
        for size in each:
            gone = tuple(f"{path}." for path in dimensions[name].replaced(range(size)))
            inside = {
                other
                for other, touched in modules.items()
                if gone and other != name and all(f"{module}.".startswith(gone) for module in touched)
            }
            if inside:
                found[name, size] = inside
    return found
