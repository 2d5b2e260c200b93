"""Files that are whole whenever they exist, and digests of what they are about."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


def digest(values: Iterable[Any]) -> str:
    """
    :param values: Tensors of any type, mappings or sequences of them, or plain values.
    :return: SHA-256 of their types, shapes and bytes, hexadecimal.
    """
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key in sorted(value):
                add(key)
                add(value[key])
        elif isinstance(value, tuple | list):
            for part in value:
                add(part)
        else:
            sha.update(repr(value).encode())

    for value in values:
        add(value)
    return sha.hexdigest()
