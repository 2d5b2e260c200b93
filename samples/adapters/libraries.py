"""A task in words: from the first sentence of a documentation string, tell which library it documents.

"Return the Fourier transform of a signal." could be several libraries'; what a model has read of them, and the habits
of their authors, tell. Sentences that name a library are left out. Test sentences come from other files than those
learned from.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from adapters.signatures import parsed_files
from adapters.task import Item, Task

LIBRARIES = ("networkx", "numpy", "pandas", "scikit-learn", "scipy", "sympy", "torch", "transformers")
_NAMES = re.compile(r"networkx|numpy|pandas|sklearn|scikit|scipy|sympy|torch|transformers|hugging", re.IGNORECASE)
_SHORTEST, _LONGEST = 30, 200  # letters of a sentence


def libraries_task(fits: Callable[[Item], bool], training: int, validation: int = 256, test: int = 2048) -> Task:
    """
    Reads the libraries until there are enough sentences, as many of each.

    :param fits: Whether an item is short enough for the model.
    :param training: Number of items to learn from.
    :param validation: Number of items to choose by.
    :param test: Number of items to report.
    :return: The task; the same one for the same installed versions and numbers.
    :raises RuntimeError: A library is not installed, or there are not as many sentences.
    """
    known: set[str] = set()
    held_out = _items(fits, True, test, known)
    learned = _items(fits, False, training + validation, known)
    return Task("libraries", tuple(learned[validation:]), tuple(learned[:validation]), tuple(held_out))


def sentence_of(text: str | None) -> str | None:
    """
    :param text: A documentation string.
    :return: Its first sentence; None if it is too short or too long, or names a library.
    """
    first = " ".join((text or "").strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) ", first)[0]
    return sentence if _SHORTEST <= len(sentence) <= _LONGEST and not _NAMES.search(sentence) else None


def _items(fits: Callable[[Item], bool], held_out: bool, count: int, known: set[str]) -> list[Item]:
    """Sentences of the libraries in turns, no sentence twice."""
    items: list[Item] = []
    queues = {name: _sentences(name, held_out) for name in LIBRARIES}
    while len(items) < count:
        for name, queue in queues.items():
            for sentence in queue:
                item = Item(f"{sentence}\nThis documents the library", f" {name}")
                if sentence not in known and fits(item):
                    known.add(sentence)
                    items.append(item)
                    break
            else:
                have = sum(item.answer == f" {name}" for item in items)
                raise RuntimeError(f"Asked for {count} sentences, an equal share of each, but {name} has {have}.")
    return items[:count]


def _sentences(name: str, held_out: bool) -> Iterator[str]:
    for number, tree in enumerate(parsed_files(name)):
        if held_out != (number % 3 == 0):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                sentence = sentence_of(ast.get_docstring(node))
                if sentence is not None:
                    yield sentence
