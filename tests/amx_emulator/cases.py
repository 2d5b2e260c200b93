"""Small programs of AMX instructions, written as assembly, run on the emulator or on the real unit."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.amx_emulator.emulated import Emulator, Run, compile_c

MEMORY = 16384  # bytes of memory that a case sees, at ADDRESS and in rdi; rsi is 64
ADDRESS = 0x10000000
INPUTS, OUTPUTS, TILE = (
    1024,
    8192,
    1024,
)  # by convention: configuration at 0, seven inputs, eight outputs of one tile each


def configuration(shapes: dict[int, tuple[int, int]], start_row: int = 0) -> np.ndarray:
    """:return: [64] uint8 for LDTILECFG: palette 1 and the shape (rows, bytes in a row) of each tile named."""
    block = np.zeros(64, np.uint8)
    block[:2] = 1, start_row
    for tile, (rows, row_bytes) in shapes.items():
        block[48 + tile] = rows
        block[16 + 2 * tile : 18 + 2 * tile] = np.array([row_bytes], "<u2").view(np.uint8)
    return block


def tile_address(number: int, output: bool = False) -> str:
    """:return: Operand of one 1 KiB input or output tile, rows 64 bytes apart."""
    return f"{(OUTPUTS if output else INPUTS) + TILE * number}(%rdi,%rsi,1)"


@dataclass
class Case:
    """A program and the memory it starts with.

    :param code: Lines of AT&T assembly; the memory's address is in rdi, 64 in rsi.
    :param memory: ``[MEMORY]`` uint8.
    """

    code: list[str]
    memory: np.ndarray


@dataclass
class Result:
    """What a case left.

    :param signal: What ended it; 0 when it returned.
    :param memory: ``[MEMORY]`` uint8.
    :param run: The emulated process that ran all cases; None on the real unit.
    """

    signal: int
    memory: np.ndarray
    run: Run | None

    def tile(self, number: int, shape: tuple[int, int]) -> np.ndarray:
        """:return: [rows, bytes] uint8 of one output tile."""
        block = self.memory[OUTPUTS + TILE * number :][:TILE].reshape(16, 64)
        return block[: shape[0], : shape[1]]


def run_cases(
    cases: Sequence[Case], program: Path, directory: Path, emulator: Emulator | None, every_instruction: bool = False
) -> list[Result]:
    """Assemble programs and run them, one after another in one process.

    :param cases: The programs.
    :param program: run_cases.c, compiled.
    :param directory: For the files.
    :param emulator: None = the real unit.
    :param every_instruction: Have the emulator execute also what does not trap on a CPU with AMX (ldtilecfg, sttilecfg
        and tilerelease), as on a CPU without.
    :return: One result a case.
    """
    lines = [".text", ".balign 4096"]
    for number, case in enumerate(cases):
        name = f"case_{number}"
        lines += [f".globl {name}", f".type {name}, @function", f"{name}:", *case.code, "ret"]
    lines += [".globl end_of_cases", "end_of_cases:", ".fill 16, 1, 0x90", '.section .note.GNU-stack,"",@progbits', ""]
    source, image, output = directory / "cases.s", directory / "input", directory / "output"
    source.write_text("\n".join(lines))
    code = compile_c(directory / "cases.so", [source], "-shared", "-nostdlib", "-Wl,-z,separate-code")
    image.write_bytes(b"".join(case.memory.tobytes() for case in cases))
    command = [*map(str, (program, code, image, output)), *(["int3"] if every_instruction else [])]
    run = None
    if emulator:
        run = emulator.run(command, fast=every_instruction)
        assert run.returncode == 0 and run.traps, run
    else:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done
    raw = np.fromfile(output, np.uint8).reshape(len(cases), 4 + MEMORY)
    return [Result(int(row[:4].view(np.int32)[0]), row[4:], run) for row in raw]
