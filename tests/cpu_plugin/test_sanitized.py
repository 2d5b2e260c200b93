"""Under the address and undefined-behaviour sanitizers: a short run of the fuzzer, the tests of format and kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sanitized import ROOT, build

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "runs"), [("ov_ext_fuzz", 3000), ("ov_ext_activation_fuzz", 3000), ("ov_ext_attention_fuzz", 50)]
)
def test_the_fuzzer_finds_nothing(tmp_path: Path, name: str, runs: int) -> None:
    """The same inputs in every run, a third or more of them valid; `make fuzz` tries others for as long as wanted."""
    program = build(name) / "fuzz" / name
    done = subprocess.run(
        [program, "--runs", str(runs), "--seed", "1", "--save", tmp_path], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    assert done.stdout.startswith(f"{runs} inputs, ")
    assert int(done.stdout.split()[2]) > runs // 3  # valid ones, which reached the kernels


@pytest.fixture(scope="module")
def sanitized_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its plug-in tests, with the sanitized library in place of the installed one."""
    library = build("ov_ext_cpu") / "libov_ext_cpu.so"
    tree = tmp_path_factory.mktemp("sanitized")
    only_python = shutil.ignore_patterns("*.so", "*.cpp", "*.hpp", "__pycache__")
    shutil.copytree(ROOT / "ov_ext", tree / "ov_ext", ignore=only_python)
    shutil.copytree(ROOT / "tests" / "cpu_plugin", tree / "tests" / "cpu_plugin", ignore=only_python)
    for name in ("__init__.py", "sanitized.py"):
        shutil.copy(ROOT / "tests" / name, tree / "tests" / name)
    # The runtime path of the library is relative to an installed wheel; here it is found through LD_LIBRARY_PATH.
    shutil.copy(library, tree / "ov_ext")
    return tree


def run_sanitized(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python there. -S leaves out the finder of the editable install, which would lead back to the source tree."""
    import openvino

    runtimes = (  # libstdc++ because the sanitizer looks for its functions when the process starts
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    )
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        "LD_LIBRARY_PATH": str(Path(openvino.__file__).parent / "libs"),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(tree), *(path for path in sys.path if path and Path(path) != ROOT)]),
    }
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_the_sanitized_library_is_the_one_that_runs(sanitized_tree: Path) -> None:
    """A claim that a blob is 4 KiB longer than it is: the sanitizer, not luck, must end the process."""
    code = """
import ctypes, numpy as np
from ov_ext.cpu_plugin.support import native
from ov_ext.cpu_plugin.sparse_matmul.pack import pack
from ov_ext.cpu_plugin.support.weight import Weight
blob = pack(Weight("bf16", np.ones((64, 64), np.uint16)))
memory = ctypes.create_string_buffer(blob.tobytes(), blob.nbytes)
native.library().ov_ext_validate(memory, ctypes.c_uint64(blob.nbytes))
print("valid")
heap = ctypes.CDLL(None).malloc
heap.restype = ctypes.c_void_p
short = heap(blob.nbytes - 64)
ctypes.memmove(short, memory, blob.nbytes - 64)
native.library().ov_ext_validate(ctypes.c_void_p(short), ctypes.c_uint64(blob.nbytes))
"""
    done = run_sanitized(sanitized_tree, "-c", code)
    assert done.stdout == "valid\n" and done.returncode and "heap-buffer-overflow" in done.stderr, done.stderr


@pytest.mark.parametrize("module", ["test_format", "test_kernels", "test_sparse_activation", "test_sparse_attention"])
def test_nothing_is_reported_while_the_tests_of_format_and_kernels_run(sanitized_tree: Path, module: str) -> None:
    # Left out: long ones that touch no memory in a way that the fuzzer and shorter ones do not.
    long = (
        "product",
        "a_language_model_layer",
        "any_number_of_threads",
        "large_sides",
        "every_boundary",
        "long_context",
        "resident_memory",
    )
    fast = " and ".join(f"not {name}" for name in long)
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", fast)
    done = run_sanitized(sanitized_tree, "-m", "pytest", *options, f"tests/cpu_plugin/{module}.py")
    assert not done.returncode, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
