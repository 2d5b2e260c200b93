"""From labels to dimensions: classes of indices that look alike become the units of one dimension."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nncf_ext.structure.dimensions import Cut, Dimension, DimensionKind
from nncf_ext.structure.tracing.run import Run

_HEAD_COUNTS = re.compile(r"(n|num)_([a-z]+_)*heads?|heads|all_head_size|inner_dim")


@dataclass
class Group:
    """
    Labels that change together.

    :param name: The module that writes the units first.
    :param dimension: The dimension; None where there can be none.
    :param reason: Why not.
    :param roots: The smallest label of each unit, ``[units]``.
    :param written: Paths of the weights that write the units.
    """

    name: str
    dimension: Dimension | None
    reason: str
    roots: NDArray[np.int64]
    written: tuple[str, ...] = ()


def groups_of(model: nn.Module, run: Run) -> list[Group]:
    """
    :param model: The model.
    :param run: One forward of it.
    :return: What could change its size, in the order in which it is written first, and what cannot, with the reason.
    """
    roots, reasons = run.labels.classes()
    places: dict[int, list[tuple[str, int, NDArray[np.int64]]]] = {}
    for path, axes in run.tensors.items():
        for number, axis in enumerate(axes):
            if axis is None:
                continue
            order = np.argsort(roots[axis], kind="stable")
            owners = roots[axis][order]
            starts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
            for root, start, end in zip(owners[starts[:-1]].tolist(), starts[:-1], starts[1:], strict=True):
                places.setdefault(root, []).append((path, number, order[start:end]))
    writers: dict[int, list[str]] = {}
    for path, axis in run.written:
        for root in dict.fromkeys(roots[axis[axis != 0]].tolist()) if axis is not None else ():
            writers.setdefault(root, []).append(path)
    written_axes = _written_axes(run)
    families: dict[tuple[object, ...], list[int]] = {}
    for root, paths in writers.items():
        look = tuple((path, number, len(indices)) for path, number, indices in places.get(root, ()))
        if look:
            families.setdefault((reasons.get(root), paths[0], *look), []).append(root)
    found, names = [], set()
    for (reason, first, *_), units in families.items():
        name = name_of(str(first))
        if name in names:
            name = next(f"{name}.{count}" for count in range(1, len(families) + 1) if f"{name}.{count}" not in names)
        names.add(name)
        units.sort(key=lambda root: places[root][0][2][0])
        written = tuple(dict.fromkeys(writers[units[0]]))
        if reason is not None:
            found.append(Group(name, None, str(reason), np.array(units), written))
        else:
            found.append(_group(model, run, name, units, places, roots, written, written_axes))
    return found


def name_of(path: str) -> str:
    """:return: The module of a weight; of a parameter with a name of its own, the parameter."""
    return path.removesuffix(".weight")


def _group(
    model: nn.Module,
    run: Run,
    name: str,
    units: Sequence[int],
    places: dict[int, list[tuple[str, int, NDArray[np.int64]]]],
    roots: NDArray[np.int64],
    written: tuple[str, ...],
    written_axes: set[tuple[str, int]],
) -> Group:
    array = np.array(units)
    if len(units) < 2:
        return Group(name, None, "all of it goes together: there is one unit", array, written)
    cuts = []
    for at, (path, number, _) in enumerate(places[units[0]]):
        segments = _segments(np.stack([places[root][at][2] for root in units]))
        if segments is None:
            return Group(name, None, f"its units stand in no regular order in {path}", array, written)
        cuts.append(Cut(path, number, segments))
    # Those that write into the units stand before those that read them.
    cuts.sort(key=lambda cut: cut.axis > 0 and (cut.tensor, cut.axis) not in written_axes)
    granularity = next((cut.indices_per_unit for cut in cuts if cut.tensor == written[0]), 1)
    numbers = _numbers(model, run, roots, array)
    unit = "A unit is one channel" if granularity == 1 else f"A unit is {granularity} channels that go together"
    dimension = Dimension(
        name,
        DimensionKind.WIDTH,
        len(units),
        granularity=granularity,
        cuts=tuple(cuts),
        unit=unit,
        numbers=numbers,
    )
    return Group(name, dimension, "", array, written)


def _written_axes(run: Run) -> set[tuple[str, int]]:
    """Which axis of each weight is the one that a product gives."""
    found = set()
    for path, gives in run.written:
        for number, axis in enumerate(run.tensors[path]):
            if axis is not None and gives is not None and len(gives) <= len(axis) and np.isin(gives, axis).all():
                found.add((path, number))
    return found


def _segments(indices: NDArray[np.int64]) -> tuple[tuple[int, int], ...] | None:
    """
    :param indices: The indices of each unit, ascending, ``[units, indices]``.
    :return: The segments of a :class:`Cut` that say the same; None where there are none.
    """
    found, column = [], 0
    while column < indices.shape[1]:
        size = int(indices[1, column] - indices[0, column])
        offset = int(indices[0, column])
        own = indices[:, column : column + size]
        whole = offset + np.arange(len(indices))[:, None] * size + np.arange(max(size, 0))
        if size < 1 or own.shape != whole.shape or (own != whole).any():
            return None
        found.append((offset, size))
        column += size
    return tuple(found)


def _numbers(model: nn.Module, run: Run, roots: NDArray[np.int64], units: NDArray[np.int64]) -> dict[str, int]:
    """Head counts of the modules that reshape the units: how many of them one unit is."""
    found: dict[str, int] = {}
    own = np.zeros(len(roots), bool)
    own[units] = True
    for path, axis, shape in run.reshaped:
        if axis is None or not own[roots[axis]].any():
            continue
        for name, value in vars(model.get_submodule(path)).items():
            if type(value) is int and value in shape and value % len(units) == 0 and _HEAD_COUNTS.fullmatch(name):
                found[f"{path}.{name}" if path else name] = value // len(units)
    return found
