"""Which model is cut, and where are those kept that took long to make?"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def quiet() -> None:
    """Leaves the console to a sample's own progress and tables; to be called before transformers is imported."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    for name in ("nncf", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # tracing warns about every Python condition in transformers


def load(folder: Path) -> Any:
    """:return: A committed model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def kept(folder: Path, make: Callable[[], Any]) -> Any:
    """:return: The model in a folder in float32, made first if it is not there."""
    import torch

    import nncf_ext

    if not folder.exists():
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        nncf_ext.save_pretrained(make(), aside)
        aside.rename(folder)
    return nncf_ext.load_pretrained(folder, dtype=torch.float32)
