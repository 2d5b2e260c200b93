"""What can be asked of ACTIVATION_SPARSITY beyond the ratio."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import nncf

from nncf_ext.parameters import ActivationAllocation, ActivationCentering, parse_choice

LARGEST = 0.99


@dataclass(kw_only=True)
class AdvancedActivationSparsityParameters:
    """
    Parameters of the mode ACTIVATION_SPARSITY. SCAP as published is ``sequential=True`` with the other defaults, and
    ``centering=MODE`` for MLPs without a gate.

    :param targets: Fractions of inputs to replace by regular expressions of layers' whole paths; they stand in for
        the ratio. Published for Llama-2: ``{r".*(up|gate)_proj": 0.35, r".*down_proj": 0.55}``.
    :param centering: Where inputs are taken to be densest: ZERO, at zero; MEDIAN; MODE, at the peak of their density.
    :param mean_replacement: Replace an input by the mean, over calibration tokens, of what is replaced in its channel,
        not by the centre. Costs nothing at run time. Not in the paper.
    :param weight_norms: An input counts times the norm of its column of the weight, so that what changes outputs least
        is replaced. Source: WINA, https://arxiv.org/abs/2505.19427
    :param sequential: Every layer is calibrated on what layers before it, already sparse, give it. False: on what the
        dense model gives.
    :param moving_average: Thresholds as ``nncf.experimental.torch.sparsify_activations`` finds them: a moving average
        of the quantiles of each item, which depends on the order of the items. For results that equal NNCF's.
    :param allocation: UNIFORM: the target of a layer is the fraction of its inputs to replace. GREEDY: layers of a
        block with the same target have it together, as the share of the bytes of their weights that a token need not
        read; what the block's output bears best is replaced. Where blocks cannot be run by themselves it is UNIFORM.
        Calibration takes two to four times as long. Source: TEAL, https://arxiv.org/abs/2408.14690
    """

    targets: Mapping[str, float] = field(default_factory=dict)
    centering: ActivationCentering = ActivationCentering.ZERO
    mean_replacement: bool = False
    weight_norms: bool = False
    sequential: bool = True
    moving_average: bool = False
    allocation: ActivationAllocation = ActivationAllocation.UNIFORM

    def check(self) -> None:
        """
        :raises nncf.ValidationError: A target is out of range, or no regular expression.
        :raises nncf.ParameterNotSupportedError: The centering or allocation is unknown, or nothing that NNCF has.
        """
        allocation = parse_choice(self.allocation, ActivationAllocation, "allocation")
        centering = parse_choice(self.centering, ActivationCentering, "centering")
        published = centering is ActivationCentering.ZERO and allocation is ActivationAllocation.UNIFORM
        if self.moving_average and (self.weight_norms or not published):
            msg = (
                "moving_average=True gives NNCF's thresholds, which have no centre, norms or allocation; got "
                f"centering={centering.value!r}, weight_norms={self.weight_norms}, allocation={allocation.value!r}."
            )
            raise nncf.ParameterNotSupportedError(msg)
        if not isinstance(self.targets, Mapping):
            msg = f"targets are fractions by regular expressions, a mapping; got {type(self.targets).__name__}."
            raise nncf.ValidationError(msg)
        for pattern, target in self.targets.items():
            if not isinstance(pattern, str) or isinstance(target, bool) or not isinstance(target, int | float):
                msg = f"targets are fractions by the text of regular expressions; got {target!r} for {pattern!r}."
                raise nncf.ValidationError(msg)
            if not 0.0 <= target <= LARGEST:
                msg = f"targets are fractions of inputs, from 0 to {LARGEST}; got {target} for {pattern!r}."
                raise nncf.ValidationError(msg)
            try:
                re.compile(pattern)
            except re.error as error:
                raise nncf.ValidationError(f"{pattern!r} is no regular expression: {error}.") from error
