"""
The best point where losses and costs add up over dimensions: by integer programming, without a measurement.

What each size of each dimension loses and costs is measured alone, the rest of the network being full; sums of these
are then minimized exactly. What a search has to beat where sizes influence each other.
"""

from collections.abc import Mapping, Sequence

import nncf
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from nncf_ext.exploration.fronts import Floats, unbeaten
from nncf_ext.exploration.space import Point, SearchSpace

Table = Mapping[str, Sequence[float]]
"""For each dimension of a space, a number for each of its sizes, in their order."""


def best_additive(space: SearchSpace, losses: Table, costs: Table, budget: float) -> Point:
    """
    The multiple-choice knapsack problem: one size of each dimension, least sum of losses, sum of costs within a budget.

    :param space: The dimensions and their sizes. Inactive ones count as all others.
    :param losses: For each dimension, what each size loses, largest size first.
    :param costs: The same for what each size costs.
    :param budget: The largest sum of costs.
    :return: A point within the budget; no other one has a sum of losses that is smaller by more than a millionth of the
        largest difference within a dimension.
    :raises nncf.ValidationError: A dimension or a number is missing, one too many, or not finite; or no point keeps the
        budget: the message names the least cost.

    Source: Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations Research 1979; for bits of layers
    HAWQ-V3, arXiv 2011.10680, section 3.3.
    """
    lost, cost = _columns(space, losses, "losses"), _columns(space, costs, "costs")
    least = _total(cost, [int(np.argmin(column)) for column in cost])
    if not least <= budget:
        msg = f"Asked for a cost of at most {budget:g}; the least of all points is {least:g}."
        raise nncf.ValidationError(msg)
    return space.decode(_solve(lost, cost, budget))


def additive_front(space: SearchSpace, losses: Table, costs: Table, points: int = 20) -> list[Point]:
    """
    Points between the cheapest and the one that loses least.

    :param space: As in :func:`best_additive`.
    :param losses: The same.
    :param costs: The same.
    :param points: Number of budgets, evenly from the least cost to that of the least loss.
    :return: The best point of each budget, cheapest first; none that another one beats, and none twice.
    :raises nncf.ValidationError: As :func:`best_additive`, and where `points` is less than 1.
    """
    if points < 1:
        msg = f"points is a number of budgets, at least 1; got {points}."
        raise nncf.ValidationError(msg)
    lost, cost = _columns(space, losses, "losses"), _columns(space, costs, "costs")
    # Of equally cheap sizes that which loses least, and the other way round.
    cheapest = [int(np.lexsort(pair)[0]) for pair in zip(lost, cost, strict=True)]
    best = [int(np.lexsort(pair)[0]) for pair in zip(cost, lost, strict=True)]
    budgets = np.linspace(_total(cost, cheapest), _total(cost, best), points).tolist()
    found = [cheapest, *(_solve(lost, cost, budget) for budget in budgets[1:-1]), *([best] if points > 1 else [])]
    values, places = np.unique([[_total(cost, each), _total(lost, each)] for each in found], axis=0, return_index=True)
    return [space.decode(found[place]) for place in places[unbeaten(values)]]


def _columns(space: SearchSpace, table: Table, what: str) -> list[Floats]:
    """The numbers of each dimension."""
    if table.keys() != space.dimensions.keys():
        missing = [name for name in space.dimensions if name not in table]
        other = [name for name in table if name not in space.dimensions]
        count = len(space.dimensions)
        msg = f"{what} are for each of the {count} dimensions; missing: {missing[:4]}, unknown: {other[:4]}."
        raise nncf.ValidationError(msg)
    columns = [np.asarray(table[name], dtype=np.float64) for name in space.dimensions]
    for (name, sizes), column in zip(space.dimensions.items(), columns, strict=True):
        if column.shape != (len(sizes),) or not np.isfinite(column).all():
            msg = f"{what} of {name} are a finite number for each of its sizes {list(sizes)}; got {list(table[name])}."
            raise nncf.ValidationError(msg)
    return columns


def _total(columns: list[Floats], places: Sequence[int]) -> float:
    return sum(float(column[place]) for column, place in zip(columns, places, strict=True))


def _solve(lost: list[Floats], cost: list[Floats], budget: float) -> list[int]:
    """Places of the best sizes within a budget that some have."""
    dimension = np.repeat(np.arange(len(cost)), [len(column) for column in cost])
    one_each = csr_array(dimension[None] == np.arange(len(cost))[:, None], dtype=np.float64)
    # Tolerances of the solver are absolute, so numbers are brought to a scale of 1.
    gain, gain_scale = _from_zero(lost)
    price, price_scale = _from_zero(cost)
    room = (budget - sum(float(column.min()) for column in cost)) / price_scale
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(price[None] / price_scale, -np.inf, room)]
    while True:
        solved = milp(
            gain / gain_scale, integrality=1, bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0.0}
        )
        if solved.x is None:
            msg = f"The integer program has no solution: {solved.message}"
            raise nncf.InternalError(msg)
        chosen = solved.x > 0.5
        places = [int(np.argmax(chosen[dimension == number])) for number in range(len(cost))]
        if _total(cost, places) <= budget:
            return places
        # Within the tolerance of the solver, but not within the budget: this one point is cut off.
        constraints.append(LinearConstraint(chosen[None].astype(np.float64), -np.inf, len(cost) - 1))


def _from_zero(columns: list[Floats]) -> tuple[NDArray[np.float64], float]:
    """All numbers above the least of their dimension, and the largest of them; 1 where all are 0."""
    above = np.concatenate([column - column.min() for column in columns])
    return above, float(above.max()) or 1.0
