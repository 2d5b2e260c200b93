"""The journal of resumable runs: whole entries, one run a folder, and errors that name the file."""

import json
import os
import shutil

import nncf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import nncf_ext
from nncf_ext import AdvancedMambaShedderParameters, AdvancedSparseWeightsParameters, CompressMode, PruningStage
from nncf_ext.algorithms.sparse_weights.units import FinishedUnits, LayerResult
from nncf_ext.journal import Journal, read_json
from nncf_ext.weights.records import LayerRecord
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


@pytest.mark.parametrize("content", ["torn{", "[1]", "3", "[" * 100_000, "\xff"])
def test_damaged_files_are_named(tmp_path, content):
    journal = Journal(tmp_path, "search", HEADER)
    journal.write("entry.json", lambda aside: aside.write_bytes(content.encode("latin1")))
    with pytest.raises(nncf.ValidationError, match=r"entry.json is damaged \(.*Delete it"):
        journal.read("entry.json", read_json)
    (tmp_path / "journal.json").write_bytes(content.encode("latin1"))
    with pytest.raises(nncf.ValidationError, match="journal.json is damaged"):
        Journal(tmp_path, "search", HEADER)


def test_entries_are_sealed(tmp_path):
    """An entry is read if its name, its bytes and the run are those that it was written with, or not at all."""
    journal = Journal(tmp_path / "one", "search", HEADER)
    for name, text in (("a.txt", "same"), ("b.txt", "same")):
        journal.write(name, lambda aside, text=text: aside.write_text(text))
    other = Journal(tmp_path / "other", "search", {**HEADER, "ratio": 0.6})
    for name in ("a.txt", "a.txt.sha256"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "other" / name)
    shutil.copy(tmp_path / "one/a.txt.sha256", tmp_path / "one/b.txt.sha256")
    (tmp_path / "one/c.txt").write_text("not finished")
    assert journal.names("*.txt") == ["a.txt", "b.txt"]
    assert journal.read("c.txt", lambda path: path.read_text()) is None
    assert journal.read("a.txt", lambda path: path.read_text()) == "same"
    for each, name in ((other, "a.txt"), (journal, "b.txt")):
        with pytest.raises(nncf.ValidationError, match=f"{name} is damaged .*those that were written.*Delete it"):
            each.read(name, lambda path: path.read_text())
    (tmp_path / "one/b.txt").unlink()
    assert journal.read("b.txt", lambda path: path.read_text()) is None
    journal.write("b.txt", lambda aside: aside.write_text("again"))
    assert journal.read("b.txt", lambda path: path.read_text()) == "again"


def test_journals_without_seals_are_refused(tmp_path):
    Journal(tmp_path, "search", HEADER)
    header = json.loads((tmp_path / "journal.json").read_text())
    (tmp_path / "journal.json").write_text(json.dumps({**header, "version": 1}))
    with pytest.raises(
        nncf.ValidationError, match=r"journal of version 1; this release continues version 2.*new folder"
    ):
        Journal(tmp_path, "search", HEADER)


def test_a_kill_before_the_header_leaves_a_folder_that_can_be_used(tmp_path):
    draft = tmp_path / ".journal.json.draft-0123abcd"
    draft.mkdir()
    (draft / "journal.json").write_text('{"vers')
    Journal(tmp_path, "search", HEADER).write("a.txt", lambda aside: aside.write_text("a"))
    assert Journal(tmp_path, "search", HEADER).names("*.txt") == ["a.txt"]


def test_drafts_of_a_killed_run_are_looked_for_once(tmp_path, monkeypatch):
    """Not at each entry: then a search of thousands of trials would list thousands of files for each."""
    Journal(tmp_path, "search", HEADER)
    for name in ("a.txt", "a.txt.sha256", "never written again.txt"):
        (tmp_path / f".{name}.draft-0123abcd").mkdir()
    journal = Journal(tmp_path, "search", HEADER)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]
    listed = []
    for function in ("listdir", "scandir"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda path=".", real=real: (listed.append(path), real(path))[1])
    journal.write("a.txt", lambda aside: aside.write_text("a"))
    assert not [path for path in listed if not isinstance(path, int) and os.path.samefile(path, tmp_path)]
    assert journal.names("*.txt") == ["a.txt"]


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(nncf.ValidationError, match="neither a journal of an earlier search nor an empty"):
            Journal(place, "search", HEADER)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len([*tmp_path.iterdir()]) == 1


def shed(folder):
    return nncf_ext.structure_plan(
        nncf_ext.compress(
            make("mamba2"),
            CompressMode.MAMBA_SHEDDER,
            ratio=0.0,
            dataset=nncf.Dataset([{"input_ids": tokens()}]),
            resume=folder,
            advanced_parameters=AdvancedMambaShedderParameters(stages=[PruningStage(("ssm",), 2)]),
        )
    )


def test_a_missing_step_of_a_search_is_done_again(tmp_path):
    """What was deleted, and what came after it, is searched for once more; a damaged step is refused by name."""
    expected = shed(tmp_path)
    (tmp_path / "plan.00001.json").unlink()
    assert shed(tmp_path) == expected
    (tmp_path / "scores.00002.json").unlink()
    assert shed(tmp_path) == expected
    (tmp_path / "scores.00002.json").write_text("{torn")
    with pytest.raises(nncf.ValidationError, match=r"scores.00002.json is damaged"):
        shed(tmp_path)
    header = json.loads((tmp_path / "journal.json").read_text())
    assert header["version"] == 2 and header["ratio"] == 0.0


@pytest.fixture
def sparse_gpt(tiny_llama, token_dataset):
    def run(folder):
        parameters = AdvancedSparseWeightsParameters(quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64)
        model = nncf_ext.compress(
            tiny_llama(hidden_size=64, intermediate_size=64),
            CompressMode.SPARSE_GPT,
            ratio=0.5,
            dataset=token_dataset,
            resume=folder,
            advanced_parameters=parameters,
        )
        return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}

    return run


@pytest.mark.parametrize("run", ["shed", "sparse_gpt"])
def test_no_flipped_bit_gives_another_result(tmp_path, request, run):
    """Every file of a finished run, one bit at a time, from its first byte to its last."""
    run = shed if run == "shed" else request.getfixturevalue(run)
    run(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 5
    for path in files:
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *range(3, len(whole), max(1, len(whole) // 12))}:
            torn = bytearray(whole)
            torn[place] ^= 1 << place % 8
            path.write_bytes(torn)
            with pytest.raises(nncf.ValidationError, match=r"Delete it|[Nn]ame a new folder") as refused:
                run(tmp_path)
            assert str(tmp_path) in str(refused.value)
        path.write_bytes(whole)


@pytest.mark.parametrize("run", ["shed", "sparse_gpt"])
def test_killed_at_any_file_it_continues_to_the_same_end(tmp_path, request, run, monkeypatch):
    """A copy of the folder before and after each rename is what a kill at that moment leaves."""
    run = shed if run == "shed" else request.getfixturevalue(run)
    states, replace = [], os.replace

    def copying(source, target):
        for moment in (lambda: None, lambda: replace(source, target)):
            moment()
            states.append(shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(states)}"))

    with monkeypatch.context() as patch:
        patch.setattr("nncf_ext.drafts.os.replace", copying)
        expected = run(tmp_path / "run")
    assert len(states) >= 10
    for state in states:
        assert run(state) == expected


def stored(folder, **changes):
    """A unit of one layer ``[4, 64]`` with codes and scales, some of its tensors replaced; None leaves one out."""
    codes = torch.arange(256).reshape(4, 64).remainder(16).sub(8).to(torch.int8)
    scales = torch.tensor([[0.5], [0.25], [1.0], [2.0]], dtype=torch.float16)
    weight = codes.float() * scales.float()
    units = FinishedUnits(Journal(folder, "compression", {}))
    units.store("unit", {"layer": LayerResult(weight, codes, scales, LayerRecord("sparse_gpt"))}, {"layer": weight})
    (name,) = Journal(folder, "compression", {}).names("unit-*")
    with safe_open(folder / name, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors = {key: each for key, each in (tensors | changes).items() if each is not None}
    Journal(folder, "compression", {}).write(name, lambda aside: save_file(tensors, aside, metadata=metadata))
    return units, weight


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layer.scales": torch.ones(1, 1, dtype=torch.float16)}, r"scales are \[1, 1\].*where \[4, groups\]"),
        ({"layer.scales": torch.ones(4, dtype=torch.float16)}, r"scales are \[4\]"),
        ({"layer.scales": torch.ones(4, 0, dtype=torch.float16)}, r"scales are \[4, 0\]"),
        ({"layer.scales": torch.ones(4, 1)}, r"scales are \[4, 1\] torch.float32"),
        ({"layer.scales": torch.ones(4, 1, dtype=torch.float16)}, "codes and scales do not give its weight"),
        ({"layer.scales": None}, "codes without scales"),
        ({"layer.codes": None}, "scales without codes"),
        ({"layer.codes": torch.zeros(4, 64)}, r"codes is \[4, 64\] torch.float32"),
        ({"layer.codes": torch.zeros(4, 1, dtype=torch.int8)}, r"codes is \[4, 1\]"),
        ({"layer.prerounding": torch.zeros(64)}, r"prerounding is \[64\]"),
    ],
)
def test_units_that_do_not_fit_the_layer_are_refused(tmp_path, changes, text):
    """Sealed, so made by some run; but nothing of another shape is broadcast onto a layer."""
    units, weight = stored(tmp_path)
    assert torch.equal(units.load("unit", {"layer": weight}, original=False)["layer"].weight, weight)
    units, weight = stored(tmp_path, **changes)
    with pytest.raises(nncf.ValidationError, match=f"does not fit layer: .*{text}.*Delete it"):
        units.load("unit", {"layer": weight}, original=False)


def test_a_resumed_run_reads_each_entry_once(tmp_path):
    _, weight = stored(tmp_path)
    reads = []

    class Counting(Journal):
        def read(self, name, reader):
            reads.append(name)
            return super().read(name, reader)

    units = FinishedUnits(Counting(tmp_path, "compression", {}))
    assert units.layers() == {"layer"}
    assert torch.equal(units.load("unit", {"layer": weight}, original=False)["layer"].weight, weight)
    assert len(reads) == 1
    units.store("unit", {"layer": LayerResult(2 * weight, None, None, LayerRecord("sparse_gpt"))}, {"layer": weight})
    assert torch.equal(units.load("unit", {"layer": weight}, original=False)["layer"].weight, 2 * weight)
