"""What the documents promise: links that lead somewhere, lines one can read, and an example that runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("benchmarks", "docs", "nncf_ext", "ov_ext", "samples", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.md"))])
GENERATED = ROOT / "samples" / "assets"
LONGEST_LINE = 200


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [each for each in DOCUMENTS if GENERATED not in each.parents], ids=relative)
def test_no_line_is_too_long(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [link for link in links if link and "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_python_blocks_parse(path: Path) -> None:
    for block in python_blocks(path):
        ast.parse(block)


def output(program: str, folder: Path) -> str:
    """What a program prints that runs in a folder with the assets of the samples."""
    (folder / "samples").mkdir()
    (folder / "samples" / "assets").symlink_to(ROOT / "samples" / "assets")
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout


@pytest.mark.slow
def test_the_example_of_recovery_recovers(tmp_path: Path) -> None:
    (example,) = [block for block in python_blocks(ROOT / "nncf_ext" / "README.md") if "DistillationTrainer" in block]
    printed = output(example, tmp_path)
    (found,) = re.findall(r"dense (\S+), sparse (\S+), after (\S+)$", printed, re.MULTILINE)
    dense, sparse, after = map(float, found)
    assert dense < after < sparse - 0.2 * (sparse - dense)
    assert "int4 " in printed and (tmp_path / "samples" / "out" / "recovered" / "config.json").is_file()


@pytest.mark.slow
def test_the_complete_example_runs(tmp_path: Path) -> None:
    (example,) = python_blocks(ROOT / "README.md")
    printed = output(example, tmp_path)
    assert "of 44 weights packed" in printed  # how many depends on the CPU
    assert "def read_file(path):" in printed
    assert (tmp_path / "samples" / "out" / "readme" / "openvino_model.bin").is_file()


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "assets").symlink_to(ROOT / "samples" / "assets")
    blocks = re.findall(
        r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (commands,) = blocks
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-euc", commands]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    assert "weights packed" in done.stdout and done.stdout.splitlines()[-1].strip()
    sizes = {
        name: sum(each.stat().st_size for each in (tmp_path / "samples" / "out" / name).iterdir())
        for name in ("smaller", "packed")
    }
    assert (
        sizes["packed"]
        < sizes["smaller"]
        < sum(each.stat().st_size for each in (ROOT / "samples/assets/tiny_lm").iterdir())
    )
