"""
Which blocks can be left out? Modules that give what they were given, in shape, type and labels, with one way in and one
way out, one after the other.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nncf_ext.structure.tracing.run import Call, Run

_LEAST_WEIGHTS = 2
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Chain:
    """
    Blocks of which each takes the output of the one before.

    :param name: What holds them, or the first of them where it holds several chains.
    :param blocks: Their paths, in the order in which they run.
    :param outputs: What each gives: 0 for a tensor, 1 for a tuple of one.
    :param same_widths: Whether widths at both ends of the blocks are the same ones, so that a block can be left out
        whatever the widths are.
    """

    name: str
    blocks: tuple[str, ...]
    outputs: int
    same_widths: bool


def chains_of(run: Run) -> tuple[Chain, ...]:
    """
    :param run: One forward of a model.
    :return: Chains that do not overlap, those with the most blocks first chosen, in the order in which they run.
    """
    once: dict[str, list[Call]] = {}
    for call in run.calls:
        once.setdefault(call.path, []).append(call)
    roots, _ = run.labels.classes()
    births = np.array([birth for birth, _ in run.uses], np.int64)
    moments = np.array([at for _, at in run.uses], np.int64)
    blocks = [
        call for (call, *more) in once.values() if not more and call.path and _is_block(run, call, births, moments)
    ]
    blocks.sort(key=lambda call: (call.start, -call.end))
    found: list[list[Call]] = []
    for first in blocks:
        # Every chain that begins here, and is not a part of a longer one of blocks that stand side by side.
        if any(_follows(first, other) and _parent(other) == _parent(first) for other in blocks):
            continue
        chain = [first]
        while True:
            following = (each for each in blocks if _follows(each, chain[-1]) and _parent(each) == _parent(first))
            if (after := next(following, None)) is None:
                break
            chain.append(after)
        found.append(chain)
    found.sort(key=len, reverse=True)
    taken: list[list[Call]] = []
    for chain in found:
        start, end = chain[0].start, chain[-1].end
        if all(end <= other[0].start or other[-1].end <= start for other in taken):
            taken.append(chain)
    taken.sort(key=lambda chain: chain[0].start)
    parents = [_parent(chain[0]) for chain in taken]
    return tuple(
        Chain(
            _parent(chain[0]) if parents.count(_parent(chain[0])) == 1 else chain[0].path,
            tuple(call.path for call in chain),
            chain[0].outputs,
            all(_same_widths(call, roots) for call in chain),
        )
        for chain in taken
    )


def _is_block(run: Run, call: Call, births: Numbers, moments: Numbers) -> bool:
    given, gave = call.given, call.gave
    weights = sum(path.startswith(f"{call.path}.") for path in dict.fromkeys(path for path, _ in run.products))
    if given is None or gave is None or call.outputs not in (0, 1) or weights < _LEAST_WEIGHTS:
        return False
    if (given.shape, given.dtype) != (gave.shape, gave.dtype) or not call.start < gave.birth <= call.end:
        return False
    inside = (births > call.start) & (births <= call.end) & (births != gave.birth)
    leaks = inside & (moments > call.end)
    # What is given must not go around the block: then the block would be a branch, and what joins it would count twice.
    around = (births == given.birth) & (moments > call.end)
    return not leaks.any() and not around.any()


def _follows(call: Call, before: Call) -> bool:
    assert call.given is not None and before.gave is not None
    return call.start >= before.end and call.given.birth == before.gave.birth and call.outputs == before.outputs


def _parent(call: Call) -> str:
    return call.path.rpartition(".")[0]


def _same_widths(call: Call, roots: Numbers) -> bool:
    assert call.given is not None and call.gave is not None
    for one, other in zip(call.given.axes, call.gave.axes, strict=True):
        first, second = (0 if axis is None else roots[axis] for axis in (one, other))
        if not np.all(first == second):
            return False
    return True
