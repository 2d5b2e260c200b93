"""What combinations of forms are judged by, where nothing needs to be run."""

from nncf_ext.algorithms.accuracy_control.network import FormNetwork
from nncf_ext.exploration.objectives import NetworkObjective, Objective
from nncf_ext.exploration.space import Elastic, Point


def packed_bytes() -> NetworkObjective:
    """
    Bytes of the weights of a network of forms when it is packed, to minimize, under the name "bytes": zeros take a bit
    each. Weights that have no form, such as embeddings, count as they are.

    :return: The objective.
    """

    def make(net: Elastic) -> Objective:
        assert isinstance(net, FormNetwork)
        inside = {id(layer.weight) for layer in net.layers.values()}
        rest = sum(each.nbytes for each in net.model.parameters() if id(each) not in inside)

        def count(point: Point) -> float:
            silent = net.silent(point)
            forms = [group.weights * point[name] / 8000 for name, group in net.groups.items() if name not in silent]
            return rest + sum(forms)

        return Objective("bytes", count, maximize=False)

    return NetworkObjective("bytes", make)
