"""samples/09_activation_sparsity.py on the committed model and on a small encoder, shortened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

SAMPLES = Path(__file__).parents[2] / "samples"

pytestmark = pytest.mark.slow


def run(out: Path, *words: str, arms: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    short = ["--windows", "1", "--length", "96", "--held-out", "3", "--share", "0.3", "--share", "0.6"]
    command = [sys.executable, str(SAMPLES / "09_activation_sparsity.py"), *short, "--out", str(out), *words]
    command += [word for arm in arms for word in ("--arm", arm)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_more_skipped_weights_cost_more_and_finished_parts_are_kept(tmp_path: Path) -> None:
    arms = ("CATS", "NNCF", "SCAP", "SCAP, allocated greedily")
    done = run(tmp_path, arms=arms)
    assert not done.returncode, done.stderr
    number = r"([+-]\d\.\d{3}) ±\d\.\d{3} at (\d+\.\d)%"
    for arm in arms:
        rows = re.findall(rf"│ {arm}\s+│\s+{number} │\s+{number} │\s+\d+% │", done.stdout)
        few, first, many, second = map(float, rows[-1])
        assert -0.05 < few < many < 1.0 and abs(first - 30) < 3 and abs(second - 60) < 3, done.stdout
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(kept) == 1 + 2 * len(arms) and (tmp_path / "English.png").stat().st_size > 10_000
    assert not run(tmp_path, arms=arms).returncode
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == kept


def test_an_arm_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, arms=("TEAL",))
    assert done.returncode == 2 and "TEAL" in done.stderr and "Traceback" not in done.stderr


def test_a_share_that_not_all_can_have_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--share", "0.9", arms=("SCAP",))
    assert done.returncode == 2 and "0.1 to 0.75" in done.stderr and "Traceback" not in done.stderr


def test_centres_are_compared_on_an_encoder(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{x}" for x in "aeiou")]
    tokenizer = transformers.BertTokenizerFast(vocab={word: place for place, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), initializer_range=0.3, **sizes))
    with torch.no_grad():
        for layer in model.encoder.layer:  # GELU piles up below zero
            layer.intermediate.dense.bias.sub_(1.0)
    model.save_pretrained(tmp_path / "bert")
    done = run(tmp_path, str(tmp_path / "bert"), arms=("zero", "mode (SCAP)"))
    assert not done.returncode, done.stderr
    zero, mode = (
        [float(each) for each in re.findall(rf"│ {arm} +│ +(0\.\d+)[^│]*│ +(0\.\d+)[^│]*│", done.stdout)[0]]
        for arm in ("zero", r"mode \(SCAP\)")
    )
    assert mode[0] <= zero[0] and 0 < mode[1] < zero[1], done.stdout  # at the first share both round to little
    assert (tmp_path / "centres.png").stat().st_size > 10_000
