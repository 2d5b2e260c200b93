"""Build the emulator, run programs and Python scripts on it, and count what it executed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = [HERE / name for name in ("trap.c", "decode.c", "execute.c")]


def cpu_flags() -> set[str]:
    """:return: Names of the CPU's features as Linux spells them; empty on other systems."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return set(found[1].split()) if found else set()


def require_avx512() -> None:
    """Skip where the emulator, or the AVX-512 instructions between the AMX ones, cannot run."""
    if "avx512_vbmi2" not in cpu_flags():
        pytest.skip("the CPU has no AVX-512 VBMI2, or the system is not Linux on x86-64")


def require_amx() -> None:
    """Skip where there is no real unit to compare with."""
    missing = {"amx_tile", "amx_bf16", "amx_int8"} - cpu_flags()
    if missing:
        pytest.skip(f"the CPU has no AMX ({', '.join(sorted(missing))})")


def compile_c(output: Path, sources: Sequence[Path], *flags: str) -> Path:
    """Compile with GCC, warnings being errors.

    :param output: The file to write.
    :param sources: C or C++ files.
    :param flags: Added to the command.
    :return: ``output``.
    """
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", *map(str, sources), "-o", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return output


@dataclass(frozen=True)
class Run:
    """How a program ended.

    :param returncode: As of ``subprocess``: minus the signal that killed it.
    :param stdout: What it printed.
    :param stderr: What it printed there, without the emulator's line of counts.
    :param traps: Exceptions that the emulator handled.
    :param executed: How often each AMX instruction was executed, by name.
    """

    returncode: int
    stdout: str
    stderr: str
    traps: int
    executed: dict[str, int]


@dataclass(frozen=True)
class Emulator:
    """The emulator as a library to preload.

    :param library: The compiled file.
    """

    library: Path

    def run(
        self,
        command: Sequence[str | Path],
        *,
        refuse: bool = False,
        fast: bool = False,
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        directory: Path = ROOT,
        timeout: float = 300,
    ) -> Run:
        """Run a program to its end, however it ends.

        :param command: Program and arguments.
        :param refuse: Answer the request for the unit as a kernel or container does that does not hand it out.
        :param fast: Replace executed AMX instructions by breakpoints; for model-sized runs.
        :param environment: Changed variables.
        :param before: Libraries to preload before the emulator: those of sanitizers.
        :param directory: Where it runs.
        :param timeout: Seconds.
        :return: How it ended; counts are 0 for a program that was killed.
        """
        variables = {
            "LD_PRELOAD": ":".join([*before, str(self.library)]),
            "AMX_EMULATOR_STATS": "1",
            "AMX_EMULATOR_PERMISSION": "refuse" if refuse else "grant",
            "AMX_EMULATOR_FAST": str(int(fast)),
        }
        done = subprocess.run(
            [str(part) for part in command],
            cwd=directory,
            env={**os.environ, **variables, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        counts = re.search(r"^amx_emulator: (\d+) traps:(.*)\n", done.stderr, re.MULTILINE)
        executed = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", counts[2])} if counts else {}
        stderr = done.stderr.replace(counts[0], "") if counts else done.stderr
        return Run(done.returncode, done.stdout, stderr, int(counts[1]) if counts else 0, executed)

    def run_python(
        self,
        check: Callable[..., None],
        *arguments: str,
        uses: Collection[str],
        fast: bool = False,
        refuse: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Call a function of a test module in a fresh process; it must succeed, and by the instructions named.

        :param check: A function at the top of its module.
        :param arguments: Its arguments.
        :param uses: AMX instructions that it must have executed, e.g. ``tdpbssd``; none: no AMX instruction at all.
        :param fast: As in :meth:`run`.
        :param refuse: As in :meth:`run`.
        :param environment: As in :meth:`run`.
        :return: How it ended.
        """
        command = python_command(check, *arguments)
        run = self.run(command, fast=fast, refuse=refuse, environment=environment)
        assert run.returncode == 0, f"exit {run.returncode}\n{run.stdout}\n{run.stderr}"
        assert all(run.executed.get(name) for name in uses), f"{uses} wanted, executed were {run.executed}"
        assert uses or not run.traps, f"no AMX instruction was wanted, executed were {run.executed}"
        return run


def python_command(check: Callable[..., None], *arguments: str) -> list[str]:
    """:return: The command that calls a function of a test module with strings."""
    script = f"import sys; from {check.__module__} import {check.__name__} as check; check(*sys.argv[1:])"
    return [sys.executable, "-c", script, *arguments]
