"""Which tensors does a model hold under several names (tied weights)? Equal memory alone does not make them one."""

from collections.abc import Hashable, Mapping

from torch import Tensor, nn


def place_of(tensor: Tensor) -> Hashable:
    """
    :param tensor: Any tensor.
    :return: Equal for two tensors that are one: same memory, offset, shape, strides and type. Two views of one memory
        differ. A tensor whose memory is not to be seen (meta device, no elements, a subclass) is one with itself only.
    """
    if tensor.is_meta or not tensor.numel() or type(tensor) not in (Tensor, nn.Parameter):
        return id(tensor)
    memory = tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *memory, tuple(tensor.shape), tensor.stride(), tensor.dtype


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """
    :param model: Any torch model.
    :return: All names of every parameter, in the model's order, by the parameter's ``id()``. More than one name: the
        parameter is shared, as the same object or as another with the very same memory.
    """
    parameters = list(model.named_parameters(remove_duplicate=False))
    names: dict[Hashable, list[str]] = {}
    for name, parameter in parameters:
        names.setdefault(place_of(parameter), []).append(name)
    return {id(parameter): names[place_of(parameter)] for _, parameter in parameters}


def tie(model: nn.Module, names: Mapping[str, str]) -> None:
    """
    Makes parameters one.

    :param model: The model, changed in place.
    :param names: By the name of a parameter, that of the parameter that takes its place.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, other in names.items():
        if name in parameters and other in parameters:
            module, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(module), own_name, parameters[other])
