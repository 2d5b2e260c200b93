"""NEMO: populations of several species that feed one front, and grow by what they add to it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from random import Random
from typing import Any

import nncf
import numpy as np
from optuna.distributions import BaseDistribution
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nncf_ext.exploration.domains import Domains, Inactive, finite
from nncf_ext.exploration.evolution import Integers
from nncf_ext.exploration.fronts import Floats
from nncf_ext.exploration.populations import Past, Pool, Worth, reference_of, shared, worth
from nncf_ext.exploration.samplers import SeededSampler
from nncf_ext.exploration.species import Boltzmann, Direct, Genome, Graph, Species

SPECIES = ("direct", "boltzmann", "graph")

_KEY = "nemo"
"""Attribute of a trial: its species, the trials of its parents, the seeds of its draws, mutations beyond the first."""
_AGAIN = 5
_MIGRATION = 5
"""Generations between two migrations."""
_CROSSED = 0.9
"""Chance of a child to have two parents."""


class NemoSampler(SeededSampler):
    """
    An Optuna sampler with any number of objectives: neuroevolution with several species of genomes, which pays where
    neighbouring parameters want alike values, such as the bits of layers that follow each other. There are no
    predictors: it costs next to nothing for each trial, and takes more trials than :class:`LinasSampler`.

    Species are ``direct`` (a genome is the parameters), ``boltzmann`` (a distribution over each parameter's values) and
    ``graph`` (the weights of a small graph network that says all parameters at once). Each has children of its own, of
    parents that won a tournament by rank and crowding among its best. After each generation, species share the next one
    by the hypervolume that only their points add to the front of all; of points that are worth the same, the first
    counts. The reference is fixed by the first generation: its worst value of each objective and a tenth of its extent
    beyond. Every fifth generation the best of each species joins the others, except ``graph``, which cannot read them.

    Parameters are integers, categories, or floats with a step. No point is proposed twice before every one was, as far
    as a thousand draws tell in a large space. What comes next depends on the seed and on the trials of the study alone:
    a trial keeps in its attribute ``nemo`` from which trials and draws its genome comes, so that a study continues from
    storage as if it had never stopped. Several processes may share a study.

    :param population_size: Trials of a generation, at least 5. The first generation is random.
    :param species: Some of ``direct``, ``boltzmann`` and ``graph``.
    :param smallest: Trials of a generation that each species has at least; None for a tenth of the population.
    :param features: For each parameter what ``graph`` sees of it, the same number of values for each, such as the size
        of its layer. None: its place among the names, and its number of values.
    :param edges: Pairs of parameters that are neighbours for ``graph``. None: a chain in the order of names.
    :param inactive: Names of the parameters that make no difference at some parameters, such as widths of a block that
        is skipped: trials that differ in nothing else are one, that with the first value of each.
    :param violation: Of values ``[points, objectives]``, how far each point is from keeping constraints, 0 where it
        keeps them: ``[points]``. Points that keep them come first, and only they count for the shares.
    :param seed: Seed of all draws, at least 0.
    :raises nncf.ValidationError: A number is too small, a species unknown or named twice, or features are not alike.

    Source: NEMO, arXiv 2106.07611. Only its description was published; sizes, operators and rates here are our own.
    """

    def __init__(
        self,
        population_size: int = 20,
        *,
        species: Sequence[str] = SPECIES,
        smallest: int | None = None,
        features: Mapping[str, Sequence[float]] | None = None,
        edges: Sequence[tuple[str, str]] | None = None,
        inactive: Inactive | None = None,
        violation: Callable[[Floats], Floats] | None = None,
        seed: int = 0,
    ) -> None:
        names = tuple(species)
        if not names or len(set(names)) < len(names) or not set(names) <= set(SPECIES):
            msg = f"species are some of {list(SPECIES)}, each once; got {list(names)}."
            raise nncf.ValidationError(msg)
        smallest = max(1, population_size // 10) if smallest is None else smallest
        if population_size < max(5, smallest * len(names)) or smallest < 1 or seed < 0:
            msg = (
                f"NEMO takes a population of at least 5 that gives each of {len(names)} species its smallest number, "
                f"at least 1, and a seed of at least 0; got {population_size}, {smallest} and {seed}."
            )
            raise nncf.ValidationError(msg)
        lengths = {1} if features is None else {len(each) for each in features.values()}
        if len(lengths) != 1 or 0 in lengths:
            msg = f"features are equally many numbers for each parameter, at least one; got {features}."
            raise nncf.ValidationError(msg)
        super().__init__(seed)
        self.population_size = population_size
        self._names = names
        self._smallest = smallest
        self._features = features
        self._edges = edges
        self._inactive = inactive
        self._violation = violation
        self._lineage: tuple[Any, _Lineage] | None = None
        self._planned: tuple[Any, _Plan] | None = None
        self._worths: dict[Any, Worth] = {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Optuna's interface: the next child."""
        if not search_space or "fixed_params" in trial.system_attrs:  # one that was enqueued is nobody's child
            return {}
        trials = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]
        lineage = self._lineage_of(study, search_space)
        lineage.read(trials)
        domains = lineage.domains
        begun = domains.begun(trials)
        generation, slot = divmod(len(begun), self.population_size)
        plan = self._plan(study, [*begun.values()][: generation * self.population_size], generation)
        draw = [self._seed, generation, slot]
        name = plan.slots[slot]
        parents = plan.parents(name, np.random.default_rng([*draw, 1]))
        for again, (_, places) in enumerate(islice(lineage.variants(name, parents, draw), 1 + _AGAIN)):
            vector = domains.canonical(places.tolist())
            if vector not in begun:
                note: dict[str, Any] = {"species": name, "parents": parents, "draw": draw, "again": again}
                study._storage.set_trial_system_attr(trial._trial_id, _KEY, note)
                return domains.params(vector)
        return domains.params(domains.unseen(begun, Random(f"{self._seed} {len(begun)}")))

    def shares(self, study: Study) -> list[dict[str, int]]:
        """
        :param study: A study.
        :return: For each generation that has begun, and the next one where all trials are, how many trials are those of
            each species.
        """
        trials = study.get_trials(deepcopy=False)
        space = intersection_search_space([each for each in trials if each.state is TrialState.COMPLETE])
        begun = [*Domains(space, self._inactive).begun(trials).values()]
        counts = range(len(begun) // self.population_size + 1)
        plans = [self._plan(study, begun[: count * self.population_size], count) for count in counts]
        return [{name: plan.slots.count(name) for name in self._names} for plan in plans]

    def _lineage_of(self, study: Study, space: Mapping[str, BaseDistribution]) -> "_Lineage":
        key = (study.study_name, *sorted(space.items(), key=lambda item: item[0]))
        if self._lineage is None or self._lineage[0] != key:
            domains = Domains(space, self._inactive)
            made: dict[str, Callable[[], Species]] = {
                "direct": lambda: Direct(domains.counts, [domain.ordered for domain in domains.each]),
                "boltzmann": lambda: Boltzmann(domains.counts),
                "graph": lambda: Graph(domains.counts, *self._graph(domains)),
            }
            self._lineage = key, _Lineage(domains, {name: made[name]() for name in self._names})
        return self._lineage[1]

    def _graph(self, domains: Domains) -> tuple[Floats, Integers]:
        """Features ``[genes, features]`` and edges ``[edges, 2]``."""
        features: Mapping[str, Sequence[float]] = {
            domain.name: (place, domain.count) for place, domain in enumerate(domains.each)
        }
        if self._features is not None:
            features = self._features
        edges = pairwise(domains.names) if self._edges is None else self._edges
        places = {name: place for place, name in enumerate(domains.names)}
        missing = [name for name in places if name not in features]
        pairs = [*map(tuple, edges)]
        unknown = [pair for pair in pairs if len(pair) != 2 or not set(pair) <= places.keys()]
        if missing or unknown:
            what = f"features lack {missing[:4]}" if missing else f"edges hold {unknown[:4]}"
            msg = f"{what}; the parameters are {domains.names[:8]}, and an edge is a pair of them."
            raise nncf.ValidationError(msg)
        rows = np.array([features[name] for name in places], dtype=np.float64)
        return rows, np.array([[places[name] for name in pair] for pair in pairs], dtype=np.int64).reshape(-1, 2)

    def _plan(self, study: Study, before: Sequence[FrozenTrial], generation: int) -> "_Plan":
        """
        :param study: The study.
        :param before: A trial for each point of the generations before, a finished one where there is one.
        :param generation: Number of the generation that is planned.
        :return: The plan.
        """
        measured = [each.state is TrialState.COMPLETE and finite(each) for each in before]
        past = self._past(study, [each for each, there in zip(before, measured, strict=True) if there])
        key = (study.study_name, generation, *past.numbers.tolist())
        if self._planned is None or self._planned[0] != key:
            ends = np.cumsum(measured, dtype=np.int64)[self.population_size - 1 :: self.population_size]
            self._planned = key, self._made_plan(study, past, ends[:generation].tolist())
        return self._planned[1]

    def _past(self, study: Study, measured: Sequence[FrozenTrial]) -> Past:
        signs = np.array([-1.0 if each is StudyDirection.MAXIMIZE else 1.0 for each in study.directions])
        values = np.array([each.values for each in measured], dtype=np.float64).reshape(-1, len(signs))
        found = [_note(each).get("species", SPECIES[0]) for each in measured]
        return Past(
            np.array([each.number for each in measured], dtype=np.int64),
            np.array([self._names.index(name) if name in self._names else -1 for name in found], dtype=np.int64),
            values * signs,
            np.zeros(len(values)) if self._violation is None else self._violation(values),
        )

    def _made_plan(self, study: Study, past: Past, ends: Sequence[int]) -> "_Plan":
        """
        :param study: The study.
        :param past: What was measured.
        :param ends: For each generation, how many of these were begun by its end.
        :return: The next generation.
        """
        worths: list[Worth] = []
        if ends and ends[0]:
            reference = reference_of(past.losses[: ends[0]])
        for end in ends if ends and ends[0] else ():
            key = (study.study_name, *past.numbers[:end].tolist())
            if key not in self._worths:
                self._worths[key] = worth(past[:end], len(self._names), reference)
            worths.append(self._worths[key])
        sizes = shared([each.credits for each in worths], len(self._names), self.population_size, self._smallest)
        slots = [name for name, size in zip(self._names, sizes.tolist(), strict=True) for _ in range(size)]
        Random(f"{self._seed} {len(ends)}").shuffle(slots)
        guests = np.concatenate([np.zeros(0, np.int64), *(each.best for each in worths[_MIGRATION - 1 :: _MIGRATION])])
        pools = {}
        for place, name in enumerate(self._names):
            member = past.species == place
            if name != "graph":
                member |= np.isin(past.numbers, guests)
            pools[name] = Pool.of(past[member], self.population_size)
        return _Plan(tuple(slots), pools)


@dataclass(frozen=True)
class _Plan:
    """
    :param slots: The species of each trial of a generation.
    :param pools: For each species, whose children its trials are.
    """

    slots: tuple[str, ...]
    pools: Mapping[str, Pool]

    def parents(self, name: str, rng: np.random.Generator) -> list[int]:
        """The trials of one or two parents of a species; none while there are none."""
        pool = self.pools[name]
        count = 1 + (rng.random() < _CROSSED)
        return [pool.winner(rng) for _ in range(count)] if len(pool.numbers) else []


class _Lineage:
    """
    The genomes of a study's trials, made again from what the trials say of their parents and draws.

    :param domains: The parameters.
    :param kinds: The species.
    """

    def __init__(self, domains: Domains, kinds: Mapping[str, Species]) -> None:
        self.domains, self._kinds = domains, kinds
        self._species: dict[int, str] = {}
        self._genomes: dict[int, Genome] = {}
        self._places: dict[int, Integers] = {}

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """
        :param trials: All trials in their order, in which parents come before children.
        """
        for each in trials:
            if each.number in self._places or not each.params.keys() >= set(self.domains.names):
                continue
            self._places[each.number] = np.array(self.domains.vector(each.params))
            note = _note(each)
            if note.get("species") in self._kinds:
                self._species[each.number] = note["species"]
                made = self.variants(note["species"], note["parents"], note["draw"])
                self._genomes[each.number] = next(islice(made, note["again"], None))[0]

    def variants(self, name: str, parents: Sequence[int], draw: Sequence[int]) -> Iterator[tuple[Genome, Integers]]:
        """
        :param name: A species.
        :param parents: Numbers of one or two trials that it can read; none for founders.
        :param draw: Seeds.
        :return: A child and its point ``[genes]``, then the child mutated once more, and so on; founders one by one.
        """
        kind, rng = self._kinds[name], np.random.default_rng(draw)
        genomes = [self._genome(name, number) for number in parents]
        genome = kind.crossed(genomes[0], genomes[1], rng) if len(genomes) == 2 else genomes[0] if genomes else None
        while True:
            made = kind.founder(rng) if genome is None else kind.mutated(genome, rng)
            yield made, kind.places(made, rng)
            genome = None if genome is None else made

    def _genome(self, name: str, number: int) -> Genome:
        """A trial's own genome, or what another species makes of its point."""
        if self._species.get(number) == name:
            return self._genomes[number]
        genome = self._kinds[name].imprint(self._places[number])
        assert genome is not None, "those that cannot read the points of others have no guests"
        return genome


def _note(trial: FrozenTrial) -> dict[str, Any]:
    note: dict[str, Any] = trial.system_attrs.get(_KEY, {})
    return note
