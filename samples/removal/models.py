"""Which model is cut, where are those kept that took long to make, and how fast are they?"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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


def speed(model: Any, prompt: Mapping[str, Any], tokens: int = 128) -> float:
    """
    :param model: From ``ov_ext.optimum.load``.
    :param prompt: Encoded text.
    :param tokens: To generate.
    :return: Tokens a second, the median of five runs.
    """
    import numpy as np

    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        model.generate(**prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return tokens / float(np.median(seconds[1:]))  # the first compiles
