"""Which sub-networks are there? Named dimensions, each with a list of sizes."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Protocol

import nncf

Point = dict[str, int]
"""One sub-network: a size for every dimension of a space, in the space's order."""


class Elastic(Protocol):
    """What a search, a training or an extraction needs to know of an elastic network."""

    @property
    def space(self) -> "SearchSpace":
        """All points."""

    @property
    def active(self) -> Point:
        """The point that the network computes now."""

    def activate(self, point: Mapping[str, int]) -> None:
        """
        :param point: The point to compute from now on.
        """

    def extract(self, point: Mapping[str, int]) -> Any:
        """
        :param point: A point.
        :return: The network of that point alone, for real; this one is not changed.
        :raises nncf.ValidationError: It is not a point of the space.
        """


class SearchSpace:
    """
    Ordered named dimensions with a few sizes each; a point takes one of each.

    :param dimensions: Sizes by name, each list from the largest to the smallest, distinct; 0 where something can be
        left out as a whole.
    :param inactive: Names of the dimensions that make no difference at a point, such as widths of a block that the
        point skips. It may ask only dimensions that it does not name. A search measures points that differ in nothing
        else once. None: every dimension always makes a difference.
    :raises nncf.ValidationError: There is no dimension, or a list is empty, unsorted, or has what is no integer from 0.
    """

    def __init__(
        self,
        dimensions: Mapping[str, Sequence[int]],
        *,
        inactive: Callable[[Point], Collection[str]] | None = None,
    ) -> None:
        self._dimensions = {name: tuple(sizes) for name, sizes in dimensions.items()}
        self._inactive = inactive
        if not self._dimensions:
            msg = "A search space needs at least one dimension; got none."
            raise nncf.ValidationError(msg)
        for name, sizes in self._dimensions.items():
            sound = all(type(size) is int and size >= 0 for size in sizes)
            if not sizes or not sound or list(sizes) != sorted(set(sizes), reverse=True):
                msg = f"Sizes of {name} must be distinct integers from 0, largest first; got {list(sizes)}."
                raise nncf.ValidationError(msg)

    @property
    def dimensions(self) -> dict[str, tuple[int, ...]]:
        """Sizes by name, largest first."""
        return dict(self._dimensions)

    @property
    def inactive(self) -> Callable[[Point], Collection[str]] | None:
        """What names the dimensions that make no difference at a point; None where there are none."""
        return self._inactive

    @property
    def size(self) -> int:
        """The number of points, those included that differ only in inactive dimensions."""
        return math.prod(len(sizes) for sizes in self._dimensions.values())

    def maximal(self) -> Point:
        """
        :return: The largest size of every dimension.
        """
        return {name: sizes[0] for name, sizes in self._dimensions.items()}

    def minimal(self) -> Point:
        """
        :return: The smallest size of every dimension.
        """
        return {name: sizes[-1] for name, sizes in self._dimensions.items()}

    def heuristic(self) -> Point:
        """
        :return: The middle size of every dimension; of an even number of sizes, the larger one of the two in the
            middle. Source: Shears, arXiv 2404.10934.
        """
        return {name: sizes[(len(sizes) - 1) // 2] for name, sizes in self._dimensions.items()}

    def sample(self, random: Random) -> Point:
        """
        :param random: Source of randomness; one number is taken for every dimension.
        :return: A size drawn uniformly and independently for every dimension.
        """
        # Python keeps the sequence of random() across versions; it does not promise that of choice().
        return {name: sizes[int(random.random() * len(sizes))] for name, sizes in self._dimensions.items()}

    def draw(self, seed: int, step: int = 0) -> Point:
        """
        :param seed: Seed.
        :param step: Number of the draw.
        :return: A uniform point that depends on nothing else: the same in every process and after every restart.
        """
        return self.sample(Random(f"{seed} {step}"))

    def clip(self, point: Mapping[str, float]) -> Point:
        """
        :param point: A number for every dimension.
        :return: The nearest size of each; between two, the larger.
        :raises nncf.ValidationError: A dimension is missing or unknown.
        """
        self._check_names(point)
        # Lists begin with the largest size, so among equally near sizes the smallest place is the largest size.
        return {
            name: min((abs(size - point[name]), place, size) for place, size in enumerate(sizes))[2]
            for name, sizes in self._dimensions.items()
        }

    def check(self, point: Mapping[str, int]) -> Point:
        """
        :param point: A size for every dimension, in any order.
        :return: The same in the space's order.
        :raises nncf.ValidationError: A dimension is missing or unknown, or a size is not in its list.
        """
        self._check_names(point)
        for name, sizes in self._dimensions.items():
            if point[name] not in sizes:
                msg = f"Asked for {name} = {point[name]}; its sizes are {list(sizes)}."
                raise nncf.ValidationError(msg)
        return {name: int(point[name]) for name in self._dimensions}

    def canonical(self, point: Mapping[str, int]) -> Point:
        """
        :param point: A point.
        :return: The same network with the largest size of every inactive dimension: one point for all that differ in
            nothing else.
        :raises nncf.ValidationError: It is not a point of the space, or what names inactive dimensions names an unknown
            one or others at the returned point.
        """
        point = self.check(point)
        if self._inactive is None:
            return point
        silent = set(self._inactive(dict(point)))
        if unknown := sorted(silent - self._dimensions.keys()):
            msg = f"inactive names {unknown[:4]}; the {len(point)} dimensions are {list(point)[:8]}."
            raise nncf.ValidationError(msg)
        same = {name: self._dimensions[name][0] if name in silent else size for name, size in point.items()}
        if same != point and (after := set(self._inactive(dict(same)))) != silent:
            msg = (
                f"inactive names {sorted(silent)} at {point}, but {sorted(after)} at {same}, which differs in them "
                "alone. What is inactive may depend on active dimensions only."
            )
            raise nncf.ValidationError(msg)
        return same

    def encode(self, point: Mapping[str, int]) -> tuple[int, ...]:
        """
        :param point: A point.
        :return: For each dimension, in order, the place of its size in its list; 0 is the largest size.
        :raises nncf.ValidationError: It is not a point of this space.
        """
        point = self.check(point)
        return tuple(sizes.index(point[name]) for name, sizes in self._dimensions.items())

    def decode(self, places: Sequence[int]) -> Point:
        """
        :param places: As from :meth:`encode`.
        :return: The point.
        :raises nncf.ValidationError: There are too many or too few places, or one is outside its list.
        """
        lists = self._dimensions.items()
        fits = len(places) == len(lists)
        if not fits or any(not 0 <= at < len(sizes) for at, (_, sizes) in zip(places, lists, strict=True)):
            msg = f"Asked to decode {list(places)}; the dimensions have {[len(sizes) for _, sizes in lists]} sizes."
            raise nncf.ValidationError(msg)
        return {name: sizes[at] for at, (name, sizes) in zip(places, lists, strict=True)}

    def enumerate(self) -> Iterator[Point]:
        """
        :return: Every point; the last dimension changes fastest, sizes fall.
        """
        for sizes in itertools.product(*self._dimensions.values()):
            yield dict(zip(self._dimensions, sizes, strict=True))

    def to_dict(self) -> dict[str, list[int]]:
        """
        :return: Sizes by name, as lists: plain data.
        """
        return {name: list(sizes) for name, sizes in self._dimensions.items()}

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, SearchSpace) or self._inactive != other._inactive:
            return False
        return list(self._dimensions.items()) == list(other._dimensions.items())

    def __hash__(self) -> int:
        return hash(tuple(self._dimensions.items()))

    def __repr__(self) -> str:
        return f"SearchSpace({self._dimensions})"

    def _check_names(self, point: Mapping[str, Any]) -> None:
        missing = [name for name in self._dimensions if name not in point]
        unknown = [name for name in point if name not in self._dimensions]
        if missing or unknown:
            what = f"misses {missing[:4]}" if missing else f"has unknown dimensions {unknown[:4]}"
            msg = f"The point {what}. The {len(self._dimensions)} dimensions are {list(self._dimensions)[:8]}."
            raise nncf.ValidationError(msg)
