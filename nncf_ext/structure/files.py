"""Files that are whole whenever they exist."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """
    Writes a file aside and renames it, so that an interruption leaves the old file or the new one.

    :param path: The file.
    :param write: Writes all of it to the path it is given, in the same folder.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
