"""Measures, on the CPU at hand, how long linear layers take in each form: the table that packing for this CPU uses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Protocol

import numpy as np

from ov_ext import machine
from ov_ext.extension import extension_path
from ov_ext.sparse_weights import store, trials
from ov_ext.sparse_weights.cost import KINDS, MEASURABLE, CostTable, KindCosts, weights_and_activations
from ov_ext.sparse_weights.trials import Arm

logger = logging.getLogger("ov_ext")

ROWS = (1, 4, 16, 128, 512)
ZEROS = (0.0, 0.5, 0.8)
LONGEST = 60.0  # seconds
SHORT = 9.0  # seconds that packing spends on its own; the last step may take a little longer
CERTAIN = 0.05  # relative error of a median above which a table is not believed: forms differ by 10 % to be chosen
_ROUNDS = (7, 120)  # fewest, most

Progress = Callable[[str, float], None]  # told what happens now, and which fraction 0..1 is done


class TimedArm(Protocol):
    """What is timed: see :class:`ov_ext.sparse_weights.trials.Trial`."""

    def seconds(self, rows: int) -> float:
        """:return: The time of one weight in one call with so many rows."""


MakeArm = Callable[[str, Arm, int], TimedArm]


def calibrate(
    seconds: float = LONGEST, kinds: Sequence[str] = KINDS, on_progress: Progress = lambda text, done: None
) -> CostTable:
    """Measure stock OpenVINO and our forms on this CPU, with as many threads as this process has CPUs, and keep the
    result for :func:`ov_ext.pack_sparse_weights`.

    The result belongs to this CPU, this number of threads, this release of OpenVINO and this build of the extension,
    and to OV_EXT_ISA and ONEDNN_MAX_CPU_ISA where they are set. Two processes do not measure at the same time.

    :param seconds: At most so long, above 0. What could not be measured well in that time is left out.
    :param kinds: Kinds of weights: ``"bf16"``, ``"int8"``, ``"int4"``; ``"int4_f32"`` and so on are the same for
        packing with ``activation_group=0``.
    :param on_progress: Called with a text and the fraction 0..1 that is done.
    :return: What was measured. A kind is missing where the machine was too busy, or too slow for the time.
    :raises ValueError: A kind that does not exist, or no time.
    :raises RuntimeError: Another process measures, and has not ended in ``seconds`` and a minute.
    :raises ExtensionUnavailableError: See :func:`ov_ext.extension_path`.
    """
    if unknown := [kind for kind in kinds if kind not in MEASURABLE]:
        raise ValueError(f"kinds are {', '.join(MEASURABLE)}; got {', '.join(unknown)}.")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds is a time above 0, got {seconds}.")
    extension_path()
    with store.alone(wait=seconds + LONGEST) as alone:
        if not alone:
            raise RuntimeError("Another process is measuring this CPU. Call again when it has ended.")
        return _measured(kinds, seconds, on_progress)


def known_or_measured(kinds: Sequence[str]) -> CostTable | None:
    """Find what was measured on this CPU, and measure what is missing, in ten seconds at most.

    :param kinds: Kinds of weights that matter.
    :return: The table; kinds that could not be measured are missing. None where nothing is known.
    """
    table = store.read()
    missing = [kind for kind in kinds if (table is None or kind not in table.kinds) and kind not in _given_up]
    if missing:
        deadline = time.monotonic() + SHORT
        with store.alone(wait=SHORT) as alone:
            table = store.read()  # another process may have measured meanwhile
            missing = [kind for kind in missing if table is None or kind not in table.kinds]
            if missing and alone:
                logger.info("Measuring this CPU with %s weights, once, in ten seconds at most", ", ".join(missing))
                measured = _measured(missing, deadline - time.monotonic(), lambda text, done: None)
                kept = store.read()
                _given_up.update(set(missing) - (kept.kinds.keys() if kept else set()))
                table = kept or measured
    return table


_given_up: set[str] = set()  # kinds that this process failed to measure, or to keep: it does not try at every model


def _measured(kinds: Sequence[str], seconds: float, on_progress: Progress) -> CostTable:
    """Measure, and keep the result beside what is known of other kinds."""
    table = CostTable(machine.cpu_name(), machine.cpu_count(), {})
    begin = time.monotonic()
    for i, kind in enumerate(kinds):
        deadline = begin + seconds * (i + 1) / len(kinds)

        def told(text: str, done: float, i: int = i, kind: str = kind) -> None:
            on_progress(f"{kind}: {text}", (i + done) / len(kinds))

        costs = measure(kind, deadline, told)
        if costs is not None:
            table.kinds[kind] = costs
            store.add(table)
    return table


def measure(
    kind: str,
    deadline: float,
    on_progress: Progress,
    make: MakeArm = trials.Trial,
    clock: Callable[[], float] = time.monotonic,
) -> KindCosts | None:
    """Time all forms of one kind of weight.

    :param kind: Kind of the weights, and of the activations: see :func:`calibrate`.
    :param deadline: When to end, by ``clock``.
    :param on_progress: See :func:`calibrate`.
    :param make: Makes what is timed.
    :param clock: Seconds.
    :return: The times; None, after a warning, where they are too uncertain.
    """
    weights, floating = weights_and_activations(kind)
    arms = trials.arms(weights, ZEROS, 0 if floating else trials.ACTIVATION_GROUP)
    layers, timed = trials.layer_count(weights, ZEROS), dict[Arm, TimedArm]()
    for i, arm in enumerate(arms):
        on_progress("making layers", 0.4 * i / len(arms))
        # OpenVINO may have no primitive for stock in this setting, and says so when it runs.
        with suppress(RuntimeError) if arm.form == "stock" else nullcontext():
            trial = make(weights, arm, layers)
            for rows in ROWS:
                trial.seconds(rows)  # caches, and code that OpenVINO compiles
            timed[arm] = trial
        if clock() > deadline:
            logger.warning("There was no time to measure %s weights: packing takes times of another CPU", kind)
            return None
    for last in (False, True):
        end = deadline if last else clock() + (deadline - clock()) / 2
        costs = _costs(timed, lambda done, end=end: clock() > end, on_progress)  # type: ignore[misc]
        if costs is None or costs.error <= CERTAIN:
            return costs
        if not last:
            said = "This machine is busy: times of %s weights vary, by %.0f %% of their median. Measuring again"
            logger.warning(said, kind, 100 * costs.error)
    said = "This machine is too busy to measure %s weights: packing takes times of another CPU. Later: ov-ext calibrate"
    logger.warning(said, kind)
    return None


def _costs(timed: dict[Arm, TimedArm], late: Callable[[int], bool], on_progress: Progress) -> KindCosts | None:
    """Let arms take turns, in rounds, until their ratios are certain or it is late.

    :return: The medians. None where stock OpenVINO runs in none of its settings.
    """
    order, samples = list(timed), []
    for done in range(_ROUNDS[1]):
        on_progress("measuring", 0.4 + 0.6 * done / _ROUNDS[1])
        turns = order if done % 2 else order[::-1]
        samples.append({arm: [timed[arm].seconds(rows) for rows in ROWS] for arm in turns})
        if done + 1 >= _ROUNDS[0]:
            costs = summary({arm: np.array([each[arm] for each in samples]) for arm in order})
            if costs is None or costs.error <= CERTAIN or late(done):
                break
    return costs


def summary(seconds: dict[Arm, np.ndarray]) -> KindCosts | None:
    """Take medians over rounds: of stock's times, and of the other forms' times in each round over those of stock.

    On a shared machine the speed of everything changes within seconds; ratios within a round hardly do.

    :param seconds: ``[rounds, rows]`` of each arm: seconds for one weight.
    :return: The times; None without stock.
    """
    settings = [arm for arm in seconds if arm.form == "stock"]
    if not settings:
        return None
    medians = np.array([np.median(seconds[arm], axis=0) for arm in settings])  # [settings, rows]
    best = medians.argmin(axis=0)
    base = np.stack([seconds[settings[setting]][:, row] for row, setting in enumerate(best)], axis=1)
    times, errors = {}, []
    for arm, each in seconds.items():
        if arm.form != "stock":
            middle, error = median_ratio(each, base)
            times[arm] = 1e12 * medians.min(axis=0) * middle
            errors.append(error)
    sparse = np.array([times[arm] for arm in sorted(times, key=lambda arm: arm.zeros) if arm.form == "sparse"])
    sparse = np.minimum.accumulate(sparse, axis=0)  # more zeros are not slower, but for noise
    (dense,) = (times[arm] for arm in times if arm.form == "dense")
    return KindCosts(
        ROWS,
        tuple(sorted(arm.zeros for arm in times if arm.form == "sparse")),
        rounded(1e12 * medians.min(axis=0)),
        rounded(dense),
        tuple(map(rounded, sparse)),
        min(1.0, round(float(np.mean(errors, axis=0).max()), 4)),
    )


def median_ratio(seconds: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param seconds: ``[rounds, ...]``.
    :param base: The same of what they are compared with.
    :return: The median over rounds of their ratio, and its relative error, ``[...]``.
    """
    low, middle, high = np.percentile(seconds / base, [25, 50, 75], axis=0)
    # That of a median of normally distributed samples: 1.25 deviations, each 1 / 1.35 of the middle half.
    return middle, 0.93 * (high - low) / middle / len(seconds) ** 0.5


def rounded(times: np.ndarray) -> tuple[float, ...]:
    """:return: Times with four digits, as they are kept."""
    return tuple(float(f"{each:.4g}") for each in times)
