"""What is a task, and how do its items become the rows that a model trains on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100  # label of a token that the loss passes over


@dataclass(frozen=True)
class Item:
    """
    One question with the only right answer.

    :param prompt: What the model reads.
    :param answer: What it must write, to the letter, before it ends the text.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """
    Items to learn from, to choose by and to report. No answer is in two of the three.

    :param name: A word.
    :param training: Items for gradients.
    :param validation: Items for choices, such as that of a sub-adapter.
    :param test: Items for the reported number only.
    """

    name: str
    training: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]


def encode(tokenizer: Any, items: Sequence[Item], longest: int) -> list[dict[str, list[int]]]:
    """
    Tokens of prompt, answer and the end of text; the loss sees the last two.

    :param tokenizer: The model's tokenizer.
    :param items: Items.
    :param longest: Items with more tokens are left out.
    :return: For each item that fits, lists of equal length `input_ids` and `labels`.
    """
    prompts = tokenizer([item.prompt for item in items])["input_ids"]
    answers = tokenizer([item.answer + tokenizer.eos_token for item in items])["input_ids"]
    rows = [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return [row for row in rows if len(row["input_ids"]) <= longest]


def collate(rows: Sequence[dict[str, list[int]]], padding: int) -> dict[str, torch.Tensor]:
    """
    :param rows: As `encode` gives them.
    :param padding: Id of the padding token.
    :return: int64 [rows, tokens] `input_ids`, `attention_mask` and `labels`, padded on the right: with a causal model,
        padding behind a text changes nothing in it.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", padding), "attention_mask": mask, "labels": padded("labels", IGNORED)}
