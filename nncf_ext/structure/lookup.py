"""Which dimensions does a model have? Today a record knows; a model without one is refused with what is missing."""

import nncf
from torch import nn

from nncf_ext.structure.blocks import find_block_lists
from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.records import RECORDS, record_of
from nncf_ext.structure.wrappers import check_plain, reparametrization


def dimensions_of(model: nn.Module) -> Dimensions:
    """
    Finds what can be smaller in a model, and checks that the model is built as its architecture's record says.

    :param model: A Hugging Face model, whole or cut; meta device will do.
    :return: Its dimensions.
    :raises nncf.UnsupportedModelError: No record fits the architecture, the model differs from its record, or is not
        made of plain modules (:func:`nncf_ext.structure.wrappers.check_plain`).
    """
    check_plain(model)
    record = record_of(model)
    path = None if record is None else record.blocks_path(model)
    if record is None or path is None:
        raise nncf.UnsupportedModelError(_no_record(model))
    for name, module in model.get_submodule(path).named_modules():
        for own_name, _ in module.named_parameters(recurse=False):
            if (computes := reparametrization(module, own_name)) is not None:
                raise nncf.UnsupportedModelError(f"{path}.{name}.{own_name} {computes}.")
    return record.dimensions(model, path)


def _no_record(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    known = ", ".join(model_type for record in RECORDS for model_type in record.model_types)
    lists = [each.name for each in find_block_lists(model)]
    found = f"Its repeated blocks are {', '.join(lists)}" if lists else "No repeated blocks were found"
    return (
        f"Asked to remove structure from {kind!r}, whose attention and MLP no record describes. {found}; where its "
        f"query, key, value, output and MLP projections stand is missing. Known: {known}. "
        "A record in nncf_ext/structure/records adds an architecture."
    )
