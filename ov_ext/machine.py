"""What is this machine: its CPU's name, its largest cache, its memory, the CPUs of this process?"""

from __future__ import annotations

import os
import platform
from pathlib import Path

_UNITS = {"K": 10, "M": 20, "G": 30}


def cpu_name() -> str:
    """:return: Model name, family and model of the CPU: in a virtual machine the name alone may say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    model = f"family {names.get('cpu family')}, model {names.get('model')}"
    return f"{names.get('model name', platform.processor())} ({model})"


def last_level_cache() -> int:
    """:return: Bytes of the largest cache, as the kernel reports it; 0 when unknown. In a virtual machine it is the
    host's, which others use, too."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << _UNITS[text[-1]])
    return max(sizes)


def memory() -> int:
    """:return: Bytes of physical memory; 0 when unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def cpu_count() -> int:
    """:return: CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
