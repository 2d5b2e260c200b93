"""The AMX kernels under the emulator: integers bit for bit as the reference kernel, bf16 within a bound of its sums."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import sanitized
from tests.amx_emulator.emulated import ROOT, Emulator, cpu_flags, python_command

pytestmark = pytest.mark.slow

KIND_GROUPS = [("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 0), ("int4", 64), ("int4", 128)]
USED = {"bf16": "tdpbf16ps", "int8": "tdpbssd", "int4": "tdpbssd"}
SIZES = [1, 2, 15, 16, 17, 31, 33, 64, 100]
LARGER = [(130, 1100, 100), (1, 513, 33), (200, 512, 1), (65, 640, 47)]  # several blocks, chunks and strips


def awkward_shapes() -> Iterator[tuple[int, int, int]]:
    """Every (N, K) with three of the sizes as M, all of them in turn."""
    for i, n in enumerate(SIZES):
        for j, k in enumerate(SIZES):
            for m in range(3):
                yield n, k, SIZES[(i + j + 3 * m) % len(SIZES)]
    yield from LARGER


def misaligned(blob: np.ndarray, offset: int) -> np.ndarray:
    """The same bytes at an address that is ``offset`` beyond a multiple of 64."""
    memory = np.empty(blob.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    memory[start : start + blob.nbytes] = blob
    return memory[start : start + blob.nbytes]


def check_products(kind: str, group: str, every: str = "1") -> None:
    """Run in a process of its own; ``every``: take one of so many shapes."""
    from ov_ext.cpu_plugin.sparse_matmul import native
    from tests.cpu_plugin.conftest import make_weight
    from tests.cpu_plugin.test_kernels import oracle

    for number, (n, k, m) in enumerate(list(awkward_shapes())[:: int(every)]):
        rng = np.random.default_rng(number)
        dense, bias = number % 2 == 1, number % 3 == 0
        weight = make_weight(kind, n, k, group=int(group), sparsity=[0.5, 0.0, 0.9][number % 3], bias=bias, seed=number)
        blob = misaligned(native.pack(weight, dense), number % 64)
        x = rng.standard_normal((m, k)).astype(np.float32)
        for activation_group in (128, -1):
            y = native.matmul(x, blob, activation_group, isa="amx", threads=1)
            what = f"{kind} {group} N={n} K={k} M={m} dense={dense} activation_group={activation_group}"
            assert np.array_equal(y, native.matmul(x, blob, activation_group, isa="amx", threads=3)), what
            if kind == "bf16":
                expected, bound = oracle(x, weight, activation_group)
                assert (np.abs(y - expected) <= bound).all(), what
            else:
                assert np.array_equal(y, native.matmul(x, blob, activation_group, isa="reference")), what


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_products(emulator: Emulator, kind: str, group: int) -> None:
    emulator.run_python(check_products, kind, str(group), uses=[USED[kind]], environment={"OV_EXT_ISA": "amx"})


def check_tiles_are_released() -> None:
    from ov_ext.cpu_plugin.sparse_matmul import native
    from tests.cpu_plugin.conftest import make_weight

    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes([0xC4, 0xE2, 0x79, 0x49, 0x07, 0xC3]))  # sttilecfg (%rdi); ret
    store_configuration = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    for kind in USED:
        native.matmul(np.ones((20, 100), np.float32), native.pack(make_weight(kind, 100, 100)), isa="amx", threads=1)
        configuration = np.ones(64, np.uint8)
        store_configuration(configuration.ctypes.data)
        assert not configuration.any()


def test_tiles_are_released(emulator: Emulator) -> None:
    """oneDNN's kernels run on the same threads and look at the configuration before they load their own."""
    emulator.run_python(check_tiles_are_released, uses=set(USED.values()), environment={"OV_EXT_ISA": "amx"})


# -------------------------------------------------------------------------------------------------------- selection


def print_selection() -> None:
    import json

    import ov_ext

    print(json.dumps(ov_ext.cpu_info()))


def check_fallback() -> None:
    import ov_ext
    from ov_ext.cpu_plugin.sparse_matmul import native
    from tests.cpu_plugin.conftest import make_weight

    info = ov_ext.cpu_info()
    assert not info["amx_permission"] and "amx" not in info["kernels"] and info["selected"] == "avx512"
    blob = native.pack(make_weight("int8", 100, 200))
    x = np.random.default_rng(0).standard_normal((64, 200)).astype(np.float32)
    for _ in range(2):
        assert np.array_equal(native.matmul(x, blob), native.matmul(x, blob, isa="reference"))


def test_a_refused_permission_is_one_line_and_the_next_kernel(emulator: Emulator) -> None:
    run = emulator.run_python(check_fallback, uses=(), refuse=True, environment={"OV_EXT_ISA": ""})
    lines = [line for line in run.stderr.splitlines() if "AMX" in line]
    assert len(lines) == int("amx_tile" in cpu_flags()), run.stderr  # a CPU without is not asked


def test_a_kernel_named_without_permission_is_an_error(emulator: Emulator) -> None:
    run = emulator.run(python_command(print_selection), refuse=True, environment={"OV_EXT_ISA": "amx"})
    assert run.returncode == 1 and not run.traps
    assert "kernel 'amx' (OV_EXT_ISA) is not available" in run.stderr


# ------------------------------------------------------------------------------------------------------- sanitizers


@pytest.fixture(scope="module")
def sanitized_tree(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the sanitized library in place of the installed one."""
    library = sanitized.build("ov_ext_cpu") / "libov_ext_cpu.so"
    tree = tmp_path_factory.mktemp("sanitized")
    (tree / "ov_ext").mkdir()
    for path in (ROOT / "ov_ext").iterdir():
        if path.suffix != ".so":
            (tree / "ov_ext" / path.name).symlink_to(path)
    (tree / "ov_ext" / "libov_ext_cpu.so").symlink_to(library)
    (tree / "tests").symlink_to(ROOT / "tests")
    return tree


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_nothing_is_reported_under_the_sanitizers(
    emulator: Emulator, sanitized_tree: Path, kind: str, group: int
) -> None:
    import openvino

    runtimes = [  # libstdc++ because the sanitizer looks for its functions when the process starts
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        "OV_EXT_ISA": "amx",
        "LD_LIBRARY_PATH": str(Path(openvino.__file__).parent / "libs"),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "PYTHONPATH": os.pathsep.join([str(sanitized_tree), *(p for p in sys.path if p and Path(p) != ROOT)]),
    }
    # -S leaves out the finder of the editable install, which would lead back to the source tree.
    command = python_command(check_products, kind, str(group), "7")
    run = emulator.run(
        [command[0], "-S", *command[1:]], before=runtimes, environment=environment, directory=sanitized_tree
    )
    assert run.returncode == 0, run.stderr
    assert run.executed.get(USED[kind]), run
