"""samples/10_sparse_attention.py on the committed model, shortened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.slow
def test_more_pruned_costs_more_and_finished_parts_are_kept(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "10_sparse_attention.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    for values in ("int8", "int4"):
        cells = re.findall(rf"{values}, (\d+)%.*?([+-]\d+\.\d+)% │\s+\d of 6", done.stdout)
        found = {int(level): float(loss) for level, loss in cells}
        assert list(found) == [0, 30, 50, 70, 90] and abs(found[0]) < 0.5 < found[90], done.stdout
    assert "with the fewest bytes" in done.stdout or "No level is below" in done.stdout
    (file,) = tmp_path.glob("*.json")
    kept, before = json.loads(file.read_text()), file.stat().st_mtime_ns
    assert len(kept["loss 0 160 dense 0 0"]) == 47 and (tmp_path / "tiny_lm.png").stat().st_size > 10_000
    again = subprocess.run([*command, "--within", "0.03"], capture_output=True, text=True, timeout=300)
    assert not again.returncode and "found within 0.03" in again.stdout, again.stdout + again.stderr
    assert file.stat().st_mtime_ns == before
