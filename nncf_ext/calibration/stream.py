"""
Calibration activations of a model, one unit of layers after the other. Each unit sees the outputs of the units before
it as they are after compression.

A unit is usually one block. The inputs of the first block are captured once. A unit can then be run on them as often as
needed, and `advance` replaces them by its outputs. So only the activations between two blocks are held, never those of
the whole model (except while planning: those of one sample, between all blocks). Where blocks do not form such a chain,
or there are none, the whole model is run for each unit: right for any model, and slower by the number of units.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.calibration.chain import (
    BlockCall,
    Chain,
    Inputs,
    disturbed_outputs,
    find_chain,
    joined,
    same_further_inputs,
    shared,
    split,
    trace_calls,
)
from nncf_ext.calibration.statistics import InputStatistics
from nncf_ext.structure.blocks import BlockList

logger = logging.getLogger("nncf_ext")


class _Reached(Exception):
    """Ends a forward early: the inputs that it was run for have been captured."""


@dataclass(frozen=True)
class Unit:
    """
    :param name: Path of the block, or of the first layer.
    :param layers: Linear layers to compress together, by path.
    :param run: Runs every calibration sample through the unit as it is now; outputs are dropped.
    :param advance: To be called once the unit is compressed: its outputs become the inputs of the next unit.
    """

    name: str
    layers: Mapping[str, nn.Linear]
    run: Callable[[], None]
    advance: Callable[[], None]


@dataclass
class _Segment:
    """Units that are visited in the same way: the blocks of a chain, or (without one) anything, by the whole model."""

    chain: Chain | None
    units: dict[str, dict[str, nn.Linear]]
    blocks: Mapping[str, nn.Module] = field(default_factory=dict)


def read_items(dataset: nncf.Dataset, subset_size: int) -> list[Any]:
    """
    :param dataset: The user's calibration data.
    :param subset_size: How many items to take, from the beginning.
    :return: Model inputs as the dataset's transform gives them: a mapping, a tuple or a tensor each.
    :raises nncf.ValidationError: There are none, or they are of another type.
    """
    items = list(islice(iter(dataset.get_inference_data()), subset_size))
    if not items:
        msg = "The calibration dataset is empty: this mode needs at least one item."
        raise nncf.ValidationError(msg)
    for index, item in enumerate(items):
        if not isinstance(item, Mapping | tuple | list | Tensor):
            msg = (
                f"Item {index} of the calibration dataset is a {type(item).__name__}. It must be what the model takes: "
                "a dictionary of tensors (called as model(**item)), a tuple (model(*item)) or a tensor. Give "
                "nncf.Dataset a transform_func that makes one."
            )
            raise nncf.ValidationError(msg)
    return items


class CalibrationStream:
    """
    Walks a model's layers in the order in which they run.

    :param model: The model, in evaluation mode (:func:`evaluation`); its weights may change while walking.
    :param items: Model inputs.
    :param block_lists: Repeated blocks found in the model.
    :param layers: The layers to visit, by path. Layers in no block are grouped by shared input.
    :raises nncf.ValidationError: The model cannot be run on the first item.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[Any],
        block_lists: Sequence[BlockList],
        layers: Mapping[str, nn.Linear],
    ) -> None:
        self._model = model
        self._items = items
        self._device = next(model.parameters()).device
        # A key/value cache would make a block remember the previous run.
        no_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if no_cache else {}
        self._segments = self._plan(block_lists, layers)

    def __len__(self) -> int:
        """Number of units."""
        return sum(len(segment.units) for segment in self._segments)

    def units(self) -> Iterator[Unit]:
        """
        :return: The units in the order in which they run. A unit's `advance` must be called before the next is taken.
        """
        for segment in self._segments:
            if segment.chain is None:
                for name, layers in segment.units.items():
                    yield Unit(name, layers, self._run_model, lambda: None)
            else:
                yield from self._walk(segment, segment.chain)

    def _call(self, item: Any) -> None:
        item = _to_device(item, self._device)
        if isinstance(item, Mapping):
            self._model(**{**item, **self._options})
        elif isinstance(item, Tensor):
            self._model(item, **self._options)
        else:
            self._model(*item, **self._options)

    def _run_model(self) -> None:
        for item in self._items:
            self._call(item)

    def _plan(self, block_lists: Sequence[BlockList], layers: Mapping[str, nn.Linear]) -> list[_Segment]:
        """Traces one forward and decides how each list of blocks, and each layer outside, will be visited."""
        members = {
            block_name: {id(part) for part in block.modules()}
            for each in block_lists
            for block_name, block in each.blocks.items()
        }
        block_of = {
            name: next((block for block, parts in members.items() if id(layer) in parts), None)
            for name, layer in layers.items()
        }
        order: list[str] = []
        inputs: dict[str, Tensor] = {}

        def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in order:
                order.append(name)
                if block_of[name] is None and args:
                    inputs[name] = args[0]

        with ExitStack() as hooks:
            calls = hooks.enter_context(trace_calls(block_lists))
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(partial(note, name)).remove)
            try:
                self._call(self._items[0])
            except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
                msg = (
                    f"The model cannot be run on the first calibration item ({type(error).__name__}: {error}). Items "
                    "must be what model(...) takes; a transform_func of nncf.Dataset can make them so."
                )
                raise nncf.ValidationError(msg) from error
        order += [name for name in layers if name not in order]

        segments = []
        for each in block_lists:
            units = {block: {name: layers[name] for name in order if block_of[name] == block} for block in each.blocks}
            chain = self._chain(each, calls)
            if chain is None:
                logger.warning(
                    "The blocks %s cannot be run one by one on each other's outputs; the whole model is run for each.",
                    each.name,
                )
                units = {block: own for block, own in units.items() if own}
            if any(units.values()):
                segments.append(_Segment(chain, units, each.blocks))
        # Layers that read the very same tensor are one unit. `inputs` keeps the tensors alive, so no id is used twice.
        groups: dict[int, dict[str, nn.Linear]] = {}
        for name in order:
            if block_of[name] is None:
                groups.setdefault(id(inputs.get(name, layers[name])), {})[name] = layers[name]
        segments += [_Segment(None, {next(iter(group)): group}) for group in groups.values()]
        first = {
            id(segment): min(order.index(n) for own in segment.units.values() for n in own) for segment in segments
        }
        return sorted(segments, key=lambda segment: first[id(segment)])

    def _chain(self, each: BlockList, calls: Sequence[BlockCall]) -> Chain | None:
        chain = find_chain(each, calls)
        if chain is None or chain.uniform:
            return chain
        # Blocks differ in their inputs besides the hidden state. Keeping these is right only if they do not depend on
        # hidden states, which compression changes: so the hidden states are disturbed, and the inputs compared.
        with disturbed_outputs(each, chain), trace_calls([each]) as again:
            self._call(self._items[0])
        before = [call for call in calls if call.block in each.blocks]
        return chain if same_further_inputs(chain, before, again) else None

    def _walk(self, segment: _Segment, chain: Chain) -> Iterator[Unit]:
        """Visits a chain of blocks, holding the hidden states at one block boundary."""
        hidden, further = self._capture(segment, chain)

        def outputs(block: nn.Module, inputs: Sequence[Inputs]) -> Iterator[Any]:
            for sample, rest in enumerate(inputs):
                args, kwargs = split({**rest, chain.entry: hidden[sample]})
                yield block(*args, **kwargs)

        def run(block: nn.Module, inputs: Sequence[Inputs]) -> None:
            for _ in outputs(block, inputs):
                pass

        def advance(block: nn.Module, inputs: Sequence[Inputs]) -> None:
            for sample, output in enumerate(outputs(block, inputs)):
                hidden[sample] = output if chain.exit is None else output[chain.exit]

        last = list(segment.units)[-1]
        for index, (name, layers) in enumerate(segment.units.items()):
            given = segment.blocks[name], further[0 if chain.uniform else index]
            # Nothing reads the outputs of the last block: layers after it run by the whole model.
            yield Unit(name, layers, partial(run, *given), (lambda: None) if name == last else partial(advance, *given))

    def _capture(self, segment: _Segment, chain: Chain) -> tuple[list[Tensor], list[list[Inputs]]]:
        """
        Runs the model up to the first block (to the last, if blocks get different further inputs) for every item.

        :return: Hidden states by sample, and the further inputs by block and sample.
        """
        visited = list(segment.blocks.values())[: 1 if chain.uniform else None]
        hidden: list[Tensor] = []
        further: list[list[Inputs]] = [[] for _ in visited]

        def record(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = joined(args, kwargs)
            state = inputs.pop(chain.entry)
            if index == 0:
                hidden.append(state)
            known = [rows[-1] for rows in further[: index + 1] if rows]
            further[index].append(
                {key: shared(value, [row.get(key) for row in known]) for key, value in inputs.items()}
            )
            if index == len(visited) - 1:
                raise _Reached

        with ExitStack() as hooks:
            for index, block in enumerate(visited):
                hooks.callback(block.register_forward_pre_hook(partial(record, index), with_kwargs=True).remove)
            for item in self._items:
                try:
                    self._call(item)
                except _Reached:
                    pass
        return hidden, further


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """
    Puts every module into evaluation mode without gradients, and its own mode back afterwards.

    :param model: Any torch model.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def observe_inputs(unit: Unit, *, full: bool) -> dict[str, InputStatistics]:
    """
    Runs a unit once and accumulates the second moments of its layers' inputs.

    Layers that are fed the very same tensor (query, key and value; gate and up) share one accumulator.

    :param unit: The unit, as it is now.
    :param full: Accumulate Hessians, not only squares.
    :return: Statistics by the path of the layer; a layer that no token reached is missing.
    """
    statistics: dict[str, InputStatistics] = {}
    # Which layers share an input is found on the first sample, by identity, and checked on every further one.
    latest: dict[str, Tensor] = {}
    leader_of: dict[str, str] = {}

    def observe(name: str, module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        if name not in leader_of:
            leader_of[name] = next((other for other, seen in latest.items() if seen is inputs), name)
        leader = leader_of[name]
        if leader == name:
            latest[name] = inputs
            if name not in statistics:
                statistics[name] = InputStatistics(module.in_features, full, inputs.device)
            statistics[name].update(inputs)
        elif latest[leader] is not inputs:
            msg = f"{name} and {leader} shared one input on the first sample and not on a later one."
            raise nncf.UnsupportedModelError(msg)

    with ExitStack() as hooks:
        for name, layer in unit.layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(observe, name), with_kwargs=True).remove)
        unit.run()
    by_layer = {name: statistics[leader] for name, leader in leader_of.items()}
    return {name: statistic for name, statistic in by_layer.items() if statistic.tokens}


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_to_device(part, device) for part in value]
    return value
