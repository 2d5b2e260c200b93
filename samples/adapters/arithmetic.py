"""Arithmetic word problems, written by a seeded script."""

from __future__ import annotations

from random import Random

from adapters.task import Item, Task

_NAMES = ("Ada", "Alan", "Barbara", "Dennis", "Edsger", "Grace", "John", "Ken", "Leslie", "Tony")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "files", "keys", "lines", "nodes", "pages")
_PROBLEMS = (
    ("{name} has {a} {things} and gets {b} more.", lambda a, b: a + b),
    ("{name} has {a} {things} and gives {b} away.", lambda a, b: a - b),
    ("{name} has {a} {things}, and {other} has {b} more than that.", lambda a, b: a + b),
    ("{name} has {a} {things}; {b} are lost.", lambda a, b: a - b),
    ("{name} had some {things}, got {b} and has {a} now: how many at first?", lambda a, b: a - b),
)
_LARGEST = 60


def arithmetic_task(training: int, validation: int, test: int, seed: int = 0) -> Task:
    """
    :param training: Number of problems to learn from.
    :param validation: Number of problems to choose by.
    :param test: Number of problems to report.
    :param seed: Seed.
    :return: Problems, all different: a pair of numbers with its kind of problem is in one of the three only.
    """
    draw = Random(seed)
    kinds = [(kind, a, b) for kind in range(len(_PROBLEMS)) for a in range(1, _LARGEST) for b in range(1, a + 1)]
    draw.shuffle(kinds)
    if training + validation + test > len(kinds):
        raise ValueError(f"Asked for {training + validation + test} problems; there are {len(kinds)} different ones.")
    items = []
    for kind, a, b in kinds[: training + validation + test]:
        text, result = _PROBLEMS[kind]
        name, other = draw.sample(_NAMES, 2)
        story = text.format(name=name, other=other, things=draw.choice(_THINGS), a=a, b=b)
        items.append(Item(f"# {story}\nanswer =", f" {result(a, b)}"))
    return Task(
        "arithmetic",
        tuple(items[validation + test :]),
        tuple(items[:validation]),
        tuple(items[validation : validation + test]),
    )
