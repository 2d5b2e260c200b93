"""
MultiPruner: first whole attention and MLP branches go, then groups of MLP channels, then groups of heads.

Which layer pays is chosen by the loss of the whole model, which channels of a layer go by the size of their weights.
Nothing is trained.

Source: Munoz et al., MultiPruner: Balanced Structure Removal in Foundation Models (arXiv 2501.09949).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import nncf
from torch import Tensor, nn

from nncf_ext.algorithms.multipruner.parameters import ACTIVATIONS, COSTS, AdvancedMultiPrunerParameters
from nncf_ext.calibration.statistics import InputStatistics
from nncf_ext.calibration.stream import evaluation
from nncf_ext.importance.blocks import activation_norm
from nncf_ext.method import Request
from nncf_ext.pruning.candidates import Removal, branch_removals, width_removals
from nncf_ext.pruning.compensation import Compensator
from nncf_ext.pruning.method import Stage, StructuredPruning, mlp_group
from nncf_ext.structure.counting import count_costs
from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.plan import StructurePlan

BLOCKS, CHANNELS, HEADS = STAGES = ("blocks", "MLP channels", "heads")


class MultiPruner(StructuredPruning):
    """
    One run.

    :param request: Ratio of the cost to remove, calibration data (batches of token ids) and everything else.
    :raises nncf.ValidationError: A parameter is out of range, or data is missing, empty, short or of another kind.
    """

    def __init__(self, request: Request[AdvancedMultiPrunerParameters]) -> None:
        super().__init__(request)
        parameters = request.parameters
        self._parameters = parameters
        self._width_batches = self._batches[: parameters.width_subset_size or max(1, len(self._batches) // 2)]
        self._spread: dict[nn.Module, Tensor] = {}

    def stages(self, model: nn.Module, dimensions: Dimensions, order: Mapping[str, list[int]]) -> list[Stage]:
        parts = list(dict.fromkeys(each.part for each in dimensions.values()))
        if set(parts) != {"attention", "mlp"}:
            msg = (
                f"Asked to remove attention and MLPs from {type(model).__name__}, which has "
                f"{', '.join(parts)} branches. CompressMode.MAMBA_SHEDDER works on such a model."
            )
            raise nncf.UnsupportedModelError(msg)
        groups = self._groups(dimensions)
        whole = self.cost(model, dimensions, StructurePlan.dense(model, dimensions))
        paying = [name for name in STAGES if self._share(name)]
        joint = self._parameters.joint_cost is not None
        stages, paid = [], 0.0
        for names in [paying] if joint else [[name] for name in paying]:
            paid += sum(self._share(name) for name in names)
            target = self._ratio * min(paid, 1.0)
            stages.append(
                Stage(
                    ", ".join(names),
                    partial(self._could_go, dimensions, names, groups, order),
                    partial(self._has_paid, model, dimensions, whole, target),
                    self._batches if BLOCKS in names else self._width_batches,
                )
            )
        return stages

    def _has_paid(
        self, model: nn.Module, dimensions: Dimensions, whole: float, target: float, plan: StructurePlan
    ) -> bool:
        return 1 - self.cost(model, dimensions, plan) / whole >= target

    # Attention before MLP, lower layers first: the order that breaks ties.
    def _could_go(
        self,
        dimensions: Dimensions,
        names: Sequence[str],
        groups: Mapping[str, int],
        order: Mapping[str, list[int]],
        plan: StructurePlan,
    ) -> Iterator[Removal]:
        for name in names:
            if name == BLOCKS:
                for part in ("attention", "mlp"):
                    yield from branch_removals(dimensions, plan, part)
            else:
                part = "mlp" if name == CHANNELS else "attention"
                yield from width_removals(dimensions, plan, part, groups[part], order)

    def cost(self, model: nn.Module, dimensions: Dimensions, plan: StructurePlan) -> float:
        cost = self._parameters.joint_cost
        if callable(cost):
            return float(cost(plan))
        return float(getattr(count_costs(model, plan, dimensions=dimensions), cost or COSTS[0]))

    def savings(
        self, model: nn.Module, dimensions: Dimensions, plan: StructurePlan, candidates: Sequence[Removal]
    ) -> Mapping[Removal, float] | None:
        if self._parameters.joint_cost is None:
            return None
        now = self.cost(model, dimensions, plan)
        found = {each: now - self.cost(model, dimensions, each.on(plan)) for each in candidates}
        return {each: saved for each, saved in found.items() if saved > 0}

    def compensator(self, model: nn.Module, dimensions: Dimensions) -> Compensator | None:
        return Compensator(model, self._batches, dimensions) if self._parameters.compensate else None

    def order(self, model: nn.Module, dimensions: Dimensions) -> dict[str, list[int]]:
        if self._parameters.order == ACTIVATIONS:
            self._spread = self._mean_squares(model, dimensions)
        return super().order(model, dimensions)

    def scores(self, model: nn.Module, dimensions: Dimensions, name: str) -> Tensor | None:
        if self._parameters.order != ACTIVATIONS or not dimensions[name].readers:
            return super().scores(model, dimensions, name)
        (reader,) = dimensions[name].readers
        output: Any = model.get_submodule(reader.module)
        return activation_norm(self._spread[output], output.weight.detach(), dimensions[name].size)

    def header(self) -> dict[str, Any]:
        cost = self._parameters.joint_cost
        return super().header() | {
            "distribution": list(self._parameters.distribution),
            "attention_group": self._parameters.attention_group,
            "joint_cost": cost if isinstance(cost, str | None) else getattr(cost, "__qualname__", repr(cost)),
            "compensate": self._parameters.compensate,
        }

    def calibration(self) -> dict[str, Any]:
        return super().calibration() | {"sequences_width": sum(len(each["input_ids"]) for each in self._width_batches)}

    def cost_in_words(self) -> str:
        cost = self._parameters.joint_cost
        return "cost" if callable(cost) else cost or COSTS[0]

    def advice(self) -> str:
        return "A lower ratio, smaller groups, another distribution or a smaller ignored scope would work."

    def _mean_squares(self, model: nn.Module, dimensions: Dimensions) -> dict[nn.Module, Tensor]:
        """Of every input of the output projections, on calibration text."""
        outputs: dict[nn.Module, InputStatistics] = {}
        with ExitStack() as hooks, evaluation(model):
            for cut in [cut for each in dimensions.values() for cut in each.readers]:
                output: Any = model.get_submodule(cut.module)
                outputs[output] = InputStatistics(output.in_features, device=output.weight.device)
                hook = output.register_forward_pre_hook(lambda module, inputs: outputs[module].update(inputs[0]))
                hooks.callback(hook.remove)
            for batch in self._batches:
                model(**batch, use_cache=False)
        return {output: statistics.mean_square for output, statistics in outputs.items()}

    def _groups(self, dimensions: Dimensions) -> dict[str, int]:
        """Units that go together, by part."""
        widest = max(dimensions.of_part("attention"), key=lambda each: each.size)
        channels = widest.granularity
        asked = self._parameters.attention_group or channels
        if asked % channels or asked > widest.size * channels:
            msg = (
                f"attention_group={asked} query channels. {widest.unit}; a multiple of {channels} below "
                f"{widest.size * channels} works."
            )
            raise nncf.ValidationError(msg)
        group = mlp_group(dimensions, self._parameters.mlp_group) if self._share(CHANNELS) else 0
        return {"attention": asked // channels, "mlp": group}

    def _share(self, stage: str) -> float:
        return self._parameters.distribution[STAGES.index(stage)] / sum(self._parameters.distribution)
