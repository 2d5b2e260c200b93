"""What can be asked of MULTIPRUNER beyond the ratio."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import nncf
from torch import Tensor

from nncf_ext.importance.blocks import l1_norm
from nncf_ext.importance.metrics import Metric, PerplexityMetric
from nncf_ext.structure.plan import StructurePlan

ACTIVATIONS = "activations"
COSTS = ("parameters", "bytes", "kv_bytes_per_token")


@dataclass
class AdvancedMultiPrunerParameters:
    """
    Parameters of the mode MULTIPRUNER.

    :param distribution: Shares of the ratio that blocks, MLP channels and attention heads pay, in this order; any
        positive scale. Published: 44:52:4 for models without grouped queries, 30:70:0 to 10:90:0 for Llama 3.
    :param mlp_group: MLP channels that go together, a multiple of 128 keeps INT4 groups whole. None: a sixteenth of the
        MLP, at most 1024.
    :param attention_group: Query channels that go together: a multiple of the channels of one key/value head's query
        heads. None: that many.
    :param width_subset_size: Calibration items that score channels and heads. None: half of those that score blocks.
    :param metric: How good a candidate is.
    :param order: Importance of the units within a layer, ``[units]``, from the weights that write into them; the least
        important go first. ``"activations"``: by what they write to the residual stream on calibration text, see
        :func:`nncf_ext.importance.blocks.activation_norm`. None: the last go first.
    :param joint_cost: None: stages, as published. Else one pool of everything that a stage with a share may remove,
        of which goes what adds least loss for each unit of this cost that it saves; `ratio` is then the fraction of
        the cost to save. ``"parameters"``, ``"bytes"``, ``"kv_bytes_per_token"``, or a function of a plan, such as a
        measured latency.
    :param compensate: After every step refit the output projection of the branch that lost units, by least squares on
        calibration text; see :class:`nncf_ext.structure.compensation.Compensator`. Later steps see the repaired model.
    :param early_stop: Give up candidates that cannot win any more. The choice is the same; margins become lower bounds.
    :param racing: Approximation: give up candidates that are so many standard errors behind after some of the batches;
        3 is careful. None: never.
    :param rescore_top: Approximation: score only so many of the candidates that came out best at the last full sweep,
        which every eighth step is. None: always all.
    """

    distribution: tuple[float, float, float] = (44, 52, 4)
    mlp_group: int | None = None
    attention_group: int | None = None
    width_subset_size: int | None = None
    metric: Metric = field(default_factory=PerplexityMetric)
    order: Callable[[Sequence[Tensor]], Tensor] | str | None = l1_norm
    joint_cost: str | Callable[[StructurePlan], float] | None = None
    compensate: bool = False
    early_stop: bool = True
    racing: float | None = None
    rescore_top: int | None = None

    def check(self) -> None:
        """
        Checks what can be checked without a model.

        :raises nncf.ValidationError: A value is out of range.
        """
        if len(self.distribution) != 3 or min(self.distribution) < 0 or sum(self.distribution) <= 0:
            msg = (
                f"distribution is three shares, for blocks, MLP channels and heads, none negative and not all zero; "
                f"got {self.distribution}."
            )
            raise nncf.ValidationError(msg)
        for name in ("mlp_group", "attention_group", "width_subset_size", "rescore_top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"{name} must be at least 1, or None; got {value}."
                raise nncf.ValidationError(msg)
        if self.racing is not None and not self.racing > 0:
            msg = f"racing must be above 0, standard errors, or None; got {self.racing}."
            raise nncf.ValidationError(msg)
        if isinstance(self.joint_cost, str) and self.joint_cost not in COSTS:
            msg = f"joint_cost={self.joint_cost!r}. It is one of {', '.join(COSTS)}, a function of a plan, or None."
            raise nncf.ValidationError(msg)
        if isinstance(self.order, str) and self.order != ACTIVATIONS:
            msg = f"order={self.order!r}. It is {ACTIVATIONS!r}, a function of weights, or None."
            raise nncf.ValidationError(msg)
        if not isinstance(self.metric, Metric):
            msg = (
                f"metric must be a nncf_ext.importance.metrics.Metric, such as PerplexityMetric(); got "
                f"{type(self.metric).__name__}. A subclass with losses() scores as you like."
            )
            raise nncf.ValidationError(msg)
