"""samples/05_real_model.py: its arms, what it keeps, what it prints; and what all samples say about models."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from transformers import AutoTokenizer

import ov_ext

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from evidence import scores, text  # noqa: E402
from side_by_side import arms, gguf_files, measuring, report  # noqa: E402
from side_by_side.arms import ARMS, DENSE, LLAMA_CPP, OURS, STOCK, Arm  # noqa: E402
from side_by_side.subject import Subject, kept, slug  # noqa: E402

from samples.real_models import conversations  # noqa: E402
from samples.real_models.texts import english  # noqa: E402

TINY = SAMPLES / "assets" / "tiny_lm"
script = importlib.import_module("05_real_model")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def test_windows_are_spread_over_the_text(tokenizer: Any) -> None:
    whole = tokenizer(text.python("heldout"))["input_ids"]
    found = text.windows(tokenizer, text.python("heldout"), 64, 5)
    count = len(whole) // 64
    assert found.shape == (5, 64) and found[0].tolist() == whole[:64]
    assert found[-1].tolist() == whole[(count - 1) * 64 : count * 64]
    assert text.windows(tokenizer, "a = 1\n" * 100, 64, 1000).shape[0] < 10
    with pytest.raises(ValueError, match=r"The text has \d tokens, less than one window of 64"):
        text.windows(tokenizer, "a = 1\n", 64, 5)


def test_bits_per_byte(tokenizer: Any) -> None:
    ids = text.windows(tokenizer, "def read(path):\n    return path\n" * 20, 16, 2)
    counts = text.byte_counts(tokenizer, ids)
    assert counts == [len(tokenizer.decode(row)) - len(tokenizer.decode(row[:1])) for row in ids]
    # A model that gives every byte 8 bits.
    each = np.array(counts) * 8 * np.log(2) / 15
    assert scores.bits_per_byte(each, 16, counts) == pytest.approx(8)


def test_losses_of_tokens() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (7, 50)).astype(np.float32) + 1e4
    ids = np.array([3, 49, 0, 7, 7, 1, 2])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), torch.tensor(ids[1:]), reduction="none")
    np.testing.assert_allclose(scores.token_losses(logits, ids), expected, rtol=1e-5, atol=1e-5)


def test_what_took_long_is_made_once_and_whole(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "model", interrupted)
    assert not (tmp_path / "model").exists()
    for _ in range(2):
        assert kept(tmp_path / "model", lambda folder: (folder / "new").touch(exist_ok=False)) == tmp_path / "model"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert slug("pruned 10%  sparse 0% int4") == "pruned-10-percent-sparse-0-percent-int4"


def test_arms() -> None:
    assert all(slug(name) == name.replace("_", "-") for name in ARMS)  # also names of folders
    assert {arm.engine for arm in ARMS.values()} == {STOCK, OURS, LLAMA_CPP}
    assert set(arms.QUICK) <= set(ARMS)


def test_which_arms_take_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert [arm.name for arm in script.chosen(["llamacpp-q4_0", "stock-int8", DENSE])] == [DENSE, "stock-int8"]
    assert "pip install 'nncf-ext[llama-cpp]'" in capsys.readouterr().err
    with pytest.raises(typer.BadParameter, match="stock-int5: no such arm. There are dense-bf16, stock-int8"):
        script.chosen(["stock-int5"])


def test_a_curve_leaves_out_what_another_arm_beats() -> None:
    points = {"slow": (9.0, 3.0), "best": (5.0, 3.0), "small": (1.0, 4.0), "worse": (2.0, 4.5), "same": (1.0, 4.5)}
    assert report.frontier(points) == ["small", "best"]


class FakeEngine:
    """Says how often it is asked."""

    calls = 0

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def call(self, method: str, *arguments: Any) -> Any:
        FakeEngine.calls += 1
        return [65, 66] if method == "answer" else np.array([1.0, 2.0])


def test_quality_is_measured_once_for_each_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    subject = Subject(tmp_path)
    subject.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    monkeypatch.setattr(measuring, "start", lambda *_: FakeEngine())
    monkeypatch.setattr(measuring, "size", lambda *_: 7)
    monkeypatch.setattr(FakeEngine, "calls", 0)
    arm = Arm("mine", LLAMA_CPP, "gguf", lambda subject, folder: (folder / "weights").touch())
    said: list[Any] = []
    texts = {"one": torch.ones(3, 4, dtype=torch.int64)}
    for _ in range(2):
        record = measuring.quality(subject, arm, texts, lambda *what: said.append(what))
        assert record["losses"] == {"one": [1.5] * 3} and record["bytes"] == 7
        assert FakeEngine.calls == 4
    assert said[-1] == ("read", 3, 3)
    measuring.quality(subject, arm, texts | {"two": texts["one"]}, lambda *what: None)
    assert FakeEngine.calls == 4 + 7


def test_weights_that_cannot_be_expanded_are_named(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_K  # what llama.cpp computes with, not stores
    writer.add_tensor("good.weight", np.arange(64, dtype=np.float32).reshape(2, 32) / 3)
    writer.add_tensor("norm.weight", np.arange(32, dtype=np.float32) / 3)
    block = gguf.GGML_QUANT_SIZES[kind][1]
    writer.add_tensor("odd.weight", np.zeros((2, block), np.uint8), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(ValueError, match="odd.weight is Q8_K, which cannot be expanded"):
        gguf_files.expand(tmp_path / "model.gguf", tmp_path / "out.gguf")


@pytest.mark.slow
def test_a_run_shows_everything_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    """With the committed model in the place of the real one, which the sample finds in its folder."""
    source = shutil.copytree(TINY, tmp_path / "quick" / "source")
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    names = ["stock-int4", "ours-sparse50-int4"]
    command = [sys.executable, str(SAMPLES / "05_real_model.py"), "--quick", "--out", str(tmp_path)]
    command += [word for name in names for word in ("--arms", name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    for shown in ("nats a token", "bits/byte", "ms a token", "Best stock INT4 on Python: stock-int4", "Pictures:"):
        assert shown in done.stdout, shown
    record = json.loads((tmp_path / "quick" / "record.json").read_text())
    assert list(record["quality"]) == [DENSE, *names] and set(record["speed"]["arms"]) == {DENSE, *names}
    losses = {name: np.mean(each["losses"]["Python"]) for name, each in record["quality"].items()}
    assert losses[DENSE] < losses["ours-sparse50-int4"] < losses[DENSE] + 0.5
    sizes = {name: each["bytes"] for name, each in record["quality"].items()}
    # Where the dense form is the faster one (AVX2), the packed model is larger, by no more than the policy allows.
    growth = ov_ext.SparsePolicy().max_growth
    assert sizes["ours-sparse50-int4"] < (1 + growth) * sizes["stock-int4"] < sizes[DENSE]
    for picture in ("loss-speed.png", "loss-size.png"):
        assert (tmp_path / "quick" / picture).stat().st_size > 10_000
    (tmp_path / "quick" / "record.json").unlink()
    shutil.rmtree(tmp_path / "quick" / "arms")  # nothing of it is needed for what is known
    again = subprocess.run(command, capture_output=True, text=True)
    assert json.loads((tmp_path / "quick" / "record.json").read_text()) == record, again.stderr[-3000:]


def test_calibration_is_english_python_and_conversations_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    monkeypatch.setattr(Subject, "conversations", "words upon words " * 400)
    subject = Subject(tmp_path, 7, 32)
    texts = (english()[0], text.python("calibration"), subject.conversations)
    assert subject.calibration.shape == (7, 32)
    for number, row in enumerate(subject.calibration):
        assert subject.tokenizer.decode(row, clean_up_tokenization_spaces=False) in texts[number % 3]


def test_every_question_is_answered_in_the_form_of_the_template() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    written = conversations.conversations(model, tokenizer, 2)
    assert written == conversations.conversations(model, tokenizer, 2)
    for question in conversations.QUESTIONS:
        assert written.count(f"<user>{question}</><assistant>") == 1
    assert written.count("</>") >= 2 * len(conversations.QUESTIONS) and measuring.QUESTION not in written
