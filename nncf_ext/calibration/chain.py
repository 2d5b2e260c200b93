"""
Does each block of a model take the output of the block before it, so that blocks can be run one by one?

The answer comes from one traced forward, without knowledge of the architecture. Whatever a block gets besides the
hidden state (masks, position embeddings, flags) is kept and given to it again.
"""

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.structure.blocks import BlockList

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)

Inputs = dict[int | str, Any]
"""Inputs of a module by position or keyword."""


@dataclass(frozen=True)
class Chain:
    """
    How one block hands over to the next.

    :param entry: Position or keyword of the hidden state among a block's inputs.
    :param exit: Index of the hidden state in a block's output tuple; None if the output is the tensor itself.
    :param uniform: Whether all blocks get the same inputs besides the hidden state.
    """

    entry: int | str
    exit: int | None
    uniform: bool


@dataclass
class BlockCall:
    """
    One call of a block in the traced forward.

    :param block: Path of the block.
    :param inputs: What it was given.
    :param read: Its input tensors, and how often each had been written to when the call began.
    :param outputs: What it returned; one entry if that was a tensor.
    :param returned: Its output tensors, and how often each had been written to when the call ended.
    :param returns_tensor: Whether it returned a tensor rather than a tuple.
    """

    block: str
    inputs: Inputs
    read: list[tuple[Tensor, int]]
    outputs: Sequence[Any] = ()
    returned: list[tuple[Tensor, int]] = field(default_factory=list)
    returns_tensor: bool = True


@contextmanager
def trace_calls(lists: Sequence[BlockList]) -> Iterator[list[BlockCall]]:
    """
    Notes every call of every block while the context is open. Holds the activations at all block boundaries.

    :param lists: Lists of blocks.
    :return: Calls in the order in which they begin; complete when the context closes.
    """
    calls: list[BlockCall] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = joined(args, kwargs)
            calls.append(BlockCall(name, inputs, _versions(inputs)))

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = next(call for call in reversed(calls) if call.block == name)
            call.returns_tensor = isinstance(output, Tensor)
            call.outputs = output if isinstance(output, tuple | list) else [output]
            call.returned = _versions(call.outputs)

        return hook

    with ExitStack() as hooks:
        for each in lists:
            for name, block in each.blocks.items():
                hooks.callback(block.register_forward_pre_hook(begin(name), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(end(name)).remove)
        yield calls


def find_chain(each: BlockList, calls: Sequence[BlockCall]) -> Chain | None:
    """
    :param each: A list of blocks.
    :param calls: Their calls in one forward.
    :return: How they hand over; None unless every block was called once, in order, on the previous one's output, on
        nothing else that a block had computed, and none of these was written to in place.
    """
    calls = [call for call in calls if call.block in each.blocks]
    if len(calls) < 2 or [call.block for call in calls] != list(each.blocks):
        return None
    links: set[tuple[int | str, int]] = set()
    computed: set[int] = set()
    for previous, call in zip(calls, calls[1:], strict=False):
        computed |= {id(value) for value in previous.outputs if isinstance(value, Tensor)}
        found = [
            (key, index)
            for key, value in call.inputs.items()
            for index, output in enumerate(previous.outputs)
            if isinstance(value, Tensor) and value is output
        ]
        links.update(found)
        if len(found) != 1 or len(links) != 1 or _written(previous.returned):
            return None
    entry, index = links.pop()
    further = [{key: value for key, value in call.inputs.items() if key != entry} for call in calls]
    for call, inputs in zip(calls, further, strict=True):
        # A block that writes to an input would find it changed when it is run a second time.
        if entry not in call.inputs or _written(call.read) or not _replayable(inputs, computed):
            return None
    uniform = all(_agree(inputs, further[0], operator.is_) for inputs in further[1:])
    return Chain(entry, None if calls[0].returns_tensor else index, uniform)


def agreed(chains: Iterable[Chain | None]) -> Chain | None:
    """
    :param chains: How the blocks hand over on each calibration item.
    :return: How they do on all of them; None if that differs, or is no chain on one of them.
    """
    links = set()
    uniform = True
    for chain in chains:
        if chain is None:
            return None
        links.add((chain.entry, chain.exit))
        uniform &= chain.uniform
    return Chain(*links.pop(), uniform) if len(links) == 1 else None


def kind_of(value: Any, of_tensor: Callable[[Tensor], Hashable]) -> Hashable:
    """
    :param value: Inputs of a model or block, or a part of them.
    :param of_tensor: What counts of a tensor: :func:`axes_of`, :func:`sizes_of` or :func:`marks_of`.
    :return: Equal for inputs that differ in nothing that counts. What is neither plain nor a dense tensor is of a kind
        of its own.
    """
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
        return of_tensor(value)
    if isinstance(value, tuple | list):
        return tuple(kind_of(part, of_tensor) for part in value)
    if isinstance(value, Mapping):
        return tuple((key, kind_of(part, of_tensor)) for key, part in value.items())
    return value if isinstance(value, _PLAIN) else object()


def axes_of(value: Tensor) -> Hashable:
    """:return: Its type, and how many axes it has."""
    return value.dtype, value.dim()


def sizes_of(value: Tensor) -> Hashable:
    """:return: Its type and shape."""
    return value.dtype, tuple(value.shape)


def marks_of(value: Tensor) -> Hashable:
    """:return: Type, shape, and what models look for in masks (is something masked?) and positions (a new text?)."""
    steps = torch.atleast_1d(value).diff(dim=-1)
    return sizes_of(value), bool(value.all()), bool(value.any()), bool((steps == 1).all())


@contextmanager
def disturbed_outputs(each: BlockList, chain: Chain) -> Iterator[None]:
    """
    Halves the hidden state that every block returns, while the context is open. What else blocks get then stays the
    same only if it does not depend on hidden states.

    :param each: A list of blocks.
    :param chain: How they hand over.
    """

    def halve(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if chain.exit is None:
            return output * 0.5
        return tuple(value * 0.5 if index == chain.exit else value for index, value in enumerate(output))

    with ExitStack() as hooks:
        for block in each.blocks.values():
            hooks.callback(block.register_forward_hook(halve).remove)
        yield


def same_further_inputs(chain: Chain, left: Sequence[BlockCall], right: Sequence[BlockCall]) -> bool:
    """
    :param chain: How the blocks hand over.
    :param left: Calls of the blocks in one forward.
    :param right: Calls in another.
    :return: Whether both gave the blocks equal inputs besides the hidden state.
    """

    def further(calls: Sequence[BlockCall]) -> list[Inputs]:
        return [{key: value for key, value in call.inputs.items() if key != chain.entry} for call in calls]

    return _agree(further(left), further(right), _equal)


def joined(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """
    :param args: Positional inputs of a call.
    :param kwargs: Keyword inputs of a call.
    :return: Both in one dictionary; :func:`split` takes them apart again.
    """
    inputs: Inputs = dict(enumerate(args))
    inputs.update(kwargs.items())
    return inputs


def split(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
    """
    :param inputs: Inputs by position or keyword.
    :return: Positional and keyword inputs.
    """
    positions = sorted(key for key in inputs if isinstance(key, int))
    return [inputs[key] for key in positions], {key: value for key, value in inputs.items() if isinstance(key, str)}


def shared(value: Any, known: Sequence[Any]) -> Any:
    """
    :param value: A value to keep.
    :param known: Values kept already.
    :return: The equal one among `known` if there is one, so that equal masks of many samples are held once.
    """
    if isinstance(value, Tensor):
        same = (other for other in known if isinstance(other, Tensor) and _equal(other, value))
        return next(same, value)
    if isinstance(value, tuple):
        rows = [other for other in known if isinstance(other, tuple) and len(other) == len(value)]
        return tuple(shared(part, [row[index] for row in rows]) for index, part in enumerate(value))
    return value


def _equal(left: Tensor, right: Tensor) -> bool:
    return left is right or (left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right))


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    """All tensors in a value, each with torch's count of how often it was written to in place."""
    if isinstance(value, Tensor):
        # Torch forbids writing to tensors of inference mode, and does not count.
        return [] if value.is_inference() else [(value, value._version)]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [each for part in parts for each in _versions(part)]


def _written(versions: Sequence[tuple[Tensor, int]]) -> bool:
    return any(value._version != version for value, version in versions)


def _replayable(value: Any, computed: set[int]) -> bool:
    """Nothing a block computed, and nothing that might remember the previous run (a key/value cache)."""
    if isinstance(value, Tensor):
        return id(value) not in computed
    if isinstance(value, tuple | list):
        return all(_replayable(part, computed) for part in value)
    if isinstance(value, Mapping):
        return all(_replayable(part, computed) for part in value.values())
    return isinstance(value, _PLAIN)


def _agree(left: Any, right: Any, tensors_agree: Callable[[Tensor, Tensor], bool]) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and tensors_agree(left, right)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(
            _agree(one, other, tensors_agree) for one, other in zip(left, right, strict=True)
        )
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_agree(left[key], right[key], tensors_agree) for key in left)
    return bool(left == right)
