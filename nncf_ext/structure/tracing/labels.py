"""
Which indices of which axes go together?

Every index along every axis of a tensor has a label, an integer. Two indices with the same label, or with labels that
were united, can only be removed together. Label 0 stands for what has a size of its own: batch, positions, constants.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Axis = NDArray[np.int64] | None
"""Labels along one axis, ``[length]``; None: all of them 0."""


def carried(axis: Axis) -> bool:
    """
    :param axis: Labels along one axis.
    :return: Whether anything along it could be removed.
    """
    return axis is not None and bool(axis.any())


class Labels:
    """Labels, which of them were united, and which must stay."""

    def __init__(self) -> None:
        self._count = 1
        self._pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._fixed: list[tuple[NDArray[np.int64], str]] = []

    def new(self, length: int) -> Axis:
        """
        :param length: Length of an axis.
        :return: A label of its own for each index; none for an axis of length 1, which cannot get smaller.
        """
        if length < 2:
            return None
        self._count += length
        return np.arange(self._count - length, self._count)

    def unite(self, axes: Sequence[Axis], reason: str) -> Axis:
        """
        Axes that must agree index by index.

        :param axes: Labels along axes of one length.
        :param reason: Why indices must stay that meet label 0.
        :return: Labels of the result: the first that are not all 0.
        """
        some = [axis for axis in axes if axis is not None and axis.any()]
        if not some:
            return None
        first = some[0]
        if len(some) < len(axes):
            self.fix(first, reason)
        for other in some[1:]:
            if other is first or np.array_equal(first, other):
                continue
            for one, two in ((first, other), (other, first)):
                if not two.all():
                    self.fix(one[two == 0], reason)
            both = (first != 0) & (other != 0)
            self._pairs.append((first[both], other[both]))
        return first

    def tie(self, rows: NDArray[np.int64]) -> None:
        """
        :param rows: Labels ``[groups, members]``; the members of a group go together from now on.
        """
        self._pairs.append((np.repeat(rows[:, :1], rows.shape[1] - 1, 1).ravel(), rows[:, 1:].ravel()))

    def fix(self, axis: Axis, reason: str) -> None:
        """
        :param axis: Labels that must stay.
        :param reason: Why; a sentence without its subject: "reaches an output of the model".
        """
        if axis is not None and axis.any():
            self._fixed.append((axis[axis != 0], reason))

    def classes(self) -> tuple[NDArray[np.int64], dict[int, str]]:
        """
        :return: For each label the smallest one it goes together with, ``[labels]``; and of those that must stay, by
            the smallest label, the first reason why.
        """
        roots = np.arange(self._count)
        ones = np.concatenate([np.zeros(0, np.int64), *(one for one, _ in self._pairs)])
        others = np.concatenate([np.zeros(0, np.int64), *(other for _, other in self._pairs)])
        while True:
            left, right = roots[ones], roots[others]
            least = np.minimum(left, right)
            before = roots.copy()
            np.minimum.at(roots, left, least)
            np.minimum.at(roots, right, least)
            while not np.array_equal(roots, roots[roots]):
                roots = roots[roots]
            if np.array_equal(before, roots):
                break
        reasons: dict[int, str] = {}
        for axis, reason in self._fixed:
            for root in np.unique(roots[axis]).tolist():
                reasons.setdefault(root, reason)
        return roots, reasons
