"""What every record says about its surroundings, and how records are written and shown."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino as ov
from rich.console import Console
from rich.table import Table

import ov_ext
from benchmarks.arms import Settings
from ov_ext.machine import cpu_name, last_level_cache

Record = dict[str, Any]


def surroundings(settings: Settings) -> Record:
    """:return: Fields that are equal in all records of a run: versions, CPU, kernel, threads, settings, commit."""
    return {
        "kernel": ov_ext.cpu_info()["selected"],
        "threads": settings.thread_count,
        "openvino": ov.get_version(),
        "cpu": cpu_name(),
        "last_level_cache_mib": last_level_cache() / 2**20,
        "git_commit": git_commit(),
        "settings": " ".join(f"{key}={value}" for key, value in sorted(settings.properties().items())),
    }


def git_commit() -> str:
    """:return: Hash of the source tree's commit, with "+" when files differ from it; "unknown" outside git."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, records: Sequence[Record]) -> None:
    """Write a list of flat records, whole or not at all.

    :param path: Target; its folder is made.
    :param records: The records.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(list(records), file, indent=1)
            file.write("\n")
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def show(title: str, records: Sequence[Record], columns: dict[str, str]) -> None:
    """Print records as a table, whole even where the output is no terminal.

    :param title: Its heading.
    :param records: The rows.
    :param columns: Heading of each shown key, with a format after a bar: ``{"ours_ms": "ours ms|.2f"}``.
    """
    table = Table(title=title)
    for heading in columns.values():
        text, _, pattern = heading.partition("|")
        table.add_column(text, justify="right" if pattern else "left")
    for record in records:
        cells = []
        for key, heading in columns.items():
            value, pattern = record.get(key), heading.partition("|")[2]
            cells.append("" if value is None else format(value, pattern) if pattern else str(value))
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)
