"""Programs over the statistics of a layer: text, what they give for a network, and the published ones by name."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nncf
import torch
from torch import Tensor

from nncf_ext.algorithms.zero_cost.primitives import PRIMITIVES
from nncf_ext.algorithms.zero_cost.statistics import STATISTICS, LayerStatistics

PUBLISHED = {
    "eznas-a": "frobenius_norm(sigmoid(logdet(sign(weight_grad_noise))))",
    "eznas-a-prime": "frobenius_norm(sigmoid(logdet(sign(t1_grad_data))))",
    "eznas-top": "square(absolute(frobenius_norm(t2_noise)))",
    "eznas-enas": "reciprocal(add(frobenius_norm(t4_change),"
    " exponential(frobenius_norm(log(sigmoid(log(sigmoid(t4_change))))))))",
    "eznas-pnas": "kl_divergence(normalize(normalize(normalize(t4_grad_change))), above_zero(t4_grad_data))",
    "eznas-nasnet": "frobenius_norm(below_zero(log(add(log(t4_change), t1_noise))))",
}
"""
The programs that the authors of EZNAS published, in our words. The first is EZNAS-A, read as the gradient of weights
under noise; the numbering of statistics in their code allows the second reading as well.
"""

_TOKEN = re.compile(r"\s*([A-Za-z_0-9]+|[(),])")
_LARGEST = 1 << 24
"""Numbers of an intermediate result: a product of two large tensors must not take all memory."""
_DEEPEST = 60

Tree = tuple[Any, ...]
"""``(name, argument, ...)``; a statistic has no arguments."""


class InvalidError(Exception):
    """A program cannot be computed for a network."""


@dataclass(frozen=True)
class Program:
    """
    An expression over the statistics of a layer, such as ``"frobenius_norm(multiply(weight, weight_grad_data))"``.

    :param text: Names of primitives (:mod:`nncf_ext.algorithms.zero_cost.primitives`) and statistics
        (``zero_cost.statistics.STATISTICS``), or the name of a published program.
    :raises nncf.ValidationError: It is no such expression; a name is unknown, or a primitive takes more or fewer
        arguments.
    """

    text: str

    def __post_init__(self) -> None:
        _ = self.tree

    @cached_property
    def tree(self) -> Tree:
        """The expression."""
        return _parsed(PUBLISHED.get(self.text, self.text))

    def __str__(self) -> str:
        return _written(self.tree)

    def score(self, layers: Iterable[LayerStatistics], seconds: float | None = None) -> float | None:
        """
        The mean over layers of the mean of what the program gives for each. A layer whose shapes do not fit an
        operation is passed over.

        :param layers: Statistics of a network.
        :param seconds: How long it may take, seconds; looked at between operations. None: as long as it takes.
        :return: The score of the network; None where the program is invalid for it: the value of a layer is not finite,
            no layer fits, or time is over.
        """
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        values = []
        for layer in layers:
            try:
                value = float(_value(self.tree, layer, deadline).mean())
            except InvalidError:
                return None
            except (RuntimeError, IndexError, ValueError):  # what torch says of shapes and singular matrices
                continue
            if not math.isfinite(value):
                return None
            values.append(value)
        return sum(values) / len(values) if values else None


def _value(tree: Tree, layer: Mapping[str, Tensor], deadline: float) -> Tensor:
    name, *arguments = tree
    if not arguments:
        return layer[name]
    given = [_value(each, layer, deadline) for each in arguments]
    if time.monotonic() > deadline:
        raise InvalidError
    if len(given) == 2 and _numbers(name, given) > _LARGEST:
        raise InvalidError
    return PRIMITIVES[name][1](*given)


def _numbers(name: str, given: list[Tensor]) -> int:
    """Of the result of two tensors."""
    x, y = (each.shape for each in given)
    if name == "matmul" and min(len(x), len(y)) > 1:
        return math.prod(torch.broadcast_shapes(x[:-2], y[:-2])) * x[-2] * y[-1]
    return 1 if name == "matmul" else math.prod(torch.broadcast_shapes(x, y))


def _parsed(text: str) -> Tree:
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            msg = f"A program is names, parentheses and commas, such as {PUBLISHED['eznas-a']!r}; got {text[:200]!r}."
            raise nncf.ValidationError(msg)
        tokens.append(match[1])
        at = match.end()
    tree, rest = _expression(tokens, text, 0)
    if rest:
        msg = f"The program ends before {' '.join(rest)[:40]!r}: {text[:200]!r}."
        raise nncf.ValidationError(msg)
    return tree


def _expression(tokens: list[str], text: str, depth: int) -> tuple[Tree, list[str]]:
    name, rest = (tokens[0], tokens[1:]) if tokens else ("", [])
    if name in STATISTICS:
        return (name,), rest
    if name not in PRIMITIVES or depth > _DEEPEST:
        known = f"primitives are {', '.join(PRIMITIVES)}; statistics {', '.join(STATISTICS)}; published programs "
        what = f"has {name!r}" if depth <= _DEEPEST else f"is deeper than {_DEEPEST}"
        msg = f"The program {text[:200]!r} {what}. The {known}{', '.join(PUBLISHED)}."
        raise nncf.ValidationError(msg)
    arguments: list[Tree] = []
    while rest and rest[0] == ("," if arguments else "("):
        argument, rest = _expression(rest[1:], text, depth + 1)
        arguments.append(argument)
    count = PRIMITIVES[name][0]
    if len(arguments) != count or rest[:1] != [")"]:
        msg = f"{name} takes {count} argument(s) in parentheses; got {len(arguments)} in {text[:200]!r}."
        raise nncf.ValidationError(msg)
    return (name, *arguments), rest[1:]


def _written(tree: Tree) -> str:
    name, *arguments = tree
    return f"{name}({', '.join(map(_written, arguments))})" if arguments else name
