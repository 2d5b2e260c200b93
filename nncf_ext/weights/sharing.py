"""Which parameters does a model hold under several names (tied weights)?"""

from torch import nn


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """
    :param model: Any torch model.
    :return: All names of every parameter, in the model's order, by the parameter's ``id()``. More than one name: the
        parameter is shared.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
