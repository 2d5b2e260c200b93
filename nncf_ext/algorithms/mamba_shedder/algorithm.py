"""
Mamba-Shedder: whole Mamba blocks go, or only their state spaces; in hybrids also attention, MLPs and MLP channels.

Which one goes is chosen by the loss of the whole model. Nothing is trained.

Source: Munoz et al., Mamba-Shedder: Post-Transformer Compression for Efficient Selective Structured State Space Models
(arXiv 2501.17088).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import nncf
from torch import nn

from nncf_ext.algorithms.mamba_shedder.parameters import (
    ATTENTION,
    BLOCKS,
    CHANNELS,
    MLP,
    SSM,
    AdvancedMambaShedderParameters,
)
from nncf_ext.method import Request
from nncf_ext.pruning.candidates import Removal, branch_removals, width_removals
from nncf_ext.pruning.method import Stage, StructuredPruning, mlp_group
from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.plan import StructurePlan


class MambaShedder(StructuredPruning):
    """
    One run.

    :param request: Ratio of all parameters to remove by the stages that do not say their steps, calibration data
        (batches of token ids) and everything else.
    :raises nncf.ValidationError: A parameter is out of range, ratio and steps contradict each other, or data is
        missing, empty, short or of another kind.
    """

    def __init__(self, request: Request[AdvancedMambaShedderParameters]) -> None:
        super().__init__(request)
        parameters, ratio = request.parameters, request.ratio
        self._parameters = parameters
        counted = [stage.steps is not None for stage in parameters.stages]
        if all(counted) and ratio:
            msg = f"ratio={ratio}, but every stage says its steps. Give ratio=0, or one stage without steps."
            raise nncf.ValidationError(msg)
        if not all(counted[:-1]):
            msg = "Only the last stage can go on until the ratio is reached: give the others their steps."
            raise nncf.ValidationError(msg)

    def stages(self, model: nn.Module, dimensions: Dimensions, order: Mapping[str, list[int]]) -> list[Stage]:
        branches = {each.part for each in dimensions.values()}
        if "mamba" not in branches:
            msg = (
                f"Asked to remove Mamba blocks or state spaces from {type(model).__name__}, which has none. "
                "CompressMode.MULTIPRUNER works on such a model."
            )
            raise nncf.UnsupportedModelError(msg)
        asked = {unit for stage in self._parameters.stages for unit in stage.units}
        missing = sorted(asked & ({ATTENTION, MLP, CHANNELS} if "attention" not in branches else set()))
        if missing:
            msg = f"{', '.join(missing)}: {type(model).__name__} has Mamba blocks only. mamba_block and ssm work."
            raise nncf.ValidationError(msg)
        group = mlp_group(dimensions, self._parameters.mlp_group) if CHANNELS in asked else 0
        target = (1 - self._ratio) * self.cost(model, dimensions, StructurePlan.dense(model, dimensions))
        ends = accumulate(stage.steps or 0 for stage in self._parameters.stages)
        stages = []
        for stage, end in zip(self._parameters.stages, ends, strict=True):
            done = partial(_steps_done, end)
            if stage.steps is None:
                done = partial(self._small_enough, model, dimensions, target)
            could_go = partial(_could_go, dimensions, stage.units, group, order)
            stages.append(Stage(", ".join(stage.units), could_go, done, self._batches))
        return stages

    def _small_enough(self, model: nn.Module, dimensions: Dimensions, target: float, plan: StructurePlan) -> bool:
        return self.cost(model, dimensions, plan) <= target

    def header(self) -> dict[str, Any]:
        return super().header() | {"stages": [[list(each.units), each.steps] for each in self._parameters.stages]}

    def advice(self) -> str:
        return "A lower ratio, fewer steps, more kinds of units or a smaller ignored scope would work."


def _steps_done(end: int, plan: StructurePlan) -> bool:
    return len(plan.steps) >= end


# As published: blocks before attention before MLPs, lower layers first.
def _could_go(
    dimensions: Dimensions,
    units: Sequence[str],
    group: int,
    order: Mapping[str, list[int]],
    plan: StructurePlan,
) -> Iterator[Removal]:
    for unit, part in ((BLOCKS, "mamba"), (ATTENTION, "attention"), (MLP, "mlp")):
        if unit in units:
            yield from branch_removals(dimensions, plan, part)
    if CHANNELS in units:
        yield from width_removals(dimensions, plan, "mlp", group, order)
    if SSM in units:
        mixers = dimensions.of_part("mamba")
        yield from (Removal(each.name, (0,)) for each in mixers if len(plan.kept[each.name]) == 2)
