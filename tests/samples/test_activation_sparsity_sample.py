"""samples/09_activation_sparsity.py on the committed model, shortened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"

pytestmark = pytest.mark.slow


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    short = ["--windows", "1", "--length", "96", "--held-out", "3", "--share", "0.3", "--share", "0.6"]
    command = [sys.executable, str(SAMPLES / "09_activation_sparsity.py"), *short, "--out", str(out)]
    arms = [word for word in words if word[0].isalpha()]
    command += [word for arm in arms for word in ("--arm", arm)] + [word for word in words if word not in arms]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_more_skipped_weights_cost_more_and_finished_parts_are_kept(tmp_path: Path) -> None:
    arms = ("CATS", "SCAP", "with column norms and means")
    done = run(tmp_path, *arms)
    assert not done.returncode, done.stderr
    number = r"([+-]\d\.\d{3}) ±\d\.\d{3}"
    for arm in arms:
        rows = re.findall(rf"│ {arm}\s+│\s+{number} │\s+{number} │\s+\d+% │", done.stdout)
        assert rows and all(-0.05 < float(few) < float(many) < 1.0 for few, many in rows[-1:]), done.stdout
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(kept) == 1 + 2 * len(arms) and (tmp_path / "English.png").stat().st_size > 10_000
    assert not run(tmp_path, *arms).returncode
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == kept


def test_an_arm_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "TEAL")
    assert done.returncode == 2 and "TEAL" in done.stderr and "Traceback" not in done.stderr


def test_a_share_that_not_all_can_have_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "SCAP", "--share", "0.9")
    assert done.returncode == 2 and "0.1 to 0.66" in done.stderr and "Traceback" not in done.stderr
