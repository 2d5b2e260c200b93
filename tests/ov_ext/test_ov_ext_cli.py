"""`ov-ext`: complete folders, written whole or not at all; mistakes in one line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import openvino as ov
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import nncf_ext
import ov_ext
from nncf_ext.cli import app as nncf_ext_app
from ov_ext import cli, extension
from ov_ext.decode import measure
from ov_ext.folder import FolderExistsError, whole_folder
from ov_ext.sparse_weights.report import LayerReport
from tests.killing import largest_file
from tests.ov_ext.ir_forms import Form, build, signature

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


PACKS = ("--target", "amx")  # the first IR of the folder, whatever CPU this is


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two IRs (the second dense), files of other kinds, a sub-folder; no tokenizer."""
    source = tmp_path / "in"
    (source / "assets").mkdir(parents=True)
    ov_ext.save_model(build(Form("i4", 128, bias="f32"), n=128).model, source / "openvino_model.xml")
    ov_ext.save_model(build(Form("i8"), n=128, sparsity=0.1).model, source / "openvino_vision.xml")
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "assets" / "note.txt").write_text("kept")
    return source


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_info() -> None:
    result = run("info", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0 and facts["extension"] == "ok" and facts["kernels"][-1] == "reference"
    assert {"features", "amx_permission", "selected", "openvino", "built_for"} <= facts.keys()
    assert facts["nncf_ext"] == version("nncf-ext") and (facts["format"], facts["format_version"]) == ("SPW1", 1)
    assert facts["choice"].keys() == {"bf16", "int8", "int4"}
    for kernels in facts["choice"].values():  # [first number of rows, kernel]
        assert kernels[0][0] == 1 and all(name in facts["kernels"] for _, name in kernels)
    text = run("info").stdout
    assert "kernels for int4" in text and facts["choice"]["int4"][0][1] in text


def test_info_explains_a_wrong_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "built_for", lambda: "2025.9.9")
    result = run("info", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 1 and "built for OpenVINO 2025.9.9" in facts["extension"] and facts["nncf_ext"]


def test_versions_and_completion() -> None:
    for command, app, package in (("ov-ext", cli.app, ov_ext), ("nncf-ext", nncf_ext_app, nncf_ext)):
        result = CliRunner().invoke(app, ["--version"])
        assert result.exit_code == 0 and result.stdout == f"{command} {version('nncf-ext')}\n"
        assert package.__version__ == version("nncf-ext")
        assert "--install-completion" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160"}).stdout


def test_nothing_is_cut_or_wrapped_without_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ov_ext.save_model(build(Form("i4", 128), n=128).model, tmp_path / "in" / "openvino_model.xml")
    narrow = {"COLUMNS": "40"}
    assert f"{extension.extension_path()}\n" in CliRunner().invoke(cli.app, ["info"], env=narrow).stdout
    packed = CliRunner().invoke(
        cli.app, ["pack", str(tmp_path / "in"), str(tmp_path / "out"), "-v", *PACKS], env=narrow
    )
    (name,) = [
        node.get_friendly_name()
        for node in ov.Core().read_model(tmp_path / "in" / "openvino_model.xml").get_ops()
        if node.get_type_name() == "MatMul"
    ]
    (row,) = [line for line in packed.stdout.splitlines() if f" {name} " in line]
    assert "128x" in row and "int4_sym" in row and "sparse" in row


def test_pack_prints_a_summary_and_layers_on_demand(folder: Path, tmp_path: Path) -> None:
    short = run("pack", folder, tmp_path / "short", "--target", "amx").stdout
    options = ("--verbose", "--target", "amx", "--report", tmp_path / "report.json")
    long = run("pack", folder, tmp_path / "long", *options).stdout
    layers = json.loads((tmp_path / "report.json").read_text())["openvino_model.xml"]["layers"]
    name = f" {layers[0]['name']} "
    assert len(layers) == 1 and name in long and name not in short
    assert "1 of 1 weights packed" in short and "1 of 1 weights packed" in long and "zeros would give" in short
    summary = ov_ext.PackReport(
        (
            LayerReport("a", (64, 64), "int4_sym", 0.5, 2 << 20, 1 << 20, "sparse", speedup=1.25),
            LayerReport("b", (64, 64), "int4_sym", 0.75, 2 << 20, 1 << 19, "sparse", speedup=1.5),
            LayerReport("c", (64, 64), "f32", None, 1 << 20, 1 << 20, "stock", note="cannot be read"),
            LayerReport("d", (64, 64), "f32", None, 1 << 20, 1 << 20, "stock", note="too small"),
        ),
        "avx2",
        activation_group=0,
        workload=ov_ext.Workload(),
        costs="times from nowhere",
        model_bytes_before=7 << 20,
        model_bytes_after=9 << 19,
    ).summary()
    text = io.StringIO()
    Console(file=text, width=200).print(summary)
    rows = [line.split() for line in text.getvalue().replace("│", "").splitlines()]
    assert ["int4_sym", "sparse", "2", "50%", "-", "75%", "4.0", "1.5", "1.25", "-", "1.50"] in rows
    assert ["f32", "stock", "2", "2.0", "2.0", *"cannot be read (and 1 other notes)".split()] in rows
    assert rows[-3] == "2 of 4 weights packed: 6.0 -> 3.5 MiB, the whole model 7.0 -> 4.5 MiB".split()
    assert rows[-2] == "expected: ? -> ? ms for 1 token; times from nowhere".split()
    assert rows[-1] == "Nothing is known about the speed of these layers on this target.".split()


def test_pack_and_unpack(folder: Path, tmp_path: Path, core: ov.Core) -> None:
    packed = run("pack", folder, tmp_path / "packed", "--target", "amx", "--report", tmp_path / "report.json")
    assert packed.exit_code == 0, packed.output
    assert "1 of 1 weights packed" in packed.stdout and "11% zeros would give" in packed.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    forms = [report[name]["layers"][0]["form"] for name in ("openvino_model.xml", "openvino_vision.xml")]
    assert forms == ["sparse", "stock"]
    before, after = files(folder), files(tmp_path / "packed")
    assert before.keys() | {"README.md"} == after.keys()  # the card
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"openvino_model.xml", "openvino_model.bin"}  # what needs no change is copied byte by byte

    restored = run("unpack", tmp_path / "packed", tmp_path / "restored")
    assert restored.exit_code == 0 and "Restored openvino_model.xml" in restored.stdout
    name = "openvino_model.xml"
    assert signature(core.read_model(tmp_path / "restored" / name)) == signature(core.read_model(folder / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "packed", "report.json", "restored"]


def test_options_reach_the_policy(folder: Path, tmp_path: Path, core: ov.Core) -> None:
    options = ("--activation-group", "-1", "--target", "avx2", "--min-sparsity", "0.05", "--max-growth", "9")
    assert run("pack", folder, tmp_path / "out", *options).exit_code == 0
    for name in ("openvino_model.xml", "openvino_vision.xml"):
        model = core.read_model(tmp_path / "out" / name)
        assert model.get_rt_info(["ov_ext", "target"]).value == "avx2"
        sparse = next(node for node in model.get_ops() if node.get_type_name() == "SparseMatMul")
        assert sparse.get_attributes()["activation_group"] == -1
    assert "Nothing was packed" in run("pack", folder, tmp_path / "none", "--ignore", "lay*").stdout
    assert files(tmp_path / "none") == files(folder)


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    assert run("pack", folder, tmp_path / "packed", *PACKS).exit_code == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    for arguments, message in (
        (("pack", tmp_path / "empty", tmp_path / "out"), "holds no OpenVINO model"),
        (("pack", tmp_path / "hub", tmp_path / "out"), "`nncf-ext export IN OUT` makes one"),
        (("pack", tmp_path / "nowhere", tmp_path / "out"), "holds no OpenVINO model"),
        (("pack", folder, tmp_path / "packed"), "exists. Choose another folder, or pass --overwrite"),
        (("pack", folder, tmp_path / "letters", "--overwrite"), "holds no OpenVINO model, so it is not overwritten"),
        (("pack", tmp_path / "packed", tmp_path / "out"), "1 packed weights already"),
        (("pack", folder, tmp_path / "out", "--min-sparsity", "2"), "between 0 and 1"),
        (("pack", folder, tmp_path / "out", "--target", "neon"), "got 'neon'"),
        (("generate", folder, "--prompt", "x"), "lacks openvino_tokenizer.xml"),
        (("bench", folder), "is no stateful language model"),
        (("bench", tmp_path / "empty"), "openvino_model.xml is needed"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists() and (tmp_path / "letters" / "letter.txt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no drafts left


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, MemoryError, RecursionError, AssertionError])
def test_an_error_of_any_kind_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("of all things")

    monkeypatch.setattr(cli, "pack_sparse_weights", fail)
    result = run("pack", folder, tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "of all things" in result.stderr and error.__name__.replace("Recursion", "") in result.stderr
    assert not (tmp_path / "out").exists()
    assert run("pack", folder).exit_code == 2  # typer's own errors stay as they are


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [("openvino_genai", "genai", ("generate", "--prompt", "x")), ("transformers", "optimum", ("pack", "OUT"))],
)
def test_what_is_not_installed_is_named_with_its_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, arguments: tuple[str, ...]
) -> None:
    if module == "openvino_genai":
        (folder / "openvino_tokenizer.xml").touch()
    else:
        (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, module, None)
    command, *rest = arguments
    result = run(command, folder, *(tmp_path / "out" if each == "OUT" else each for each in rest))
    assert f"{module} is not installed" in result.stderr and f"pip install 'nncf-ext[{extra}]'" in result.stderr
    assert result.exit_code == (command == "generate") and "Traceback" not in result.output


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("pack", folder, out, *PACKS).exit_code == 0
    old = files(out)
    with pytest.raises(KeyboardInterrupt), whole_folder(out, overwrite=True) as draft:
        (draft / "half.xml").write_text("half")
        assert files(out) == old
        raise KeyboardInterrupt
    assert files(out) == old
    assert run("pack", folder, out, "--overwrite", "--activation-group", "0", *PACKS).exit_code == 0
    assert files(out) != old and files(out).keys() == old.keys()
    with pytest.raises(FolderExistsError), whole_folder(tmp_path / "new") as draft:
        (draft / "a").write_text("a")
        (tmp_path / "new").mkdir()  # somebody else was faster
        (tmp_path / "new" / "b").write_text("b")
    assert files(tmp_path / "new") == {"b": b"b"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_said_with_the_path_and_what_to_do(folder: Path, tmp_path: Path) -> None:
    """OpenVINO says "iostream error" only, and leaves nothing to look at."""
    out = tmp_path / "out"
    assert run("pack", folder, out, *PACKS).exit_code == 0
    old = files(out)
    with largest_file(4096):
        result = run("pack", folder, out, "--overwrite", *PACKS)
    text = " ".join(result.output.split())
    assert result.exit_code == 1 and "File too large. Nothing was written. Free some space" in text, text
    assert str(out) in result.output.replace("\n", "") and "iostream" not in text and files(out) == old
    model = ov.Core().read_model(folder / "openvino_model.xml")
    with pytest.raises(OSError, match="Free some space") as caught, largest_file(4096):
        ov_ext.save_model(model, tmp_path / "again.xml")
    assert caught.value.filename == str(tmp_path / "again.xml")
    assert [path for path in tmp_path.iterdir() if path not in (folder, out)] == []


def test_in_place(folder: Path) -> None:
    """IN may be OUT: the IR is mapped while it is read, and replaced only at the end."""
    assert run("pack", folder, folder, "--overwrite", *PACKS).exit_code == 0
    result = run("pack", folder, folder, "--overwrite")
    assert result.exit_code == 1 and "packed weights already" in " ".join(result.output.split())


@pytest.mark.parametrize("text", ["{}", "no JSON"])
def test_a_tokenizer_that_cannot_be_converted_is_a_warning(folder: Path, tmp_path: Path, text: str) -> None:
    """The packed model is what counts; nothing half-made stays beside it."""
    (folder / "tokenizer.json").write_text(text)
    result = run("pack", folder, tmp_path / "packed", *PACKS)
    assert result.exit_code == 0 and "1 of 1 weights packed" in result.stdout
    assert "cannot be read" in result.stderr and "OpenVINO GenAI cannot read it" in result.stderr
    assert "Traceback" not in result.output
    assert files(tmp_path / "packed").keys() == files(folder).keys() | {"README.md"}


@pytest.mark.parametrize("option", ["tokens", "prompt", "rounds"])
def test_bench_refuses_nothing_to_do(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure([tmp_path / "nowhere"], **{option: 0})
    result = run("bench", tmp_path / "nowhere", f"--{option}", 0)
    assert result.exit_code == 2 and f"--{option}" in result.stderr and "Traceback" not in result.output


@pytest.mark.slow
def test_a_language_model_from_end_to_end(folders: dict[str, Path], tmp_path: Path) -> None:
    """Pack adds the tokenizer IRs that IN lacks; generate and bench run on the result."""
    source = tmp_path / "in"
    shutil.copytree(folders["int4"], source, ignore=shutil.ignore_patterns("openvino_*tokenizer*"))
    assert run("pack", source, tmp_path / "packed").exit_code == 0
    for name in ("openvino_tokenizer.xml", "openvino_detokenizer.bin", "generation_config.json"):
        assert (tmp_path / "packed" / name).exists()
    result = run("generate", tmp_path / "packed", "--prompt", "def f(x):", "--max-new-tokens", "8")
    assert result.exit_code == 0 and result.stdout.strip()
    options = ("--tokens", "4", "--prompt", "8", "--rounds", "1")
    records = json.loads(run("bench", tmp_path / "packed", "--against", source, *options, "--json").stdout)
    assert [record["folder"] for record in records] == [str(source), str(tmp_path / "packed")]
    assert records[0]["ratio"] == 1.0 and all(record["ms_per_token"] > 0 for record in records)
    assert all(record["resident_mib"] > 10 for record in records)
    assert "tokens/s" in run("bench", tmp_path / "packed", *options).stdout
