"""
Several processes search in one study: which of its trials are being measured, and which were left by a process that is
gone?

Each process keeps a record among the user attributes of the study: where it runs, the trial it measures, and when it
was last seen. On the same machine the record of a process that was killed is known at once; on another one after a
minute without a sign of life (clocks have to agree as well as that).
"""

import logging
import os
import secrets
import threading
import time
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

logger = logging.getLogger("nncf_ext")

LEASE = 60.0
"""Seconds without a sign of life after which a process elsewhere counts as gone."""
_BEAT = LEASE / 3
_KEY = "worker "


class Workers:
    """
    What this process and the others on a study are doing. A context manager: within it this process counts as there.

    :param study: The study.
    :param shared: Whether there can be others: the study lies in a storage.
    """

    def __init__(self, study: Study, shared: bool) -> None:
        self._study = study
        self._shared = shared
        # Keys are in the order of their beginning, so that all agree on who has been here longest.
        self._key = f"{_KEY}{time.time_ns():020d}-{secrets.token_hex(4)}"
        self._measuring: int | None = None
        self._gone = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if self._shared:
            self._sign()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._shared:
            self._gone.set()
            self._thread.join()
            self._sign()

    def take(self, number: int | None) -> None:
        """
        :param number: The trial that this process measures from now on; None for none.
        """
        self._measuring = number
        if self._shared:
            self._sign()

    def running(self) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """
        :return: Unfinished trials: those that another process is at, and those that this process has to take over:
            their process is gone, and of those still there this one has been here longest.
        """
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        trials = [trial for trial in trials if trial.number != self._measuring]
        if not trials:
            return [], []
        records = self._records()
        others = {key: record for key, record in records.items() if key != self._key and _is_there(record)}
        theirs = {record.get("trial") for record in others.values()}
        left = {record.get("trial") for record in records.values()} - theirs
        busy: list[FrozenTrial] = []
        abandoned: list[FrozenTrial] = []
        for trial in trials:
            # Between the beginning of a trial and the record that says so lies the work of the sampler.
            just_begun = trial.number not in left and bool(others) and _age(trial) < LEASE
            (busy if trial.number in theirs or just_begun else abandoned).append(trial)
        return busy, abandoned if self._key < min(others, default="~") else []

    def _records(self) -> dict[str, dict[str, Any]]:
        if not self._shared:
            return {}
        return {key: record for key, record in self._study.user_attrs.items() if key.startswith(_KEY)}

    def _sign(self) -> None:
        with self._lock:
            seen = 0.0 if self._gone.is_set() else time.time()
            record = {**_this_process(), "trial": self._measuring, "seen": seen}
            self._study.set_user_attr(self._key, record)

    def _beat(self) -> None:
        while not self._gone.wait(_BEAT):
            try:
                self._sign()
            except Exception as error:  # the storage may be back before the lease is over
                logger.warning("The storage of the search cannot be reached: %s", error)


def _is_there(record: dict[str, Any]) -> bool:
    """Whether a process other than this one is at work."""
    own = _this_process()
    if not record.get("seen") or {key: record.get(key) for key in own} == own:
        return False
    if record.get("where") == own["where"]:
        return _birth(record["pid"]) == record["born"]
    return time.time() - record["seen"] < LEASE


def _this_process() -> dict[str, Any]:
    return {"where": _where(), "pid": os.getpid(), "born": _birth(os.getpid())}


@cache
def _where() -> str:
    """Where the number of a process means the same process: one boot of a machine, one namespace of numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"process {os.getpid()} somewhere, {secrets.token_hex(4)}"


def _birth(pid: int) -> str | None:
    """When a process began, in the clock of its kernel; None where there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # killed, and its parent has not noticed


def _age(trial: FrozenTrial) -> float:
    """Seconds since a trial began; machines may live in different time zones."""
    return abs((datetime.now() - trial.datetime_start).total_seconds()) if trial.datetime_start else LEASE
