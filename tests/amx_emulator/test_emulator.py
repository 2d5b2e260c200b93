"""The emulator as a guest in a process: permission, threads, other handlers of its signals, sanitizers, counts."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.amx_emulator.cases import configuration
from tests.amx_emulator.emulated import Emulator, compile_c, python_command

pytestmark = pytest.mark.slow

ARCH_PRCTL, GET_SUPPORTED, GET_PERMITTED, REQUEST, TILE_DATA = 158, 0x1021, 0x1022, 0x1023, 18
TILEZERO = bytes([0xC4, 0xE2, 0x7B, 0x49, 0xC0])
UD2 = bytes([0x0F, 0x0B])
RETURN = bytes([0xC3])


def request_permission() -> int:
    """:return: 0, or the error number."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.syscall(ARCH_PRCTL, REQUEST, TILE_DATA) else 0


def states(code: int) -> int:
    """:return: The processor states that Linux supports or has permitted."""
    mask = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(ARCH_PRCTL, code, ctypes.byref(mask)) == 0
    return mask.value


def execute_bytes(code: bytes) -> None:
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()


# -------------------------------------------------------------------------------------------------------- permission


def granted() -> None:
    assert not states(GET_PERMITTED) >> TILE_DATA & 1 and states(GET_SUPPORTED) >> TILE_DATA & 1
    assert request_permission() == 0
    assert states(GET_PERMITTED) >> TILE_DATA & 1


def refused() -> None:
    assert request_permission() == errno.EPERM
    assert not states(GET_PERMITTED) >> TILE_DATA & 1


def never_asked() -> None:
    execute_bytes(TILEZERO + RETURN)


def not_configured() -> None:
    assert request_permission() == 0
    execute_bytes(TILEZERO + RETURN)


def test_permission_is_granted_on_request(emulator: Emulator) -> None:
    emulator.run_python(granted, uses=())


def test_permission_can_be_refused(emulator: Emulator) -> None:
    emulator.run_python(refused, uses=(), refuse=True)


@pytest.mark.parametrize("check, reason", [(never_asked, "was not asked first"), (not_configured, "no tile config")])
def test_a_fault_ends_the_process_and_says_why(emulator: Emulator, check: Callable[[], None], reason: str) -> None:
    run = emulator.run(python_command(check))
    assert run.returncode == -signal.SIGILL
    assert run.stderr.startswith("amx_emulator: tilezero at 0x") and reason in run.stderr


# --------------------------------------------------------------------------------------------------- signal handlers


TILE_CODE = """
.globl load
.type load, @function
load: ldtilecfg (%rdi); mov $64, %esi; tileloadd 64(%rdi,%rsi,1), %tmm0; ret
.globl multiply
.type multiply, @function
multiply: mov $64, %esi; tileloadd 1088(%rdi,%rsi,1), %tmm1; tdpbssd %tmm1, %tmm0, %tmm2
    tilestored %tmm2, 2112(%rdi,%rsi,1); tilerelease; ret
.section .note.GNU-stack,"",@progbits
"""


@pytest.fixture(scope="module")
def tile_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """load(memory) keeps a tile that multiply(memory) uses; memory: configuration, A, B, result."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.s").write_text(TILE_CODE)
    return compile_c(folder / "code.so", [folder / "code.s"], "-shared", "-nostdlib")


def multiply_on_threads(library: str, threads: str) -> None:
    """All threads load their tiles, then all multiply: what one loads must not reach another."""
    code = ctypes.CDLL(library)
    barrier = threading.Barrier(int(threads))
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            memory = rng.integers(0, 256, 64 + 3 * 1024).astype(np.uint8)
            memory[:64] = configuration({0: (16, 64), 1: (16, 64), 2: (16, 64)})
            a, b = (memory[64 + 1024 * i :][:1024].view(np.int8).astype(np.int32) for i in range(2))
            expected = a.reshape(16, 64) @ b.reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16)
            at = ctypes.c_void_p(memory.ctypes.data)
            code.load(at)
            barrier.wait()
            code.multiply(at)
            barrier.wait()
            if not np.array_equal(memory[64 + 2048 :].view(np.int32).reshape(16, 16), expected):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(int(threads))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def multiply(library: str, threads: str = "6") -> None:
    assert request_permission() == 0
    multiply_on_threads(library, threads)
    emulator = ctypes.CDLL(None)
    emulator.amx_emulator_executed.restype = ctypes.c_long
    assert emulator.amx_emulator_traps() >= int(threads) * 20
    assert emulator.amx_emulator_executed(b"tdpbssd") == int(threads) * 20
    assert emulator.amx_emulator_executed(b"fmul") == -1


def multiply_beside_other_handlers(library: str) -> None:
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    ignore = int(signal.SIG_IGN)
    for number in (signal.SIGILL, signal.SIGTRAP):
        assert not libc.signal(number, ignore) and libc.signal(number, None) == ignore
    faulthandler.enable()
    multiply(library, "1")
    faulthandler.disable()
    multiply_again = ctypes.CDLL(library)  # faulthandler has put back what it had found
    memory = np.zeros(64 + 3 * 1024, np.uint8)
    memory[:64] = configuration({0: (16, 64), 1: (16, 64), 2: (16, 64)})
    multiply_again.load(ctypes.c_void_p(memory.ctypes.data))
    multiply_again.multiply(ctypes.c_void_p(memory.ctypes.data))
    faulthandler.enable()
    execute_bytes(UD2)


@pytest.mark.parametrize("fast", [False, True])
def test_every_thread_has_its_own_tiles(emulator: Emulator, tile_code: Path, fast: bool) -> None:
    run = emulator.run_python(multiply, str(tile_code), uses=("tdpbssd", "tileloadd", "tilestored"), fast=fast)
    assert run.executed["tdpbssd"] == 120 and run.executed["tileloadd"] == 240


@pytest.mark.parametrize("fast", [False, True])
def test_other_handlers_get_what_is_not_amx(emulator: Emulator, tile_code: Path, fast: bool) -> None:
    run = emulator.run(python_command(multiply_beside_other_handlers, str(tile_code)), fast=fast)
    assert run.returncode == -signal.SIGILL, run.stderr
    assert run.stderr.startswith("Fatal Python error: Illegal instruction") and "in execute_bytes" in run.stderr


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGILL)


def test_a_signal_that_somebody_sends_arrives(emulator: Emulator) -> None:
    assert emulator.run(python_command(kill_itself)).returncode == -signal.SIGILL


def trap() -> None:
    execute_bytes(b"\xcc" + RETURN)


def test_a_breakpoint_of_somebody_else_is_theirs(emulator: Emulator) -> None:
    assert emulator.run(python_command(trap), fast=True).returncode == -signal.SIGTRAP


# -------------------------------------------------------------------------------------------------------- sanitizers


SANITIZED_PROGRAM = """
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int count, char** arguments) {
    (void)count;
    unsigned char configuration[64] = {1};
    configuration[16] = 64;
    configuration[48] = 16;
    unsigned char* tile = malloc((size_t)atoi(arguments[1]));
    if (syscall(SYS_arch_prctl, 0x1023, 18))
        return 3;
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
    __asm__ volatile("tilezero %%tmm0; tilestored %%tmm0, (%0,%1,1)" ::"r"(tile), "r"(64L) : "memory");
    __asm__ volatile("tilerelease");
    for (int i = 0; i < 1024; i++)
        if (tile[i])
            return 4;
    free(tile);
    puts("stored");
    return 0;
}
"""


@pytest.mark.parametrize("size", [1024, 1023])
def test_tiles_beyond_their_memory_are_seen_under_the_address_sanitizer(
    emulator: Emulator, tmp_path: Path, size: int
) -> None:
    (tmp_path / "program.c").write_text(SANITIZED_PROGRAM)
    program = compile_c(tmp_path / "program", [tmp_path / "program.c"], "-fsanitize=address")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    run = emulator.run([program, str(size)], before=[runtime.strip()])
    if size == 1024:
        assert run.returncode == 0 and run.stdout == "stored\n" and run.executed["tilestored"] == 1, run
    else:
        assert run.returncode != 0 and not run.stdout
        assert "tilestored at 0x" in run.stderr and "a row of the tile lies outside valid memory" in run.stderr
