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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.calibration.chain import (
    BlockCall,
    Chain,
    Inputs,
    agreed,
    axes_of,
    disturbed_outputs,
    find_chain,
    joined,
    kind_of,
    marks_of,
    same_further_inputs,
    shared,
    sizes_of,
    split,
    trace_calls,
)
from nncf_ext.calibration.float_products import fast_products
from nncf_ext.calibration.trainable_block import TrainableBlock
from nncf_ext.memory import is_out_of_memory
from nncf_ext.structure.blocks import BlockList
from nncf_ext.structure.modes import evaluation_mode

logger = logging.getLogger("nncf_ext")


class Enough(Exception):
    """Raised in a hook to end a forward early: what it was run for has been seen."""


class Run(Protocol):
    """Runs samples through a unit; outputs are dropped."""

    def __call__(self, after_sample: Callable[[], None] = ...) -> None:
        """
        Runs every sample, each until it ends or a hook raises :class:`Enough`.

        :param after_sample: Called after each.
        """


def _nothing() -> None:
    """What happens after a sample if nothing is asked for."""


@dataclass(frozen=True)
class Unit:
    """
    :param name: Path of the block, or of the first layer.
    :param layers: Linear layers to compress together, by path.
    :param run: Runs every calibration sample through the unit as it is now.
    :param advance: To be called once the unit is compressed: its outputs become the inputs of the next unit.
    :param block: How to train the unit by itself; None where it cannot be run by itself, or nobody asked.
    :param module: The block that `run` and `advance` call; None where they run the whole model.
    """

    name: str
    layers: Mapping[str, nn.Linear]
    run: Run
    advance: Callable[[], None]
    block: TrainableBlock | None = None
    module: nn.Module | None = None


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
    :param trainable: Give units with :class:`TrainableBlock`. The hidden states of the model as it was are then kept
        as well, at one block boundary, and each block runs once more on every sample.
    :raises nncf.ValidationError: The model cannot be run on an item.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[Any],
        block_lists: Sequence[BlockList],
        layers: Mapping[str, nn.Linear],
        trainable: bool = False,
    ) -> None:
        self._model = model
        self._trainable = trainable
        self._items = items
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

    def call(self, item: Any) -> Any:
        """
        :param item: An item of the calibration data.
        :return: What the model gives for it.
        """
        return call_model(self._model, item)

    def _run_model(self, after_sample: Callable[[], None] = _nothing) -> None:
        for item in self._items:
            with suppress(Enough):
                self.call(item)
            after_sample()

    def _plan(self, block_lists: Sequence[BlockList], layers: Mapping[str, nn.Linear]) -> list[_Segment]:
        """
        Traces one forward for every kind of item and decides how each list of blocks, and each layer outside, will be
        visited. One item is not enough: what blocks are given (masks of some kind, or none) may differ between items.
        """
        blocks = {name: block for each in block_lists for name, block in each.blocks.items()}
        # Of blocks that share a module, the first has it: so the last is written first.
        holders = {id(part): name for name in reversed(blocks) for part in blocks[name].modules()}
        block_of = {name: holders.get(id(layer)) for name, layer in layers.items()}
        order: list[str] = []
        # For each layer outside blocks and each item: the first layer that read the very same tensor.
        leaders: dict[str, list[str | None]] = {name: [] for name in layers if block_of[name] is None}
        chains: dict[str, list[Chain | None]] = {each.name: [] for each in block_lists}
        traced: set[Any] = set()
        independent: set[Any] = set()
        for index in range(len(self._items)):
            found = self._trace(index, block_lists, layers, leaders, traced)
            if found is None:
                continue
            calls, inputs = found
            _merge_order(order, inputs)
            first_reader: dict[int, str] = {}
            for name, own in leaders.items():
                read = inputs.get(name)
                own.append(None if read is None else first_reader.setdefault(id(read), name))
            for each in block_lists:
                chains[each.name].append(self._chain(each, index, calls, independent))
            del found, calls, inputs  # activations at all block boundaries: of one item at a time
        seen = set(order)
        order += [name for name in layers if name not in seen]

        members: dict[str | None, dict[str, nn.Linear]] = {}
        for name in order:
            members.setdefault(block_of[name], {})[name] = layers[name]
        segments = []
        for each in block_lists:
            units = {block: members.get(block, {}) for block in each.blocks}
            chain = agreed(chains[each.name])
            if chain is None:
                logger.warning(
                    "The blocks %s cannot be run one by one on each other's outputs; the whole model is run for each.",
                    each.name,
                )
                units = {block: own for block, own in units.items() if own}
            if any(units.values()):
                segments.append(_Segment(chain, units, each.blocks))
        groups: dict[Any, dict[str, nn.Linear]] = {}
        for name, layer in members.get(None, {}).items():
            key = tuple(leaders[name]) if any(leaders[name]) else name
            groups.setdefault(key, {})[name] = layer
        segments += [_Segment(None, {next(iter(group)): group}) for group in groups.values()]
        place = {name: index for index, name in enumerate(order)}
        return sorted(segments, key=lambda segment: min(place[n] for own in segment.units.values() for n in own))

    def _trace(
        self,
        index: int,
        block_lists: Sequence[BlockList],
        layers: Mapping[str, nn.Linear],
        outside: Collection[str],
        traced: set[Any],
    ) -> tuple[list[BlockCall], dict[str, Any]] | None:
        """
        Runs the model on one item: the calls of its blocks, and the layers in running order, each with what it read
        first if it stands outside of blocks. What layers in blocks read may go as soon as the model lets it go.

        None, from the first blocks on, if neither the item nor what these are given is of a new kind, and all layers
        stand in blocks. `traced` collects the kinds.
        """
        inputs: dict[str, Any] = {}
        own = kind_of(self._items[index], marks_of)
        given: dict[str, Any] = {}

        def begin(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.setdefault(name, kind_of(joined(args, kwargs), sizes_of))
            if len(given) == len(block_lists) and not outside and (own, *given.items()) in traced:
                raise Enough

        def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = args[0] if args else kwargs.get("input")
            inputs.setdefault(name, read if name in outside else None)

        with ExitStack() as hooks:
            calls = hooks.enter_context(trace_calls(block_lists))
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
            for each in block_lists:
                start = next(iter(each.blocks.values()))
                hooks.callback(start.register_forward_pre_hook(partial(begin, each.name), with_kwargs=True).remove)
            try:
                self.call(self._items[index])
            except Enough:
                return None
            except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
                if is_out_of_memory(error):
                    raise
                msg = (
                    f"The model cannot be run on item {index} of the calibration dataset ({type(error).__name__}: "
                    f"{error}). Items must be what model(...) takes; a transform_func of nncf.Dataset can make them so."
                )
                raise nncf.ValidationError(msg) from error
        traced.add((own, *given.items()))
        return calls, inputs

    def _chain(self, each: BlockList, index: int, calls: Sequence[BlockCall], independent: set[Any]) -> Chain | None:
        """How blocks hand over on one item. `independent` collects the kinds of further inputs that were checked."""
        chain = find_chain(each, calls)
        if chain is None or chain.uniform:
            return chain
        # Blocks differ in their inputs besides the hidden state. Keeping these is right only if they do not depend on
        # hidden states, which compression changes: so the hidden states are disturbed, and the inputs compared.
        before = [call for call in calls if call.block in each.blocks]
        kind = each.name, kind_of([call.inputs for call in before], axes_of)
        if kind in independent:
            return chain
        with disturbed_outputs(each, chain), trace_calls([each]) as again:
            self.call(self._items[index])
        if not same_further_inputs(chain, before, again):
            return None
        independent.add(kind)
        return chain

    def _walk(self, segment: _Segment, chain: Chain) -> Iterator[Unit]:
        """Visits a chain of blocks, holding the hidden states at one block boundary."""
        hidden, further = self._capture(segment, chain)

        def call(inputs: Sequence[Inputs], sample: int, function: Callable[..., Any], states: list[Tensor]) -> Any:
            args, kwargs = split({**inputs[sample], chain.entry: states[sample]})
            return function(*args, **kwargs)

        def state(output: Any) -> Tensor:
            found: Tensor = output if chain.exit is None else output[chain.exit]
            return found

        def run(block: nn.Module, inputs: Sequence[Inputs], after_sample: Callable[[], None] = _nothing) -> None:
            for sample in range(len(hidden)):
                with suppress(Enough):
                    call(inputs, sample, block, hidden)
                after_sample()

        def advance(block: nn.Module, inputs: Sequence[Inputs], states: list[Tensor]) -> None:
            for sample in range(len(states)):
                states[sample] = state(call(inputs, sample, block, states))

        def output(inputs: Sequence[Inputs], sample: int, function: Callable[..., Any]) -> Tensor:
            return state(call(inputs, sample, function, hidden))

        # A block that shares weights with an earlier one is compressed by then: nothing tells what it gave before.
        known = [id(each) for block in segment.blocks.values() for each in block.parameters()]
        trainable = self._trainable and len(set(known)) == len(known)
        dense = list(hidden) if trainable else []
        last = list(segment.units)[-1]
        for index, (name, layers) in enumerate(segment.units.items()):
            block, inputs = segment.blocks[name], further[0 if chain.uniform else index]
            part = None
            if trainable:
                advance(block, inputs, dense)
                part = TrainableBlock(block, dense, partial(output, inputs))
            # Nothing reads the outputs of the last block: layers after it run by the whole model.
            onward = (lambda: None) if name == last else partial(advance, block, inputs, hidden)
            yield Unit(name, layers, partial(run, block, inputs), onward, part, block)

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
                raise Enough

        with ExitStack() as hooks:
            for index, block in enumerate(visited):
                hooks.callback(block.register_forward_pre_hook(partial(record, index), with_kwargs=True).remove)
            for item in self._items:
                try:
                    self.call(item)
                except Enough:
                    pass
        return hidden, further


def call_model(model: nn.Module, item: Any) -> Any:
    """
    :param model: A model.
    :param item: An item of calibration data; the model gets a copy of it, on its device.
    :return: What the model gives for it, without a cache of keys and values.
    """
    # A cache would make a block remember the previous run.
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    item = _copied(item, next(model.parameters()).device)
    if isinstance(item, Mapping):
        return model(**{**item, **options})
    return model(item, **options) if isinstance(item, Tensor) else model(*item, **options)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """
    Puts every module into evaluation mode without gradients, and its own mode back afterwards. Half-precision models
    multiply in float32 where the CPU is faster so.

    :param model: Any torch model.
    """
    with evaluation_mode(model), torch.no_grad(), fast_products(model):
        yield


def _merge_order(order: list[str], seen: Iterable[str]) -> None:
    """Puts names that are new in a sequence without repetitions right behind those that stood before them there."""
    known = set(order)
    behind: dict[str | None, list[str]] = {}
    last = None
    for name in seen:
        if name in known:
            last = name
        else:
            behind.setdefault(last, []).append(name)
    if behind:
        order[:] = [each for name in (None, *order) for each in (name, *behind.get(name, ())) if each is not None]


def _copied(value: Any, device: torch.device) -> Any:
    """A model may write to its inputs, and what was made in inference mode can hardly be used outside: so a copy."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_copied(part, device) for part in value]
    return value
