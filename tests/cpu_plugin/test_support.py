"""support/: kernel objects share no code, and a second operation gets by with what is there."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ov_ext.cpu_plugin.support import native
from tests.sanitized import ROOT

PLUGIN = ROOT / "ov_ext" / "cpu_plugin"
TOY = Path(__file__).parent / "toy"
OPERATIONS = {"sparse_matmul": 7, "sparse_activation": 4, "sparse_attention": 5}  # and how many kernel objects each has


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Object name to the command that compiles it, for the kernels of all operations, without optimization.

    Unoptimized code keeps the inline functions that the optimizer would remove.
    """
    build = tmp_path_factory.mktemp("build")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}") or shutil.which("cmake")
    assert cmake, "CMake is needed: pip install cmake"
    options = ("-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=", f"-DPython_EXECUTABLE={sys.executable}")
    run(cmake, "-S", PLUGIN, "-B", build, *options)
    found = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        name = re.search(r"CMakeFiles/(kernels\w*)\.dir/(\S+)\.cpp\.o", entry["command"])
        if name:
            found[f"{name[1]}/{name[2]}"] = shlex.split(entry["command"])
    return found


def compiled(command: list[str], source: Path, output: Path) -> Path:
    """The object of a source file under another file's flags, warnings being errors except GCC's own headers'."""
    flags = [flag for flag in command[:-4] if not flag.startswith("-O")]
    run(*flags, "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Werror", "-c", source, "-o", output)
    return output


def shared_functions(code: Path) -> list[str]:
    """Functions that the linker may take from another object: weak and unique ones."""
    lines = run("nm", "--demangle", "--defined-only", code).splitlines()
    return [line for line in lines if line.split(" ")[1] in "WuV" and "DW.ref." not in line]


@pytest.fixture(scope="module")
def objects(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The objects of all kernels, without optimization."""
    folder = tmp_path_factory.mktemp("objects")
    return {
        name: compiled(command, Path(command[-1]), folder / f"{name.replace('/', '-')}.o")
        for name, command in commands.items()
    }


def test_kernel_objects_share_no_code(objects: dict[str, Path]) -> None:
    """Else the linker could give a function with AVX-512 instructions to everybody."""
    found = {operation: sum(f"/{operation}/" in name for name in objects) for operation in OPERATIONS}
    assert found == (OPERATIONS if platform.machine() in ("x86_64", "AMD64") else dict.fromkeys(OPERATIONS, 1))
    for name, code in objects.items():
        if name.endswith("reference"):  # runs everywhere, and so may what it lends
            continue
        assert not shared_functions(code), name


# What only later CPUs have: expansion, permutations and shifts of bytes and words, popcounts, GFNI, bf16.
NEWER = r"\bv(?:p(?:expand|compress)[bw]|perm[it]?2?b|pmultishift\w+|psh[lr]dv?[wdq]|popcnt\w+|gf2p8\w+|\w+bf16\w*)\b"
DOT_PRODUCT = r"\bvpdp\w+"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason=f"no AVX-512 code on {platform.machine()}")
def test_no_instruction_is_newer_than_the_target(objects: dict[str, Path]) -> None:
    """Flags keep the compiler from it, but not what is written in assembly."""
    for folder, has_dot_product in (("kernels", False), ("kernels_avx512_core_vnni", True)):
        code = run("objdump", "-d", "--no-show-raw-insn", objects[f"{folder}/sparse_matmul/avx512_core"])
        assert "%zmm" in code and not re.findall(NEWER, code)
        assert bool(re.search(DOT_PRODUCT, code)) == has_dot_product


def test_a_second_operation_needs_nothing_of_the_first(commands: dict[str, list[str]], tmp_path: Path) -> None:
    """The toy includes files of support/ only; its kernels agree, and refuse what is malformed."""
    import openvino

    for path in TOY.iterdir():
        for name in re.findall(r'#include "(.*)"', path.read_text()):
            assert name == "kernel.hpp" or (name.startswith("support/") and (PLUGIN / name).is_file()), path
    flags = {name.split("/")[-1]: command for name, command in commands.items() if "vnni" not in name}
    kernels = [name for name in ("reference", "avx2", "avx512_core", "avx512") if name in flags]
    objects = []
    for name in kernels:
        command = [*flags[name][:1], f"-I{PLUGIN}", *flags[name][1:]]
        objects.append(compiled(command, TOY / f"{name}.cpp", tmp_path / f"{name}.o"))
        assert name == "reference" or not shared_functions(objects[-1]), name
    package = Path(openvino.__file__).parent
    sources = [TOY / "operation.cpp", *(PLUGIN / "support").glob("*.cpp"), *objects]
    headers = [f"-I{path}" for path in (PLUGIN, package / "include")]
    libraries = [*(package / "libs").glob("libtbb.so*")][:1]
    run("g++", "-std=c++17", "-O1", "-fPIC", "-shared", *headers, *sources, *libraries, "-o", tmp_path / "toy.so")

    code = f"""
import ctypes
import numpy as np
import openvino  # it loads TBB
library = ctypes.CDLL({str(tmp_path / "toy.so")!r})
library.ov_ext_last_error.restype = ctypes.c_char_p
rng = np.random.default_rng(0)
weights = rng.integers(-128, 128, 256).astype(np.int8) * (rng.random(256) < 0.5)
x = rng.standard_normal(256).astype(np.float32)
masks = np.packbits(weights != 0, bitorder="little")
values = np.append(weights[weights != 0], np.zeros(64, np.int8)).astype(np.int8)
sums, factors = np.zeros(4, np.int64), np.zeros(4, np.float32)
pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (masks, values, x, sums, factors)]
call = lambda count: library.toy_multiply(
    *pointers[:2], ctypes.c_uint64(count), pointers[2], ctypes.c_uint64(4), *pointers[3:]
)
assert call(1) == 1 and b"masks" in library.ov_ext_last_error()
assert call(np.count_nonzero(weights)) == 0
codes = np.rint(x * (np.float32(127) / np.abs(x).max()))
print(*sums, *(factors == np.abs(x).max() / np.float32(127)), int(weights @ codes))
"""
    words = run(sys.executable, "-c", code).split()
    count = len(words) // 2
    available = [name for name in native.cpu_info()["kernels"] if name in kernels]
    assert words[: len(available)] == [words[-1]] * len(available)
    assert words[count : count + len(available)] == ["True"] * len(available)
