"""
A search space whose front is known though nobody could walk it: bits for each layer of a made-up chain of layers.

What a layer loses falls by four with each bit. Layers that follow each other are alike in sensitivity and size, and
their errors add up in part: losses do not add up over layers, but over pairs of neighbours, so that dynamic programming
finds the exact front. Searches on it cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nncf_ext import SearchSpace

BITS, STAGES = (8, 6, 4, 3), 3


class Workload:
    """
    :param layers: Number of layers, a multiple of 3.
    :param seed: Of sensitivities and of how much neighbours' errors have in common.
    """

    def __init__(self, layers: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        walk = np.cumsum(draw.normal(size=layers))
        self.space = SearchSpace({f"layer{number:02d}": BITS for number in range(layers)})
        self.sizes = 2 ** (np.arange(layers) * STAGES // layers)
        """``[layers]``: weights, in units; each stage has twice those of the one before."""
        self.errors = np.exp(0.5 * (walk - walk.mean()))
        """``[layers]``: what a layer adds to the amplitude of the error at one bit, before it is halved by each bit."""
        self.shared = draw.uniform(0, 1, layers - 1)
        """``[layers - 1]``: correlation of the errors of neighbours."""

    def loss(self, point: Mapping[str, int]) -> float:
        """:return: The logarithm, to base 10, of the power of the error of a point."""
        amplitude = self.errors * 2.0 ** -np.array([point[name] for name in self.space.dimensions], dtype=np.float64)
        return float(np.log10((amplitude**2).sum() + 2 * (self.shared * amplitude[1:] * amplitude[:-1]).sum()))

    def cost(self, point: Mapping[str, int]) -> int:
        """:return: Bits of all weights of a point."""
        return int(self.sizes @ [point[name] for name in self.space.dimensions])

    def features(self) -> dict[str, list[float]]:
        """:return: Of each layer: its place, and the logarithms of its size and of the error that it alone adds."""
        rows = np.stack([np.arange(len(self.sizes)), np.log(self.sizes), np.log(self.errors)], axis=1)
        return dict(zip(self.space.dimensions, rows.tolist(), strict=True))

    def front(self) -> np.ndarray:
        """:return: ``[points, 2]``: loss and cost of every point that no other one beats, cheapest first."""
        # For each width of the layer before and each cost up to it, the least power of the error of all layers so far.
        bits = np.array(BITS)
        most = int(self.sizes.sum() * bits.max())
        best = np.full((len(bits), most + 1), np.inf)
        for number in range(len(self.sizes)):
            amplitude = self.errors[number] * 2.0**-bits
            following = np.full_like(best, np.inf)
            for place, width in enumerate(bits):
                price = int(self.sizes[number] * width)
                if number:
                    before = self.errors[number - 1] * 2.0**-bits
                    pair = 2 * self.shared[number - 1] * before * amplitude[place]
                    reached = (best + pair[:, None]).min(axis=0)[: most + 1 - price]
                else:
                    reached = np.where(np.arange(most + 1 - price) == 0, 0.0, np.inf)
                following[place, price:] = reached + amplitude[place] ** 2
            best = following
        least = best.min(axis=0)
        costs = np.flatnonzero(least < np.minimum.accumulate(np.append(np.inf, least))[:-1])
        return np.stack([np.log10(least[costs]), costs], axis=1)
