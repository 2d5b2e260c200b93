"""Make a model smaller for real: cut tensors, replace modules, and let the architecture's record finish."""

import copy
from typing import Any, TypeVar

import nncf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nncf_ext.standalone.skipping import keep_ties, tied_names
from nncf_ext.structure.checks import check_plan
from nncf_ext.structure.dimensions import Dimension, Dimensions, Kept, tensor_at
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.upstream import is_wrapped
from nncf_ext.weights.records import set_record
from nncf_ext.weights.sharing import names_of_parameters

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
    scissors = _Scissors(model)  # one for all dimensions: a tensor may be cut by two of them
    for name, dimension in dimensions.items():
        units = kept[name]
        if tuple(units) == dimension.all_units:
            continue
        if stand_ins := dimension.replaced(units):
            for path, stand_in in stand_ins.items():
                replaced = model.get_submodule(path)
                replacement = stand_in.standing_for(replaced)
                # A new module is in training mode; what it stands for may not be.
                for module in {*replacement.modules()} - {*replaced.modules()}:
                    module.training = replaced.training
                # Stand-ins look at slices of the weights; a copy lets the rest of the memory go.
                for parameter in replacement.parameters():
                    parameter.data = parameter.data.clone()
                model.set_submodule(path, replacement)
        else:
            scissors.cut(dimension, units)


class _Scissors:
    """Cuts tensors; one that several modules share stays shared."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        names = names_of_parameters(model)
        # Kept alive, so that no new tensor gets the id of an old one.
        self._shared: dict[int, Tensor] = {id(each): each for each in model.parameters() if len(names[id(each)]) > 1}
        self._pieces: dict[tuple[int, int], Tensor] = {}

    def cut(self, dimension: Dimension, units: Any) -> None:
        for cut in dimension.cuts:
            module, name = self._model.get_submodule(cut.module), cut.tensor.rpartition(".")[2]
            whole = tensor_at(self._model, cut.tensor)
            piece = self._pieces.get((id(whole), cut.axis))
            if piece is None:
                piece = whole.detach().index_select(cut.axis, cut.indices(units, whole.device))
                if isinstance(whole, nn.Parameter):
                    piece = nn.Parameter(piece, requires_grad=whole.requires_grad)
                if id(whole) in self._shared:
                    self._pieces[id(whole), cut.axis] = piece
                    self._shared[id(piece)] = piece
            setattr(module, name, piece)
            fit_attributes(module)
            set_record(module, None)


def fit_attributes(module: Any) -> None:
    """
    Makes the numbers that a layer keeps about its shape agree with its weight.

    :param module: A linear layer, convolution, embedding or normalization; any other stays as it is.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups == module.in_channels > 1:  # depthwise: a group for each channel that is left
            module.groups = weight.shape[0] * module.groups // module.out_channels
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, _NormBase):
        module.num_features = weight.shape[0]
