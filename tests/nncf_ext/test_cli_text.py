"""Calibration text from files, folders of datasets and the hub: which tokens come out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import nncf
import pytest
import torch
from transformers import AutoTokenizer

from nncf_ext.cli.text import Source, read_windows

ROWS = [f"{index:02d}: a row of texts" for index in range(40)]  # 18 letters, which are 18 tokens here
CHATS = [[{"role": "user", "content": row}, {"role": "assistant", "content": "So it is."}] for row in ROWS]
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}#"
MODEL = SimpleNamespace(
    config=SimpleNamespace(max_position_embeddings=64), get_input_embeddings=lambda: torch.nn.Embedding(320, 1)
)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of rows rests for five seconds at its end."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def texts(source: Source, tokenizer: Any, samples: int = 100, window: int = 20) -> list[str]:
    items = read_windows(source, tokenizer, samples, window, MODEL)
    assert all(item["input_ids"].shape == (1, window) for item in items)
    return [tokenizer.decode(item["input_ids"][0]) for item in items]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return Source(str(path))


def saved_to_disk(path: Path) -> Source:
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(path)
    return Source(str(path))


def saved_with_splits(path: Path) -> Source:
    other = datasets.Dataset.from_dict({"text": ["other"]})
    datasets.DatasetDict({"test": other, "train": datasets.Dataset.from_dict({"text": ROWS})}).save_to_disk(path)
    return Source(str(path))


def parquet_folder(path: Path) -> Source:
    path.mkdir()
    datasets.Dataset.from_dict({"body": ["other"]}).to_parquet(path / "train.parquet")
    datasets.Dataset.from_dict({"body": ROWS}).to_parquet(path / "validation.parquet")
    return Source(str(path), split="validation", column="body")


def parquet_file(path: Path) -> Source:
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(path.with_suffix(".parquet"))
    return Source(str(path.with_suffix(".parquet")))


def arrow_file(path: Path) -> Source:
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(path)
    (file,) = path.glob("*.arrow")
    return Source(str(file))


@pytest.mark.parametrize("make", [saved_to_disk, saved_with_splits, parquet_folder, parquet_file, arrow_file])
def test_rows_of_a_dataset_come_in_random_order_until_there_are_enough(make, tmp_path: Path, tokenizer: Any) -> None:
    source = make(tmp_path / "data")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    found = texts(source, tokenizer)  # a window of 20 tokens is a row and the blank line behind it
    assert sorted(found) == [f"{row}\n\n" for row in ROWS] and found != sorted(found)
    assert texts(source, tokenizer, samples=5) == found[:5]  # the same ones every time
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_json_lines_of_text_and_of_chats(tmp_path: Path, tokenizer: Any) -> None:
    source = write_lines(tmp_path / "text.jsonl", [{"id": index, "text": row} for index, row in enumerate(ROWS)])
    assert texts(source, tokenizer) == [f"{row}\n\n" for row in ROWS]
    assert texts(source, tokenizer, samples=2) == [f"{ROWS[0]}\n\n", f"{ROWS[-1]}\n\n"]  # from the first to the last
    tokenizer.chat_template = TEMPLATE
    written = "".join(f"<user>{row}<assistant>So it is.#" for row in ROWS)
    source = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    assert "".join(texts(source, tokenizer)) == written[: len(written) // 20 * 20]
    source = write_lines(tmp_path / "named.jsonl", [{"talk": chat, "text": "other"} for chat in CHATS])
    assert texts(Source(source.name, column="talk"), tokenizer)[0] == written[:20]


def test_chats_of_a_dataset(tmp_path: Path, tokenizer: Any) -> None:
    datasets.Dataset.from_dict({"messages": CHATS}).save_to_disk(tmp_path / "data")
    tokenizer.chat_template = TEMPLATE
    (found,) = texts(Source(str(tmp_path / "data")), tokenizer, samples=1, window=64)
    assert found[24:].startswith("<assistant>So it is.#<user>")


def test_a_line_of_json_may_hold_any_character(tmp_path: Path, tokenizer: Any) -> None:
    source = write_lines(tmp_path / "text.jsonl", [{"text": "one\u2028two\x85three" * 3}])
    assert len(texts(source, tokenizer)) == 2


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("data", {"split": "test"}, "has no split 'test'; name one by --split: one, two"),
        ("data", {}, "name one by --split: one, two"),
        ("data", {"split": "one", "column": "body"}, "has no body, but: text"),
        ("data/one", {"split": "train"}, "has no splits"),
        ("numbers", {}, "has no text or messages or conversations, but: number"),
        ("numbers", {"column": "number"}, "neither text nor a list of messages"),
        ("chats", {}, "no chat template"),
        ("empty", {}, "empty cannot be read as a dataset"),
        ("broken", {}, "broken cannot be read as a dataset"),
        ("text.txt", {"split": "train", "column": "text"}, "--split, --column: for datasets only"),
        ("absent.txt", {}, "There is no calibration text absent.txt"),
        ("no/such/place", {}, "There is no calibration text no/such/place"),
    ],
)
def test_what_cannot_be_read_is_said(
    name: str, options: dict[str, str], said: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = datasets.Dataset.from_dict({"text": ROWS})
    datasets.DatasetDict({"one": text, "two": text}).save_to_disk(tmp_path / "data")
    datasets.Dataset.from_dict({"number": [1]}).save_to_disk(tmp_path / "numbers")
    datasets.Dataset.from_dict({"messages": CHATS}).save_to_disk(tmp_path / "chats")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((nncf.ValidationError, nncf.ParameterNotSupportedError)) as caught:
        texts(Source(name, **options), tokenizer)
    assert said in str(caught.value)


def test_text_in_a_script_without_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "so": 1, "it": 2, "is": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    file = tmp_path / "text.txt"
    file.write_text("so it is so it is so it is rare " * 10)  # one of ten
    assert len(texts(Source(str(file)), tokenizer)) == 5
    file.write_text("so it is так оно и есть " * 10, encoding="utf-8")
    with pytest.raises(nncf.ValidationError, match=r"no token for 57% of .*text.txt: there stands \[UNK\]"):
        texts(Source(str(file)), tokenizer)


def test_a_name_of_the_hub_needs_a_network(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        nncf.ValidationError, match="no-one/nothing here, and no dataset of this name .* needs a network"
    ):
        texts(Source("no-one/nothing"), tokenizer)
