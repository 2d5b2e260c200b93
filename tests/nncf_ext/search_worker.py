"""
One process of several that search together: ``python -m tests.nncf_ext.search_worker STORAGE SAMPLER BUDGET LOG
SECONDS [STOP]`` writes its number and the point to LOG when it begins to measure one. At its STOP-th point it waits to
be killed.
"""

import os
import sys
import time
from pathlib import Path

from nncf_ext import Objective, search
from tests.nncf_ext.searches import COST, accuracy, keys, network


def main(storage: str, sampler: str, budget: str, log: str, seconds: str, stop: str = "0") -> None:
    count = 0

    def measure(point: dict[str, int]) -> float:
        nonlocal count
        count += 1
        with Path(log).open("a") as file:
            file.write(f"{[os.getpid(), *point.values()]}\n")
        time.sleep(1000 if count == int(stop) else float(seconds))
        return accuracy(point)

    report = search(
        network(), [Objective("accuracy", measure), COST], sampler=sampler, budget=int(budget), storage=storage
    )
    print(sorted(keys(report.evaluations)))


if __name__ == "__main__":
    main(*sys.argv[1:])
