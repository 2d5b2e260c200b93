"""
How many points does a search have to measure? Samplers on two spaces whose fronts are known: the sub-networks of a
small super-network on digits, and bits for the layers of a made-up chain. Points measured to 95 % of the hypervolume of
the exact front. ``python -m benchmarks.samplers --help``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from rich.console import Console
from rich.table import Table as Grid

from benchmarks import digits_space, precision_space
from benchmarks.options import positive
from nncf_ext import LinasSampler, NemoSampler, SearchSpace
from nncf_ext.exploration.fronts import hypervolume, unbeaten
from nncf_ext.exploration.samplers import OrderedNSGAIISampler

_OUT = Path(__file__).parent / "out"
Values = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """
    :param space: The points.
    :param values: Loss and cost of a point, less is better.
    :param front: ``[points, 2]``: those of the points that no other one beats.
    :param largest: The cost of the largest point.
    :param inactive: Parameters of a trial that make no difference; None where there are none.
    :param features: What is known of each parameter without measuring a point; None where that is nothing.
    """

    space: SearchSpace
    values: Callable[[Mapping[str, int]], Values]
    front: np.ndarray
    largest: float
    inactive: Callable[[dict[str, Any]], set[str]] | None = None
    features: dict[str, list[float]] | None = None

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What parameters of a trial can be: places in the lists of sizes."""
        return {name: IntDistribution(0, len(sizes) - 1) for name, sizes in self.space.dimensions.items()}

    @property
    def reference(self) -> np.ndarray:
        """The worst loss on the front, and the largest point."""
        return np.array([self.front[:, 0].max(), self.largest])

    def point(self, params: dict[str, Any]) -> dict[str, int]:
        """:return: The point whose places are the parameters of a trial."""
        return self.space.decode([params[name] for name in self.space.dimensions])


def digits(options: argparse.Namespace) -> Task:
    """:return: Loss and multiplications of sub-networks, all measured."""
    known = digits_space.table(options.table, options.steps)

    def values(point: Mapping[str, int]) -> Values:
        return known.loss(point), float(digits_space.macs(point))

    def skipped(params: dict[str, Any]) -> set[str]:
        # Inner widths of blocks that do not run; the depth of a stage is 2 or 1.
        return {f"stage{stage}.block1" for stage in range(digits_space.STAGES) if params[f"stage{stage}.depth"] == 1}

    every = np.array([values(point) for point in digits_space.distinct()])
    return Task(digits_space.SPACE, values, every[unbeaten(every)], every[:, 1].max(), skipped)


def precision(options: argparse.Namespace) -> Task:
    """:return: Error and bits of a made-up chain of layers."""
    workload = precision_space.Workload(options.layers, options.workload)
    front = workload.front()
    return Task(
        workload.space,
        lambda point: (workload.loss(point), float(workload.cost(point))),
        front,
        workload.cost(workload.space.maximal()),
        features=workload.features(),
    )


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {"digits": digits, "precision": precision}


def _small(seed: int, **settings: Any) -> LinasSampler:
    """LINAS as SearchSampler.LINAS means it."""
    return LinasSampler(5, first_round=10, resets=True, by_gain=True, smooth=True, seed=seed, **settings)


def _computed(task: Task) -> dict[int, Callable[[dict[str, Any]], float]]:
    """The cost, which needs no predictor."""
    return {1: lambda params: task.values(task.point(params))[1]}


SAMPLERS: dict[str, Callable[[Task, int, int], BaseSampler]] = {
    "random": lambda task, population, seed: RandomSampler(seed=seed),
    "TPE": lambda task, population, seed: TPESampler(seed=seed),
    "NSGA-II": lambda task, population, seed: OrderedNSGAIISampler(population_size=population, seed=seed),
    "NSGA-II of search()": lambda task, population, seed: OrderedNSGAIISampler(population_size=20, seed=seed),
    "LINAS": lambda task, population, seed: LinasSampler(population, seed=seed),
    "LINAS, resets": lambda task, population, seed: LinasSampler(population, resets=True, seed=seed),
    "LINAS, inactive": lambda task, population, seed: LinasSampler(population, inactive=task.inactive, seed=seed),
    "LINAS, exact cost": lambda task, population, seed: LinasSampler(population, exact=_computed(task), seed=seed),
    "LINAS, small rounds": lambda task, population, seed: LinasSampler(5, first_round=10, resets=True, seed=seed),
    "LINAS, by gain": lambda task, population, seed: LinasSampler(
        5, first_round=10, resets=True, by_gain=True, seed=seed
    ),
    "LINAS of search()": lambda task, population, seed: _small(seed),
    "LINAS of search(), exact cost": lambda task, population, seed: _small(seed, exact=_computed(task)),
    "LINAS, all three": lambda task, population, seed: LinasSampler(
        population, resets=True, inactive=task.inactive, exact=_computed(task), seed=seed
    ),
    "NEMO": lambda task, population, seed: NemoSampler(inactive=task.inactive, seed=seed),
    "NEMO, features": lambda task, population, seed: NemoSampler(features=task.features, seed=seed),
    "NEMO, direct only": lambda task, population, seed: NemoSampler(species=("direct",), seed=seed),
    "NEMO, no graph": lambda task, population, seed: NemoSampler(species=("direct", "boltzmann"), seed=seed),
    "NEMO, graph only": lambda task, population, seed: NemoSampler(species=("graph",), seed=seed),
}


def evaluations(sampler: BaseSampler, task: Task, limit: int, levels: int = 0) -> Iterator[tuple[int, float]]:
    """
    :param sampler: What chooses points.
    :param task: Where.
    :param limit: Number of points.
    :param levels: Number of points to begin with that stand at one place in all lists, from the largest on.
    :return: After each point that was not measured before: how many there are, and the hypervolume of all.
    """
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    distributions, reference = task.distributions, task.reference
    for level in range(levels):
        study.enqueue_trial({name: min(level, len(sizes) - 1) for name, sizes in task.space.dimensions.items()})
    found: dict[tuple[int, ...], Values] = {}
    for _ in range(20 * limit):  # NSGA-II and TPE repeat themselves; that costs them nothing
        trial = study.ask(distributions)
        point = task.point(trial.params)
        values = task.values(point)
        study.tell(trial, values)
        key = task.space.encode(point)
        if key not in found:
            found[key] = values
            yield len(found), hypervolume(np.array([*found.values()], dtype=np.float64), reference)
        if len(found) >= limit:
            return


@dataclass(frozen=True)
class Outcome:
    """
    :param count: Points measured when the hypervolume is as wanted; infinite if it is not by the limit.
    :param share: Of the hypervolume of the exact front, at the end: there, or at the limit.
    """

    count: float
    share: float


def outcome(sampler: BaseSampler, task: Task, wanted: float, limit: int, levels: int = 0) -> Outcome:
    """:return: What a search comes to that stops at a share of the exact hypervolume."""
    best = hypervolume(task.front, task.reference)
    share = 0.0
    for count, volume in evaluations(sampler, task, limit, levels):
        share = volume / best
        if share >= wanted:
            return Outcome(count, share)
    return Outcome(math.inf, share)


def main(arguments: list[str] | None = None) -> None:
    """Compare, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--space", choices=list(TASKS), default="digits")
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=["NSGA-II", "LINAS"])
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--population", type=positive, default=50)
    parser.add_argument("--limit", type=positive, default=1500, help="points after which a search gives up")
    parser.add_argument("--share", type=float, default=0.95, help="of the hypervolume of the exact front")
    parser.add_argument("--levels", type=int, default=0, help="points to begin with: all sizes largest, second ...")
    parser.add_argument("--steps", type=positive, default=800, help="of training of the super-network")
    parser.add_argument("--table", type=Path, default=_OUT / "digits_space.npy", help="keeps the values of all points")
    parser.add_argument("--layers", type=positive, default=12, help="of the made-up chain, a multiple of 3")
    parser.add_argument("--workload", type=int, default=1, help="seed of the made-up chain")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = TASKS[options.space](options)
    rows: dict[str, list[Outcome]] = {}
    console = Console()
    for name in options.samplers:
        rows[name] = []
        for seed in range(options.seeds):
            sampler = SAMPLERS[name](task, options.population, seed)
            rows[name].append(outcome(sampler, task, options.share, options.limit, options.levels))
            console.print(f"{name}, seed {seed}: {rows[name][-1].count:g} ({rows[name][-1].share:.1%})")
    grid = Grid(title=f"Points measured until {options.share:.0%} of the hypervolume of the exact front", width=110)
    for column in ("sampler", "median", "of each seed", "mean share at the end", "NSGA-II / this"):
        grid.add_column(column)
    base = median(each.count for each in rows.get("NSGA-II", [Outcome(math.nan, math.nan)]))
    for name, found in rows.items():
        middle = median(each.count for each in found)
        grid.add_row(name, f"{middle:g}", ", ".join(f"{each.count:g}" for each in found),
                     f"{fmean(each.share for each in found):.1%}", f"{base / middle:.1f}")  # fmt: skip
    grid.caption = (
        f"{task.space.size:,} points, {len(task.front)} on the front; inf: not within {options.limit}; "
        f"{platform.processor()}"
    )
    console.print(grid)
    if options.json:
        found_counts = {name: [str(each.count) for each in found] for name, found in rows.items()}
        options.json.write_text(json.dumps(found_counts))


if __name__ == "__main__":
    main()
