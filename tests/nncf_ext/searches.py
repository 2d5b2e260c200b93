"""An elastic network of nothing, what its points are worth, and fronts by the definition."""

from dataclasses import dataclass, field

from nncf_ext import Objective, SearchSpace


@dataclass
class Network:
    """An elastic network of nothing; notes what was activated."""

    space: SearchSpace
    active: dict[str, int] = field(init=False)
    activated: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.active = self.space.minimal()

    def activate(self, point) -> None:
        self.active = self.space.check(point)
        self.activated.append(self.active)


def network(dimensions: int = 5, sizes: tuple[int, ...] = (32, 24, 16)) -> Network:
    return Network(SearchSpace({f"d{number}": sizes for number in range(dimensions)}))


def accuracy(point: dict[str, int]) -> float:
    """More is better, with returns that diminish differently by dimension, and an interaction."""
    gains = [(number + 1) * (1 - 8 / size) for number, size in enumerate(point.values())]
    return sum(gains) - 0.4 * (point["d0"] == point["d1"])


def cost(point: dict[str, int]) -> float:
    return float(sum(point.values()))


ACCURACY, COST = Objective("accuracy", accuracy), Objective("cost", cost, maximize=False)


def pairs(space: SearchSpace) -> dict[tuple[int, ...], tuple[float, float]]:
    return {tuple(point.values()): (accuracy(point), cost(point)) for point in space.enumerate()}


def brute_front(values: dict) -> set:
    """Keys that nothing beats, by the definition."""
    return {
        key
        for key, (gain, price) in values.items()
        if not any((g >= gain and p <= price) and (g > gain or p < price) for g, p in values.values())
    }


def hypervolume(values, worst: tuple[float, float]) -> float:
    """Area between a front and the worst point."""
    area, reached = 0.0, worst[0]
    for gain, price in sorted(values, key=lambda pair: pair[1]):
        if gain > reached:
            area += (gain - reached) * (worst[1] - price)
            reached = gain
    return area


def keys(evaluations) -> list[tuple[int, ...]]:
    return [tuple(evaluation.point.values()) for evaluation in evaluations]
