"""The emulator, built once for a test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.amx_emulator.emulated import HERE, SOURCES, Emulator, compile_c, require_avx512


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    require_avx512()
    flags = ("-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
    return Emulator(compile_c(tmp_path_factory.mktemp("amx") / "libamx_emulator.so", SOURCES, *flags))


@pytest.fixture(scope="session")
def case_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_avx512()
    return compile_c(tmp_path_factory.mktemp("cases") / "run_cases", [HERE / "run_cases.c"])
