"""
Thresholds for the inputs of linear layers, calibrated block by block.

For each group of layers that read one tensor, in the order in which they run: find the centre of the inputs, then the
threshold below which the wanted fraction of them lies, put it in, and go on; so layers behind see sparse inputs. Inputs
are read again for each number that is sought, never kept.

Source: SCAP, arXiv 2412.07174.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.algorithms.activation_sparsity.allocation import allocated
from nncf_ext.algorithms.activation_sparsity.moving_average import moving_averages
from nncf_ext.algorithms.activation_sparsity.order_statistics import Reading, density_peak, quantiles
from nncf_ext.algorithms.activation_sparsity.parameters import LARGEST, AdvancedActivationSparsityParameters
from nncf_ext.calibration.stream import CalibrationStream, Enough, Unit, evaluation, read_items
from nncf_ext.files import digest
from nncf_ext.journal import Journal, read_json
from nncf_ext.method import Request
from nncf_ext.parameters import ActivationAllocation, ActivationCentering
from nncf_ext.progress import Progress
from nncf_ext.saving.thresholds import as_row, from_row
from nncf_ext.structure.blocks import Survey, note_untouched
from nncf_ext.upstream import get_hook_storage, is_wrapped
from nncf_ext.weights.activation_sparsity import (
    ActivationSparsity,
    activation_sparsity_of,
    set_activation_sparsity,
)
from nncf_ext.weights.int4 import weight_hooks
from nncf_ext.weights.records import LayerRecord, record_of, set_record

logger = logging.getLogger("nncf_ext")
_OFF = 0.1  # farther from the target, as a fraction of all inputs, is worth a warning; as published
_SAMPLE = 256  # tokens on which a layer's error is measured


@dataclass(frozen=True)
class _Found:
    sparsity: ActivationSparsity
    error: float
    """Relative, of the layer's output."""


class ActivationSparsityMethod:
    """
    One run. Everything is checked before a threshold is put in.

    :param request: What was asked for; the ratio is that of each layer without a target of its own.
    :raises nncf.ValidationError: A parameter is out of range, or there is no dataset.
    :raises nncf.ParameterNotSupportedError: The centering is unknown.
    """

    def __init__(self, request: Request[AdvancedActivationSparsityParameters]) -> None:
        request.parameters.check()
        if request.dataset is None:
            msg = f"{request.mode.value} takes thresholds from the inputs of each layer and needs a dataset; got None."
            raise nncf.ValidationError(msg)
        if request.ratio > LARGEST:
            msg = f"ratio is a fraction of inputs, at most {LARGEST}; got {request.ratio}."
            raise nncf.ValidationError(msg)
        self._request = request
        self._parameters = request.parameters
        self._items = read_items(request.dataset, request.subset_size)
        self._averages: dict[str, float] = {}  # thresholds by layer, where they are NNCF's

    def check(self, model: nn.Module, survey: Survey) -> None:
        """
        :param model: The model.
        :param survey: Its weights.
        :raises nncf.ValidationError: A target matches no layer, layers match two, there is nothing to do, or a layer
            has a threshold.
        """
        wanted = self._wanted(survey.targets)
        if not wanted:
            msg = (
                f"No layer of {type(model).__name__} would get sparse inputs: it has {len(survey.targets)} linear "
                "layers that can be treated, and the ratio or the target of each is 0."
            )
            raise nncf.ValidationError(msg)
        done = [name for name in wanted if activation_sparsity_of(survey.targets[name]) is not None]
        if done:
            msg = (
                f"{done[0]} has a threshold for its inputs already. Start from the model without, or put the layer "
                "into the ignored scope."
            )
            raise nncf.ValidationError(msg)

    def apply(self, model: nn.Module, survey: Survey) -> None:
        """
        :param model: The model; its layers get thresholds.
        :param survey: Its weights.
        :raises nncf.ValidationError: No token reached any layer, or the journal is another run's.
        """
        note_untouched(survey)
        layers = survey.targets
        wanted = asked = self._wanted(layers)
        journal = None
        if self._request.resume is not None:
            journal = Journal(self._request.resume, "activation sparsity", self._header(model, wanted))
        results: dict[str, _Found] = {}
        with evaluation(model), Progress() as progress:
            if self._parameters.moving_average:
                sparse = self._parameters.sequential
                self._averages = moving_averages(model, self._items, layers, wanted, sparse)
                wanted = {name: wanted[name] for name in self._averages}
            stream = CalibrationStream(model, self._items, survey.block_lists, {name: layers[name] for name in wanted})
            task = progress.add_task(f"Applying {self._request.mode.value}", total=len(stream))
            try:
                for unit in stream.units():
                    with _decoded(model, unit):
                        results |= self._finished(model, unit, wanted, journal)
                        unit.advance()
                    progress.advance(task)
            except BaseException:
                for name in wanted:  # all or nothing: half a calibration is of no use
                    set_activation_sparsity(layers[name], None)
                raise
        if not results:
            raise nncf.ValidationError("No calibration token reached a layer that shall get sparse inputs.")
        for name, each in results.items():
            set_activation_sparsity(layers[name], each.sparsity)
            _note(layers[name], each, self._request.mode.value)
        for name in sorted({*asked} - {*results}):
            logger.warning("%s saw no calibration token; its inputs stay as they are.", name)

    def _wanted(self, layers: Iterable[str]) -> dict[str, float]:
        """Targets by layer, none of which is 0."""
        compiled = {pattern: re.compile(pattern) for pattern in self._parameters.targets}
        wanted, idle = {}, {*compiled}
        for name in layers:
            rules = [pattern for pattern, rule in compiled.items() if rule.fullmatch(name)]
            idle -= {*rules}
            values = {self._parameters.targets[pattern] for pattern in rules}
            if len(values) > 1:
                msg = f"{name} matches {rules}, with targets {sorted(values)}. One target for each layer is needed."
                raise nncf.ValidationError(msg)
            target = values.pop() if values else self._request.ratio
            if target:
                wanted[name] = target
        if idle:
            msg = (
                f"Targets {sorted(idle)} match no layer; layers are named as {next(iter(layers), 'there are none')!r}."
            )
            raise nncf.ValidationError(msg)
        return wanted

    def _finished(
        self, model: nn.Module, unit: Unit, wanted: Mapping[str, float], journal: Journal | None
    ) -> dict[str, _Found]:
        """What was found for a unit, now or by an interrupted run; where that is sequential, it is put in."""
        entry = f"unit-{digest([unit.name])[:16]}.json"
        kept = None if journal is None else journal.read(entry, read_json)
        results = self._calibrated(model, unit, wanted) if kept is None else _restored(kept)
        if journal is not None and kept is None:
            journal.write(entry, partial(_keep, results))
        if self._parameters.sequential:
            for name, each in results.items():
                set_activation_sparsity(unit.layers[name], each.sparsity)
        return results

    def _calibrated(self, model: nn.Module, unit: Unit, wanted: Mapping[str, float]) -> dict[str, _Found]:
        results: dict[str, _Found] = {}
        groups, once = _groups(unit)
        weights = _Weights(model, unit)

        def found(group: Sequence[str], targets: Mapping[str, float]) -> dict[str, ActivationSparsity]:
            return self._thresholds({name: _reading(unit, unit.layers[name], once) for name in group}, weights, targets)

        if ActivationAllocation(self._parameters.allocation) is ActivationAllocation.GREEDY and unit.module is not None:
            wanted = allocated(
                *(unit, unit.module, groups, wanted, len(self._items)),
                lambda group, fraction: found(group, dict.fromkeys(group, fraction)),
            )
        for group in groups:
            for name, each in found(group, wanted).items():
                results[name] = _measured(name, weights(name), each, _reading(unit, unit.layers[name], once))
            if self._parameters.sequential:
                for name in group:
                    set_activation_sparsity(unit.layers[name], results[name].sparsity)
        return results

    def _thresholds(
        self, reads: Mapping[str, Reading], weights: "_Weights", targets: Mapping[str, float]
    ) -> dict[str, ActivationSparsity]:
        """Of layers that read the same."""
        found: dict[str, ActivationSparsity] = {}
        known: dict[float, ActivationSparsity] = {}
        for name, read in reads.items():
            target = targets[name]
            if self._parameters.weight_norms:
                found[name] = self._sparsity(read, target, _column_norms(weights(name)), None)
                continue
            if target not in known:
                known[target] = self._sparsity(read, target, None, self._averages.get(name))
            found[name] = known[target]
        return found

    def _sparsity(self, read: Reading, target: float, norms: Tensor | None, limit: float | None) -> ActivationSparsity:
        """What is found for a target, at a limit of the distance from the centre where it is known."""
        centering = ActivationCentering(self._parameters.centering)
        centre = 0.0
        if centering is ActivationCentering.MEDIAN:
            (centre,) = quantiles(read, (0.5,))
        elif centering is ActivationCentering.MODE:
            centre = density_peak(read)

        def distances(see: Callable[[Tensor], None]) -> None:
            weights: Any = 1.0 if norms is None else norms
            read(lambda inputs: see((inputs.float() - centre).abs() * weights))

        if limit is None:
            (limit,) = quantiles(distances, (target,))
        sparsity = ActivationSparsity(
            threshold=limit if norms is None else limit / norms,
            centre=centre,
            replacement=centre,
            target=target,
            centering=centering.value,
        )
        return replace(sparsity, replacement=_means(read, sparsity)) if self._parameters.mean_replacement else sparsity

    def _header(self, model: nn.Module, wanted: Mapping[str, float]) -> dict[str, Any]:
        return {
            "mode": self._request.mode.value,
            "parameters": {**asdict(replace(self._parameters, targets={}))},
            "targets": dict(wanted),
            "data": digest(self._items),
            "weights": digest(model.state_dict().items()),
            "thresholds": digest(
                (name, as_row(known))
                for name, module in model.named_modules()
                if (known := activation_sparsity_of(module)) is not None
            ),
        }


def _groups(unit: Unit) -> tuple[list[list[str]], bool]:
    """
    Layers that read the very same tensor in every sample, in the order in which they run, without those that see no
    value; and whether no sample calls a layer twice, so that a run may end where it is called.
    """
    if not unit.layers:
        return [], True
    leaders: dict[str, list[str]] = {name: [] for name in unit.layers}
    values, calls = dict.fromkeys(unit.layers, 0), dict.fromkeys(unit.layers, 0)
    held: dict[int, tuple[str, Tensor]] = {}  # with the tensors, so that no other one gets their identity
    order: list[str] = []
    most = 0

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        values[name] += inputs.numel()
        calls[name] += 1
        if name not in order:
            order.append(name)
        if calls[name] == 1:
            leaders[name].append(held.setdefault(id(inputs), (name, inputs))[0])

    def after_sample() -> None:
        nonlocal most
        most = max(most, *calls.values())
        for name, number in calls.items():
            if not number:
                leaders[name].append("")
        calls.update(dict.fromkeys(calls, 0))
        held.clear()

    with ExitStack() as hooks:
        for name, layer in unit.layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
            )
            hooks.callback(handle.remove)
        unit.run(after_sample)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in order:
        if values[name]:
            groups.setdefault(tuple(leaders[name]), []).append(name)
    return [*groups.values()], most <= 1


def _reading(unit: Unit, layer: nn.Linear, once: bool) -> Reading:
    def read(see: Callable[[Tensor], None]) -> None:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else kwargs["input"])
            if once:
                raise Enough

        handle = layer.register_forward_pre_hook(observe, with_kwargs=True)
        try:
            unit.run()
        finally:
            handle.remove()

    return read


@contextmanager
def _decoded(model: nn.Module, unit: Unit) -> Iterator[None]:
    """Codes become floating weights while a block is run by itself: NNCF's hooks act where the whole model is run."""
    hooks = weight_hooks(model) if unit.module is not None else {}
    codes = {}
    try:
        for name, hook in hooks.items():
            parameter = model.get_parameter(name)
            if name.startswith(f"{unit.name}.") and not parameter.is_floating_point():
                codes[parameter] = parameter.data
                parameter.data = hook(parameter.data)
        yield
    finally:
        for parameter, packed in codes.items():
            parameter.data = packed


def _acts_on_more_than_codes(model: nn.Module) -> bool:
    """Whether NNCF's hooks do anything but decode integer weights."""
    if not is_wrapped(model):
        return False
    behind = weight_hooks(model).items()
    decoding = {id(hook) for name, hook in behind if not model.get_parameter(name).is_floating_point()}
    return any(id(hook) not in decoding for _, hook in get_hook_storage(model).named_hooks())


class _Weights:
    """Weights of a unit's layers ``[out_features, in_features]`` float32, as the forward sees them."""

    def __init__(self, model: nn.Module, unit: Unit) -> None:
        self._hooks, self._unit = weight_hooks(model), unit

    def __call__(self, name: str) -> Tensor:
        weight: Tensor = self._unit.layers[name].weight
        if not weight.is_floating_point():  # where blocks are not run by themselves; else see _decoded
            weight = self._hooks[f"{name}.weight"](weight)
        return weight.detach().float()


def _column_norms(weight: Tensor) -> Tensor:
    """``[in_features]``, on average 1; a column of zeros counts a little, so that its threshold is finite."""
    norms = weight.norm(dim=0)
    average = float(norms.mean())
    return (norms / average).clamp(min=1e-3) if average > 0 else torch.ones_like(norms)


def _means(read: Reading, sparsity: ActivationSparsity) -> Tensor:
    """``[in_features]`` float32: of each channel, the mean of the inputs that are replaced; the centre if none is."""
    sums: Any = 0.0
    counts: Any = 0

    def add(inputs: Tensor) -> None:
        nonlocal sums, counts
        rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
        replaced = sparsity.replaced(rows)
        sums = sums + (rows * replaced).sum(0, dtype=torch.float64)
        counts = counts + replaced.sum(0)

    read(add)
    means = (sums / counts.clamp(min=1)).float()
    return torch.where(counts > 0, means, torch.full_like(means, sparsity.centre))


def _measured(name: str, weight: Tensor, sparsity: ActivationSparsity, read: Reading) -> _Found:
    replaced = count = 0
    sample: list[Tensor] = []

    def look(inputs: Tensor) -> None:
        nonlocal replaced, count
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        replaced += int(sparsity.replaced(rows).sum())
        count += rows.numel()
        left = _SAMPLE - sum(map(len, sample))
        if left > 0:
            sample.append(rows[torch.linspace(0, len(rows) - 1, min(left, len(rows), 32)).long()].float())

    read(look)
    rows = torch.cat(sample)
    exact = torch.linalg.norm(rows @ weight.T)
    error = torch.linalg.norm((sparsity(rows) - rows) @ weight.T)
    achieved = replaced / count
    if abs(achieved - sparsity.target) > _OFF:
        logger.warning(
            "%s: %.0f %% of its inputs are replaced where %.0f %% were asked for, as many of them are equal.",
            *(name, 100 * achieved, 100 * sparsity.target),
        )
    return _Found(replace(sparsity, achieved=achieved), float(error / exact) if exact > 0 else 0.0)


def _note(layer: nn.Linear, found: _Found, mode: str) -> None:
    """For the report, unless it tells already what was done to the weight."""
    known = record_of(layer)
    if known is None or known.mode is None:
        bytes_before = layer.weight.nbytes
        set_record(layer, LayerRecord(mode=mode, bytes_before=bytes_before, error=found.error, error_of="output"))


def _keep(results: Mapping[str, _Found], path: Path) -> None:
    rows = {name: [as_row(each.sparsity), each.error] for name, each in results.items()}
    path.write_text(json.dumps(rows))


def _restored(content: Mapping[str, Any]) -> dict[str, _Found]:
    return {name: _Found(from_row(row), error) for name, (row, error) in content.items()}
