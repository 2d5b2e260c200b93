"""The front door of extraction: from a network that could be many to one that is small."""

from collections.abc import Mapping

import nncf
from torch import nn

from nncf_ext.algorithms.elastic_lora.algorithm import ElasticNetwork
from nncf_ext.algorithms.elastic_lora.extraction import extract_ranks


def extract(net: ElasticNetwork, point: Mapping[str, int]) -> nn.Module:
    """
    Makes the network of one point real: smaller tensors, no hooks.

    :param net: Elastic network; not changed.
    :param point: A size for every dimension, such as ``net.heuristic()`` or ``report.best``.
    :return: A new model that computes what `net` computes with this point active. For ranks, a PEFT model with an
        ordinary adapter: ``save_pretrained`` writes it, ``PeftModel.from_pretrained`` of stock PEFT loads it.
    :raises nncf.ValidationError: It is not a point of the network's space.
    :raises nncf.UnsupportedModelError: There is nothing elastic.
    """
    if not isinstance(net, ElasticNetwork):
        msg = f"Asked to extract from a {type(net).__name__}; extract() takes what make_elastic() returned."
        raise nncf.UnsupportedModelError(msg)
    return extract_ranks(net, point)
