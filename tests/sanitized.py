"""The extension, and its fuzzer, built with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(target: str, folder: str = "sanitized", compiler: str = "g++", engine: bool = False) -> Path:
    """Build one target, or what has changed of it since the last time.

    :param target: ``ov_ext_cpu``, or a fuzzer: ``ov_ext_fuzz``, ``ov_ext_activation_fuzz``, ``ov_ext_attention_fuzz``.
    :param folder: Where in build/.
    :param compiler: C++ compiler.
    :param engine: Build the fuzzer for the fuzzing engine of the compiler instead of its own driver.
    :return: The build folder.
    """
    out = ROOT / "build" / folder
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    cmake = shutil.which("cmake", path=environment["PATH"])
    assert cmake, "CMake is needed: pip install cmake"
    flags = ["-DCMAKE_CXX_FLAGS=-fsanitize=fuzzer-no-link"] if engine else []
    options = [
        *("-DCMAKE_BUILD_TYPE=Release", "-DOV_EXT_SANITIZE=ON", f"-DOV_EXT_FUZZ={'engine' if engine else 'own'}"),
        *(f"-DCMAKE_CXX_COMPILER={compiler}", f"-DPython_EXECUTABLE={sys.executable}", *flags),
    ]
    commands = (
        [cmake, "-G", "Unix Makefiles", "-S", ROOT / "ov_ext" / "cpu_plugin", "-B", out, *options],
        [cmake, "--build", out, "--target", target, "--parallel", str(os.cpu_count())],
    )
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:  # tests run in several processes, and one builds for all
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in commands:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert not done.returncode, done.stdout + done.stderr
    return out
