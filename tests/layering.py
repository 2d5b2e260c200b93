"""Reads from the source who imports what, and says what breaks a rule. A rule returns texts: none where it holds."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

When = Literal["at import", "late", "for types"]


@dataclass(frozen=True)
class Import:
    """One imported name.

    :param name: Dotted; the last part may be a module or a name in one.
    :param when: When it runs: with the module, in a function ("late"), or never ("for types": under TYPE_CHECKING).
    :param dots: Dots of a relative import, else 0.
    """

    name: str
    when: When
    dots: int = 0


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """:return: Every module of some packages in ``root``: its dotted name and its file."""
    found = {}
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path) -> tuple[Import, ...]:
    """:return: All that a module imports, with relative names made absolute."""
    parts = module.split(".")
    return _parse(path.read_text(), tuple(parts if path.stem == "__init__" else parts[:-1]))


@cache
def _parse(text: str, package: tuple[str, ...]) -> tuple[Import, ...]:

    def walk(nodes: Iterable[ast.AST], when: When) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, when) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else ()
                base += (node.module,) if node.module else ()
                yield from (Import(".".join([*base, alias.name]), when, node.level) for alias in node.names)
            elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from walk(node.body, "for types")
                yield from walk(node.orelse, when)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(node.body, "late" if when == "at import" else when)
            else:
                yield from walk(ast.iter_child_nodes(node), when)

    return tuple(walk([ast.parse(text)], "at import"))


def home(name: str, known: Iterable[str]) -> str | None:
    """:return: The module that an imported name is, or lies in; None where it is none of the known ones."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in known), None)


# Floors


def room(module: str, floors: Sequence[str]) -> tuple[int, str] | None:
    """
    Finds where a module stands. The longest floor that fits counts, and a plain one before one with a star.

    :param module: Dotted name without the package.
    :param floors: Names, lowest first. A star stands for rooms side by side: ``algorithms.*``.
    :return: The floor and the room on it; None where no floor fits.
    """
    parts = module.split(".")
    fits = []
    for index, floor in enumerate(floors):
        depth = floor.count(".") + 1
        start = ".".join(parts[:depth])
        if len(parts) >= depth and fnmatchcase(start, floor):
            fits.append((depth, "*" not in floor, index, start))
    return max(fits)[2:] if fits else None


def upward_imports(files: Mapping[str, Path], package: str, floors: Sequence[str]) -> list[str]:
    """
    A module imports from its own room and from lower floors, late and for types, too: not from higher floors, not from
    rooms beside its own, and no public name from the package itself.
    """
    wrong = []
    for module, path in files.items():
        inside = [found for found in imports(module, path) if found.name.startswith(f"{package}.")]
        if module == package or not (inside or path.stem != "__init__"):
            continue
        own = room(module.removeprefix(f"{package}."), floors)
        if own is None:
            wrong.append(f"{module} stands on no floor")
            continue
        for found in inside:
            target = home(found.name, files)
            target = found.name if target in (None, package) else target
            other = room(target.removeprefix(f"{package}."), floors)
            if other is None:
                wrong.append(f"{module} imports {found.name}, which stands on no floor")
            elif other[0] > own[0] or (other[0] == own[0] and other[1] != own[1]):
                wrong.append(f"{module} imports {found.name}")
    return wrong


# Circles


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """:return: For each module those that it needs to run, late ones, too. What is for types only does not count."""
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        for found in imports(module, path):
            if found.when != "for types" and (target := home(found.name, files)):
                # Python runs the packages around a module before the module.
                parts = target.split(".")
                around = {".".join(parts[:length]) for length in range(1, len(parts))} & files.keys()
                graph[module] |= {target} | {each for each in around if not f"{module}.".startswith(f"{each}.")}
        graph[module].discard(module)
    return graph


def circle(graph: Mapping[str, set[str]]) -> str:
    """:return: One circle of a graph, as "a -> b -> a"; "" where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))  # the sorter names what is needed before what needs it
    return ""


# Files that travel with saved weights


def strangers(folder: Path) -> list[str]:
    """Files of ``standalone/`` import the standard library, three packages, and each other relatively."""
    allowed = sys.stdlib_module_names | {"torch", "transformers", "safetensors"}
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        for found in imports(f"standalone.{path.stem}", path):
            beside = found.dots == 1 and (folder / f"{found.name.split('.')[1]}.py").is_file()
            if not beside and (found.dots or found.name.split(".")[0] not in allowed):
                wrong.append(f"{path.name} imports {'.' * found.dots}{found.name}")
    return wrong


# C++


def operations(plugin: Path) -> list[Path]:
    """:return: The folders that have kernels."""
    return sorted(path.parent for path in plugin.glob("*/kernel.hpp"))


# Headers of support/ for operations and dispatch, not for kernels: they hold code that is compiled for every CPU.
NOT_FOR_KERNELS = ("bandwidth", "capi", "cpu_features", "isa_selection", "parallel", "scratch", "validation_cache")


def kernels_that_know_too_much(operation: Path) -> list[str]:
    """Kernels, and all headers that they include, know raw pointers only; they use their own folder and support/."""
    pending = [operation / "kernel.hpp", operation / "reference.cpp"]
    pending += [path for path in sorted(operation.glob("a*x*.[ch]pp")) if path.name.startswith(("avx", "amx"))]
    places = (operation.resolve(), (operation.parent / "support").resolve())
    seen, wrong = set(), []
    while pending:
        path = pending.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        if not path.is_file():
            wrong.append(f"{path} is missing")
            continue
        for opening, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.MULTILINE):
            if re.match(r"(openvino|tbb|oneapi|torch)\b", name):
                wrong.append(f"{path.name} includes {name}")
            elif opening == '"':
                target = (path.parent / name).resolve()
                if target.parent in places and target.stem not in NOT_FOR_KERNELS:
                    pending.append(target)
                else:
                    wrong.append(f"{path.name} includes {name}")
    return wrong
