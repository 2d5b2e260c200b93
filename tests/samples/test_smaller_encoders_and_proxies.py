"""samples/11_eftnas.py and 12_eznas.py from one end to the other, on a tiny encoder and tiny networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

from encoders import tasks  # noqa: E402
from proxies import data, networks  # noqa: E402

pytestmark = pytest.mark.slow

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "so", "pill", "it", "works", "never"]


def encoder(folder: Path) -> Path:
    """A BERT of two layers with a vocabulary of twelve words."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    return folder


def test_a_quick_run_of_eftnas_shows_everything(tmp_path: Path) -> None:
    texts = [["so good it works", 2], ["never so bad", 0], ["it pill so", 1], ["good good pill", 2]] * 20
    parts = {"training": texts, "validation": [], "test": texts}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reviews.json").write_text(json.dumps({"name": "reviews", "classes": tasks.RATINGS, **parts}))
    folder = encoder(tmp_path / "model")
    command = [sys.executable, str(SAMPLES / "11_eftnas.py"), "--quick", "--model", str(folder)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    record = json.loads((tmp_path / "out/quick/seed-0/record.json").read_text())["arms"]
    arms = ("EFTNAS 0.5", "magnitude order 0.5", "uniform widths 0.5", "blind cut 0.5")
    assert [*record] == ["dense", *arms] and all(len(each["right"]) == 48 for each in record.values())
    assert all(each in done.stdout for each in (*record, "dense, INT8", "EFTNAS 0.5, INT8", "times faster"))
    most = record["uniform widths 0.5"]["macs"]
    assert most == record["blind cut 0.5"]["macs"] < 0.6 * record["dense"]["macs"]
    assert record["EFTNAS 0.5"]["macs"] <= most and record["magnitude order 0.5"]["macs"] <= most


def test_a_quick_run_of_eznas_shows_everything(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "12_eznas.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    for shown in ("between seeds", "params", "zico", "eznas-a", "evolved", "at equal MACs"):
        assert shown in done.stdout, shown
    assert len(json.loads((tmp_path / "quick/networks-10.json").read_text())) == 30


def test_texts_and_their_batches() -> None:
    texts = [(" ".join(WORDS[5 : 6 + number]), number) for number in range(5)]
    tokenizer = transformers.BertTokenizerFast(vocab={word: place for place, word in enumerate(WORDS)})
    found = tasks.batches(texts, tokenizer, length=5, size=2, seed=1)
    assert sorted(torch.cat([each["places"] for each in found]).tolist()) == [0, 1, 2, 3, 4]
    for batch in found:
        assert torch.equal(batch["labels"], batch["places"]) and batch["input_ids"].shape[1] <= 5
        assert torch.equal(batch["attention_mask"].sum(1), (batch["places"] + 3).clamp_max(5))


@pytest.mark.parametrize("parts", [data.digits(), data.signals()], ids=["digits", "signals"])
def test_data_are_fixed_and_in_two_parts(parts) -> None:
    (images, labels), (test, wanted) = parts
    assert len(images) == len(labels) == 1000 and len(test) == len(wanted) > 700
    assert images.ndim == 4 and {*labels.tolist()} == {*wanted.tolist()} == {*range(10)}
    again = (data.digits if images.shape[2] == 8 else data.signals)()
    assert torch.equal(again[0][0], images) and torch.equal(again[1][1], wanted)
    joined = torch.cat([images, test]).flatten(1)
    assert len(joined.unique(dim=0)) == len(joined)


@pytest.mark.parametrize("space", networks.SPACES)
def test_networks_of_all_spaces(space) -> None:
    from random import Random

    for number in range(6):
        blocks = networks.draw(space, Random(number))
        assert 2 <= len(blocks) <= 6 and all(4 <= width <= 32 and kernel in (1, 3, 5) for width, kernel in blocks)
        for shape in ((2, 1, 8, 8), (2, 1, 1, 40)):
            assert networks.network(space, blocks)(torch.rand(shape)).shape == (2, 10)
