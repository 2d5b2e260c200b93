"""Progress where there is no terminal: lines in the log."""

import logging

import pytest

from nncf_ext import progress
from nncf_ext.progress import Progress


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "nncf_ext"]


def test_a_line_for_each_block_that_takes_its_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 15))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO, "nncf_ext"), Progress() as bar:
        task = bar.add_task("Applying", total=3)
        for _ in range(3):
            bar.advance(task)
    assert [line.split(",")[0] for line in lines(caplog)] == [f"Applying: {done} of 3" for done in (1, 2, 3)]


def test_quick_steps_share_a_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1e6)
    with caplog.at_level(logging.INFO, "nncf_ext"), Progress() as bar:
        task = bar.add_task("Searching", total=None)
        bar.update(task, total=100)  # nothing is complete yet: no line
        for done in range(1, 101):
            bar.update(task, completed=done, description=f"Searching; best {done}")
    found = lines(caplog)
    assert found == ["Searching; best 1: 1 of 100", "Searching; best 100: 100 of 100"]
