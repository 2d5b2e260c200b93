"""How reports become text and pictures."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nncf_ext.files import write_whole


def as_text(table: Table) -> str:
    """
    :param table: A table.
    :return: It as text of at most 160 columns, without colours.
    """
    console = Console(width=160, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """
    :param figure: A figure of matplotlib.
    :param path: File to write, whole or not at all; its suffix says the format, such as ``.png`` or ``.svg``.
    """
    file = Path(path)
    write_whole(file, lambda aside: figure.savefig(aside, format=file.suffix.removeprefix(".") or "png"))
