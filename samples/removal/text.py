"""Which text are the committed models calibrated, trained and measured on?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from evidence import text
from evidence.recovery import WINDOW
from numpy.typing import NDArray
from tiny_lm import corpus
from tokenizers import Tokenizer
from torch import Tensor

MAX_PACKAGE_BYTES = 400_000
"""Of each training package: enough for a recovery, and for every kind of text that the models learned from."""


def windows(tokenizer: Any, part: str, limit: int) -> Tensor:
    """
    :param tokenizer: Tokenizer of the model.
    :param part: ``"calibration"`` or ``"heldout"``: the committed text.
    :param limit: How many at most.
    :return: ``[windows, WINDOW]`` token ids, spread evenly over the text.
    """
    return text.windows(tokenizer, text.python(part), WINDOW, limit)


def training_tokens(file: Path, tokenizer_file: Path, max_package_bytes: int = MAX_PACKAGE_BYTES) -> NDArray[np.uint16]:
    """
    :param file: Where to keep them.
    :param tokenizer_file: A tokenizer.json.
    :param max_package_bytes: No package gives more text than this.
    :return: uint16 ``[tokens]``: source of the training packages that are installed here, shuffled by file.
    """
    if not file.exists():
        documents = sorted(_documents(max_package_bytes), key=lambda document: document.sha256)
        texts = [document.text for document in documents]
        tokens = np.concatenate(list(corpus.encode(Tokenizer.from_file(str(tokenizer_file)), texts)))
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".part.npy")
        np.save(aside, tokens)
        os.replace(aside, file)
    return np.load(file, mmap_mode="r")


def _documents(max_package_bytes: int) -> Iterator[corpus.Document]:
    for name in corpus.TRAINING_PACKAGES:
        try:
            package = corpus.find_package(name)
        except RuntimeError:
            continue  # not installed
        size = 0
        for document in sorted(corpus.read_documents(package), key=lambda document: document.sha256):
            if size < max_package_bytes and not corpus.HELD_OUT_STDLIB & set(Path(document.path).with_suffix("").parts):
                size += len(document.text.encode())
                yield document
