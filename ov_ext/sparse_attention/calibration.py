"""Measures, on the CPU at hand, how long a token attends to many others: stock OpenVINO, and our operation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import openvino as ov

from ov_ext import runtime
from ov_ext.sparse_attention import costs, trials
from ov_ext.sparse_attention.costs import AttentionCosts
from ov_ext.sparse_attention.passes import sparsify_attention
from ov_ext.sparse_attention.policy import SparseAttentionPolicy
from ov_ext.sparse_weights import store
from ov_ext.sparse_weights.calibration import CERTAIN, median_ratio, rounded

logger = logging.getLogger("ov_ext")

TOKENS = (64, 256, 512, 2048)  # of the past; what longer ones gain is not asked
HEAD_DIM = 128
LONGEST = 9.0  # seconds
_ROUNDS = (7, 500)  # fewest, most
_CALLS = 4  # in a round, the first of which is not timed


class Timed(Protocol):
    """What is timed: see :class:`Trial`."""

    def fill(self, count: int) -> None:
        """Begin anew with so many tokens of the past."""

    def seconds(self) -> float:
        """:return: The time of one more token."""


def calibrate_attention(seconds: float = LONGEST, make: Callable[[bool], Timed] | None = None) -> AttentionCosts | None:
    """Measure stock OpenVINO's attention over its cache of 8 bits and ours on this CPU, with as many threads as this
    process has CPUs, and keep the result for :func:`ov_ext.sparsify_attention`.

    :param seconds: At most so long, above 0.
    :param make: Makes what is timed, ours or stock.
    :return: The times; None, after a warning, where the machine was too busy.
    :raises ValueError: No time.
    :raises RuntimeError: Another process measures, and has not ended in a minute.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds is a time above 0, got {seconds}.")
    with store.alone(wait=60) as alone:
        if not alone:
            raise RuntimeError("Another process is measuring this CPU. Call again when it has ended.")
        deadline = time.monotonic() + seconds
        arms = [(make or Trial)(ours) for ours in (False, True)]
        measured = [_medians(arms, count, deadline, len(TOKENS) - i) for i, count in enumerate(TOKENS)]
    error = max(each[2] for each in measured)
    if error > CERTAIN:
        logger.warning(
            "This machine is too busy to measure attention: times vary, by %.0f %% of their median", 100 * error
        )
        return None
    stock, ours = (rounded(1e6 * np.array([each[i] for each in measured])) for i in (0, 1))
    found = AttentionCosts(trials.HEADS * HEAD_DIM, TOKENS, stock, ours, round(error, 4))
    costs.keep(found)
    return found


def _medians(arms: list[Timed], count: int, deadline: float, lengths: int) -> tuple[float, float, float]:
    """:return: Seconds of stock, seconds of ours by the median of their ratios in each round, error of that ratio."""
    steady = max(1, count // (10 * _CALLS))  # rounds in which the past grows by no more than a tenth
    end = time.monotonic() + (deadline - time.monotonic()) / lengths
    samples: list[list[float]] = []
    error = 1.0
    while len(samples) < _ROUNDS[0] or (len(samples) < _ROUNDS[1] and error > CERTAIN and time.monotonic() < end):
        if len(samples) % steady == 0:
            for arm in arms:
                arm.fill(count)
        turns = arms if len(samples) % 2 else arms[::-1]
        times = {id(arm): float(np.median([arm.seconds() for _ in range(_CALLS)][1:])) for arm in turns}
        samples.append([times[id(arm)] for arm in arms])
        stock, ours = np.array(samples).T
        ratio, uncertain = median_ratio(ours, stock)
        error = min(1.0, float(uncertain))
    base = float(np.median(stock))
    return base, base * float(ratio), error


class Trial:
    """One layer, compiled.

    :param ours: Ours, as it is by default, or stock with a cache of 8 bits.
    """

    def __init__(self, ours: bool) -> None:
        model, properties = trials.layer(HEAD_DIM), {"KV_CACHE_PRECISION": "u8"}
        if ours:
            model, properties = sparsify_attention(model, SparseAttentionPolicy(pack_from=0))[0], {}
        compiled = runtime.add_extension(ov.Core()).compile_model(model, "CPU", properties)
        self._request, self._count = compiled.create_infer_request(), 0
        self._rng = np.random.default_rng(0)

    def fill(self, count: int) -> None:
        """Begin anew with so many tokens of the past."""
        self._request.reset_state()
        self._count = 0
        self._infer(count)

    def seconds(self) -> float:
        """:return: The time of one more token."""
        return self._infer(1)

    def _infer(self, count: int) -> float:
        inputs: dict[str, Any] = trials.tokens(self._rng, HEAD_DIM, count, self._count)
        start = time.perf_counter()
        self._request.infer(inputs, share_inputs=True, share_outputs=True)
        self._count += count
        return time.perf_counter() - start
