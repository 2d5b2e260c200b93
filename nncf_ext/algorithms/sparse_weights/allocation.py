"""
How many zeros each layer gets.

The same ratio everywhere is not the best: some blocks, the first and the last of a language model as a rule, spoil its
output several times as much as others when they lose the same share of their weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.calibration.statistics import InputStatistics
from nncf_ext.calibration.stream import CalibrationStream
from nncf_ext.importance.outputs import difference, few_items, read_output
from nncf_ext.importance.weights import smallest_mask, wanda_score
from nncf_ext.parameters import SparsityAllocation
from nncf_ext.structure.blocks import BlockList

_TOKENS = 512  # seen for each measurement
_TRIED = 0.25  # of the weights of a part go at least, so that the output changes measurably
_OUTLIER = 5.0  # times the mean score: OWL's M for language models
_STEPS = 1024  # of the shares at which the error of a layer is known
_HALVINGS = 60
_MOST = 0.99  # of the weights of a layer


@dataclass(frozen=True)
class Part:
    """
    Layers that are measured together.

    :param block: Path of their block; of a layer in none, its own.
    :param layers: By path.
    """

    block: str
    layers: Mapping[str, nn.Linear]


@dataclass(frozen=True)
class Curve:
    """
    How the output of one layer loses energy as its weights go, the least important first.

    :param size: Number of weights.
    :param levels: ``[steps]``, ascending: what the weight loses at which a share of 0, 1/steps, .. is reached, as a
        fraction of the layer's energy.
    :param lost: Fraction of the energy lost where Wanda prunes at the ratio that is tried.
    :param outliers: Fraction of scores far above their mean.
    """

    size: int
    levels: Tensor
    lost: float
    outliers: float

    def share(self, threshold: float) -> float:
        """:return: The share of weights that lose no more than this, 0..1."""
        return float(torch.searchsorted(self.levels, torch.tensor(threshold), right=True)) / len(self.levels)


def allocate(
    stream: CalibrationStream,
    items: Sequence[Any],
    parts: Sequence[Part],
    allocation: SparsityAllocation,
    ratio: float,
    spread: float,
    advance: Callable[[int], None],
) -> dict[str, float]:
    """
    Ratios of the layers whose mean, weighted by size, is the ratio asked for.

    With SENSITIVITY: each part alone is pruned by Wanda, and the change of the model's output is measured; divided by
    the energy that its layers lose, that is the price of energy in this part. Weights then go, in all layers alike, as
    long as energy times price stays below one threshold.

    :param stream: Runs the model, which is dense and in evaluation mode.
    :param items: Calibration data; a few of them are taken.
    :param parts: All layers.
    :param allocation: How.
    :param ratio: Fraction of zeros, above 0.
    :param spread: How far the ratio of a layer may be from that; with OUTLIERS, half of the range of all ratios.
    :param advance: Told how many parts are measured.
    :return: Ratios by the path of the layer. A layer that sees no token keeps the ratio asked for.

    Source of OUTLIERS: Yin et al., OWL, arXiv 2310.05175, section 3.2.
    """
    few = few_items(items, _TOKENS)
    layers = {name: layer for part in parts for name, layer in part.layers.items()}
    statistics = _observed(stream, few, layers)
    scores = {name: wanda_score(layer.weight.detach(), statistics[name].mean_square) for name, layer in layers.items()}
    tried = max(ratio, _TRIED)
    curves = {name: curve for name, each in scores.items() if (curve := _curve(each, tried)) is not None}
    uniform = dict.fromkeys(layers, ratio)
    if not curves:
        return uniform
    if allocation is SparsityAllocation.OUTLIERS:
        return uniform | _by_outliers(parts, curves, ratio, spread)
    prices: dict[str, float] = {}
    dense = [read_output(stream.call(item)) for item in few]
    for done, part in enumerate(parts):
        known = [name for name in part.layers if name in curves]
        with _pruned(part, {name: scores[name] for name in known}, tried):
            harm = sum(difference(read_output(stream.call(item)), pair) for item, pair in zip(few, dense, strict=True))
        lost = sum(curves[name].lost for name in known)
        prices |= dict.fromkeys(known, harm / lost if lost > 0 else 0.0)
        advance(done + 1)
    if not all(map(math.isfinite, prices.values())):
        msg = "The model's outputs are not finite on the calibration data, so that parts cannot be compared."
        raise nncf.ValidationError(msg)
    least = min((price for price in prices.values() if price > 0), default=0.0)
    if least == 0:
        return uniform
    return uniform | _by_price(curves, {name: max(price, least) for name, price in prices.items()}, ratio, spread)


def parts_of(block_lists: Sequence[BlockList], layers: Mapping[str, nn.Linear]) -> list[Part]:
    """
    :param block_lists: Repeated blocks of the model.
    :param layers: Its layers by path.
    :return: Layers that stand in one child of a block (attention, MLP) together; a layer in no block alone.
    """
    blocks = [block for each in block_lists for block in each.blocks]
    found: dict[tuple[str, str], dict[str, nn.Linear]] = {}
    for name, layer in layers.items():
        block = max((each for each in blocks if name.startswith(f"{each}.")), key=len, default=name)
        child = name[len(block) + 1 :].split(".")[0]
        found.setdefault((block, child), {})[name] = layer
    return [Part(block, own) for (block, _), own in found.items()]


def _observed(
    stream: CalibrationStream, items: Sequence[Any], layers: Mapping[str, nn.Linear]
) -> dict[str, InputStatistics]:
    statistics = {
        name: InputStatistics(layer.in_features, device=layer.weight.device) for name, layer in layers.items()
    }

    def observe(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: statistics[name].update(args[0] if args else kwargs["input"])

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(observe(name), with_kwargs=True).remove)
        for item in items:
            stream.call(item)
    return statistics


def _curve(scores: Tensor, ratio: float) -> Curve | None:
    """None for a layer that sees nothing."""
    energy = scores.square().flatten().sort().values.double()
    total = float(energy.sum())
    if not total > 0 or not math.isfinite(total):
        return None
    levels = energy[torch.linspace(0, len(energy) - 1, min(_STEPS, len(energy)), dtype=torch.float64).long()] / total
    lost = float(scores.square()[_wanda(scores, ratio)].double().sum()) / total
    outliers = float((scores > _OUTLIER * scores.mean()).float().mean())
    return Curve(scores.numel(), levels.cpu(), lost, outliers)


@contextmanager
def _pruned(part: Part, scores: Mapping[str, Tensor], ratio: float) -> Any:
    """Pruned by Wanda for as long as the context lasts."""
    with ExitStack() as undo:
        for name, score in scores.items():
            weight = part.layers[name].weight
            undo.callback(setattr, weight, "data", weight.data)
            weight.data = weight.data.masked_fill(_wanda(score, ratio), 0.0)
        yield


def _wanda(scores: Tensor, ratio: float) -> Tensor:
    return smallest_mask(scores, int(scores.shape[1] * ratio))


def _by_outliers(parts: Sequence[Part], curves: Mapping[str, Curve], ratio: float, spread: float) -> dict[str, float]:
    blocks: dict[str, list[str]] = {}
    for part in parts:
        blocks.setdefault(part.block, []).extend(name for name in part.layers if name in curves)
    sizes = {block: sum(curves[name].size for name in names) for block, names in blocks.items() if names}
    found = {block: sum(curves[n].outliers * curves[n].size for n in blocks[block]) / sizes[block] for block in sizes}
    least, most = min(found.values()), max(found.values())
    if least == most:
        return {}
    reach = min(2 * spread, ratio, max(_MOST - ratio, 0.0))  # no ratio may leave 0..1
    scaled = {block: (value - least) / (most - least) * reach for block, value in found.items()}
    mean = sum(scaled[block] * size for block, size in sizes.items()) / sum(sizes.values())
    return {name: ratio + mean - scaled[block] for block in sizes for name in blocks[block]}


def _by_price(
    curves: Mapping[str, Curve], prices: Mapping[str, float], ratio: float, spread: float
) -> dict[str, float]:
    """One threshold for energy times price over all layers, found by halving; the rest is shared out evenly."""
    size = sum(curve.size for curve in curves.values())

    def ratios(logarithm: float) -> dict[str, float]:
        found = {}
        for name, curve in curves.items():
            share = curve.share(math.exp(logarithm) / prices[name])
            found[name] = min(max(share, ratio - spread, 0.0), ratio + spread, max(_MOST, ratio))
        return found

    def mean(found: Mapping[str, float]) -> float:
        return sum(found[name] * curve.size for name, curve in curves.items()) / size

    low, high = -200.0, 200.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(ratios(middle)) < ratio else (low, middle)
    below, above = ratios(low), ratios(high)
    gap = mean(above) - mean(below)
    part = (ratio - mean(below)) / gap if gap > 0 else 0.0
    return {name: below[name] + min(max(part, 0.0), 1.0) * (above[name] - below[name]) for name in curves}
