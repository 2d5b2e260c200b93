"""The emulator against the real unit, bit for bit: random arithmetic with NaN bits, random programs with faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.amx_emulator.cases import INPUTS, MEMORY, TILE, Case, Result, configuration, run_cases, tile_address
from tests.amx_emulator.emulated import Emulator, require_amx

pytestmark = pytest.mark.slow

DOT_PRODUCTS = ["tdpbf16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud"]
STORED = 3 * 64  # three configurations to load lie at 0, this is where one is stored


def run_both(
    cases: list[Case], runner: Path, directory: Path, emulator: Emulator, every_instruction: bool
) -> list[tuple[Result, Result]]:
    require_amx()
    unit = run_cases(cases, runner, directory, None)
    return list(zip(run_cases(cases, runner, directory, emulator, every_instruction), unit, strict=True))


def test_bf16_of_random_bits(emulator: Emulator, case_runner: Path, tmp_path: Path) -> None:
    cases = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        memory = rng.integers(0, 256, MEMORY).astype(np.uint8)
        halves = memory[INPUTS : INPUTS + 2 * TILE].view(np.uint16)
        if seed % 3 == 0:  # hardly anything but zeros, denormals, infinities and NaNs
            halves[:] = rng.choice([0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7F81, 0xFFC1, 0x7FC5], halves.shape)
        elif seed % 3 == 1:  # products and sums around the smallest normal number
            halves[:] = (halves & 0x807F) | rng.integers(56, 72, halves.shape).astype(np.uint16) << 7
        rows, depth, columns = rng.integers(1, 17, 3)
        memory[:64] = configuration({0: (rows, 4 * columns), 1: (rows, 4 * depth), 2: (depth, 4 * columns)})
        code = ["ldtilecfg (%rdi)", f"tileloadd {tile_address(0)}, %tmm1", f"tileloadd {tile_address(1)}, %tmm2"]
        code += [f"tileloadd {tile_address(2)}, %tmm0", "tdpbf16ps %tmm2, %tmm1, %tmm0"]
        cases.append(Case([*code, f"tilestored %tmm0, {tile_address(0, output=True)}"], memory))
    nans = 0
    for emulated, unit in run_both(cases, case_runner, tmp_path, emulator, False):
        assert emulated.signal == unit.signal == 0
        assert np.array_equal(emulated.memory, unit.memory)
        rows, columns = unit.memory[48], unit.memory[16] // 4
        nans += int(np.isnan(unit.tile(0, (rows, 4 * columns)).copy().view(np.float32)).sum())
    assert nans > 1000


def random_program(rng: np.random.Generator) -> Case:
    """Forty instructions over tiles that mostly fit each other."""
    memory = rng.integers(0, 256, MEMORY).astype(np.uint8)
    m, k, n = rng.integers(1, 17, 3)
    for block in range(3):
        roles = [(m, 4 * n), (m, 4 * k), (k, 4 * n), (m, 4 * n), (m, 4 * k), (k, 4 * n), (16, 64), (0, 0)]
        if rng.random() < 0.1:
            roles[rng.integers(8)] = tuple(rng.integers(0, 20, 2))  # often refused
        start_row = int(rng.integers(1, 6)) if rng.random() < 0.1 else 0
        memory[64 * block : 64 * block + 64] = configuration(dict(enumerate(roles)), start_row)
    tile = lambda: rng.integers(0, 7 if rng.random() < 0.95 else 8)  # noqa: E731
    code = ["ldtilecfg (%rdi)"]
    for _ in range(40):
        draw = rng.random()
        if draw < 0.05:
            code += [f"ldtilecfg {64 * rng.integers(3)}(%rdi)"]
        elif draw < 0.08:
            code += [f"sttilecfg {STORED}(%rdi)"]
        elif draw < 0.09:
            code += ["tilerelease", f"ldtilecfg {64 * rng.integers(3)}(%rdi)"]
        elif draw < 0.2:
            code += [f"tilezero %tmm{tile()}"]
        elif draw < 0.5:
            code += [f"{rng.choice(['tileloadd', 'tileloaddt1'])} {tile_address(int(rng.integers(7)))}, %tmm{tile()}"]
        elif draw < 0.65:
            code += [f"tilestored %tmm{tile()}, {tile_address(int(rng.integers(8)), output=True)}"]
        else:
            c, a, b = (0, 1, 2) if draw < 0.75 else (3, 4, 5) if draw < 0.85 else (0, 4, 2)
            if draw > 0.98:
                c, a, b = rng.choice(8, 3, replace=False)
            code += [f"{rng.choice(DOT_PRODUCTS)} %tmm{b}, %tmm{a}, %tmm{c}"]
    return Case(code + [f"tilestored %tmm{t}, {tile_address(t, output=True)}" for t in range(7)], memory)


@pytest.mark.parametrize("every_instruction", [False, True])
def test_random_programs(emulator: Emulator, case_runner: Path, tmp_path: Path, every_instruction: bool) -> None:
    cases = [random_program(np.random.default_rng(seed)) for seed in range(400)]
    signals = []
    for emulated, unit in run_both(cases, case_runner, tmp_path, emulator, every_instruction):
        assert emulated.signal == unit.signal
        if not every_instruction:
            emulated.memory[STORED + 1] = unit.memory[STORED + 1]  # start_row, which the emulator marks on such a CPU
        assert np.array_equal(emulated.memory, unit.memory)
        signals.append(unit.signal)
    assert signals.count(0) > 100 and len(set(signals)) == 3  # all returned, or ended by either signal
