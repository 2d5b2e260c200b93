"""What the compiler made of the AVX-512 loops: decoding must be register to register and must not spill.

Functions are found by their instructions and by the unwind tables, which survive stripping, not by name.
"""

from __future__ import annotations

import bisect
import functools
import platform
import re
import subprocess

import pytest

from ov_ext.extension import extension_path

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason=f"no AVX-512 code on {platform.machine()}"
)

SLICES = 16  # of a panel, decoded by one run of straight code
KINDS_OF_LOOP = 5  # bf16; int8 and int4 with quantized and with f32 activations
FEW_ROWS = 4  # functions for 1 ... 4 rows of x, and one that decodes for more
EXPAND = re.compile(r"\bvpexpand[bw]\b")
STACK = re.compile(r"\[(?:rsp|rbp)\b")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def _decoders() -> list[list[str]]:
    """The instructions of every function that expands slices, in order of address."""
    library = str(extension_path())
    frames = re.findall(r"\bFDE\b.*\bpc=([0-9a-f]+)\.\.", _run("objdump", "--dwarf=frames", library))
    starts = sorted({int(start, 16) for start in frames})
    functions: dict[int, list[str]] = {}
    for line in _run("objdump", "-d", "-M", "intel", "--no-show-raw-insn", library).splitlines():
        address, _, instruction = line.partition(":\t")
        if instruction and (place := bisect.bisect(starts, int(address, 16))):
            functions.setdefault(starts[place - 1], []).append(instruction)
    return [code for code in functions.values() if any(map(EXPAND.search, code))]


def _panels(code: list[str]) -> list[list[str]]:
    """The code of each panel, from its first expand to its last."""
    places = [i for i, instruction in enumerate(code) if EXPAND.search(instruction)]
    return [code[places[i] : places[i + SLICES - 1] + 1] for i in range(0, len(places), SLICES)]


def test_every_sparse_function_expands_a_whole_panel() -> None:
    decoders = _decoders()
    assert len(decoders) >= KINDS_OF_LOOP * (FEW_ROWS + 1)
    for code in decoders:
        assert sum(bool(EXPAND.search(instruction)) for instruction in code) % SLICES == 0
    words = [code for code in decoders if any("vpexpandw" in instruction for instruction in code)]
    assert len(words) >= FEW_ROWS + 1  # bf16


def test_no_expand_reads_memory() -> None:
    expands = [instruction for code in _decoders() for instruction in code if EXPAND.search(instruction)]
    assert len(expands) >= SLICES * KINDS_OF_LOOP * (FEW_ROWS + 1)
    assert not [instruction for instruction in expands if "[" in instruction]


def test_no_accumulator_is_spilled_within_a_panel() -> None:
    for code in _decoders():
        for panel in _panels(code):
            assert not [instruction for instruction in panel if "zmm" in instruction and STACK.search(instruction)]


@pytest.mark.parametrize("rows", range(1, FEW_ROWS + 1))
@pytest.mark.parametrize("product, kinds", [("vpdpbusd", 2), ("vdpbf16ps", 1)])  # int8 and int4; bf16
def test_a_decoded_slice_meets_all_rows_of_x_at_once(product: str, kinds: int, rows: int) -> None:
    """Loops for this number of rows: a dot product for each slice and row of x, and few instructions besides."""
    found = 0
    for code in _decoders():
        counts = {sum(product in instruction for instruction in panel) for panel in _panels(code)}
        if all((SLICES - 1) * rows <= count <= SLICES * rows for count in counts):
            found += 1
            assert all(len(panel) <= SLICES * (9 + 2 * rows) for panel in _panels(code))
    assert found == kinds
