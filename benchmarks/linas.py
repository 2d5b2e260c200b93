"""
How many sub-networks does a search have to measure? LINAS, Optuna's NSGA-II and others on the digits super-network, all
of whose points are known: evaluations to 95 % of the hypervolume of the exhaustive front.
``python -m benchmarks.linas --help``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from rich.console import Console
from rich.table import Table as Grid

from benchmarks.digits_space import SPACE, STAGES, Table, distinct, macs, table
from benchmarks.options import positive
from nncf_ext import LinasSampler
from nncf_ext.exploration.fronts import hypervolume, unbeaten
from nncf_ext.exploration.samplers import OrderedNSGAIISampler

_OUT = Path(__file__).parent / "out"
_DISTRIBUTIONS: dict[str, BaseDistribution] = {
    name: IntDistribution(0, len(sizes) - 1) for name, sizes in SPACE.dimensions.items()
}


def point_of(params: dict[str, Any]) -> dict[str, int]:
    """:return: The point whose places are the parameters of a trial."""
    return {name: sizes[params[name]] for name, sizes in SPACE.dimensions.items()}


def skipped(params: dict[str, Any]) -> set[str]:
    """:return: Parameters that make no difference: inner widths of blocks that do not run."""
    point = point_of(params)
    return {f"stage{stage}.block1" for stage in range(STAGES) if point[f"stage{stage}.depth"] == 1}


SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {
    "random": lambda population, seed: RandomSampler(seed=seed),
    "TPE": lambda population, seed: TPESampler(seed=seed),
    "NSGA-II": lambda population, seed: OrderedNSGAIISampler(population_size=population, seed=seed),
    "LINAS": lambda population, seed: LinasSampler(population, seed=seed),
    "LINAS, resets": lambda population, seed: LinasSampler(population, resets=True, seed=seed),
    "LINAS, inactive": lambda population, seed: LinasSampler(population, inactive=skipped, seed=seed),
    "LINAS, exact MACs": lambda population, seed: LinasSampler(
        population, exact={1: lambda params: macs(point_of(params))}, seed=seed
    ),
    "LINAS, small rounds": lambda population, seed: LinasSampler(5, first_round=10, resets=True, seed=seed),
    "LINAS, by gain": lambda population, seed: LinasSampler(5, first_round=10, resets=True, by_gain=True, seed=seed),
    "LINAS of search()": lambda population, seed: LinasSampler(
        5, first_round=10, resets=True, by_gain=True, smooth=True, seed=seed
    ),
    "LINAS of search(), exact MACs": lambda population, seed: LinasSampler(
        5,
        first_round=10,
        resets=True,
        by_gain=True,
        smooth=True,
        exact={1: lambda params: macs(point_of(params))},
        seed=seed,
    ),
    "LINAS, all three": lambda population, seed: LinasSampler(
        population, resets=True, inactive=skipped, exact={1: lambda params: macs(point_of(params))}, seed=seed
    ),
}


def evaluations(sampler: BaseSampler, known: Table, reference: np.ndarray, limit: int) -> Iterator[tuple[int, float]]:
    """:return: After each point that was not measured before: how many there are, and the hypervolume of all."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    found: dict[tuple[int, ...], tuple[float, int]] = {}
    for _ in range(20 * limit):  # NSGA-II and TPE repeat themselves; that costs them nothing
        trial = study.ask(_DISTRIBUTIONS)
        point = point_of(trial.params)
        values = known.loss(point), macs(point)
        study.tell(trial, values)
        key = SPACE.encode(point)
        if key not in found:
            found[key] = values
            yield len(found), hypervolume(np.array([*found.values()], dtype=np.float64), reference)
        if len(found) >= limit:
            return


def first(sampler: BaseSampler, known: Table, reference: np.ndarray, wanted: float, limit: int) -> float:
    """:return: The number of points measured when the hypervolume is `wanted`; infinite if it is not by the limit."""
    reached = evaluations(sampler, known, reference, limit)
    return next((count for count, volume in reached if volume >= wanted), math.inf)


def main(arguments: list[str] | None = None) -> None:
    """Compare, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=["NSGA-II", "LINAS"])
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--population", type=positive, default=50)
    parser.add_argument("--limit", type=positive, default=1500, help="points after which a search gives up")
    parser.add_argument("--share", type=float, default=0.95, help="of the hypervolume of the exhaustive front")
    parser.add_argument("--steps", type=positive, default=800, help="of training of the super-network")
    parser.add_argument("--table", type=Path, default=_OUT / "digits_space.npy", help="keeps the values of all points")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = table(options.table, options.steps)
    every = np.array([(known.loss(point), macs(point)) for point in distinct()], dtype=np.float64)
    front = every[unbeaten(every)]
    # The worst loss on the front, and the largest network.
    reference = np.array([front[:, 0].max(), every[:, 1].max()])
    wanted = options.share * hypervolume(front, reference)
    rows: dict[str, list[float]] = {}
    console = Console()
    for name in options.samplers:
        rows[name] = []
        for seed in range(options.seeds):
            sampler = SAMPLERS[name](options.population, seed)
            rows[name].append(first(sampler, known, reference, wanted, options.limit))
            console.print(f"{name}, seed {seed}: {rows[name][-1]:g}")
    grid = Grid(title=f"Points measured until {options.share:.0%} of the exhaustive hypervolume", width=100)
    for column in ("sampler", "median", "of each seed", "NSGA-II / this"):
        grid.add_column(column)
    base = median(rows.get("NSGA-II", [math.nan]))
    for name, counts in rows.items():
        grid.add_row(name, f"{median(counts):g}", ", ".join(f"{count:g}" for count in counts),
                     f"{base / median(counts):.1f}")  # fmt: skip
    grid.caption = (
        f"{len(every)} sub-networks, {len(front)} on the front; inf: not within {options.limit}; {platform.processor()}"
    )
    console.print(grid)
    if options.json:
        options.json.write_text(json.dumps({name: [str(each) for each in counts] for name, counts in rows.items()}))


if __name__ == "__main__":
    main()
