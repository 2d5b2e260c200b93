"""samples/06_sparse_steps.py: what it prints, what it keeps, what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"
SHORT = ("--windows", "2", "--length", "64", "--held-out", "2", "--text", "python")

pytestmark = pytest.mark.slow


def run(out: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    chosen = [word for step in steps for word in ("--step", step)]
    command = [sys.executable, str(SAMPLES / "06_sparse_steps.py"), *SHORT, "--out", str(out), *chosen]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_run_prints_each_step_and_goes_on_from_what_it_kept(tmp_path: Path) -> None:
    done = run(tmp_path, "magnitude", "ADMM, INT4")
    assert not done.returncode, done.stderr
    number = r"[+-]\d\.\d{3}"
    for step in ("magnitude", "ADMM, INT4"):
        assert re.search(rf"{step}\s+│ {number} \({number} – {number}\) │ {number} ", done.stdout), done.stdout
    kept = {file.stem.rsplit("-2-", 1)[1]: file for file in tmp_path.glob("*.json")}
    assert set(kept) == {"dense", "magnitude", "ADMM--INT4"}
    content = json.loads(kept["magnitude"].read_text())
    kept["magnitude"].write_text(json.dumps(content | {"seconds": 5400.0}))
    assert re.search(r"magnitude .* 90\.0 │", run(tmp_path, "magnitude").stdout)  # not measured again


def test_a_step_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "ADMM, INT3")
    assert done.returncode == 2 and "ADMM, INT3" in done.stderr and "Traceback" not in done.stderr
