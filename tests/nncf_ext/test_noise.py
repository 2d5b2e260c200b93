"""What the commands say on stderr: their own lines, and of the libraries below them only what was asked for."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nncf
import peft
import pytest

import nncf_ext
from nncf_ext.noise import own_lines

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) \S")


def command(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs it as a shell does, both outputs into pipes; the environment without switches that silence libraries."""
    known = ("VERBOSITY", "DISABLE_PROGRESS", "TORCH_", "PYTHONWARNINGS", "CI")
    environment = {name: value for name, value in os.environ.items() if not any(word in name for word in known)}
    path = Path(sys.executable).with_name(program)
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_compress_says_its_own_lines_only(folder: Path, tmp_path: Path) -> None:
    text = ("--dataset", tmp_path / "text.txt", "--window", "32", "--samples", "4", "--ratio", "0.5")
    done = command("nncf-ext", "compress", folder, tmp_path / "small", *text, "--quantization", "int4_sym")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(LINE.match(line) for line in lines), done.stderr
    assert [line.partition("INFO ")[2].partition(",")[0] for line in lines] == [
        "Applying sparse_admm: 1 of 2",
        "Applying sparse_admm: 2 of 2",
    ]
    assert done.stdout.lstrip().startswith("Compression report") and "q_proj" not in done.stdout


@pytest.mark.slow
def test_export_and_unpack_say_their_own_lines_only(folder: Path, tmp_path: Path, token_dataset: nncf.Dataset) -> None:
    """Tracing, NNCF's own compression of the rest, packing, and a tokenizer that OpenVINO cannot convert."""
    model = nncf_ext.compress(
        nncf_ext.load_pretrained(folder),
        nncf_ext.CompressMode.SPARSE_MAGNITUDE,
        ratio=0.5,
        dataset=token_dataset,
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(quantization=nncf.CompressWeightsMode.INT4_SYM),
    )
    nncf_ext.save_pretrained(model, tmp_path / "small")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "small")
    done = command("nncf-ext", "export", tmp_path / "small", tmp_path / "ir", "--pack")
    assert done.returncode == 0 and done.stdout.lstrip().startswith("Packed weights"), done.stderr
    (line,) = done.stderr.splitlines()
    assert LINE.match(line) and "OpenVINO cannot convert" in line
    done = command("ov-ext", "unpack", tmp_path / "ir", tmp_path / "stock")
    assert done.returncode == 0 and done.stdout.startswith("Restored"), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Warning: OpenVINO cannot convert")


@pytest.mark.slow
def test_search_says_its_own_lines_only(folder: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(nncf_ext.load_pretrained(folder), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    text = (
        "--dataset",
        tmp_path / "text.txt",
        "--window",
        "32",
        "--samples",
        "2",
        "--storage",
        tmp_path / "journal.log",
    )
    ranks = ("--adapter", tmp_path / "adapter", "--ranks", "4,2", "--budget", "2")
    done = command("nncf-ext", "search", folder, tmp_path / "report.json", *ranks, *text)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert all(LINE.match(line) and "2 of 2" in line for line in done.stderr.splitlines()[1:]), done.stderr


@pytest.mark.slow
def test_verbose_shows_what_libraries_say(folder: Path, tmp_path: Path) -> None:
    done = command("nncf-ext", "-v", "compress", folder, tmp_path / "small", "--mode", "sparse_magnitude")
    assert done.returncode == 0 and "Loading weights" in done.stderr, done.stderr
    assert "model.layers.0.self_attn.q_proj.weight" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--verbose",)], ids=["plain", "verbose"])
def test_verbose_shows_where_an_error_came_from(options: tuple[str, ...], tmp_path: Path) -> None:
    done = command("nncf-ext", *options, "extract", tmp_path, tmp_path / "small")
    assert done.returncode == 2 and "Say what to extract" in done.stderr
    assert ("Traceback" in done.stderr) == bool(options)


@pytest.mark.parametrize("arguments", [("nncf-ext", "--version"), ("ov-ext", "info")], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program, *rest = arguments
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, *rest], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.stderr == ""


def test_while_a_command_runs_libraries_say_errors_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setenv("TORCH_LOGS", "+dynamo")  # the user's own
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    levels = [logging.getLogger(name).level for name in ("root", "nncf_ext", "ov_ext")]
    with own_lines(verbose=False):
        assert (os.environ["TORCH_LOGS"], os.environ["TRANSFORMERS_VERBOSITY"]) == ("+dynamo", "error")
        for name in ("library", "nncf_ext", "ov_ext"):
            logging.getLogger(name).warning("a word of %s", name)
            logging.getLogger(name).debug("a detail of %s", name)
        warnings.warn("a warning", stacklevel=1)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("WARNING ")[2] for line in said] == ["a word of nncf_ext", "a word of ov_ext"]
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    assert [logging.getLogger(name).level for name in ("root", "nncf_ext", "ov_ext")] == levels
    with own_lines(verbose=True), pytest.warns(UserWarning, match="a warning"):
        assert "TRANSFORMERS_VERBOSITY" not in os.environ
        logging.getLogger("ov_ext").debug("a detail")
        warnings.warn("a warning", stacklevel=1)
    assert capsys.readouterr().err.endswith("DEBUG a detail\n")


def test_a_terminal_has_bars_in_place_of_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        context = own_lines(verbose=False)
        context.__enter__()
    logging.getLogger("nncf_ext").info("1 of 2")
    logging.getLogger("nncf_ext").warning("Interrupted")
    context.__exit__(None, None, None)
    assert capsys.readouterr().err.endswith("WARNING Interrupted\n") and "1 of 2" not in capsys.readouterr().err
