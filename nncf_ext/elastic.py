"""The front door of elastic networks: which method makes what elastic?"""

from collections.abc import Sequence

from torch import nn

from nncf_ext.algorithms.elastic_lora.algorithm import ElasticLora
from nncf_ext.algorithms.elastic_lora.parameters import RankGroup
from nncf_ext.parameters import ElasticMode, parse_choice
from nncf_ext.structure.wrappers import check_not_compiled


def make_elastic(
    model: nn.Module,
    mode: ElasticMode = ElasticMode.RANK,
    *,
    groups: Sequence[RankGroup],
    adapter_name: str | None = None,
) -> ElasticLora:
    """
    Makes sizes inside a network changeable: one set of weights, many networks.

    With ``ElasticMode.RANK``: the ranks of the LoRA adapters of a PEFT model. The network of a lower rank uses the
    leading rows of A and columns of B, with the scaling of the full rank. Layers outside all groups keep their rank.

    :param model: PEFT model; stays as it is, with a hook on the A of each adapter in a group. Its base may be sparse,
        quantized, or neither.
    :param mode: What becomes elastic.
    :param groups: Groups of adapters that share a rank, and the ranks to choose from.
    :param adapter_name: Name of the adapter; None for the active one.
    :return: The elastic network: its space, and ``activate(point)``. Train it with ``ElasticCallback``, choose with
        ``search``, cut with ``extract``.
    :raises nncf.ValidationError: Groups match nothing or overlap, ranks do not begin with the rank of the adapters, a
        layer stands in no block, the adapter is unknown, merged or already elastic.
    :raises nncf.UnsupportedModelError: The model is not a PEFT model with plain LoRA (DoRA, bias, modules_to_save and
        others are refused), it is compiled, or the rank of a layer in a group cannot be elastic.
    :raises nncf.ParameterNotSupportedError: The mode is unknown.
    """
    parse_choice(mode, ElasticMode)
    check_not_compiled(model)
    return ElasticLora(model, groups, adapter_name)
