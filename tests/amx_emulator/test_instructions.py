"""Each AMX instruction against an oracle written here: on the emulator, and on the real unit where there is one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.amx_emulator.cases import (
    ADDRESS,
    INPUTS,
    MEMORY,
    OUTPUTS,
    TILE,
    Case,
    Result,
    configuration,
    run_cases,
    tile_address,
)
from tests.amx_emulator.emulated import require_amx

pytestmark = pytest.mark.slow

Execute = Callable[[Sequence[Case]], list[Result]]


@pytest.fixture(params=["emulator", "emulator-all", "unit"])
def execute(request: pytest.FixtureRequest, case_runner: Path, tmp_path: Path) -> Execute:
    """Run cases on the emulator (what traps here; everything, as on a CPU without AMX) or on the real unit."""
    if request.param == "unit":
        require_amx()
        return lambda cases: run_cases(cases, case_runner, tmp_path, None)
    emulator = request.getfixturevalue("emulator")
    return lambda cases: run_cases(cases, case_runner, tmp_path, emulator, request.param == "emulator-all")


def memory_of(shapes: dict[int, tuple[int, int]], inputs: Sequence[np.ndarray], start_row: int = 0) -> np.ndarray:
    """The configuration, input tiles of 1 KiB, and 0xEE where nothing has been written."""
    memory = np.full(MEMORY, 0xEE, np.uint8)
    memory[:64] = configuration(shapes, start_row)
    for number, tile in enumerate(inputs):
        memory[INPUTS + TILE * number :][:TILE] = tile.reshape(-1).view(np.uint8)
    return memory


def dot_product(name: str, rows: int, depth: int, columns: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Case:
    """C += A B with C in tile 5, A in 2 and B in 7; depth and columns count groups of 32 bits."""
    shapes = {5: (rows, 4 * columns), 2: (rows, 4 * depth), 7: (depth, 4 * columns)}
    code = [
        "ldtilecfg (%rdi)",
        f"tileloadd {tile_address(0)}, %tmm2",
        f"tileloaddt1 {tile_address(1)}, %tmm7",
        f"tileloadd {tile_address(2)}, %tmm5",
        f"{name} %tmm7, %tmm2, %tmm5",
        f"tilestored %tmm5, {tile_address(0, output=True)}",
        "tilerelease",
    ]
    return Case(code, memory_of(shapes, [a, b, c]))


# ------------------------------------------------------------------------------------------------------------ bf16


SMALLEST = 2.0**-126  # smaller results and operands are zero, with their sign


def rounded(exact: np.ndarray, error: np.ndarray) -> np.ndarray:
    """exact + error (both float64, the second less than half a unit of the first) rounded once to float32."""
    bits = exact.view(np.int64).copy()
    inexact = np.isfinite(exact) & (error != 0)
    towards_zero = inexact & (np.signbit(error) != np.signbit(exact))
    bits[towards_zero] -= 1  # truncated
    bits[inexact] |= 1  # and made odd: rounding that to fewer bits is rounding the real sum
    mantissa, exponent = np.frexp(bits.view(np.float64))
    value = np.ldexp(mantissa.astype(np.float32).astype(np.float64), exponent)
    value = np.where(np.abs(value) < SMALLEST, np.copysign(0.0, value), value)
    return value.astype(np.float32)


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y (float64) in one rounding."""
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)  # Knuth's two-sum: exact
    return rounded(total, np.where(np.isfinite(total), error, 0))


def flushed(bits: np.ndarray) -> np.ndarray:
    """float32 bits as float64, denormals as zeros."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        value = bits.view(np.float32).astype(np.float64)
    return np.where(np.abs(value) < SMALLEST, np.copysign(0.0, value), value)


def bf16_oracle(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """[rows, 2 depth], [depth, 2 columns] bf16 bits and [rows, columns] float32 bits: the SDM's text of TDPBF16PS."""
    wide_a, wide_b = flushed(a.astype(np.uint32) << 16), flushed(b.astype(np.uint32) << 16)
    sums = [np.zeros(c.shape, np.float32), np.zeros(c.shape, np.float32)]
    with np.errstate(all="ignore"):
        for k in range(b.shape[0]):
            for parity in range(2):
                product = wide_a[:, 2 * k + parity, None] * wide_b[None, k, parity::2]  # exact: 8 bits times 8 bits
                sums[parity] = add(product, sums[parity].astype(np.float64))
        both = add(sums[0].astype(np.float64), sums[1].astype(np.float64))
        return add(flushed(c), both.astype(np.float64))


def bf16_values(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 bits of one kind."""
    normal = rng.standard_normal(shape).astype(np.float32)
    if kind == "tiny":  # products and sums around the smallest normal number
        normal *= np.float32(2.0) ** rng.integers(-70, -56, shape).astype(np.float32)
    bits = normal.view(np.uint32)
    if kind == "any bits":
        bits = rng.integers(0, 1 << 32, shape, np.uint32)
    if kind == "special":
        values = [0, 1 << 31, 0x3F800000, 0x7F800000, 0xFF800000, 0x7FC10000, 0x7F810000, 0xFFC10000, 0x7F7F0000]
        values += [0x00010000, 0x807F0000, 0x00800000, 0xC0490000, 0x3F800001]
        bits = rng.choice(np.array(values, np.uint32), shape, p=[0.2] + [0.8 / 13] * 13)
    return bits


SHAPES = [(16, 16, 16), (1, 1, 1), (3, 16, 5), (16, 2, 16), (13, 15, 1), (1, 16, 16), (7, 3, 12)]


@pytest.mark.parametrize("kind", ["normal", "tiny", "any bits", "special"])
def test_bf16(execute: Execute, kind: str) -> None:
    cases, expected = [], []
    for number in range(200):
        rng = np.random.default_rng(number)
        rows, depth, columns = SHAPES[number] if number < len(SHAPES) else rng.integers(1, 17, 3)
        a, b = ((bf16_values(rng, kind, (16, 32)) >> 16).astype(np.uint16) for _ in range(2))
        c = bf16_values(rng, kind, (16, 16))
        if kind == "tiny":
            c = (c.view(np.float32) * np.float32(2.0**-62)).view(np.uint32)
        cases.append(dot_product("tdpbf16ps", rows, depth, columns, a, b, c))
        expected.append(bf16_oracle(a[:rows, : 2 * depth], b[:depth, : 2 * columns], c[:rows, :columns]))
    nans = 0
    for result, want in zip(execute(cases), expected, strict=True):
        got = result.tile(0, (want.shape[0], 4 * want.shape[1])).copy().view(np.float32)
        assert result.signal == 0
        nans += int(np.isnan(want).sum())
        assert np.array_equal(np.isnan(got), np.isnan(want))
        number = ~np.isnan(want)
        assert np.array_equal(got[number].view(np.uint32), want[number].view(np.uint32))
    assert (nans > 0) == (kind in ("any bits", "special"))


# ----------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "name, a_type, b_type",
    [
        ("tdpbssd", np.int8, np.int8),
        ("tdpbsud", np.int8, np.uint8),
        ("tdpbusd", np.uint8, np.int8),
        ("tdpbuud", np.uint8, np.uint8),
    ],
)
def test_bytes(execute: Execute, name: str, a_type: type, b_type: type) -> None:
    cases, expected = [], []
    for number in range(100):
        rng = np.random.default_rng(number)
        rows, depth, columns = SHAPES[number] if number < len(SHAPES) else rng.integers(1, 17, 3)
        a, b = (
            rng.choice([0, 1, 127, 128, 255], 1024) if number % 3 == 0 else rng.integers(0, 256, 1024) for _ in "ab"
        )
        a, b = (raw.astype(np.uint8).view(kind).reshape(16, 64) for raw, kind in ((a, a_type), (b, b_type)))
        c = rng.integers(-(2**31), 2**31, (16, 16)).astype(np.int32)
        cases.append(dot_product(name, rows, depth, columns, a, b, c))
        total = c[:rows, :columns].astype(np.int64)
        for k in range(depth):
            for i in range(4):
                total += np.multiply.outer(a[:rows, 4 * k + i].astype(np.int64), b[k, i : 4 * columns : 4])
        expected.append(((total + 2**31) % 2**32 - 2**31).astype(np.int32))  # wraps around
    for result, want in zip(execute(cases), expected, strict=True):
        assert result.signal == 0
        assert np.array_equal(result.tile(0, (want.shape[0], 4 * want.shape[1])).copy().view(np.int32), want)


# ------------------------------------------------------------------------------------------- configuration and memory


def test_tiles_start_empty_and_the_configuration_reads_back(execute: Execute) -> None:
    shapes = {0: (16, 64), 3: (5, 12), 7: (1, 4)}
    code = ["sttilecfg 128(%rdi)", "ldtilecfg (%rdi)", "tilezero %tmm0", "sttilecfg 192(%rdi)"]
    code += ["tilerelease", "sttilecfg 256(%rdi)"]
    result = execute([Case(code, memory_of(shapes, []))])[0]
    assert result.signal == 0
    assert not result.memory[128:192].any() and not result.memory[256:320].any()
    stored = result.memory[192:256].copy()
    if result.run:
        stored[1] = 0  # the emulator's mark on a CPU with AMX
    assert np.array_equal(stored, configuration(shapes))


@pytest.mark.parametrize("again", ["same", "other", "released"])
def test_loading_a_configuration_clears_the_tiles(execute: Execute, again: str) -> None:
    memory = memory_of({0: (4, 16), 1: (2, 8)}, [np.full(1024, 7, np.uint8)])
    memory[64:128] = configuration({0: (4, 16), 1: (2, 8)} if again != "other" else {0: (4, 16), 1: (3, 8)})
    code = [
        "ldtilecfg (%rdi)",
        f"tileloadd {tile_address(0)}, %tmm0",
        *(["tilerelease"] if again == "released" else []),
    ]
    code += ["ldtilecfg 64(%rdi)", f"tilestored %tmm0, {tile_address(0, output=True)}"]
    result = execute([Case(code, memory)])[0]
    assert result.signal == 0 and not result.tile(0, (4, 16)).any()
    assert (result.memory[OUTPUTS + 16 : OUTPUTS + 64] == 0xEE).all()  # nothing beyond the columns of the tile


ADDRESSES = {  # operand: (instructions before, offset of row 0, stride)
    "(%rdi,%rsi,1)": ([], 0, 64),
    "(%rdi,%rsi,2)": ([], 0, 128),
    "(%r12,%r13,8)": (["mov %rdi, %r12", "mov $16, %r13"], 0, 128),
    "1024(%rdi,%rsi,4)": ([], 1024, 256),
    "-16(%r13,%rsi,1)": (["lea 100(%rdi), %r13"], 84, 64),
    "2048(%rdi,%r15,1)": (["mov $-32, %r15"], 2048, -32),
    "256(%rdi)": ([], 256, 0),
    f"{ADDRESS + 512}(,%rsi,1)": ([], 512, 64),
    "(%rbp,%rdx,1)": (["push %rbp", "lea 320(%rdi), %rbp", "mov $3, %edx"], 320, 3),
    "(%r8,%r9,1)": (["lea 77(%rdi), %r8", "mov $77, %r9"], 77, 77),
    "64(%rsp,%rcx,1)": (["mov %rsp, %rax", "lea 64(%rdi), %rsp", "mov $80, %rcx"], 128, 80),
}


@pytest.mark.parametrize("operand", ADDRESSES)
def test_addresses_of_tiles(execute: Execute, operand: str) -> None:
    before, offset, stride = ADDRESSES[operand]
    after = {"push %rbp": ["pop %rbp"], "mov %rsp, %rax": ["mov %rax, %rsp"]}.get(before[0] if before else "", [])
    rows, row_bytes = 9, 36
    memory = np.random.default_rng(0).integers(0, 256, MEMORY).astype(np.uint8)
    memory[OUTPUTS:] = 0
    block = configuration({6: (rows, row_bytes)})
    copy = ";".join(f"movl ${int(word)}, {4 * i}(%rdi)" for i, word in enumerate(block.view("<u4")))
    keep = ["mov %rdi, %r10"]  # the configuration comes last, so that any operand may lie over it
    code = [*keep, f"lea {OUTPUTS + 4096}(%rdi), %rdi", copy, "ldtilecfg (%rdi)", "mov %r10, %rdi", *before]
    load = [f"tileloadd {operand}, %tmm6", *after, f"tilestored %tmm6, {OUTPUTS}(%r10,%rsi,1)"]
    result = execute([Case(code + load, memory)])[0]
    assert result.signal == 0
    for row in range(rows):
        start = offset + row * stride
        assert np.array_equal(result.tile(0, (rows, row_bytes))[row], memory[start : start + row_bytes])


@pytest.mark.parametrize("operand", ["(%rdi)", "8(%rdi)", "-8(%r13,%rcx,2)", "(%rdi,%rsi,4)", "configuration(%rip)"])
def test_addresses_of_configurations(execute: Execute, operand: str) -> None:
    memory, offset = np.full(MEMORY, 0xEE, np.uint8), {"8(%rdi)": 8, "(%rdi,%rsi,4)": 256}.get(operand, 0)
    block = configuration({1: (2, 8)})
    memory[offset : offset + 64] = block
    code = ["lea -12(%rdi), %r13", "mov $10, %rcx", f"ldtilecfg {operand}", "tilezero %tmm1"]
    code += [f"tilestored %tmm1, {tile_address(0, output=True)}"]
    words = ", ".join(str(byte) for byte in block)
    code += ["ret", "configuration:", f".byte {words}"] if "rip" in operand else []
    result = execute([Case(code, memory)])[0]
    assert result.signal == 0
    assert not result.tile(0, (2, 8)).any() and (result.memory[OUTPUTS + 8 : OUTPUTS + 64] == 0xEE).all()


def test_start_row(execute: Execute) -> None:
    memory = memory_of({0: (4, 8)}, [(np.arange(TILE) % 251 + 1).astype(np.uint8)], start_row=2)
    code = ["ldtilecfg (%rdi)", f"tileloadd {tile_address(0)}, %tmm0", f"tilestored %tmm0, {tile_address(0, True)}"]
    result = execute([Case(code, memory)])[0]
    want = memory[INPUTS : INPUTS + TILE].reshape(16, 64)[:4, :8].copy()
    want[:2] = 0
    assert result.signal == 0 and np.array_equal(result.tile(0, (4, 8)), want)


# ---------------------------------------------------------------------------------------------------------- faults


FULL = {tile: (16, 64) for tile in range(8)}
LOAD = f"tileloadd {tile_address(0)}, %tmm4"


def broken(offset: int, value: int) -> np.ndarray:
    block = configuration(FULL)
    block[offset] = value
    return block


NOT_CONFIGURED = configuration(FULL | {4: (0, 0)})
FAULTS: dict[str, tuple[np.ndarray, list[str], signal.Signals, str]] = {
    "no configuration": (configuration({}), ["tilerelease", LOAD], signal.SIGILL, "no tile configuration"),
    "palette 2": (broken(0, 2), [], signal.SIGSEGV, "palette"),
    "reserved byte": (broken(5, 1), [], signal.SIGSEGV, "reserved byte"),
    "17 rows": (broken(48, 17), [], signal.SIGSEGV, "more than 16 rows"),
    "65 bytes": (broken(16, 65), [], signal.SIGSEGV, "more than 16 rows or 64 bytes"),
    "rows of no bytes": (broken(20, 0), [], signal.SIGSEGV, "rows of no bytes"),
    "bytes but no rows": (broken(50, 0), [], signal.SIGSEGV, "no rows"),
    "tile 8": (broken(56, 1), [], signal.SIGSEGV, "above 7"),
    "load of an unconfigured tile": (NOT_CONFIGURED, [LOAD], signal.SIGILL, "not configured"),
    "zero of an unconfigured tile": (NOT_CONFIGURED, ["tilezero %tmm4"], signal.SIGILL, "not configured"),
    "store of an unconfigured tile": (
        NOT_CONFIGURED,
        [f"tilestored %tmm4, {tile_address(0)}"],
        signal.SIGILL,
        "not configured",
    ),
    "load of ragged bytes": (configuration(FULL | {4: (16, 62)}), [LOAD], signal.SIGILL, "multiple of 4"),
    "start row": (configuration(FULL | {4: (3, 64)}, start_row=3), [LOAD], signal.SIGILL, "start_row"),
    "M": (configuration(FULL | {1: (15, 64)}), ["tdpbf16ps %tmm3, %tmm2, %tmm1"], signal.SIGILL, "(M)"),
    "N": (configuration(FULL | {1: (16, 60)}), ["tdpbssd %tmm3, %tmm2, %tmm1"], signal.SIGILL, "(N)"),
    "K": (configuration(FULL | {2: (16, 60)}), ["tdpbuud %tmm3, %tmm2, %tmm1"], signal.SIGILL, "(K)"),
    "C unconfigured": (configuration(FULL | {1: (0, 0)}), ["tdpbusd %tmm3, %tmm2, %tmm1"], signal.SIGILL, "not conf"),
    "A unconfigured": (configuration(FULL | {2: (0, 0)}), ["tdpbsud %tmm3, %tmm2, %tmm1"], signal.SIGILL, "not conf"),
    "B unconfigured": (configuration(FULL | {3: (0, 0)}), ["tdpbf16ps %tmm3, %tmm2, %tmm1"], signal.SIGILL, "not conf"),
    "C is A": (broken(0, 1), [".byte 0xC4, 0xE2, 0x73, 0x5E, 0xC0"], signal.SIGILL, "same tile"),
    "C is B": (broken(0, 1), [".byte 0xC4, 0xE2, 0x7B, 0x5E, 0xC1"], signal.SIGILL, "same tile"),
    "A is B": (broken(0, 1), [".byte 0xC4, 0xE2, 0x73, 0x5E, 0xC1"], signal.SIGILL, "same tile"),
    "a page that is not there": (broken(0, 1), [f"tileloadd {MEMORY - 64}(%rdi,%rsi,1), %tmm4"], signal.SIGSEGV, ""),
    "tile number 9": (broken(0, 1), [".byte 0xC4, 0x62, 0x7B, 0x49, 0xC8"], signal.SIGILL, "above 7"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(execute: Execute, fault: str) -> None:
    block, code, number, reason = FAULTS[fault]
    memory = memory_of({}, [])
    memory[:64] = block
    fine = Case(["ldtilecfg (%rdi)", "tilezero %tmm2", "movb $7, 8192(%rdi)"], memory_of(FULL, []))
    result, after = execute([Case(["ldtilecfg (%rdi)", *code, "movb $7, 8192(%rdi)"], memory), fine])
    assert result.signal == number and result.memory[OUTPUTS] == 0xEE
    assert after.signal == 0 and after.memory[OUTPUTS] == 7
    native = number == signal.SIGSEGV and result.run and "ldtilecfg" not in result.run.executed  # the CPU's own check
    assert result.run is None or native or reason in result.run.stderr
