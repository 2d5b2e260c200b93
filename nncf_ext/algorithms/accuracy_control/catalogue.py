"""
Every layer's weight in every form, made once and kept on disk, with the error that each makes in the layer's output.

The model is walked block by block as in a compression, but stays as it is: a form of one layer is chosen for the inputs
that the dense model gives it, so that forms of different layers can be put together freely.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nncf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nncf_ext.algorithms.accuracy_control.forms import DENSE, WeightForm
from nncf_ext.algorithms.accuracy_control.parameters import AdvancedAccuracyControlParameters
from nncf_ext.algorithms.sparse_weights.layer import Curvature, LayerSolver
from nncf_ext.calibration.statistics import InputStatistics, observe_inputs
from nncf_ext.calibration.stream import CalibrationStream, Unit, evaluation
from nncf_ext.journal import Journal
from nncf_ext.progress import Progress
from nncf_ext.structure.blocks import Survey
from nncf_ext.weights.int4 import dequantize, pack
from nncf_ext.weights.int8 import dequantize_int8, pack_int8, round_to_int8
from nncf_ext.weights.records import LayerRecord, set_record

_MODE = "accuracy_control"
"""What made it, for reports."""


@dataclass(frozen=True)
class Entry:
    """
    A layer's weight in one form.

    :param form: The form.
    :param error: Relative error of the layer's output on calibration tokens.
    :param weight: ``[out_features, in_features]``: codes, int8, or a floating weight; None for a weight as it was.
    :param scales: ``[out_features, groups]``, float16, of codes; None for a floating weight.
    """

    form: WeightForm
    error: float
    weight: Tensor | None = None
    scales: Tensor | None = None

    def dense(self) -> Tensor:
        """:return: What the forward sees, float32 or, of a floating weight, in its own type."""
        if self.weight is None:
            raise nncf.InternalError("A weight as it was is in the model alone.")
        if self.scales is None:
            return self.weight
        return (
            dequantize(self.weight, self.scales) if self.form.bits == 4 else dequantize_int8(self.weight, self.scales)
        )

    def install(self, model: nn.Module, path: str, layer: nn.Linear) -> None:
        """
        Puts it into a model in NNCF's torch form.

        :param model: The model.
        :param path: Path of the layer in it.
        :param layer: The layer.
        """
        if self.weight is None:
            return
        before, device = layer.weight.nbytes, layer.weight.device
        if self.scales is None:
            layer.weight.data = self.weight.to(device, layer.weight.dtype, copy=True)
        else:
            put = pack if self.form.bits == 4 else pack_int8
            put(model, f"{path}.weight", self.weight.to(device, copy=True), self.scales.to(device, copy=True))
        set_record(layer, LayerRecord(mode=_MODE, bytes_before=before, error=self.error, error_of="output"))


@dataclass(frozen=True)
class Group:
    """
    Layers that share a form: those that read the same inputs, such as query, key and value.

    :param name: Path of the first one.
    :param layers: Paths.
    :param weights: How many weights they have in all.
    :param forms: Which forms there are for them, by size, largest first.
    """

    name: str
    layers: tuple[str, ...]
    weights: int
    forms: Mapping[int, WeightForm]


class Catalogue:
    """
    :param model: The dense model; stays as it is.
    :param survey: Its weights.
    :param items: Calibration data.
    :param parameters: Forms, and how they are made.
    :param journal: Where finished units are kept.
    :raises nncf.ValidationError: The journal is another run's; no token reached any layer.
    """

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        items: Sequence[Any],
        parameters: AdvancedAccuracyControlParameters,
        journal: Journal,
    ) -> None:
        self._parameters, self._journal = parameters, journal
        self._entries: dict[str, dict[int, Entry]] = {}
        self.groups: list[Group] = []
        layers = survey.targets
        with evaluation(model), Progress() as progress:
            stream = CalibrationStream(model, items, survey.block_lists, layers)
            task = progress.add_task("Making every form of every layer", total=len(stream))
            for unit in stream.units():
                if unit.layers:
                    self._take(unit, layers)
                unit.advance()
                progress.advance(task)
        if not self.groups:
            raise nncf.ValidationError("No calibration token reached a layer that could be compressed.")

    def entry(self, layer: str, size: int) -> Entry:
        """
        :param layer: Path of a layer.
        :param size: Size of a form of its group.
        :return: Its weight in that form.
        """
        return self._entries[layer][size]

    def error(self, group: Group, size: int) -> float:
        """
        :param group: A group.
        :param size: Size of one of its forms.
        :return: Sum over its layers of squared relative errors of their outputs.
        """
        return sum(self._entries[layer][size].error ** 2 for layer in group.layers)

    def _take(self, unit: Unit, layers: Mapping[str, nn.Linear]) -> None:
        name = f"forms-{hashlib.sha256(unit.name.encode()).hexdigest()[:16]}.safetensors"
        found = self._journal.read(name, _read)
        if found is None:
            entries = self._made(unit)
            self._journal.write(name, lambda aside: _write(aside, *entries))
            found = self._journal.read(name, _read)
        assert found is not None
        groups, made = found
        self._entries |= made
        for group in groups:
            forms = {size: entry.form for size, entry in made[group[0]].items()}
            weights = sum(layers[layer].weight.numel() for layer in group)
            self.groups.append(Group(group[0], tuple(group), weights, forms))

    def _made(self, unit: Unit) -> tuple[list[list[str]], dict[str, dict[int, Entry]]]:
        statistics = observe_inputs(unit, full=True)
        groups: dict[int, list[str]] = {}
        for name, each in statistics.items():
            groups.setdefault(id(each), []).append(name)
        entries: dict[str, dict[int, Entry]] = {}
        for group in groups.values():
            statistic = statistics[group[0]]
            curvature = Curvature(statistic, self._parameters.solver.damping)
            for name in group:
                entries[name] = dict(self._forms_of(unit.layers[name].weight, statistic, curvature))
        return [*groups.values()], entries

    def _forms_of(
        self, weight: Tensor, statistic: InputStatistics, curvature: Curvature
    ) -> Iterator[tuple[int, Entry]]:
        dense, sparse = weight.detach(), dict[float, Tensor]()
        for size, form in self._parameters.by_size.items():
            group_size = form.group_size if form.bits == 4 else None
            if group_size is not None and weight.shape[1] % group_size:
                continue
            quantization = nncf.CompressWeightsMode.INT4_SYM if group_size else None
            settings = replace(self._parameters.solver, quantization=quantization, group_size=group_size or 128)
            solver = LayerSolver(self._parameters.mode, form.sparsity, settings)
            if form == DENSE:
                yield size, Entry(form, 0.0)
                continue
            if group_size:
                solution = solver.solve(weight, statistic, curvature)
                made = Entry(form, 0.0, solution.codes.cpu(), solution.scales.cpu())  # type: ignore[union-attr]
            else:
                if form.sparsity and form.sparsity not in sparse:
                    sparse[form.sparsity] = solver.solve(weight, statistic, curvature).weight
                floating = sparse[form.sparsity] if form.sparsity else dense
                if form.bits == 8:
                    codes, scales = round_to_int8(floating)
                    made = Entry(form, 0.0, codes.cpu(), scales.cpu())
                else:
                    made = Entry(form, 0.0, floating.to(dense.dtype).cpu())
            yield size, replace(made, error=statistic.output_error(dense, made.dense().to(dense.device)))


def _write(path: Path, groups: list[list[str]], entries: Mapping[str, Mapping[int, Entry]]) -> None:
    tensors = {}
    about: dict[str, dict[int, tuple[str, float]]] = {}
    for layer, forms in entries.items():
        about[layer] = {size: (str(each.form), each.error) for size, each in forms.items()}
        for size, each in forms.items():
            if each.weight is not None:
                tensors[f"{layer}|{size}|weight"] = each.weight.contiguous()
            if each.scales is not None:
                tensors[f"{layer}|{size}|scales"] = each.scales.contiguous()
    save_file(tensors, path, metadata={"groups": json.dumps(groups), "forms": json.dumps(about)})


def _read(path: Path) -> tuple[list[list[str]], dict[str, dict[int, Entry]]]:
    with ExitStack() as stack:
        file = stack.enter_context(safe_open(path, "pt"))
        metadata, names = file.metadata(), {*file.keys()}
        entries: dict[str, dict[int, Entry]] = {}
        for layer, forms in json.loads(metadata["forms"]).items():
            for size, (form, error) in forms.items():
                parts = [f"{layer}|{size}|{part}" for part in ("weight", "scales")]
                weight, scales = (file.get_tensor(part) if part in names else None for part in parts)
                entry = Entry(WeightForm.parse(form), error, weight, scales)
                entries.setdefault(layer, {})[int(size)] = entry
        return json.loads(metadata["groups"]), entries
