"""Which of some points does no other beat, how good is a front? Losses here: less is better in every column."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CANDIDATES = 200
"""Points of a front that are compared by what they gain."""


def unbeaten(losses: Floats) -> NDArray[np.bool_]:
    """
    :param losses: ``[points, objectives]``.
    :return: ``[points]``: whether no other point is at least as good in everything and better in something. Equal
        points do not beat each other.
    """
    # Whoever has the smallest sum of the points left is beaten by none of them; each pass drops what it beats.
    order = np.argsort(losses.sum(axis=1), kind="stable")
    left, best = losses[order], 0
    while best < len(left):
        one = left[best]
        stays = ~((left >= one).all(axis=1) & (left > one).any(axis=1))
        best = int(stays[:best].sum()) + 1
        order, left = order[stays], left[stays]
    mask = np.zeros(len(losses), dtype=bool)
    mask[order] = True
    return mask


def ranks(losses: Floats, violations: Floats, enough: int) -> NDArray[np.int64]:
    """
    Non-dominated sorting: 0 for the front, 1 for the front of what is left, and so on. Points that violate constraints
    come after all others, in the order of their violation (Deb's constrained domination).

    :param losses: ``[points, objectives]``.
    :param violations: ``[points]``, 0 where a point keeps all constraints.
    :param enough: After so many points the fronts are not told apart any more: the rest has one common rank.
    :return: ``[points]``.
    """
    found = np.zeros(len(losses), dtype=np.int64)
    left, rank = np.flatnonzero(violations <= 0), 0
    sorted_points = 0
    while len(left):
        front = unbeaten(losses[left]) if sorted_points < enough else np.ones(len(left), dtype=bool)
        found[left[front]] = rank
        sorted_points += int(front.sum())
        left, rank = left[~front], rank + 1
    late = violations > 0
    found[late] = rank + np.unique(violations[late], return_inverse=True)[1]
    return found


def crowding(losses: Floats, rank: NDArray[np.int64]) -> Floats:
    """
    :param losses: ``[points, objectives]``.
    :param rank: ``[points]``, from :func:`ranks`.
    :return: ``[points]``: how far the neighbours in the same front are, as a share of the front's extent, summed over
        objectives; infinite at its ends. Source: NSGA-II (Deb et al., 2002), section III-B.
    """
    distance = np.zeros(len(losses))
    for front in (np.flatnonzero(rank == each) for each in np.unique(rank)):
        for column in losses[front].T:
            order = np.argsort(column, kind="stable")
            extent = column[order[-1]] - column[order[0]]
            distance[front[order[[0, -1]]]] = np.inf
            if extent > 0:
                distance[front[order[1:-1]]] += (column[order[2:]] - column[order[:-2]]) / extent
    return distance


def best_first(losses: Floats, violations: Floats, enough: int) -> NDArray[np.int64]:
    """
    :param losses: ``[points, objectives]``.
    :param violations: ``[points]``.
    :param enough: How many of the first places matter.
    :return: Numbers of the points by rank, then by crowding; equal ones in their order.
    """
    rank = ranks(losses, violations, enough)
    return np.lexsort((-crowding(losses, rank), rank))


def by_gain(losses: Floats, measured: Floats, enough: int) -> NDArray[np.int64]:
    """
    :param losses: ``[points, objectives]`` of candidates; where nothing is to be gained, earlier ones come first.
    :param measured: ``[measured, objectives]``: what there is already.
    :param enough: How many places matter.
    :return: Numbers of the candidates. Each adds more hypervolume to what is measured and to those before it than any
        other would; what counts is better than the worst that was measured.
    """
    left, chosen = np.arange(len(losses)), np.zeros(0, np.int64)
    if not len(measured):
        return left
    reference, taken = measured.max(axis=0), measured[unbeaten(measured)]

    def gain(point: Floats) -> float:
        # Of its own box, what the others have already. Seen from the point, few of them remain on a front.
        if not (point < reference).all():
            return 0.0
        return float(np.prod(reference - point)) - hypervolume(np.maximum(taken, point), reference)

    while len(chosen) < enough and len(left):
        # One that another candidate beats gains no more than that other.
        front = left[unbeaten(losses[left])][:_CANDIDATES]
        gains = [gain(losses[each]) for each in front]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        chosen = np.append(chosen, front[best])
        taken, left = np.vstack([taken, losses[front[best]]]), left[left != front[best]]
    return np.concatenate([chosen, left])


def hypervolume(losses: Floats, reference: Floats) -> float:
    """
    :param losses: ``[points, objectives]``.
    :param reference: ``[objectives]``: the worst that counts; points that are not better in everything add nothing.
    :return: The volume of what at least one point beats and the reference does not.
    """
    inside = losses[(losses < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    front = inside[unbeaten(inside)]
    if losses.shape[1] == 1:
        return float(reference[0] - front.min())
    # Slices along the last objective: each is as thick as the way to the next point, and as large as all up to it.
    front = front[np.argsort(front[:, -1], kind="stable")]
    thickness = np.diff(np.append(front[:, -1], reference[-1]))
    areas = (hypervolume(front[: count + 1, :-1], reference[:-1]) for count in range(len(front)))
    return float(sum(area * thick for area, thick in zip(areas, thickness, strict=True) if thick > 0))


def exclusive(losses: Floats, reference: Floats) -> Floats:
    """
    :param losses: ``[points, objectives]``.
    :param reference: ``[objectives]``: the worst that counts.
    :return: ``[points]``: the hypervolume that the front would miss without each of its points, if none behind came
        after; 0 for one that another one beats or equals.
    """
    gains, places = np.zeros(len(losses)), np.flatnonzero(unbeaten(losses) & (losses < reference).all(axis=1))
    for place in places:
        point, others = losses[place], losses[places[places != place]]
        # Of its own box, what the others have not. Seen from the point, few of them remain on a front.
        gains[place] = np.prod(reference - point) - hypervolume(np.maximum(others, point), reference)
    return np.maximum(gains, 0.0)
