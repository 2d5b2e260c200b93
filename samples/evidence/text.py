"""Which text is a model calibrated and measured on, and in which pieces?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets"


def python(part: str) -> str:
    """
    :param part: ``"calibration"`` or ``"heldout"``.
    :return: The committed text: Python source.
    """
    return (ASSETS / f"{part}.txt").read_text(encoding="utf-8")


def windows(tokenizer: Any, text: str, length: int, limit: int) -> Tensor:
    """
    :param tokenizer: Tokenizer of the model.
    :param text: Any text.
    :param length: Tokens of a window.
    :param limit: How many windows at most.
    :return: int64 ``[windows, length]``, spread evenly over the text; none overlap.
    :raises ValueError: The text is shorter than one window.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < length:
        raise ValueError(f"The text has {len(ids)} tokens, less than one window of {length}. Take a longer text.")
    whole = ids[: len(ids) // length * length].view(-1, length)
    return whole[torch.linspace(0, len(whole) - 1, min(limit, len(whole))).long()]


def batches(ids: Tensor, size: int) -> list[dict[str, Tensor]]:
    """
    :param ids: ``[windows, tokens]``.
    :param size: Windows of a batch.
    :return: What a causal language model takes.
    """
    return [{"input_ids": part} for part in ids.split(size)]


def byte_counts(tokenizer: Any, ids: Tensor) -> list[int]:
    """
    :param tokenizer: Tokenizer of the model.
    :param ids: ``[windows, tokens]``.
    :return: For each window, UTF-8 bytes of all tokens but the first: of those that a model predicts there.
    """
    return [len(tokenizer.decode(row[1:], clean_up_tokenization_spaces=False).encode()) for row in ids]
