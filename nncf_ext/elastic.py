"""The front door of elastic networks: which method makes what elastic?"""

from collections.abc import Sequence
from typing import Any

import nncf
from torch import nn

from nncf_ext.algorithms.bootstrap_nas.algorithm import SuperNetwork
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from nncf_ext.algorithms.elastic_lora.algorithm import ElasticLora
from nncf_ext.algorithms.elastic_lora.parameters import RankGroup
from nncf_ext.algorithms.lonas.algorithm import ElasticBaseAndLora
from nncf_ext.parameters import ElasticMode
from nncf_ext.structure.wrappers import check_not_compiled, check_plain
from nncf_ext.weights.activation_sparsity import refuse_sparse_inputs


def make_elastic(
    model: nn.Module,
    mode: ElasticMode = ElasticMode.RANK,
    *,
    groups: Sequence[RankGroup] | None = None,
    adapter_name: str | None = None,
    example_input: Any = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    advanced_parameters: AdvancedBootstrapNasParameters | None = None,
) -> Any:
    """
    Makes sizes inside a network changeable: one set of weights, many networks.

    With ``ElasticMode.RANK``: the ranks of the LoRA adapters of a PEFT model. The network of a lower rank uses the
    leading rows of A and columns of B, with the scaling of the full rank. Layers outside all groups keep their rank.

    With ``ElasticMode.WIDTH``, ``DEPTH`` and ``KERNEL``, alone or together: channels and heads, blocks, kernels of
    convolutions, of any torch model that runs with the example. What belongs together is read from the architecture's
    record where there is one, else found by one forward; ``net.refused`` says what cannot change, and why.

    :param model: PEFT model for ranks; stays as it is, with a hook on the A of each adapter in a group. Its base may be
        sparse, quantized, or neither. For the other modes any torch model of plain modules; it gets hooks.
    :param mode: What becomes elastic.
    :param groups: For ranks: groups of adapters that share a rank, and the ranks to choose from.
    :param adapter_name: For ranks: name of the adapter; None for the active one.
    :param example_input: For the other modes: what the model is called with; a tensor, a tuple of arguments, or a
        dictionary of named ones.
    :param ignored_scope: For the other modes: layers that keep their shapes.
    :param advanced_parameters: For the other modes: which sizes there are.
    :return: The elastic network, a :class:`SuperNetwork`, for ranks an :class:`ElasticLora`, for both together an
        :class:`ElasticBaseAndLora`: its space, and ``activate(point)``. Train it with ``ElasticCallback`` or a loop of
        your own, choose with ``search``, cut with ``extract``.
    :raises nncf.ValidationError: Groups match nothing or overlap, ranks do not begin with the rank of the adapters, a
        layer stands in no block, the adapter is unknown, merged or already elastic; there is no example, or the model
        does not run with it; a rule of the ignored scope matches nothing.
    :raises nncf.UnsupportedModelError: For ranks the model is not a PEFT model with plain LoRA (DoRA, bias,
        modules_to_save and others are refused), or the rank of a layer in a group cannot be elastic; it is compiled or
        not made of plain modules; nothing can be elastic.
    :raises nncf.ParameterNotSupportedError: The mode is unknown, or modes that do not go together.
    """
    if not isinstance(mode, ElasticMode) or not mode:
        names = ", ".join(f"ElasticMode.{each.name}" for each in ElasticMode)
        msg = (
            f"Unknown mode {mode!r}. There are {names}, and sums of them such as ElasticMode.WIDTH | ElasticMode.DEPTH."
        )
        raise nncf.ParameterNotSupportedError(msg)
    check_not_compiled(model)
    if isinstance(model, nn.Module):  # what else it may be is refused below
        refuse_sparse_inputs(model, "make elastic")
    sizes = mode & ~ElasticMode.RANK
    if sizes and example_input is None:
        msg = (
            f"{sizes} follows a forward of the model: give example_input=, what {type(model).__name__} is called with."
        )
        raise nncf.ValidationError(msg)
    if ElasticMode.RANK not in mode:
        check_plain(model)
        return SuperNetwork(model, mode, example_input, ignored_scope, advanced_parameters)
    if groups is None:
        msg = "Ranks become elastic in groups: give groups=[nncf_ext.RankGroup(patterns, ranks)]."
        raise nncf.ValidationError(msg)
    if not sizes:
        return ElasticLora(model, groups, adapter_name)
    if ElasticMode.KERNEL in mode:
        msg = f"Kernels and ranks do not go together; got {mode}. Use ranks with widths and depth, or kernels alone."
        raise nncf.ParameterNotSupportedError(msg)
    check_plain(model)
    return ElasticBaseAndLora(model, mode, groups, adapter_name, example_input, ignored_scope, advanced_parameters)
