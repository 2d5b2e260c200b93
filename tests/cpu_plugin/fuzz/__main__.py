"""A long run of the fuzzers, with libFuzzer or AFL++ where installed, else with its own driver: ``make fuzz``."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.sanitized import ROOT, build

HERE = Path(__file__).parent
WEIGHTS, ACTIVATION, ATTENTION = "ov_ext_fuzz", "ov_ext_activation_fuzz", "ov_ext_attention_fuzz"


def libfuzzer(seconds: int, findings: Path, name: str) -> int:
    program = build(name, "fuzz-libfuzzer", "clang++", engine=True) / "fuzz" / name
    corpus = findings / f"corpus-libfuzzer-{name}"
    corpus.mkdir(exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=1000000", "-len_control=0", "-timeout=60"]
    return subprocess.run([program, *options, f"-artifact_prefix={findings}/", corpus]).returncode


def afl(seconds: int, findings: Path, name: str) -> int:
    if name != WEIGHTS:  # its mutations are linked with the library
        return own(seconds, findings, name)
    program = build("ov_ext_fuzz", "fuzz-afl", "afl-clang-fast++", engine=True) / "fuzz" / "ov_ext_fuzz"
    mutator, seeds, out = program.with_name("mutator.so"), findings / "seeds-afl", findings / "afl"
    sources = [HERE / name for name in ("engine.cpp", "mutate.cpp", "plain.cpp")]
    # Not sanitized: it is loaded into afl-fuzz.
    subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", *sources, "-o", mutator], check=True)
    seeds.mkdir(exist_ok=True)
    (seeds / "any").write_text("x")  # the mutator starts from blobs of its own
    settings = {
        "AFL_CUSTOM_MUTATOR_LIBRARY": str(mutator),
        "AFL_CUSTOM_MUTATOR_ONLY": "1",
        **dict.fromkeys(
            ("AFL_AUTORESUME", "AFL_SKIP_CPUFREQ", "AFL_NO_UI", "AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES"), "1"
        ),
    }
    command = ["afl-fuzz", "-V", str(seconds), "-m", "none", "-t", "60000", "-i", seeds, "-o", out, "--", program]
    status = subprocess.run(command, env=os.environ | settings).returncode
    return status or len([*out.glob("default/crashes/id*")])


def own(seconds: int, findings: Path, name: str) -> int:
    program = build(name) / "fuzz" / name
    end, seed = time.monotonic() + seconds, int(time.time())
    while time.monotonic() < end:
        options = ["--seed", str(seed), "--runs", "500" if name == ATTENTION else "10000", "--save", findings]
        if status := subprocess.run([program, *options]).returncode:
            return status
        seed += 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--engine", choices=["libfuzzer", "afl", "own"], help="default: the first that is installed")
    arguments = parser.parse_args()
    installed = "libfuzzer" if shutil.which("clang++") else "afl" if shutil.which("afl-clang-fast++") else "own"
    engine = arguments.engine or installed
    findings = ROOT / "build" / "fuzz-findings"
    findings.mkdir(parents=True, exist_ok=True)
    print(f"Fuzzing for {arguments.seconds} s with {engine}; inputs that fail are kept in {findings}.", flush=True)
    run = {"libfuzzer": libfuzzer, "afl": afl, "own": own}[engine]
    return next(
        filter(None, (run(arguments.seconds // 3, findings, name) for name in (WEIGHTS, ACTIVATION, ATTENTION))), 0
    )


if __name__ == "__main__":
    raise SystemExit(main())
