"""samples/13_accuracy_control.py from one end to the other, on the committed model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.slow
def test_a_quick_run_shows_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "13_accuracy_control.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    rows = json.loads((tmp_path / "tiny_lm-quick" / "record.json").read_text())
    for share in ("INT8", "100% INT4"):
        stock, ours = rows[f"NNCF {share}"], rows[f"ours, {share}"]
        assert 0 < ours[0] <= stock[0] and all(each > 0 for each in (*stock, *ours))
        assert f"NNCF {share}" in done.stdout
    assert rows["NNCF 100% INT4"][1] < rows["NNCF INT8"][1]
    assert (tmp_path / "tiny_lm-quick" / "front.png").stat().st_size > 1000
