"""What can be asked of MULTIPRUNER beyond the ratio."""

from collections.abc import Callable
from dataclasses import dataclass

import nncf

from nncf_ext.pruning.method import PruningParameters, check_count
from nncf_ext.structure.plan import StructurePlan

ACTIVATIONS = "activations"
COSTS = ("parameters", "bytes", "kv_bytes_per_token")


@dataclass(kw_only=True)
class AdvancedMultiPrunerParameters(PruningParameters):
    """
    Parameters of the mode MULTIPRUNER, beside those of every search (:class:`PruningParameters`): ``metric``,
    ``mlp_group``, ``order``, ``early_stop``, ``racing``, ``rescore_top``, ``candidates_per_pass``, ``reuse_bytes``.

    :param distribution: Shares of the ratio that blocks, MLP channels and attention heads pay, in this order; any
        positive scale. Published: 44:52:4 for models without grouped queries, 30:70:0 to 10:90:0 for Llama 3.
    :param attention_group: Query channels that go together: a multiple of the channels of one key/value head's query
        heads. None: that many.
    :param width_subset_size: Calibration items that score channels and heads. None: half of those that score blocks.
    :param order: Beside what every search takes: ``"activations"``, by what the units write to the residual stream on
        calibration text, see :func:`nncf_ext.importance.blocks.activation_norm`.
    :param joint_cost: None: stages, as published. Else one pool of everything that a stage with a share may remove,
        of which goes what adds least loss for each unit of this cost that it saves; `ratio` is then the fraction of
        the cost to save. ``"parameters"``, ``"bytes"``, ``"kv_bytes_per_token"``, or a function of a plan, such as a
        measured latency.
    :param compensate: After every step refit the output projection of the branch that lost units, by least squares on
        calibration text; see :class:`nncf_ext.pruning.compensation.Compensator`. Later steps see the repaired model.
    """

    distribution: tuple[float, float, float] = (44, 52, 4)
    attention_group: int | None = None
    width_subset_size: int | None = None
    joint_cost: str | Callable[[StructurePlan], float] | None = None
    compensate: bool = False

    def check(self) -> None:
        super().check()
        if len(self.distribution) != 3 or min(self.distribution) < 0 or sum(self.distribution) <= 0:
            msg = (
                f"distribution is three shares, for blocks, MLP channels and heads, none negative and not all zero; "
                f"got {self.distribution}."
            )
            raise nncf.ValidationError(msg)
        for name in ("attention_group", "width_subset_size"):
            check_count(name, getattr(self, name))
        if isinstance(self.joint_cost, str) and self.joint_cost not in COSTS:
            msg = f"joint_cost={self.joint_cost!r}. It is one of {', '.join(COSTS)}, a function of a plan, or None."
            raise nncf.ValidationError(msg)
        if isinstance(self.order, str) and self.order != ACTIVATIONS:
            msg = f"order={self.order!r}. It is {ACTIVATIONS!r}, a function of weights, or None."
            raise nncf.ValidationError(msg)
