"""The journal of resumable runs: whole entries, one run a folder, and errors that name the file."""

import json

import nncf
import pytest

import nncf_ext
from nncf_ext import AdvancedMambaShedderParameters, CompressMode, PruningStage
from nncf_ext.journal import Journal, read_json
from tests.structure_models import make, tokens

HEADER = {"ratio": 0.5, "layers": ["a", "b"], "size": (2, 3)}


def test_entries_are_read_by_the_same_run_only(tmp_path):
    folder = tmp_path / "deep" / "journal"
    journal = Journal(folder, "search", HEADER)
    assert journal.names("*.txt") == [] and journal.read("b.txt", lambda path: path.read_text()) is None
    for name in "ba":
        journal.write(f"{name}.txt", lambda aside, name=name: aside.write_text(name * 3))
    again = Journal(folder, "search", {**HEADER, "size": [2, 3]})
    assert again.names("*.txt") == ["a.txt", "b.txt"]
    assert again.read("b.txt", lambda path: path.read_text()) == "bbb"
    with pytest.raises(nncf.ValidationError, match="begun by another search; it differs in more, ratio. Resume"):
        Journal(folder, "search", {**HEADER, "ratio": 0.6, "more": 1})


def test_an_interrupted_write_leaves_no_entry(tmp_path):
    journal = Journal(tmp_path, "search", HEADER)

    def fail(aside):
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.write("entry.txt", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]


@pytest.mark.parametrize("content", ["torn{", "[1]", "3"])
def test_damaged_files_are_named(tmp_path, content):
    journal = Journal(tmp_path, "search", HEADER)
    (tmp_path / "entry.json").write_text(content)
    with pytest.raises(nncf.ValidationError, match=r"entry.json is damaged \(.*Delete it"):
        journal.read("entry.json", read_json)
    (tmp_path / "journal.json").write_text(content)
    with pytest.raises(nncf.ValidationError, match="journal.json is damaged"):
        Journal(tmp_path, "search", HEADER)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(nncf.ValidationError, match="neither a journal of an earlier search nor an empty"):
            Journal(place, "search", HEADER)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len([*tmp_path.iterdir()]) == 1


def test_a_missing_step_of_a_search_is_done_again(tmp_path):
    """What was deleted, and what came after it, is searched for once more; a damaged step is refused by name."""

    def shed():
        return nncf_ext.structure_plan(
            nncf_ext.compress(
                make("mamba2"),
                CompressMode.MAMBA_SHEDDER,
                ratio=0.0,
                dataset=nncf.Dataset([{"input_ids": tokens()}]),
                resume=tmp_path,
                advanced_parameters=AdvancedMambaShedderParameters(stages=[PruningStage(("ssm",), 3)]),
            )
        )

    expected = shed()
    (tmp_path / "plan.00002.json").unlink()
    assert shed() == expected
    (tmp_path / "scores.00003.json").unlink()
    assert shed() == expected
    (tmp_path / "scores.00003.json").write_text("{torn")
    with pytest.raises(nncf.ValidationError, match=r"scores.00003.json is damaged"):
        shed()
    header = json.loads((tmp_path / "journal.json").read_text())
    assert header["version"] == 1 and header["ratio"] == 0.0
