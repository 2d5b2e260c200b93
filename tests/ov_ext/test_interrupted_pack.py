"""`ov-ext pack` ended by a signal while it writes: OUT is the old folder or the complete new one, never half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ov_ext
from ov_ext import cli, drafts
from ov_ext.folder import whole_folder, write_whole
from tests.ov_ext.ir_forms import Form, build

pytestmark = pytest.mark.slow

# A job started in the background may inherit that SIGINT is ignored.
PACK = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ov_ext.cli import app; app()"


def draft(out: Path) -> Path | None:
    return next(iter(out.parent.glob(f".{out.name}.draft-*/{out.name}")), None)


def files_in(folder: Path | None) -> list[str]:
    """Names at any depth; os.walk does not mind folders that vanish meanwhile."""
    return [name for _, _, names in os.walk(folder) for name in names] if folder else []


# When to interrupt: is the moment there?
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the folder aside appears": lambda out: draft(out) is not None,
    "the first IR is being written": lambda out: any(name.endswith(".bin") for name in files_in(draft(out))),
    "the first IR is complete": lambda out: "openvino_model.xml" in files_in(draft(out)),
    "other files are being copied": lambda out: any(name.startswith("note") for name in files_in(draft(out))),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and enough small files that copying them takes a moment."""
    folder = tmp_path_factory.mktemp("interrupted") / "in"
    folder.mkdir()
    ov_ext.save_model(build(Form("f32"), n=512).model, folder / "openvino_model.xml")
    for i in range(1000):
        (folder / f"note{i}.txt").write_text("kept")
    return folder


@pytest.fixture(scope="module")
def complete(source: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    out = source.parent / "complete"
    assert CliRunner().invoke(cli.app, ["pack", str(source), str(out)]).exit_code == 0
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_no_half_folder(
    source: Path, complete: dict[str, bytes], tmp_path: Path, number: signal.Signals, moment: str, overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "old.xml").write_text("an older model")
    before = contents(out) if overwrite else None
    command = [sys.executable, "-c", PACK, "pack", str(source), str(out), *(["--overwrite"] if overwrite else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not MOMENTS[moment](out):
            time.sleep(0.0005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), errors  # it was interrupted
    after = contents(out) if out.exists() else None
    assert after == before or after == complete
    litter = [path.name for path in tmp_path.iterdir() if path != out]
    if number == signal.SIGINT:
        assert not litter and "Traceback" not in errors
    else:  # what stays is hidden, so no tool takes it for a model folder, and the next run removes it
        assert all(name.startswith(".out.") for name in litter)
        again = ["pack", str(source), str(out), *(["--overwrite"] if overwrite else [])]
        assert CliRunner().invoke(cli.app, again).exit_code == 0 and contents(out) == complete
        assert [*tmp_path.iterdir()] == [out]


def test_an_interrupt_between_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two folders in one step."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.xml").write_text("old")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == out and (self / "model.xml").read_text() == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(drafts, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(out, overwrite=True) as folder:
        (folder / "model.xml").write_text("new")
    assert contents(out) == {"model.xml": b"old"} and [*tmp_path.iterdir()] == [out]


def test_a_report_is_whole_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    write_whole(report, "old")

    def half(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(report, "the new report")
    assert report.read_text() == "old" and [*tmp_path.iterdir()] == [report]
