"""The benchmark of the search runs, counts, and would notice a wrong score."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compression

SMALL = "--layers 4 --hidden 64 --vocabulary 96 --tokens 16 --steps 3 --rescore-top 2 --sequences 2 --threads 1".split()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_search_takes_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = compression.main([*SMALL, "--json", str(tmp_path / "r.json")])
    assert [each["search"] for each in records] == [
        compression.WHOLE,
        compression.EXACT,
        compression.TOGETHER,
        compression.RESCORED,
        compression.RACED,
    ]
    by_name = {each["search"]: each for each in records}
    candidates = 8 + 7 + 6  # two branches in each of four layers, one less at every step
    assert {by_name[each]["evaluations"] for each in ("whole passes", "exact", "side by side")} == {2 * candidates}
    assert by_name[compression.RESCORED]["evaluations"] == 2 * (8 + 2 + 2)
    assert by_name[compression.RACED]["evaluations"] <= 2 * candidates
    assert (
        by_name["exact"]["agreement"] == by_name["side by side"]["agreement"] == "3 of 3"
        and by_name["whole passes"]["ratio"] == 1
    )
    assert json.loads((tmp_path / "r.json").read_text()) == records
    assert "same removals" in capsys.readouterr().out


def test_a_wrong_score_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    score = compression.WholePasses.score

    def other(*arguments: Any) -> Any:
        losses = score(*arguments)
        return torch.nextafter(losses, losses + 1)

    monkeypatch.setattr(compression.WholePasses, "score", other)
    with pytest.raises(AssertionError, match="scores differ"):
        compression.main(SMALL)
