"""What combinations of forms are judged by, where nothing needs to be run."""

import nncf

from nncf_ext.algorithms.accuracy_control.network import FormNetwork
from nncf_ext.exploration.objectives import NetworkObjective, Objective
from nncf_ext.exploration.space import Elastic, Point


def packed_bytes() -> NetworkObjective:
    """
    Bytes of the weights of a network of forms when it is packed, to minimize, under the name "packed bytes": where
    there are zeros, a bit a weight says where, and the others are stored. Weights that have no form, such as
    embeddings, count as they are in the model.

    :return: The objective.
    :raises nncf.ValidationError: When it is bound: the network is one of other dimensions.
    """

    def make(net: Elastic) -> Objective:
        if not isinstance(net, FormNetwork):
            msg = f"packed_bytes() counts forms of weights, which {type(net).__name__} has not. Use weight_bytes()."
            raise nncf.ValidationError(msg)
        inside = {id(layer.weight) for layer in net.layers.values()}
        rest = sum(each.nbytes for each in net.model.parameters() if id(each) not in inside)

        def count(point: Point) -> float:
            silent = net.silent(point)
            forms = [group.weights * point[name] / 8000 for name, group in net.groups.items() if name not in silent]
            return rest + sum(forms)

        return Objective("packed bytes", count, maximize=False)

    return NetworkObjective("packed bytes", make)
