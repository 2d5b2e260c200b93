"""Files that are whole whenever they exist, and digests of what they are about."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nncf_ext.drafts import whole_file


def write_whole(path: Path, write: Callable[[Path], Any], clean_up: bool = True) -> None:
    """
    Writes a file aside and renames it, so that an interruption leaves the old file or the new one.

    :param path: The file.
    :param write: Writes all of it to the path it is given, which has the same name.
    :param clean_up: See :func:`nncf_ext.drafts.whole_file`.
    :raises OSError: The file cannot be written; of a full disk the message says what to do.
    """
    with whole_file(path, clean_up) as draft:
        write(draft)


def let_others_read(folder: Path) -> None:
    """
    Gives safetensors files the permissions of other new files. They are made so that only their owner reads them, and
    stay so where the file system has no permissions.

    :param folder: A folder that was made with the permissions that the user chose for new ones.
    """
    for file in folder.glob("*.safetensors"):
        with suppress(OSError):
            file.chmod(folder.stat().st_mode & 0o666)


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
