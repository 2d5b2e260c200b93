"""Keeps what was measured on this CPU, in the user's cache folder: one JSON file for each machine and set-up.

The file is untrusted: what is not a table of this machine is ignored, with one warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import openvino as ov

from ov_ext import machine
from ov_ext.cpu_plugin.support import native
from ov_ext.drafts import whole_file
from ov_ext.extension import extension_path
from ov_ext.sparse_weights.cost import CostTable, read_table

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("ov_ext")
T = TypeVar("T")

CAPS = ("OV_EXT_ISA", "ONEDNN_MAX_CPU_ISA")  # environment variables that hold instructions back: ours, OpenVINO's
_VERSION = 1
_MOST_BYTES = 1 << 20
_POLL = 0.1  # seconds
_warned: set[Path] = set()


def key() -> dict[str, Any]:
    """:return: What a measurement belongs to."""
    features = native.cpu_info()["features"]
    return {
        "version": _VERSION,
        "cpu": machine.cpu_name(),
        "features": sorted(name for name, present in features.items() if present),
        "caps": {name: os.environ.get(name, "") for name in CAPS},
        "threads": machine.cpu_count(),
        "openvino": ov.get_version(),
        "extension": _digest(extension_path()),
    }


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def path(of: str = "") -> Path:
    """:return: The file of this machine, whether it is there or not; ``of`` something else than weights."""
    from platformdirs import user_cache_path

    name = hashlib.sha256(json.dumps(key(), sort_keys=True).encode()).hexdigest()[:16]
    return user_cache_path("nncf-ext") / "calibration" / f"{name}{of and '.' + of}.json"


def read() -> CostTable | None:
    """:return: What was measured on this machine; None where there is nothing of use."""
    return kept(path(), read_table)


def kept(file: Path, parse: Callable[[Any], T]) -> T | None:
    """Read what :func:`keep` wrote.

    :param file: What :func:`path` gives.
    :param parse: Checks what is in it, and raises ValueError.
    :return: What ``parse`` makes of it; None, perhaps after a warning, where there is nothing of use.
    """
    try:
        text = _text(file)
        data = json.loads(text)
        if not isinstance(data, dict) or data.keys() != {"key", "table"}:
            raise ValueError("a mapping of key, table is needed")
        if data["key"] != key():
            raise ValueError("it belongs to another machine, or another set-up of this one")
        return parse(data["table"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        if file not in _warned:
            _warned.add(file)
            reason = str(error) or type(error).__name__
            logger.warning("The measured times in %s are ignored (%s). `ov-ext calibrate` makes new ones", file, reason)
        return None


def _text(file: Path) -> str:
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:  # a FIFO must not block
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    return content.decode()


def add(table: CostTable) -> None:
    """Keep a table; kinds that it does not have stay as they were. Where that is impossible, a warning says why."""
    known = read()
    kinds = (known.kinds if known else {}) | table.kinds
    keep(path(), CostTable(table.cpu, table.threads, kinds).to_dict())


def keep(file: Path, table: dict[str, Any]) -> None:
    """Write what :func:`kept` reads. Where that is impossible, a warning says why."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as draft:
            draft.write_text(json.dumps({"key": key(), "table": table}, indent=1), encoding="utf-8")
    except OSError as error:
        logger.warning("The measured times cannot be kept: %s", error)


@contextmanager
def alone(wait: float) -> Iterator[bool]:
    """Let one process measure at a time: two would measure each other.

    :param wait: For the other one, in seconds.
    :return: Context manager. It gives whether this process is the only one; where locks are impossible, it is.
    """
    lock = path().with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield True
        return
    try:
        yield _locked(descriptor, time.monotonic() + wait)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, deadline: float) -> bool:
    while fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        except OSError:  # a file system without locks
            return True
        else:
            return True
    return True
