"""A task from real source code: given the signature of a function, write the call that passes all arguments on.

``def resize(self, image, size, *, resample=None):`` asks for ``self.resize(image, size, resample=resample)``: the names
have to be copied, those with a default become keywords, default values go, stars stay, a marker of keyword-only
arguments goes. Signatures, less their annotations, are those of installed packages. Those of the test come from
packages that the language model in ``assets/`` has never seen, and no answer of the test is among those learned from.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from tiny_lm import corpus

from adapters.task import Item, Task

TRAINING_PACKAGES = ("transformers", "torch", "scikit-learn", "scipy", "sympy", "nncf", corpus.STDLIB)
HELD_OUT_PACKAGES = (
    *("aiohttp", "attrs", "dill", "multidict", "multiprocess", "networkx", "optimum", "optimum-intel", "peft"),
    *("rich", "torchao", "tqdm", "yarl", corpus.STDLIB),
)
"""None is in the text that the model learned from; of the standard library, only the modules held out from it."""


def signatures_task(fits: Callable[[Item], bool], training: int, validation: int = 500, test: int = 2048) -> Task:
    """
    Reads the packages until there are enough items.

    :param fits: Whether an item is short enough for the model.
    :param training: Number of items to learn from.
    :param validation: Number of items to choose by, from training packages.
    :param test: Number of items to report, from held-out packages.
    :return: The task; the same one for the same installed versions and numbers.
    :raises RuntimeError: A package is not installed, or there are not as many items.
    """
    learned = _items(fits, TRAINING_PACKAGES, False, training + validation, set())
    held_out = _items(fits, HELD_OUT_PACKAGES, True, test, {item.answer for item in learned})
    return Task("signatures", tuple(learned[validation:]), tuple(learned[:validation]), tuple(held_out))


def item_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Item | None:
    """
    :param function: A definition in source code.
    :return: Its item, or None if fewer than two arguments could be passed on by name.
    """
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = len(positional) - len(arguments.defaults)
    owner = positional[0].arg if positional and positional[0].arg in ("self", "cls") else ""
    passed = []
    for place, argument in enumerate(positional):
        keyword = place >= max(without_default, len(arguments.posonlyargs))
        passed.append(f"{argument.arg}={argument.arg}" if keyword else argument.arg)
    if owner:
        passed = passed[1:]
    if arguments.vararg:
        passed.append(f"*{arguments.vararg.arg}")
    passed += [f"{argument.arg}={argument.arg}" for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        passed.append(f"**{arguments.kwarg.arg}")
    if len(passed) < 2:
        return None
    for argument in [*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument:
            argument.annotation = None
    call = f"{owner}.{function.name}" if owner else function.name
    return Item(f"def {function.name}({ast.unparse(arguments)}):\n    return", f" {call}({', '.join(passed)})")


def _items(
    fits: Callable[[Item], bool], packages: tuple[str, ...], held_out: bool, count: int, known: set[str]
) -> list[Item]:
    """The first items, one for an answer, with files in the order of the hashes of their names, packages in turns."""
    answers = set(known)
    items: list[Item] = []
    queues = [_package_items(name, held_out) for name in packages]
    while queues and len(items) < count:
        for queue in list(queues):
            fresh = next((item for item in queue if item.answer not in answers and fits(item)), None)
            if fresh is None:
                queues.remove(queue)
                continue
            answers.add(fresh.answer)
            items.append(fresh)
    if len(items) < count:
        raise RuntimeError(f"Asked for {count} signatures, but {', '.join(packages)} have {len(items)} different ones.")
    return items[:count]


def _package_items(name: str, held_out: bool) -> Iterator[Item]:
    def counts(relative: Path) -> bool:
        return name != corpus.STDLIB or held_out == bool(corpus.HELD_OUT_STDLIB & set(relative.with_suffix("").parts))

    for tree in parsed_files(name, counts):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (item := item_of(node)):
                yield item


def parsed_files(name: str, counts: Callable[[Path], bool] = lambda relative: True) -> Iterator[ast.Module]:
    """
    :param name: Of an installed package.
    :param counts: Whether a file counts, by its name in the package.
    :return: Its files of Python as trees, in the order of the hashes of their names.
    :raises RuntimeError: It is not installed.
    """
    for relative, path in sorted(_files(name), key=lambda file: _rank(file[0])):
        if not counts(relative):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's code
                yield ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue


def _files(name: str) -> list[tuple[Path, Path]]:
    """Python files of a package, each by its name in the package and by its path."""
    if name == corpus.STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [(path.relative_to(root), path) for path in root.rglob("*.py")]
        return [(relative, path) for relative, path in found if "site-packages" not in relative.parts]
    try:
        files = metadata.distribution(name).files or ()
    except metadata.PackageNotFoundError as error:
        raise RuntimeError(f"The task needs the package {name!r}, which is not installed: pip install it.") from error
    return [(Path(file), Path(str(file.locate()))) for file in files if file.suffix == ".py"]


def _rank(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()
