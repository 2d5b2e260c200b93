"""Make a model smaller for real: cut tensors, replace modules, and let the architecture's record finish."""

import copy
from typing import Any, TypeVar

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.standalone.skipping import keep_ties, tied_names
from nncf_ext.structure.checks import check_plan
from nncf_ext.structure.cutting import kept_numbers, sizes_of_layer, staying
from nncf_ext.structure.dimensions import Dimensions, Kept, tensor_at
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.upstream import is_wrapped
from nncf_ext.weights.records import set_record

TModel = TypeVar("TModel", bound=nn.Module)


def extract_structure(model: TModel, plan: StructurePlan, dimensions: Dimensions | None = None) -> TModel:
    """
    Carries a plan out. The input is untouched; the result shares no tensor with it.

    Layers that lose both branches vanish. Where all layers come out alike, the result is an ordinary model of its
    class, configuration included; else :func:`nncf_ext.save_pretrained` writes what differs.

    :param model: The dense model, before compression to a grid.
    :param plan: What stays.
    :param dimensions: The model's dimensions; None: find them.
    :return: The smaller model: plain modules with smaller shapes on the device of the input.
    :raises nncf.ValidationError: The plan does not fit the model.
    :raises nncf.UnsupportedModelError: The model's structure is unknown, shared, or carries NNCF hooks.
    """
    if is_wrapped(model):
        msg = "Asked to cut a model that carries NNCF hooks. Extract the plain model first, then compress the result."
        raise nncf.UnsupportedModelError(msg)
    dimensions = dimensions_of(model) if dimensions is None else dimensions
    check_plan(model, plan, dimensions)
    # Weights that will be cut or dropped are not copied whole: slicing makes new ones.
    replaced: dict[int, Any] = {}
    for name, dimension in dimensions.items():
        units = plan.kept[name]
        for path, stand_in in dimension.replaced(units).items():
            module = model.get_submodule(path)
            stays = {id(each) for each in stand_in.standing_for(module).parameters()}
            replaced |= {id(each): each for each in module.parameters() if id(each) not in stays}
        for cut in dimension.cuts if 0 < len(units) and units != dimension.all_units else ():
            replaced[id(tensor_at(model, cut.tensor))] = tensor_at(model, cut.tensor)
    small = copy.deepcopy(model, replaced)
    cut_structure(small, plan.kept, dimensions)
    return small


def cut_structure(model: nn.Module, kept: Kept, dimensions: Dimensions) -> None:
    """
    Cuts a model in place, parameters on any device, meta included.

    :param model: The model, changed in place.
    :param kept: Units of each dimension that stay.
    :param dimensions: The model's dimensions.
    """
    base = model.get_submodule(dimensions.blocks.rpartition(".")[0])
    ties = tied_names(base)
    cut_tensors(model, kept, dimensions)
    keep_ties(base, ties)
    dimensions.record.finish(model)


def cut_tensors(model: nn.Module, kept: Kept, dimensions: Dimensions) -> None:
    """
    The part of :func:`cut_structure` that needs no record: tensors, sizes of their layers, and stand-ins.

    :param model: The model, changed in place.
    :param kept: Units of each dimension that stay.
    :param dimensions: The model's dimensions.
    """
    numbers = kept_numbers(dimensions, kept)
    axes_of = staying(model, dimensions, kept)
    wholes = {path: tensor_at(model, path) for path in axes_of}
    pieces: dict[int, Tensor] = {}  # a tensor that several modules share stays shared
    for path, axes in axes_of.items():
        whole = wholes[path]
        if id(whole) not in pieces:
            piece = whole.detach()
            for axis, indices in axes.items():
                piece = piece.index_select(axis, torch.from_numpy(indices).to(whole.device))
            is_parameter = isinstance(whole, nn.Parameter)
            pieces[id(whole)] = nn.Parameter(piece, requires_grad=whole.requires_grad) if is_parameter else piece
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if name == "weight":
            for attribute, value in sizes_of_layer(module, pieces[id(whole)].shape).items():
                setattr(module, attribute, value)
        setattr(module, name, pieces[id(whole)])
        set_record(module, None)
    for path, value in numbers.items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)
    for name, dimension in dimensions.items():
        for path, stand_in in dimension.replaced(kept[name]).items():
            replaced = model.get_submodule(path)
            replacement = stand_in.standing_for(replaced)
            # A new module is in training mode; what it stands for may not be.
            for each in {*replacement.modules()} - {*replaced.modules()}:
                each.training = replaced.training
            # Stand-ins look at slices of the weights; a copy lets the rest of the memory go.
            for parameter in replacement.parameters():
                parameter.data = parameter.data.clone()
            model.set_submodule(path, replacement)
