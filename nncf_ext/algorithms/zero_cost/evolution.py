"""
Genetic programming of proxies: programs are judged by how well they rank networks whose accuracy is known, by the worst
of several tasks, so that a program which fits one of them alone does not live.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nncf
import torch
from scipy.stats import kendalltau

from nncf_ext.algorithms.zero_cost.parameters import AdvancedEznasParameters
from nncf_ext.algorithms.zero_cost.primitives import PRIMITIVES
from nncf_ext.algorithms.zero_cost.programs import Program
from nncf_ext.algorithms.zero_cost.statistics import STATISTICS, check_statistics, read_statistics
from nncf_ext.progress import Progress

INVALID = -2.0
"""Fitness of a program that is invalid for a network; below all values of Kendall's tau."""

_DRAWS = 1000
_LONGEST = 300  # names of a program


@dataclass(frozen=True)
class ProxyTask:
    """
    Networks of one space on one data set.

    :param name: Its name.
    :param statistics: A file for each network, from :meth:`nncf_ext.StatisticsCache.add`.
    :param accuracies: What each network reached.
    :raises nncf.ValidationError: There are not as many of both, or fewer than three; accuracies are all equal, or one
        is not finite.
    """

    name: str
    statistics: Sequence[Path]
    accuracies: Sequence[float]

    def __post_init__(self) -> None:
        count = len(self.statistics)
        finite = all(math.isfinite(each) for each in self.accuracies)
        if len(self.accuracies) != count or count < 3 or len({*self.accuracies}) < 2 or not finite:
            msg = (
                f"A task needs statistics and finite accuracies of at least three networks that differ; {self.name} "
                f"has {count} and {len(self.accuracies)}, {len({*self.accuracies})} different ones."
            )
            raise nncf.ValidationError(msg)


@dataclass(frozen=True)
class EvolvedProxy:
    """
    :param program: The program: ``nncf_ext.Proxy(evolved.program, images)``.
    :param fitness: The worst of the tasks' values of tau, over all networks.
    :param taus: Kendall's tau of each task.
    """

    program: str
    fitness: float
    taus: Mapping[str, float]


def evolve_proxy(
    tasks: Sequence[ProxyTask],
    *,
    seed: int = 0,
    workers: int = 1,
    advanced_parameters: AdvancedEznasParameters | None = None,
) -> list[EvolvedProxy]:
    """
    Looks for programs that rank networks as their accuracies do.

    The fitness of a program is the least of Kendall's tau over tasks. Each round judges by some of the tasks and some
    of their networks; parents are judged anew, so that nothing lives by luck. The best of all rounds are judged by all
    networks at the end. At any time the statistics of one network for each worker are in memory.

    :param tasks: What programs are judged by.
    :param seed: Of all draws. The result does not depend on the number of workers, unless time limits strike.
    :param workers: Processes. With several, a script that calls this does so under ``if __name__ == "__main__"``.
    :param advanced_parameters: Sizes and chances.
    :return: The best programs of all rounds that are valid for all networks, the best first; there may be none.
    :raises nncf.ValidationError: There are no tasks, two have one name, or a file of statistics is damaged.
    :raises ModuleNotFoundError: DEAP is not installed (extra ``search``).
    Source: EZNAS, arXiv 2209.07413, sections 3 and 4.
    """
    parameters = AdvancedEznasParameters() if advanced_parameters is None else advanced_parameters
    if not tasks or len({each.name for each in tasks}) < len(tasks) or workers < 1:
        msg = f"Programs are judged by tasks with names of their own, with at least one worker; got {len(tasks)} tasks."
        raise nncf.ValidationError(msg)
    for file in dict.fromkeys(file for task in tasks for file in task.statistics):
        check_statistics(file)
    with _own_random(seed) as draw, _pool(workers) as pool, Progress() as progress:
        breeding = _Breeding(parameters)
        judge = _Judge(tasks, parameters.seconds, pool)
        bar = progress.add_task("Evolving", total=parameters.generations)
        best: dict[str, float] = {}
        parents: list[Any] = []
        for _ in range(parameters.generations):
            sample = _sample(tasks, parameters, draw)
            texts = {str(each): each for each in (*parents, *breeding.children(parents, parameters))}
            taus = judge(list(texts), sample)
            fitness = {text: min(taus[text].values()) for text in texts}
            ranked = sorted(texts, key=lambda text: (-fitness[text], len(text), text))
            valid = [text for text in ranked if fitness[text] > INVALID]
            parents = [breeding.valued(texts[text], fitness[text]) for text in valid[: parameters.parents]]
            # Rounds judge by other networks: of a program that lives on, the last value counts.
            best |= {text: fitness[text] for text in valid[: parameters.hall]}
            progress.update(bar, advance=1, description=f"Evolving; best tau {fitness[ranked[0]]:.3f}")
        hall = sorted(best, key=lambda text: (-best[text], len(text), text))[: 4 * parameters.hall]
        final = judge(hall, [range(len(task.accuracies)) for task in tasks])
    found = [EvolvedProxy(text, min(final[text].values()), final[text]) for text in hall]
    found = [each for each in found if each.fitness > INVALID]
    return sorted(found, key=lambda each: (-each.fitness, len(each.program)))[: parameters.hall]


class _Breeding:
    """Programs as trees of DEAP: new ones, and children of old ones."""

    def __init__(self, parameters: AdvancedEznasParameters) -> None:
        from deap import base, gp, tools

        self._gp, self._tools, self._parameters = gp, tools, parameters
        self._set = gp.PrimitiveSetTyped("proxy", [torch.Tensor] * len(STATISTICS), torch.Tensor)
        self._set.renameArguments(**{f"ARG{place}": name for place, name in enumerate(STATISTICS)})
        for name, (count, function) in PRIMITIVES.items():
            self._set.addPrimitive(function, [torch.Tensor] * count, torch.Tensor, name=name)

        class Fitness(base.Fitness):
            weights = (1.0,)

        self._fitness = Fitness

    def new(self) -> Any:
        smallest, deepest = self._parameters.smallest, self._parameters.deepest
        while True:
            # Half of them grow to one depth in all branches: of the deepest, nobody would see the end.
            tree = self._gp.genHalfAndHalf(self._set, smallest, min(deepest, max(smallest, 6)))
            if len(tree) <= _LONGEST:
                return self.valued(self._gp.PrimitiveTree(tree), INVALID)

    def valued(self, tree: Any, fitness: float) -> Any:
        tree.fitness = self._fitness()
        tree.fitness.values = (fitness,)
        return tree

    def children(self, parents: list[Any], parameters: AdvancedEznasParameters) -> list[Any]:
        """As many as asked for, all different: half of them from parents, where there are some."""
        found: dict[str, Any] = {}
        half = parameters.children // 2 if parents else 0
        for _ in range(_DRAWS):
            if len(found) >= half:
                break
            child = self._child(parents, parameters)
            found.setdefault(str(child), child)
        for _ in range(_DRAWS):
            if len(found) >= parameters.children:
                break
            tree = self.new()
            found.setdefault(str(tree), tree)
        return list(found.values())

    def _child(self, parents: list[Any], parameters: AdvancedEznasParameters) -> Any:
        def parent() -> Any:
            (chosen,) = self._tools.selTournament(parents, 1, min(parameters.tournament, len(parents)))
            return self._gp.PrimitiveTree(chosen)

        kind, one = random.random(), parent()
        before = self._gp.PrimitiveTree(one)  # DEAP changes trees in place
        if kind < parameters.crossover:
            child, _ = self._gp.cxOnePoint(one, parent())
        elif kind < parameters.crossover + parameters.mutation:
            (child,) = self._gp.mutUniform(one, lambda pset, type_: self._gp.genFull(pset, 0, 2, type_), self._set)
        else:
            child = one
        fits = child.height <= parameters.deepest and len(child) <= _LONGEST
        return self.valued(child if fits else before, INVALID)


class _Judge:
    """Kendall's tau of programs, network after network."""

    def __init__(self, tasks: Sequence[ProxyTask], seconds: float, pool: Executor | None) -> None:
        self._tasks, self._seconds = tasks, seconds
        self._map: Callable[..., Iterable[Any]] = map if pool is None else pool.map

    def __call__(self, programs: list[str], sample: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
        """
        :param programs: The programs.
        :param sample: For each task the places of the networks to judge by; empty: not by this task.
        :return: By program and task.
        """
        jobs = [
            (str(task.statistics[place]), programs, self._seconds)
            for task, places in zip(self._tasks, sample, strict=True)
            for place in places
        ]
        rows = iter(self._map(_scores, jobs))
        found: dict[str, dict[str, float]] = {program: {} for program in programs}
        for task, places in zip(self._tasks, sample, strict=True):
            if not places:
                continue
            accuracies = [task.accuracies[place] for place in places]
            scores = [next(rows) for _ in places]
            for program, own in zip(programs, zip(*scores, strict=True), strict=True):
                found[program][task.name] = _tau(own, accuracies)
        return found


def _scores(job: tuple[str, list[str], float]) -> list[float | None]:
    file, programs, seconds = job
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums have one order then, in whatever process
    try:
        layers = list(read_statistics(file))
        return [Program(each).score(layers, seconds) for each in programs]
    finally:
        torch.set_num_threads(before)


def _tau(scores: Sequence[float | None], accuracies: Sequence[float]) -> float:
    if any(each is None for each in scores):
        return INVALID
    tau = float(kendalltau(scores, accuracies).statistic)
    return -1.0 if tau != tau else tau  # all scores are equal


def _sample(tasks: Sequence[ProxyTask], parameters: AdvancedEznasParameters, draw: random.Random) -> list[list[int]]:
    chosen = {*draw.sample(range(len(tasks)), min(parameters.tasks, len(tasks)))}
    return [
        sorted(draw.sample(range(len(task.accuracies)), min(parameters.networks, len(task.accuracies))))
        if place in chosen
        else []
        for place, task in enumerate(tasks)
    ]


@contextmanager
def _own_random(seed: int) -> Iterator[random.Random]:
    """DEAP draws from Python's one generator, which belongs to the user: it is put back."""
    before = random.getstate()
    random.seed(f"eznas {seed}")
    try:
        yield random.Random(f"eznas sample {seed}")
    finally:
        random.setstate(before)


def _pool(workers: int) -> Any:
    if workers == 1:
        return nullcontext()
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
