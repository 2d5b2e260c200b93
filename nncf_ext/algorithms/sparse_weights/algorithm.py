"""
Sparse weights, layer by layer.

For each unit of layers (a block, as a rule): see the inputs its layers get from the compressed blocks before; zero and
round their weights; put the new weights in; let the unit's new outputs feed the next. A unit is put in whole or not at
all, so an interrupted run leaves a model of which the first units are compressed and the others untouched.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import nncf
import torch
from torch import nn

from nncf_ext.algorithms.sparse_weights.allocation import allocate, parts_of
from nncf_ext.algorithms.sparse_weights.layer import Curvature, LayerSolver
from nncf_ext.algorithms.sparse_weights.parameters import AdvancedSparseWeightsParameters, smaller_groups
from nncf_ext.algorithms.sparse_weights.reconstruction import reconstruct
from nncf_ext.algorithms.sparse_weights.solver import Solution
from nncf_ext.algorithms.sparse_weights.units import FinishedUnits, LayerResult
from nncf_ext.calibration.statistics import InputStatistics, observe_inputs
from nncf_ext.calibration.stream import CalibrationStream, Unit, evaluation, read_items
from nncf_ext.calibration.trainable_block import TrainableBlock
from nncf_ext.files import digest
from nncf_ext.journal import Journal, read_json
from nncf_ext.method import Request
from nncf_ext.parameters import CompressMode, SparsityAllocation
from nncf_ext.progress import Progress
from nncf_ext.structure.blocks import Survey, note_untouched
from nncf_ext.upstream import HOOKS_PREFIX
from nncf_ext.weights.int4 import check_hookable, decompressors, dequantize, pack, unpack, weight_hooks
from nncf_ext.weights.records import LayerRecord, set_record

logger = logging.getLogger("nncf_ext")
_RATIOS = "allocation.json"

MODES = (
    CompressMode.SPARSE_MAGNITUDE,
    CompressMode.SPARSE_WANDA,
    CompressMode.SPARSE_GPT,
    CompressMode.SPARSE_ADMM,
)


class SparseWeights:
    """
    One run of a sparse-weights mode. Everything is checked on construction; :meth:`apply` does the work.

    :param request: What was asked for. SPARSE_MAGNITUDE without quantization needs no dataset.
    :raises nncf.ValidationError: Parameters contradict each other, or data is missing or empty.
    :raises nncf.ParameterNotSupportedError: A parameter is not supported.
    """

    def __init__(self, request: Request[AdvancedSparseWeightsParameters]) -> None:
        mode, parameters = request.mode, request.parameters
        parameters.check(request.ratio)
        self._mode = mode
        self._ratio = request.ratio
        self._parameters = parameters
        self._solver = LayerSolver(mode, request.ratio, parameters)
        self._resume = request.resume
        self._pattern = parameters.keep_and_run
        self._quantize = parameters.quantization is not None
        self._items: list[Any] = []
        self._epochs = parameters.reconstruction_epochs
        self._allocation = SparsityAllocation(parameters.allocation)
        self._ratios: Mapping[str, float] = {}
        measured = self._allocation is not SparsityAllocation.UNIFORM
        if mode is not CompressMode.SPARSE_MAGNITUDE or self._quantize or self._epochs or measured:
            further = " with quantization" if self._quantize else " with reconstruction" if self._epochs else ""
            further = further or (f" with allocation by {self._allocation.value}" if measured else "")
            what = f"{mode.value}{further}"
            if request.dataset is None:
                msg = f"{what} looks at the inputs of each layer and needs a dataset; got None."
                raise nncf.ValidationError(msg)
            self._items = read_items(request.dataset, request.subset_size)

    def check(self, model: nn.Module, survey: Survey) -> None:
        """
        Refuses what cannot work, before any weight is touched.

        :param model: The model to compress.
        :param survey: Its weights.
        :raises nncf.ValidationError: A layer is already compressed, not finite, or does not fit the pattern.
        :raises nncf.InvalidGroupSizeError: A layer does not fit the group size.
        :raises nncf.UnsupportedModelError: There is nothing to compress, or NNCF cannot hook the model.
        """
        survey = survey.including(self._parameters.include)
        for weight in survey.weights:
            if weight.hidden:
                msg = f"{weight.name} {weight.untouched}, or put the layer into the ignored scope."
                raise nncf.UnsupportedModelError(msg)
        targets = survey.targets
        if not targets:
            kinds = sorted({weight.untouched for weight in survey.weights if weight.untouched})
            msg = (
                f"{type(model).__name__} has no linear layer that can be compressed. Its {len(survey.weights)} weights "
                f"are left out as: {'; '.join(kinds) or 'there are none'}."
            )
            raise nncf.ValidationError(msg)
        if self._quantize:
            check_hookable(model)
        self._check_fresh(model, targets)
        if self._pattern is not None:
            misfits = [name for name, layer in targets.items() if layer.in_features % self._pattern[1]]
            if misfits:
                msg = (
                    f"Pattern {self._parameters.pattern} needs in_features divisible by {self._pattern[1]}; not so in "
                    f"{_some(misfits)}. Put them into the ignored scope or choose another pattern."
                )
                raise nncf.ValidationError(msg)
        misfits = [name for name, layer in targets.items() if self._quantize and self._group_of(layer) is None]
        if misfits:
            self._check_left_floating(misfits, targets)

    def _check_left_floating(self, misfits: list[str], targets: Mapping[str, nn.Linear]) -> None:
        """Layers that no group divides are meant to be left floating, and are not all."""
        size = self._parameters.group_size
        smaller = [
            str(other)
            for other in smaller_groups(size)
            if any(targets[name].in_features % other == 0 for name in misfits)
        ]
        refused = self._parameters.group_size_fallback_mode == nncf.GroupSizeFallbackMode.ERROR
        msg = f"in_features is no multiple of group size {size} in {_some(misfits)}. "
        if smaller:
            msg += (
                f"group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST takes groups of {' or '.join(smaller)} "
                "where these fit, and IGNORE leaves such layers floating (--group-size-fallback). "
            )
        elif refused:
            msg += (
                "group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE leaves such layers floating "
                "(--group-size-fallback ignore). "
            )
        if refused:
            raise nncf.InvalidGroupSizeError(f"{msg}Or put them into the ignored scope.")
        if len(misfits) == len(targets):
            raise nncf.ValidationError(f"{msg}No layer would be quantized.")

    def apply(self, model: nn.Module, survey: Survey) -> None:
        """
        Compresses the model in place.

        :param model: The model.
        :param survey: Its weights.
        :raises KeyboardInterrupt: If interrupted, with the number of finished layers in its text.
        """
        survey = survey.including(self._parameters.include)
        note_untouched(survey)
        targets = survey.targets
        finished = journal = None
        if self._resume is not None:
            journal = Journal(self._resume, "compression", self._header(model, survey))
            finished = FinishedUnits(journal)
        packed = [name for name in targets if f"{name}.weight" in decompressors(model)]
        foreign = sorted(set(packed) - (finished.layers() if finished is not None else set()))
        if foreign:
            raise nncf.ValidationError(_already_compressed(foreign[0], "INT4 codes, not from this journal"))
        if packed and self._epochs:
            msg = (
                f"{packed[0]} is compressed already, and reconstruction compares with the model as it was. Resume with "
                "the original model: load it again."
            )
            raise nncf.ValidationError(msg)
        for name in packed:
            unpack(model, f"{name}.weight")
        done = 0
        with evaluation(model), Progress() as progress:
            units: Iterator[Unit]
            task = progress.add_task(f"Applying {self._mode.value}", total=None)
            try:
                if self._items:
                    stream = CalibrationStream(
                        model, self._items, survey.block_lists, targets, trainable=self._epochs > 0
                    )
                    self._ratios = self._allocated(stream, survey, journal, progress)
                    units, total = stream.units(), len(stream)
                else:
                    units, total = _single_layers(targets), len(targets)
                progress.update(task, total=total)
                for unit in units:
                    self._compress_unit(model, unit, finished)
                    done += len(unit.layers)
                    progress.advance(task)
                    logger.debug("%s: %d of %d layers are compressed", unit.name, done, len(targets))
            except KeyboardInterrupt as interrupt:
                how = (
                    f"the same call continues from {self._resume}"
                    if self._resume is not None
                    else "with resume=FOLDER (--resume FOLDER on the command line) it could have been continued"
                )
                msg = f"Interrupted: {done} of {len(targets)} layers are compressed, the others are untouched; {how}."
                logger.warning(msg)
                raise KeyboardInterrupt(msg) from interrupt

    def _allocated(
        self, stream: CalibrationStream, survey: Survey, journal: Journal | None, progress: Progress
    ) -> dict[str, float]:
        """Ratios; none where all layers have the one asked for. Kept: who resumes may have a model half compressed."""
        if self._allocation is SparsityAllocation.UNIFORM or self._ratio == 0:
            return {}
        kept = journal.read(_RATIOS, read_json) if journal is not None else None
        if kept is not None:
            return kept
        parts = parts_of(survey.block_lists, survey.targets)
        task = progress.add_task("Allocating zeros", total=len(parts))
        ratios = allocate(
            stream,
            self._items,
            parts,
            self._allocation,
            self._ratio,
            self._parameters.allocation_spread,
            lambda done: progress.update(task, completed=done),
        )
        progress.update(task, completed=len(parts))
        if journal is not None:
            journal.write(_RATIOS, lambda aside: aside.write_text(json.dumps(ratios)))
        return ratios

    def _solver_of(self, name: str) -> LayerSolver:
        return replace(self._solver, ratio=self._ratios.get(name, self._ratio))

    def _compress_unit(self, model: nn.Module, unit: Unit, finished: FinishedUnits | None) -> None:
        if not unit.layers:
            unit.advance()
            return
        originals = {name: layer.weight.data for name, layer in unit.layers.items()}
        earlier = finished.load(unit.name, originals, original=self._epochs > 0) if finished is not None else None
        results = self._solve_unit(unit) if earlier is None else earlier
        with ExitStack() as undo:
            for name, layer in unit.layers.items():
                undo.callback(layer.weight.requires_grad_, layer.weight.requires_grad)
                undo.callback(setattr, layer.weight, "data", originals[name])
                layer.weight.data = results[name].weight.to(originals[name].device)
            unit.advance()
            if finished is not None and earlier is None:
                finished.store(unit.name, results, originals)
            for name, layer in unit.layers.items():
                codes, scales = results[name].codes, results[name].scales
                undo.callback(set_record, layer, None)
                set_record(layer, results[name].record)
                if codes is not None and scales is not None:
                    device = layer.weight.device
                    handle = pack(model, f"{name}.weight", codes.to(device), scales.to(device))
                    undo.callback(handle.remove)
            undo.pop_all()

    def _solve_unit(self, unit: Unit) -> dict[str, LayerResult]:
        statistics: Mapping[str, InputStatistics] = {}
        if self._items:
            full = self._quantize or self._solver.corrects
            statistics = observe_inputs(unit, full=full)
        unseen = [name for name in unit.layers if self._items and name not in statistics]
        layers = {name: layer for name, layer in unit.layers.items() if name not in unseen}
        curvatures = self._curvatures(statistics)
        if unit.block is not None and layers:
            solutions = self._trained(unit.block, layers, statistics, curvatures)
            results = {
                name: self._result(layer, statistics.get(name), solutions[name]) for name, layer in layers.items()
            }
        else:
            if self._epochs:
                logger.warning("%s cannot be trained by itself: its layers are solved one by one only.", unit.name)
            results = {}
            for name, layer in layers.items():  # what is derived from inputs goes with the last layer that has them
                solution = self._solver_of(name).solve(layer.weight, statistics.get(name), curvatures.pop(name, None))
                results[name] = self._result(layer, statistics.get(name), solution)
        return results | {name: _left_alone(name, unit.layers[name]) for name in unseen}

    def _curvatures(self, statistics: Mapping[str, InputStatistics]) -> dict[str, Curvature]:
        """By layer; layers with the same inputs share the statistic, and so what is derived from it."""
        found: dict[int, Curvature] = {}
        for each in statistics.values():
            if each.full and id(each) not in found:
                found[id(each)] = Curvature(each, self._parameters.damping)
        return {name: found[id(each)] for name, each in statistics.items() if each.full}

    def _trained(
        self,
        block: TrainableBlock,
        layers: Mapping[str, nn.Linear],
        statistics: Mapping[str, InputStatistics],
        curvatures: Mapping[str, Curvature],
    ) -> dict[str, Solution]:
        """Zeros first, then the weights that stay together; where there is a grid, both once more on it."""
        train = partial(
            reconstruct,
            block,
            layers,
            epochs=self._epochs,
            learning_rate=self._parameters.reconstruction_learning_rate,
        )
        solutions = {
            name: self._solver_of(name).floating().solve(layer.weight, statistics.get(name), curvatures.get(name))
            for name, layer in layers.items()
        }
        solutions = train(solutions)
        if not self._quantize:
            return solutions
        return train({name: self._solver.round(each, curvatures.get(name)) for name, each in solutions.items()})

    def _result(self, layer: nn.Linear, statistic: InputStatistics | None, solution: Solution) -> LayerResult:
        old = layer.weight.detach()
        codes, scales = solution.codes, solution.scales
        new = solution.weight if codes is None or scales is None else dequantize(codes, scales)
        new = new.to(old.dtype)
        if not bool(new.isfinite().all()):
            msg = (
                "A corrected weight is not finite: the calibration data is too little or too uniform for this layer, "
                f"or {old.dtype} too narrow. Raise AdvancedSparseWeightsParameters.damping or use float32."
            )
            raise nncf.ValidationError(msg)
        if statistic is not None:
            error, error_of = statistic.output_error(old, new), "output"
        else:
            error, error_of = _weight_error(old, new), "weight"
        record = LayerRecord(
            mode=self._mode.value,
            bytes_before=old.nbytes,
            error=error,
            error_of=error_of,
            note=self._group_note(layer),
            prerounding=solution.prerounding if self._parameters.keep_prerounding else None,
        )
        return LayerResult(new, codes, scales, record)

    def _group_of(self, layer: nn.Linear) -> int | None:
        return self._parameters.group_of(layer.in_features)

    def _group_note(self, layer: nn.Linear) -> str | None:
        """What became of the group size on a layer that it does not divide."""
        asked, taken = self._parameters.group_size, self._group_of(layer)
        if not self._quantize or taken == asked:
            return None
        done = "not quantized" if taken is None else f"group size {taken}"
        return f"{done}: {layer.in_features} inputs are no multiple of group size {asked}"

    def _check_fresh(self, model: nn.Module, targets: Mapping[str, nn.Linear]) -> None:
        hooks = weight_hooks(model)
        packed = decompressors(model)
        for name, layer in targets.items():
            weight, path = layer.weight, f"{name}.weight"
            if path in packed and self._resume is not None:
                continue
            if path in hooks or not weight.is_floating_point():
                kind = type(hooks[path]).__name__ if path in hooks else str(weight.dtype)
                raise nncf.ValidationError(_already_compressed(name, kind))
            if weight.is_meta:
                msg = f"{name} has no values (meta device). Load the weights before compressing."
                raise nncf.ValidationError(msg)
            if not bool(weight.detach().isfinite().all()):
                msg = f"The weight of {name} holds values that are not finite."
                raise nncf.ValidationError(msg)

    def _header(self, model: nn.Module, survey: Survey) -> dict[str, Any]:
        targets = survey.targets
        taken = {f"{name}.weight" for name in targets}
        staying = [(name, value) for name, value in model.named_parameters() if name not in taken]
        return {
            "mode": self._mode.value,
            "ratio": self._ratio,
            "parameters": asdict(self._parameters),
            "layers": {name: [layer.out_features, layer.in_features] for name, layer in targets.items()},
            "data": digest(self._items),
            "other weights": digest((name, value) for name, value in staying if not name.startswith(HOOKS_PREFIX)),
        }


def _already_compressed(name: str, kind: str) -> str:
    return (
        f"{name} is already compressed ({kind}). Compress the original model, or put the layer into the ignored scope; "
        "masks of nncf.prune can be made permanent by nncf.strip first."
    )


def _single_layers(targets: Mapping[str, nn.Linear]) -> Iterator[Unit]:
    for name, layer in targets.items():
        yield Unit(name, {name: layer}, lambda after_sample=None: None, lambda: None)


def _left_alone(name: str, layer: nn.Linear) -> LayerResult:
    logger.warning("%s saw no calibration token and is left untouched.", name)
    record = LayerRecord(untouched="saw no calibration token", bytes_before=layer.weight.nbytes)
    return LayerResult(layer.weight.detach(), None, None, record)


def _weight_error(old: torch.Tensor, new: torch.Tensor) -> float:
    exact = torch.linalg.norm(old.float())
    return float(torch.linalg.norm(old.float() - new.float()) / exact) if exact > 0 else 0.0


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
