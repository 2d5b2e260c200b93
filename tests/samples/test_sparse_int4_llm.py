"""The demo, run as a user runs it, shortened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SAMPLE = Path(__file__).parents[2] / "samples" / "01_sparse_int4_llm.py"


def test_the_demo_prints_its_table(tmp_path: Path) -> None:
    (tmp_path / "out" / "mine").mkdir(parents=True)
    command = [sys.executable, str(SAMPLE), "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    number = r"[\d.]+"
    rows = re.findall(
        rf"│ ((?:dense|stock|sparse)-\w+)\s+│\s+({number}) │\s+({number}) │\s+({number}) │\s+({number}) │ (.+?)\s+│",
        done.stdout,
    )
    table = {name: (float(disk), float(perplexity), kernel) for name, disk, _, perplexity, _, kernel in rows}
    assert list(table) == ["dense-bf16", "stock-int8", "stock-int4", "sparse-int4"]
    # Where the dense form is the faster one (AVX2), the packed model may be larger, as far as the policy allows.
    assert table["sparse-int4"][0] <= 1.02 * table["stock-int4"][0] < table["stock-int8"][0] < table["dense-bf16"][0]
    assert table["sparse-int4"][1] < 1.15 * table["dense-bf16"][1]
    assert table["sparse-int4"][2].startswith("ours") and table["stock-int4"][2] == "OpenVINO"
    assert "benchmarks.decode" in done.stdout
    assert (tmp_path / "out" / "mine").is_dir()  # a folder the user named keeps what is not the sample's
