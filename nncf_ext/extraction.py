"""The front door of extraction: from a network that could be many, or a plan for a smaller one, to a small one."""

from collections.abc import Mapping
from typing import Any

import nncf
from torch import nn

from nncf_ext.exploration.space import Elastic
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from nncf_ext.structure.wrappers import plain_arithmetic, unwrapped
from nncf_ext.weights.activation_sparsity import refuse_sparse_inputs


@plain_arithmetic()
def extract(net: Elastic | nn.Module, point: Mapping[str, int] | StructurePlan) -> Any:
    """
    Makes the network of one point, or of a plan, real: smaller tensors, no hooks.

    :param net: Elastic network with a point, or a dense model with a plan; not changed.
    :param point: A size for every dimension, such as ``net.heuristic()`` or ``report.best``; or the plan.
    :return: A new model. Of a point: what `net` computes with it active; for ranks, a PEFT model with an ordinary
        adapter (``save_pretrained`` writes it, ``PeftModel.from_pretrained`` of stock PEFT loads it). Of a plan: plain
        modules with smaller shapes; ``nncf_ext.save_pretrained`` writes them.
    :raises nncf.ValidationError: It is not a point of the network's space, or the plan is not for this model.
    :raises nncf.UnsupportedModelError: There is nothing elastic, or a plan cannot be carried out on such a model.
    """
    if isinstance(point, StructurePlan):
        if not isinstance(net, nn.Module):
            msg = f"Asked to carry out a StructurePlan on a {type(net).__name__}; it needs the dense model it is for."
            raise nncf.UnsupportedModelError(msg)
        refuse_sparse_inputs(net, "cut")
        return extract_structure(unwrapped(net), point)
    if isinstance(net, nn.Module) or not callable(getattr(net, "extract", None)):
        msg = (
            f"Asked to extract a point from a {type(net).__name__}; extract() takes what make_elastic() returned, or "
            "a model with a StructurePlan."
        )
        raise nncf.UnsupportedModelError(msg)
    return net.extract(point)
