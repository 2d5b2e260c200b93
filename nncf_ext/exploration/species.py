"""
Three kinds of genomes for one kind of point: how a point is written down, varied and read back.

A point has a place for each gene: gene i is 0 to ``counts[i] - 1``. What is a small change of one kind of genome is a
large one of another, so populations of different kinds come to different points. Source: NEMO, arXiv 2106.07611; its
code was not published, so kinds and numbers here are our own.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nncf_ext.exploration.evolution import Integers
from nncf_ext.exploration.fronts import Floats

Genome = Floats
"""One array; its shape is the business of its species."""

_IMPRINT = 4.0
"""Logit of what a point has, where a distribution is made of it; 0 of all else."""
_NOISE = 0.1
_HOTTEST, _COLDEST = 0.3, 0.05
_LEVEL = 0.5
"""Share of founders with the same share of each list of places: all small, all large, all between."""
_HIDDEN = 32
_CHANGED, _RESET = 0.1, 0.05
_SMALLEST_STEP, _LARGEST_STEP = 0.01, 0.1


class Species(Protocol):
    """A kind of genome."""

    def founder(self, rng: np.random.Generator) -> Genome:
        """
        :param rng: Where chance comes from.
        :return: A random genome.
        """

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """
        :param one: A parent.
        :param other: The other one.
        :param rng: Where chance comes from.
        :return: A child that has something of both.
        """

    def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """
        :param genome: A genome.
        :param rng: Where chance comes from.
        :return: One that differs a little.
        """

    def places(self, genome: Genome, rng: np.random.Generator) -> Integers:
        """
        :param genome: A genome.
        :param rng: Where chance comes from.
        :return: ``[genes]``: the point.
        """

    def imprint(self, places: Integers) -> Genome | None:
        """
        :param places: ``[genes]``: a point that another species found.
        :return: A genome that mostly gives it; None where there is no simple way to one.
        """


class Direct:
    """
    A genome is the point itself.

    :param counts: ``[genes]``.
    :param ordered: ``[genes]``: whether neighbouring places are alike.
    """

    def __init__(self, counts: Integers, ordered: Sequence[bool]) -> None:
        self._counts, self._ordered = counts, np.array(ordered)

    def founder(self, rng: np.random.Generator) -> Genome:
        """Uniform, or all genes on one level."""
        drawn = rng.integers(0, self._counts)
        return (_level(self._counts, rng) if rng.random() < _LEVEL else drawn).astype(np.float64)

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """Each gene of either parent."""
        return np.where(rng.random(len(one)) < 0.5, one, other)

    def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """
        About one gene changes: to any other place, or, every other time and where there is an order, by one step.
        """
        top = self._counts - 1.0
        resampled = rng.integers(0, np.maximum(self._counts - 1, 1)).astype(np.float64)
        resampled += resampled >= genome  # any other place
        step = np.where(rng.random(len(genome)) < 0.5, -1.0, 1.0)
        step = np.where((genome + step < 0) | (genome + step > top), -step, step)
        steps = self._ordered & (rng.random(len(genome)) < 0.5)
        changes = rng.random(len(genome)) < 1 / len(genome)
        changed = np.where(changes, np.where(steps, genome + step, resampled), genome)
        return np.clip(changed, 0.0, top)

    def places(self, genome: Genome, rng: np.random.Generator) -> Integers:
        """As it is written."""
        return genome.astype(np.int64)

    def imprint(self, places: Integers) -> Genome:
        """The point."""
        return places.astype(np.float64)


class Boltzmann:
    """
    A genome is a distribution over points: logits for the places of each gene, and a temperature for each gene, whose
    logarithm stands in the last column. Reading it back draws from it.

    :param counts: ``[genes]``.
    """

    def __init__(self, counts: Integers) -> None:
        self._counts = counts
        self._legal = np.arange(counts.max()) < counts[:, None]

    def founder(self, rng: np.random.Generator) -> Genome:
        """Normal logits, or those of one level for all genes; temperatures from cold to hot."""
        genes, width = self._legal.shape
        heat = rng.uniform(np.log(_COLDEST), np.log(_HOTTEST), (genes, 1))
        logits = rng.normal(size=(genes, width))
        if rng.random() < _LEVEL:
            logits = 1.0 * (np.arange(width) == _level(self._counts, rng)[:, None])
        return np.concatenate([logits, heat], axis=1)

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """Each gene's distribution of either parent."""
        return np.where(rng.random((len(one), 1)) < 0.5, one, other)

    def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """Noise on logits, temperatures a little colder or hotter."""
        noise = np.full(genome.shape, _NOISE)
        noise[:, -1] = 0.1
        return genome + noise * rng.normal(size=genome.shape)

    def places(self, genome: Genome, rng: np.random.Generator) -> Integers:
        """A draw for each gene."""
        logits = np.where(self._legal, genome[:, :-1] / np.exp(genome[:, -1:]), -np.inf)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        return np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)

    def imprint(self, places: Integers) -> Genome:
        """The point's places likely, the temperature warm."""
        genes, width = self._legal.shape
        logits = _IMPRINT * (np.arange(width) == places[:, None])
        return np.concatenate([logits, np.zeros((genes, 1))], axis=1)


class Graph:
    """
    A genome is the weights of a graph convolutional network (Kipf and Welling, arXiv 1609.02907) that is shown what
    each gene is, and which are neighbours, and says the places of all genes: two layers of 32 units, then logits.

    :param counts: ``[genes]``.
    :param features: ``[genes, features]``.
    :param edges: ``[edges, 2]``: numbers of neighbours.
    """

    def __init__(self, counts: Integers, features: Floats, edges: Integers) -> None:
        genes, width = len(counts), int(counts.max())
        self._legal = np.arange(width) < counts[:, None]
        deviation = features.std(axis=0)
        self._features = (features - features.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
        near = np.eye(genes)
        near[edges[:, 0], edges[:, 1]] = near[edges[:, 1], edges[:, 0]] = 1.0
        degree = near.sum(axis=1)
        self._near = near / np.sqrt(degree[:, None] * degree)
        # A row for each unit of each layer: its weights and its bias.
        self._layers = [(_HIDDEN, features.shape[1]), (_HIDDEN, _HIDDEN), (width, _HIDDEN)]

    def founder(self, rng: np.random.Generator) -> Genome:
        """Normal weights of the size that keeps the size of what they are given (He et al., arXiv 1502.01852)."""
        return np.concatenate([self._fresh(shape, rng).ravel() for shape in self._layers])

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """Each unit of either parent."""
        units = [np.repeat(rng.random(rows) < 0.5, inputs + 1) for rows, inputs in self._layers]
        return np.where(np.concatenate(units), one, other)

    def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """Noise on one weight in ten, much or little from time to time; one in twenty of these is drawn anew."""
        size = np.exp(rng.uniform(np.log(_SMALLEST_STEP), np.log(_LARGEST_STEP)))
        changes = rng.random(len(genome)) < _CHANGED
        resets = rng.random(len(genome)) < _RESET
        changed = np.where(resets, self.founder(rng), genome + size * rng.normal(size=len(genome)))
        return np.where(changes, changed, genome)

    def places(self, genome: Genome, rng: np.random.Generator) -> Integers:
        """The place of the largest logit of each gene."""
        return np.argmax(np.where(self._legal, self.logits(genome), -np.inf), axis=1)

    def imprint(self, places: Integers) -> None:
        """Weights that give a point would have to be trained."""
        return

    def logits(self, genome: Genome) -> Floats:
        """
        :param genome: Weights.
        :return: ``[genes, places]``, those that a gene does not have included.
        """
        ends = np.cumsum([rows * (inputs + 1) for rows, inputs in self._layers])
        parts = np.split(genome, ends[:-1])
        first, second, last = (part.reshape(rows, -1) for part, (rows, _) in zip(parts, self._layers, strict=True))
        hidden = np.maximum(self._near @ self._features @ first[:, :-1].T + first[:, -1], 0.0)
        hidden = np.maximum(self._near @ hidden @ second[:, :-1].T + second[:, -1], 0.0)
        return hidden @ last[:, :-1].T + last[:, -1]

    @staticmethod
    def _fresh(shape: tuple[int, int], rng: np.random.Generator) -> Floats:
        rows, inputs = shape
        return np.concatenate([rng.normal(size=shape) * np.sqrt(2 / inputs), np.zeros((rows, 1))], axis=1)


def _level(counts: Integers, rng: np.random.Generator) -> Integers:
    """``[genes]``: the same share of each list of places."""
    return np.rint(rng.random() * (counts - 1)).astype(np.int64)
