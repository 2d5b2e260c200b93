"""Any torch model and one example of its input -> what in it can change its size, and what cannot, with reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
from torch import nn

from nncf_ext.structure.dimensions import Dimension, Dimensions
from nncf_ext.structure.tracing.chains import Chain, chains_of
from nncf_ext.structure.tracing.example import Example, evaluated, perturbed
from nncf_ext.structure.tracing.groups import Group, groups_of
from nncf_ext.structure.tracing.rules import outputs_of
from nncf_ext.structure.tracing.run import Run
from nncf_ext.structure.tracing.verification import failures, same_results, unheard

_ROUNDS = 6


@dataclass(frozen=True)
class Traced:
    """
    What one forward tells about a model.

    :param dimensions: Its widths, each of them tried: the model runs with some of the units, and gives what it gives
        when the others are zero.
    :param refused: What cannot change its size, by the module that writes it, and why.
    :param chains: Blocks of which each takes the output of the one before, and which may be left out.
    :param products: For each weight, how many products each of its numbers takes part in, in one forward of the
        example: multiplications of a layer = numbers of its weight times this.
    """

    dimensions: Dimensions
    refused: Mapping[str, str]
    chains: tuple[Chain, ...]
    products: Mapping[str, float]


def trace(model: nn.Module, example_input: Any, ignored: Sequence[str] = ()) -> Traced:
    """
    Follows a forward, finds which axes of which tensors must change together, and tries what it found.

    :param model: Any torch model, on any device. It runs in evaluation mode, and is the same afterwards.
    :param example_input: What it is called with: a tensor, a tuple of arguments, or a dictionary of named ones.
    :param ignored: Paths of modules whose weights keep their shapes.
    :return: Its dimensions.
    :raises nncf.ValidationError: The model does not run with this input.
    :raises nncf.UnsupportedModelError: It gives no tensors, or other results each time.
    """
    example = Example(example_input)
    with evaluated(model):
        _check_runs(model, example)
        twin = perturbed(model, example)
        choices: dict[int, int] = {}
        for _ in range(_ROUNDS):
            run = Run(model, choices)
            example.run(model, run.forward)
            groups = [_unless_ignored(each, ignored) for each in groups_of(model, run)]
            found = {each.name: each for each in groups if each.dimension is not None}
            dimensions = Dimensions([_dimension(each) for each in found.values()], scopes=run.scopes)
            for name, reason in failures(twin, dimensions, run, example).items():
                found[name].dimension, found[name].reason = None, reason
            other = _other_choices(run, groups, choices)
            if not other:
                break
            choices |= other
        left = Dimensions([_dimension(each) for each in groups if each.dimension is not None], scopes=run.scopes)
        if silent := unheard(twin, left, example):
            trial = Dimensions([left[name] for name in silent], scopes=run.scopes)
            for name, reason in failures(twin, trial, run, example, inside=True).items():
                found[name].dimension, found[name].reason = None, reason
            left = Dimensions([_dimension(each) for each in groups if each.dimension is not None], scopes=run.scopes)
        products: dict[str, float] = {}
        for path, count in run.products:
            products[path] = products.get(path, 0.0) + count
        refused = {each.name: each.reason for each in groups if each.dimension is None}
        return Traced(left, refused, chains_of(run), products)


def _check_runs(model: nn.Module, example: Example) -> None:
    try:
        first, second = (outputs_of(example.run(model)) for _ in range(2))
    except Exception as error:
        msg = (
            f"{type(model).__name__} does not run with the example input ({type(error).__name__}: {error}). Give a "
            "tensor, a tuple of positional arguments or a dictionary of named ones, on the model's device."
        )
        raise nncf.ValidationError(msg) from error
    if not first:
        msg = (
            f"{type(model).__name__} gives no tensor with the example input, so nothing says what must keep its size. "
            "Outputs may be tensors, or tuples, lists, dictionaries and dataclasses of tensors."
        )
        raise nncf.UnsupportedModelError(msg)
    if not same_results(first, second):
        msg = (
            f"{type(model).__name__} gives other results each time, in evaluation mode and with the same input, so "
            "nothing can be tried. Take the random draws out, or let it draw from a generator with a seed of its own."
        )
        raise nncf.UnsupportedModelError(msg)


def _dimension(group: Group) -> Dimension:
    assert group.dimension is not None
    return group.dimension


def _unless_ignored(group: Group, ignored: Sequence[str]) -> Group:
    kept = {*ignored}
    if group.dimension is not None and any(cut.module in kept for cut in group.dimension.cuts):
        which = next(cut.module for cut in group.dimension.cuts if cut.module in kept)
        return Group(group.name, None, f"{which} is in the ignored scope", group.roots, group.written)
    return group


def _other_choices(run: Run, groups: Sequence[Group], choices: Mapping[int, int]) -> dict[int, int]:
    """For sites in groups that came to nothing: the next axis."""
    roots, _ = run.labels.classes()
    lost = np.concatenate([np.zeros(0, np.int64), *(each.roots for each in groups if each.dimension is None)])
    other = {}
    for site in run.sites:
        now = choices.get(site.number, 0)
        if now + 1 < site.options and np.isin(roots[site.labels], lost).any():
            other[site.number] = now + 1
    return other
