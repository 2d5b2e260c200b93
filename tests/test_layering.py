"""Who may import whom. Arrows point downward only; the two packages meet in plain data, never in imports.

Every rule is also shown a small made-up tree that breaks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layering import (
    Import,
    circle,
    import_graph,
    imports,
    kernels_that_know_too_much,
    modules,
    operations,
    room,
    strangers,
    upward_imports,
)

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "ov_ext" / "cpu_plugin"
FILES = modules(ROOT, "nncf_ext", "ov_ext")
OV_EXT = {name: path for name, path in FILES.items() if name.split(".")[0] == "ov_ext"}
NNCF_EXT = {name: path for name, path in FILES.items() if name.split(".")[0] == "nncf_ext"}
# Lower floors first: a module may import its own floor and those below. Rooms on a floor with a star do not see each
# other: one folder for one method, one folder for one operation.
LAYERS = (
    "parameters",
    "upstream",
    "drafts",
    "noise",
    "files",
    "memory",
    "progress",
    "showing",
    "journal",
    "standalone",
    "weights",
    "structure.wrappers",
    "structure.dimensions",
    "structure.cutting",
    "structure.slicing",
    "structure.records",  # know architectures; what stands above them takes dimensions
    "structure.blocks",
    "structure.lookup",
    "structure.order",
    "structure.plan",
    "structure.checks",
    "structure",
    "method",
    "report",
    "saving",
    "training",
    "calibration",
    "importance",
    "pruning",
    "exploration",
    "algorithms.*",
    "algorithms.lonas",  # ranks and widths together
    "algorithms.sqft",  # adapters that merge build on elastic ones
    "algorithms.accuracy_control",  # chooses among what other methods make of a layer
    "compression",
    "input_scopes",
    "elastic",
    "extraction",
    "cli",
)
OV_EXT_LAYERS = (
    "card",
    "drafts",
    "noise",
    "folder",
    "_build_info",
    "extension",
    "machine",
    "cpu_plugin.support",
    "cpu_plugin.*",
    "graphs",
    "runtime",
    "sparse_*",
    "sparse_activation",  # finds weights as sparse_weights does
    "sparse_attention",  # keeps what it measured as sparse_weights does
    "stand_in",
    "convert",
    "leftovers",
    "deployment",
    "state_space",
    "optimum",
    "genai",
    "decode",
    "cli",
)

Tree = Callable[[dict[str, str]], dict[str, Path]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes files of a package ``p``, named without ".py", and returns all modules that it has by now."""

    def write(files: dict[str, str]) -> dict[str, Path]:
        for name, text in files.items():
            path = tmp_path / "p" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return modules(tmp_path, "p")

    return write


# Floors


@pytest.mark.parametrize("files, other", [(NNCF_EXT, "ov_ext"), (OV_EXT, "nncf_ext")], ids=["nncf_ext", "ov_ext"])
def test_the_packages_do_not_import_each_other(files: dict[str, Path], other: str) -> None:
    names = {module: [found.name.split(".")[0] for found in imports(module, path)] for module, path in files.items()}
    # One command goes from the one to the other: nncf-ext export.
    assert {module for module in names if other in names[module]} <= {"nncf_ext.cli.export"}


@pytest.mark.parametrize("name", ["drafts.py", "noise.py"])
def test_what_both_packages_need_is_the_same_file_in_both(name: str) -> None:
    assert (ROOT / "nncf_ext" / name).read_bytes() == (ROOT / "ov_ext" / name).read_bytes()


def test_imports_point_downward() -> None:
    assert not upward_imports(NNCF_EXT, "nncf_ext", LAYERS)
    assert not upward_imports(OV_EXT, "ov_ext", OV_EXT_LAYERS)


def test_sqft_builds_on_elastic_adapters_only() -> None:
    sqft = {name: path for name, path in NNCF_EXT.items() if name.startswith("nncf_ext.algorithms.sqft")}
    names = {found.name for module, path in sqft.items() for found in imports(module, path)}
    methods = {".".join(name.split(".")[:3]) for name in names if name.startswith("nncf_ext.algorithms.")}
    assert methods == {"nncf_ext.algorithms.sqft", "nncf_ext.algorithms.elastic_lora"}


@pytest.mark.parametrize(
    "text",
    [
        "import p.high",
        "from p import high",
        "from p.high import name",
        "from . import high",
        "from .high import name",
        "def function():\n    import p.high",
        "if TYPE_CHECKING:\n    from p.high import name",
    ],
)
def test_an_upward_import_is_found_however_it_is_written(tree: Tree, text: str) -> None:
    floors = ("low", "high")
    assert not upward_imports(tree({"low": "", "high": "from p import low"}), "p", floors)
    (wrong,) = upward_imports(tree({"low": text, "high": ""}), "p", floors)
    assert wrong.startswith("p.low imports p.high")


def test_rooms_side_by_side_do_not_see_each_other(tree: Tree) -> None:
    floors = ("plugin.support", "plugin.*")
    inside = "from p.plugin.support import memory\nfrom p.plugin.one import b"
    files = {"plugin/support/memory": "", "plugin/one/a": inside, "plugin/one/b": "", "plugin/two/c": ""}
    assert not upward_imports(tree(files), "p", floors)
    for beside in ("plugin/one/b", "plugin/support/memory"):
        (wrong,) = upward_imports(tree({**files, beside: "from p.plugin.two.c import name"}), "p", floors)
        assert wrong == f"p.{beside.replace('/', '.')} imports p.plugin.two.c.name"


def test_every_module_stands_on_a_floor(tree: Tree) -> None:
    files = tree({"__init__": "", "low": "import p.new\nfrom p import public", "new": ""})
    assert upward_imports(files, "p", ("low",)) == [
        "p.low imports p.new, which stands on no floor",
        "p.low imports p.public, which stands on no floor",  # a name of the package's table: it has a home to name
        "p.new stands on no floor",
    ]


def test_the_longest_floor_counts_and_a_plain_one_before_a_star() -> None:
    floors = ("a.records", "a", "b.*", "b.c")
    rooms = [room(name, floors) for name in ("a.records.x", "a.x", "b.d.x", "b.c.x", "b", "z")]
    assert rooms == [(0, "a.records"), (1, "a"), (2, "b.d"), (3, "b.c"), None, None]


# Circles


def test_there_is_no_import_circle() -> None:
    graph = import_graph(FILES)
    assert sum(map(len, graph.values())) > len(graph) > 60
    assert not circle(graph)


@pytest.mark.parametrize(
    "text", ["import p.a", "from p import a", "from . import a", "def late():\n    from p.a import name"]
)
def test_a_circle_is_named(tree: Tree, text: str) -> None:
    files = tree({"__init__": "", "a": "from p import b", "b": "import p.c", "c": text, "d": "from p import a"})
    named = circle(import_graph(files))
    assert named in ("p.a -> p.b -> p.c -> p.a", "p.b -> p.c -> p.a -> p.b", "p.c -> p.a -> p.b -> p.c")


def test_a_circle_through_a_package_is_found(tree: Tree) -> None:
    files = {"one/__init__": "from p.one import a", "one/a": "import p.two", "two": "import p.one.b", "one/b": ""}
    assert "p.one" in circle(import_graph(tree(files))).split(" -> ")


def test_what_is_for_types_only_makes_no_circle(tree: Tree) -> None:
    files = tree({"a": "from p import b", "b": "if TYPE_CHECKING:\n    from p import a\nelse:\n    import c"})
    assert not circle(import_graph(files))
    assert imports("p.b", files["p.b"]) == (Import("p.a", "for types"), Import("c", "at import"))


# What may be imported from outside


@pytest.mark.parametrize("module", OV_EXT)
def test_execution_needs_no_training_framework_at_import(module: str) -> None:
    heavy = {"torch", "nncf", "transformers", "optimum", "openvino_genai", "openvino_tokenizers", "onnx", "peft"}
    names = {found.name.split(".")[0] for found in imports(module, FILES[module]) if found.when == "at import"}
    assert not names & heavy


@pytest.mark.parametrize("module", NNCF_EXT)
def test_non_public_names_of_dependencies_come_through_one_file(module: str) -> None:
    if module == "nncf_ext.upstream":
        return
    names = [found.name for found in imports(module, FILES[module])]
    private = [name for name in names if re.match(r"(nncf\.(?!Dataset)|transformers\.(models|utils)\.)\w+\.", name)]
    assert not private, f"{module} imports {private}: move it to upstream.py"


def test_only_the_optimum_module_touches_optimum() -> None:
    users = {
        module
        for module, path in FILES.items()
        for found in imports(module, path)
        if found.name.split(".")[0] == "optimum"
    }
    plugin = "nncf_ext.cli.optimum_plugin.register_nncf_ext"  # a part of its command line, never imported here
    assert users <= {"ov_ext.optimum", plugin}


def test_files_that_travel_with_weights_stand_alone() -> None:
    folder = ROOT / "nncf_ext" / "standalone"
    assert len([*folder.glob("*.py")]) >= 3
    assert not strangers(folder)


@pytest.mark.parametrize(
    "text, found",
    [
        ("import nncf_ext.weights", "nncf_ext.weights"),
        ("def late():\n    from nncf_ext import extract", "nncf_ext.extract"),
        ("import numpy as np", "numpy"),
        ("from ..weights import int4", "..weights.int4"),
        ("from . import missing", ".standalone.missing"),
        ("if TYPE_CHECKING:\n    import nncf", "nncf"),
    ],
)
def test_a_stranger_is_found(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "beside.py").write_text("import json\nimport torch\nfrom safetensors.torch import load_file")
    (tmp_path / "model.py").write_text("import transformers\nfrom .beside import name\nfrom . import beside")
    assert not strangers(tmp_path)
    (tmp_path / "strange.py").write_text(text)
    assert strangers(tmp_path) == [f"strange.py imports {found}"]


# C++


def test_kernels_are_found() -> None:
    assert PLUGIN / "sparse_matmul" in operations(PLUGIN)


@pytest.mark.parametrize("operation", operations(PLUGIN), ids=lambda path: path.name)
def test_kernels_know_raw_pointers_only(operation: Path) -> None:
    assert not kernels_that_know_too_much(operation)


@pytest.mark.parametrize(
    "file, text, wrong",
    [
        ("two/reference.cpp", "#include <openvino/op/op.hpp>", "reference.cpp includes openvino/op/op.hpp"),
        ("two/avx2.cpp", "#include <tbb/parallel_for.h>", "avx2.cpp includes tbb/parallel_for.h"),
        ("support/unaligned.hpp", "#include <tbb/task_arena.h>", "unaligned.hpp includes tbb/task_arena.h"),
        ("two/amx.cpp", '#include "../one/kernel.hpp"', "amx.cpp includes ../one/kernel.hpp"),
    ],
)
def test_a_kernel_of_any_operation_that_knows_too_much_is_found(
    tmp_path: Path, file: str, text: str, wrong: str
) -> None:
    for name in ("one", "two", "support"):
        (tmp_path / name).mkdir()
    for operation in ("one", "two"):
        (tmp_path / operation / "kernel.hpp").write_text("#include <cstdint>\n")
        (tmp_path / operation / "reference.cpp").write_text(
            '#include "kernel.hpp"\n#include "../support/unaligned.hpp"\n'
        )
        (tmp_path / operation / "op.cpp").write_text("#include <openvino/op/op.hpp>\n")  # no kernel
    (tmp_path / "support" / "unaligned.hpp").write_text("#include <cstring>\n")
    assert [path.name for path in operations(tmp_path)] == ["one", "two"]
    assert not any(map(kernels_that_know_too_much, operations(tmp_path)))
    (tmp_path / file).write_text(text)
    assert kernels_that_know_too_much(tmp_path / "two") == [wrong]


# Public names


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
