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
def _functions() -> list[list[tuple[int, str]]]:
    """Every function's instructions with their addresses, in order of address."""
    library = str(extension_path())
    frames = re.findall(r"\bFDE\b.*\bpc=([0-9a-f]+)\.\.", _run("objdump", "--dwarf=frames", library))
    starts = sorted({int(start, 16) for start in frames})
    functions: dict[int, list[tuple[int, str]]] = {}
    for line in _run("objdump", "-d", "-M", "intel", "--no-show-raw-insn", library).splitlines():
        address, _, instruction = line.partition(":\t")
        if instruction and (place := bisect.bisect(starts, int(address, 16))):
            functions.setdefault(starts[place - 1], []).append((int(address, 16), instruction))
    return list(functions.values())


@functools.cache
def _decoders() -> list[list[str]]:
    """The instructions of every function that expands slices of weights."""
    functions = [[instruction for _, instruction in code] for code in _functions()]
    return [code for code in functions if any(map(EXPAND.search, code)) and not _is_of_attention(code)]


def _is_of_attention(code: list[str]) -> bool:
    """Sparse attention expands, too, and takes nibbles and keys apart by shuffles, which no decoder of weights has."""
    return any(map(EXPAND.search, code)) and any("vpshufb" in instruction for instruction in code)


def _innermost_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of each loop without another one in it."""
    jumps = [(int(found[1], 16), address) for address, text in code if (found := re.match(r"j\w+ +([0-9a-f]+)", text))]
    back = [(start, end) for start, end in jumps if code[0][0] <= start < end]
    inner = [(a, b) for a, b in back if not any((a, b) != (c, d) and a <= c and d <= b for c, d in back)]
    return [[text for address, text in code if a <= address <= b] for a, b in inner]


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


# Without VBMI2: one 16-bit value a lane for bf16, shuffles for bytes; products of 16 bits.
EXPAND_LANES = re.compile(r"\bvpexpandd\b")
CORE_KERNELS = 2  # with and without VNNI


def test_expansion_by_lanes_reads_registers_and_masks_come_from_memory() -> None:
    """Two expansions for each slice. What goes through a general register takes port 5 once more."""
    loops = [loop for code in _functions() for loop in _innermost_loops(code) if any(map(EXPAND_LANES.search, loop))]
    for loop in loops:
        assert not [text for text in loop if EXPAND_LANES.search(text) and "[" in text]
        assert not [text for text in loop if "zmm" in text and STACK.search(text)]
        expands = sum(bool(EXPAND_LANES.search(text)) for text in loop)
        assert 2 * sum(bool(re.match(r"kmovw +k\d,WORD PTR", text)) for text in loop) == expands
        assert not [text for text in loop if re.match(r"(?:kmov\w +k\d|vpbroadcast\w +zmm\d+),[er]", text)]
    panels = [loop for loop in loops if sum(bool(EXPAND_LANES.search(text)) for text in loop) == 2 * SLICES]
    assert len(panels) >= CORE_KERNELS * FEW_ROWS


@pytest.mark.parametrize(
    "product, loops", [(r"vpmaddubsw zmm", 2 * (2 * FEW_ROWS + 5)), (r"vpdpbusd zmm.*(?:BCST|1to16)", 2 * 2 * FEW_ROWS)]
)
def test_integer_sums_stay_in_registers(product: str, loops: int) -> None:
    """Of int8 and int4, sparse and dense, for 1 ... 4 rows of x; without VNNI also of decoded slices, for more rows."""
    candidates = [loop for code in _functions() for loop in _innermost_loops(code)]
    found = [loop for loop in candidates if any(re.search(product, text) for text in loop)]
    assert len(found) >= loops
    for loop in found:
        assert not [text for text in loop if "zmm" in text and STACK.search(text)]


def test_words_of_sparse_attention_meet_all_rows_in_registers() -> None:
    """AVX2: keys and values, for 1 ... 4 query rows: two halves of a slice, four words each, factors broadcast."""
    loops = [loop for code in _functions() for loop in _innermost_loops(code)]
    wanted, others = ("vpsllw ymm", "vpbroadcastd ymm", "vpmaddwd ymm"), "vpmaddubsw"
    words = [
        loop for loop in loops if all(any(each in text for text in loop) for each in wanted) and others not in str(loop)
    ]
    products = [sum("vpmaddwd ymm" in text for text in loop) for loop in words]
    assert {4 * rows for rows in range(1, FEW_ROWS + 1)} <= set(products)
    for loop in words:
        assert not [text for text in loop if "ymm" in text and STACK.search(text)]


@pytest.mark.parametrize("product", ["vpdpbusd zmm", "vpmaddwd zmm"])
def test_bytes_that_a_shuffle_expands_meet_all_rows_of_sparse_attention_in_registers(product: str) -> None:
    """AVX-512 without VBMI2, two slices at a time, for 1 ... 4 query rows: keys of either half, and values."""
    loops = [loop for code in _functions() for loop in _innermost_loops(code)]
    pairs = [
        loop for loop in loops if sum("vpermd zmm" in text for text in loop) == 4 and "vpmaddubsw" not in str(loop)
    ]
    found = [loop for loop in pairs if any(product in text for text in loop)]
    products = [sum(product in text for text in loop) for loop in found]
    assert all(products.count(4 * rows) >= 4 for rows in range(1, FEW_ROWS + 1))
    for loop, count in zip(found, products, strict=True):
        assert not [text for text in loop if "zmm" in text and STACK.search(text)]
        assert len(loop) < 75 + 2.5 * count  # 37 a slice, and its products: GCC 12 has 33


@pytest.mark.parametrize("product", ["vpdpbusd zmm", "vpmaddubsw zmm"])
def test_weights_of_inputs_that_stay_meet_their_products_in_registers(product: str) -> None:
    """Four rows of int4 and int8 weights, interleaved. Taken apart, for 3 or 4 rows of x: four products each."""
    loops = [loop for code in _functions() for loop in _innermost_loops(code) if any(product in text for text in loop)]
    interleaved = [loop for loop in loops if any("vpunpckhwd zmm" in text for text in loop)]
    assert {4, 8} <= {sum(product in text for text in loop) for loop in interleaved}
    shared = [loop for loop in loops if _loads(loop) == 4 and sum(product in text for text in loop) in (4 * 3, 4 * 4)]
    assert {4 * 3, 4 * 4} == {sum(product in text for text in loop) for loop in shared}
    for loop in interleaved + shared:
        assert not [text for text in loop if "zmm" in text and STACK.search(text)]


def _loads(loop: list[str]) -> int:
    return sum("vmovdqa64 zmm" in text and "[" in text for text in loop)
