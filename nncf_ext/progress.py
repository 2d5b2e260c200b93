"""How far is long work? A bar where there is a terminal, else a line in the log now and then."""

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger("nncf_ext")

_SECONDS = 10.0  # between two lines of the log


class Progress(RichProgress):
    """
    rich's progress bars on stderr. Without a terminal there, each task writes a line to the log of this package (level
    INFO) when it moves: the first time, then every ten seconds at most, and when it is complete.

    :param columns: Of the bar; by default its description, the bar, how many of how many, and the time left.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        default = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._silent = not sys.stderr.isatty()
        self._said: dict[TaskID, tuple[float, float]] = {}  # time of the last line, and what was complete then
        super().__init__(*(columns or default), console=Console(stderr=True), disable=self._silent, transient=True)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Moves a task on."""
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Changes a task: how much is complete, its description, its total."""
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        now, (last, completed) = time.monotonic(), self._said.get(task_id, (-_SECONDS, 0.0))
        moved = task.completed > completed
        if self._silent and moved and (task.finished or now - last >= _SECONDS):
            self._said[task_id] = (now, task.completed)
            total = "" if task.total is None else f" of {task.total:g}"
            left = "" if not task.time_remaining else f", {task.time_remaining:.0f} s left"
            logger.info("%s: %g%s%s", task.description, task.completed, total, left)
