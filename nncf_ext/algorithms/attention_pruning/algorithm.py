"""
Which levels of pruning can each layer's keys and values bear? Fewest bytes within a divergence from the dense model.

The first tokens of an item are read densely, as the operation reads prompts. Their keys and values are pruned, and the
last tokens follow. Every level of each layer's keys, and of its values, is tried alone; integer programming chooses by
the sums of these divergences, and measured choices correct what it may sum up to.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import nncf
import torch
from rich.table import Table as RichTable
from torch import Tensor, nn

from nncf_ext.algorithms.attention_pruning.rule import MOST_PRUNED, PAGE, Values, check_rule, prune_tokens
from nncf_ext.calibration.stream import evaluation, read_items
from nncf_ext.exploration.additive import Table, best_additive
from nncf_ext.exploration.space import Point, SearchSpace
from nncf_ext.progress import Progress
from nncf_ext.showing import as_text

logger = logging.getLogger("nncf_ext")

_CORRECTIONS = 8  # choices that are measured
_HOPELESS = 1e6  # nats, of what is no number


@dataclass(frozen=True)
class AttentionLevels:
    """
    :param layers: Levels of keys and values by the number of the layer: ``SparseAttentionPolicy(layers=...)``.
    :param divergence: From the dense model, nats a token, over the tokens that were predicted.
    :param unpruned: The same where nothing is pruned, only rounded.
    :param token_bytes: Of one packed token, all layers.
    :param unpruned_bytes: The same where nothing is pruned.
    """

    layers: Mapping[int, tuple[float, float]]
    divergence: float
    unpruned: float
    token_bytes: float
    unpruned_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """
        :return: Plain data for JSON, whose keys are texts.
        """
        return asdict(self) | {"layers": {str(layer): list(levels) for layer, levels in self.layers.items()}}

    def __str__(self) -> str:
        table = RichTable(title=f"{self.divergence:.4f} nats a token, {self.token_bytes:.0f} bytes a token")
        for heading in ("layer", "K pruned", "V pruned"):
            table.add_column(heading, justify="right")
        for layer, levels in self.layers.items():
            table.add_row(str(layer), *(f"{level:.0%}" for level in levels))
        return as_text(table)


def find_attention_levels(
    model: nn.Module,
    dataset: nncf.Dataset,
    *,
    max_divergence: float = 0.01,
    levels: Sequence[float] = (0.0, 0.3, 0.5, 0.7, 0.9),
    values: Values = "int8",
    sink: int = 4,
    recent: int = 64,
    predicted: int = 64,
    subset_size: int = 8,
) -> AttentionLevels:
    """
    Find for each layer how much of older keys and values attention can do without.

    :param model: A causal language model of transformers, all of whose layers attend to all tokens. It is not changed.
    :param dataset: Items with ``input_ids``, ``[1, tokens]``, of one length or several, without padding.
    :param max_divergence: Kullback-Leibler divergence of the predicted distributions from those of the dense model that
        is accepted, nats a token; 0.01 is one percent of perplexity.
    :param levels: Fractions that may be pruned, 0..0.9.
    :param values: How the rest is stored, as in ``SparseAttentionPolicy``; ``sink`` and ``recent`` as well.
    :param sink: First tokens that stay dense.
    :param recent: Last tokens that stay dense.
    :param predicted: Last tokens of each item, which attend to pruned ones and are predicted.
    :param subset_size: How many items to take.
    :return: The levels, and what they cost.
    :raises nncf.ValidationError: A value is out of range, an item is too short or padded, or rounding alone already
        costs more than ``max_divergence``.
    :raises nncf.UnsupportedModelError: The model keeps something else than keys and values of all tokens.
    """
    levels = sorted(set(levels) | {0.0})
    if not 0 <= levels[0] <= levels[-1] <= MOST_PRUNED or not max_divergence > 0 or predicted < 2:
        msg = (
            f"Levels are fractions between 0 and {MOST_PRUNED}, max_divergence is above 0, predicted a number of "
            f"tokens from 2; got {levels}, {max_divergence} and {predicted}."
        )
        raise nncf.ValidationError(msg)
    check_rule(levels[-1], values, sink, recent)
    with evaluation(model):
        readings = [_read(model, item, predicted, sink, recent) for item in read_items(dataset, subset_size)]
        head_dim, of_heads = readings[0].keys[0].shape[-1], [key.shape[1] for key in readings[0].keys]
        # What stays of a token names a level: among levels that leave as many elements, the lowest.
        by_size = {head_dim - math.floor(head_dim * level): level for level in reversed(levels)}
        sizes = sorted(by_size, reverse=True)
        names = [f"layers.{layer}.{which}" for layer in range(len(of_heads)) for which in "kv"]
        space = SearchSpace(dict.fromkeys(names, sizes))

        def measure(point: Point) -> float:
            chosen = [by_size[point[name]] for name in names]
            pairs = list(zip(chosen[::2], chosen[1::2], strict=True))
            each = [reading.divergence(model, pairs, values, sink, recent) for reading in readings]
            mean = sum(each) / len(each)
            return mean if math.isfinite(mean) else _HOPELESS

        full = space.maximal()
        unpruned = measure(full)
        if not unpruned <= max_divergence:
            msg = (
                f"Rounding keys and values to {values} alone costs {unpruned:.3g} nats a token; at most "
                f"{max_divergence:g} were asked for."
            )
            raise nncf.ValidationError(msg)
        alone = {}
        with Progress() as progress:
            task = progress.add_task("Pruning keys or values of one layer", total=len(names))
            for name in names:
                alone[name] = [0.0, *(max(0.0, measure({**full, name: size}) - unpruned) for size in sizes[1:])]
                progress.advance(task)
        value_bytes = 1 if values == "int8" else 0.5
        costs = {
            name: [heads * size * value_bytes for size in sizes]
            for name, heads in zip(names, (heads for heads in of_heads for _ in "kv"), strict=True)
        }

        def cost(point: Point) -> float:
            return sum(costs[name][sizes.index(size)] for name, size in point.items())

        best, divergence = _cheapest(space, alone, costs, max_divergence - unpruned, lambda p: measure(p) - unpruned)
    chosen = [by_size[best[name]] for name in names]
    besides = sum(heads * (2 * head_dim / 8 + 8) for heads in of_heads)  # masks and scales
    return AttentionLevels(
        dict(enumerate(zip(chosen[::2], chosen[1::2], strict=True))),
        divergence + unpruned,
        unpruned,
        cost(best) + besides,
        cost(full) + besides,
    )


def _cheapest(
    space: SearchSpace, alone: Table, costs: Table, limit: float, measure: Callable[[Point], float]
) -> tuple[Point, float]:
    """
    Bisects over the sum of single divergences: what it may be for the measured divergence to stay within the limit.

    :return: The cheapest point found, and its divergence.
    """
    best = space.maximal()
    lost = {tuple(best.values()): 0.0}
    low, high, allowed = 0.0, math.inf, limit
    for _ in range(_CORRECTIONS):
        point = best_additive(space, costs, alone, allowed)
        place = tuple(point.values())
        if place not in lost:
            lost[place] = measure(point)
            logger.debug("At most %.4g nats predicted, %.4g measured", allowed, lost[place])
        if lost[place] <= limit:
            best, low = point, allowed
        else:
            high = allowed
        allowed = 2 * low if high == math.inf else (low + high) / 2
    return best, lost[tuple(best.values())]


@dataclass(frozen=True)
class _Reading:
    """
    An item whose first tokens were read densely.

    :param keys: Of each layer, ``[1, heads, tokens, head_dim]``.
    :param values: The same.
    :param following: The tokens behind, ``[1, tokens]``.
    :param dense: What the dense model predicts there, log-probabilities ``[tokens, vocabulary]``.
    """

    keys: list[Tensor]
    values: list[Tensor]
    following: Tensor
    dense: Tensor

    def divergence(
        self, model: nn.Module, levels: Sequence[tuple[float, float]], values: Values, sink: int, recent: int
    ) -> float:
        def pruned(x: Tensor, level: float) -> Tensor:
            return prune_tokens(x, level, values=values, sink=sink, recent=recent)

        layers = zip(self.keys, self.values, levels, strict=True)
        found = _predict(model, self.following, [(pruned(k, of_k), pruned(v, of_v)) for k, v, (of_k, of_v) in layers])
        far = self.dense.exp() * (self.dense - found)
        return float(torch.where(self.dense == -math.inf, 0.0, far).sum(-1).mean())


def _predict(model: nn.Module, following: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    from transformers import DynamicCache

    logits = model(input_ids=following, past_key_values=DynamicCache(past)).logits[0]
    return torch.log_softmax(logits.float(), -1)


def _read(model: nn.Module, item: Any, predicted: int, sink: int, recent: int) -> _Reading:
    from transformers import DynamicCache

    if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), Tensor):
        raise nncf.ValidationError("Items are dictionaries with input_ids, a tensor [1, tokens].")
    ids, mask = item["input_ids"], item.get("attention_mask")
    needed = sink + recent + PAGE + predicted
    if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] < needed or (mask is not None and not bool(mask.all())):
        msg = (
            f"Items need input_ids [1, tokens] without padding, of {needed} tokens at least: {sink} + {recent} that "
            f"stay dense, {PAGE} that are pruned, {predicted} that are predicted; got {list(ids.shape)}."
        )
        raise nncf.ValidationError(msg)
    ids = ids.to(next(model.parameters()).device)
    context = ids.shape[1] - predicted
    cache = DynamicCache(config=getattr(model, "config", None))
    model(input_ids=ids[:, :context], past_key_values=cache)
    layers: list[tuple[Any, Any]] = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
    ]
    if not layers or not all(
        isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == context for pair in layers for x in pair
    ):
        msg = "All layers must keep keys and values of all tokens: no sliding windows, no states instead of them."
        raise nncf.UnsupportedModelError(msg)
    keys, values = ([pair[i] for pair in layers] for i in (0, 1))
    if len({x.shape[-1] for x in (*keys, *values)}) != 1:
        raise nncf.UnsupportedModelError("All keys and values must have one size.")
    return _Reading(
        keys, values, ids[:, context:], _predict(model, ids[:, context:], list(zip(keys, values, strict=True)))
    )
