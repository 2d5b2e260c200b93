"""Who may import whom. Arrows point downward only; the two packages meet in plain data, never in imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("nncf_ext/**/*.py"), *ROOT.glob("ov_ext/**/*.py")])
# Lower layers of nncf_ext first: a module may import its own layer and those before it.
LAYERS = (
    "parameters",
    "upstream",
    "files",
    "journal",
    "standalone",
    "weights",
    "structure",
    "method",
    "saving",
    "calibration",
    "importance",
    "pruning",
    "exploration",
    "report",
    "algorithms",
    "compression",
    "elastic",
    "extraction",
    "cli",
)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: not the bodies of functions, nor what is for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from statements(child)


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in statements(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_packages_do_not_import_each_other(path: Path) -> None:
    other = "ov_ext" if relative(path).startswith("nncf_ext") else "nncf_ext"
    assert not [name for name in imports(path) if name.split(".")[0] == other]


@pytest.mark.parametrize("path", [f for f in FILES if relative(f).startswith("ov_ext")], ids=relative)
def test_execution_needs_no_training_framework_at_import(path: Path) -> None:
    heavy = {"torch", "nncf", "transformers", "optimum", "openvino_genai", "openvino_tokenizers", "onnx", "peft"}
    assert not {name.split(".")[0] for name in imports(path, at_import=True)} & heavy


@pytest.mark.parametrize("path", [f for f in FILES if relative(f).startswith("nncf_ext")], ids=relative)
def test_imports_point_downward(path: Path) -> None:
    parts = path.relative_to(ROOT / "nncf_ext").with_suffix("").parts
    if parts[0] == "__init__":
        return
    layer = LAYERS.index(parts[0])
    for name in imports(path):
        if name.startswith("nncf_ext.") and (target := name.split(".")[1]) in LAYERS:
            # A method never sees another method; adapters that merge build on elastic ones.
            assert LAYERS.index(target) <= layer, f"{relative(path)} imports {name}"
            if parts[0] == target == "algorithms" and len(name.split(".")) > 2 and parts[1] != "__init__":
                base = {"sqft": "elastic_lora"}
                seen = {parts[1], base.get(parts[1])}
                assert name.split(".")[2] in seen, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_non_public_names_of_dependencies_come_through_one_file(path: Path) -> None:
    if relative(path) == "nncf_ext/upstream.py" or not relative(path).startswith("nncf_ext"):
        return
    private = [
        name for name in imports(path) if re.match(r"(nncf\.(?!Dataset)|transformers\.(models|utils)\.)\w+\.", name)
    ]
    assert not private, f"{relative(path)} imports {private}: move it to upstream.py"


def test_only_the_optimum_module_touches_optimum() -> None:
    users = {relative(path) for path in FILES if any(name.split(".")[0] == "optimum" for name in imports(path))}
    assert users <= {"ov_ext/optimum.py"}


def test_kernels_know_raw_pointers_only() -> None:
    folder = ROOT / "ov_ext/cpu_plugin/sparse_matmul"
    kernels = [folder / "kernel.hpp", folder / "reference.cpp", *folder.glob("a*x*.[ch]pp")]
    assert len(kernels) >= 5
    for path in kernels:
        assert not re.search(r"#include <(openvino|tbb|torch)", path.read_text()), path


def test_no_module_bears_the_name_of_a_public_function() -> None:
    import nncf_ext
    import ov_ext

    for package in (nncf_ext, ov_ext):
        modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
        functions = {name for name in package.__all__ if name.islower()}
        assert not functions & modules


@pytest.mark.parametrize("package", ["nncf_ext", "ov_ext"])
def test_public_names_resolve_twice(package: str) -> None:
    module = __import__(package)
    for name in module.__all__:
        assert getattr(module, name) is getattr(module, name)
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018
