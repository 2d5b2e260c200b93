"""What can be asked of MAMBA_SHEDDER beyond the ratio."""

from collections.abc import Sequence
from dataclasses import dataclass

import nncf

from nncf_ext.pruning.method import PruningParameters, check_count

BLOCKS, SSM, ATTENTION, MLP, CHANNELS = UNITS = ("mamba_block", "ssm", "attention", "mlp", "mlp_channels")


@dataclass(frozen=True)
class PruningStage:
    """
    What competes at a time.

    :param units: ``"mamba_block"``: the mixer of a layer and its normalization. ``"ssm"``: its state space; a gated
        convolution stays. Of hybrids, too: ``"attention"`` and ``"mlp"`` of one use of a shared transformer,
        ``"mlp_channels"`` of all its uses.
    :param steps: How many of them go. None: until the ratio is reached.
    """

    units: tuple[str, ...]
    steps: int | None = None


@dataclass(kw_only=True)
class AdvancedMambaShedderParameters(PruningParameters):
    """
    Parameters of the mode MAMBA_SHEDDER, beside those of every search (:class:`PruningParameters`): ``metric``,
    ``mlp_group``, ``order``, ``early_stop``, ``racing``, ``rescore_top``, ``candidates_per_pass``, ``reuse_bytes``.

    :param stages: What goes, stage by stage. Published: Mamba-1 ``PruningStage(("mamba_block",), 14)``, Mamba-2
        ``PruningStage(("ssm",), 24)``, Zamba2 ``(PruningStage(("mamba_block", "attention", "mlp"), 3),
        PruningStage(("mlp_channels",), 20), PruningStage(("ssm",), 18))``. Where all stages say their steps, the ratio
        is 0.
    """

    stages: Sequence[PruningStage] = (PruningStage((BLOCKS,)),)

    def check(self) -> None:
        super().check()
        if not self.stages or not all(isinstance(each, PruningStage) for each in self.stages):
            msg = f"stages are PruningStage(units, steps), at least one; got {self.stages!r}."
            raise nncf.ValidationError(msg)
        for stage in self.stages:
            unknown = sorted({*stage.units} - {*UNITS})
            if unknown or not stage.units or isinstance(stage.units, str):
                msg = f"units={stage.units!r} of a stage: a tuple of some of {', '.join(UNITS)} works."
                raise nncf.ValidationError(msg)
            check_count("steps", stage.steps)
        if isinstance(self.order, str):
            msg = f"order={self.order!r}. It is a function of weights, or None."
            raise nncf.ValidationError(msg)
