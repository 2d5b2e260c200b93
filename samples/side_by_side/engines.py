"""One interface to all engines. Each runs in a process of its own, which stops while another is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from evidence.scores import Losses, token_losses
from numpy.typing import NDArray

from benchmarks.arms import Settings, candidates, compile_model, load_plugin
from benchmarks.decoders import Decoder, Generator, LlamaCppDecoder, OpenVinoDecoder
from benchmarks.engines import Engine
from side_by_side.arms import LLAMA_CPP, Arm
from side_by_side.gguf_files import NAME

CONTEXT = 1024  # tokens that llama.cpp allocates memory for
MODEL = "openvino_model.xml"


class Player(Generator):
    """
    A model that can be scored, asked and timed. Lives in the process of an engine.

    :param load: Makes the decoder.
    :param vocabulary: Number of tokens.
    """

    def losses(self, ids: NDArray[np.int64]) -> Losses:
        """:return: Of ``[tokens]``, the loss of each but the first, nats."""
        return token_losses(self._decoder.logits(ids[None]), ids)

    def answer(self, prompt: NDArray[np.int64], end: int, limit: int) -> list[int]:
        """
        :param prompt: ``[tokens]``.
        :param end: Token that ends an answer.
        :param limit: Tokens at most.
        :return: The likeliest tokens, one by one, without the end.
        """
        logits, written = self._decoder.start(prompt[None]), []
        while len(written) < limit and (token := int(logits.argmax())) != end:
            written.append(token)
            logits = self._decoder.step(token)
        return written


def settings_of(arm: Arm) -> Sequence[Settings]:
    """:return: Settings of OpenVINO to choose from, by time; llama.cpp has one."""
    return [Settings()] if arm.engine == LLAMA_CPP else candidates(Settings(), arm.kind, stock=True)


def start(arm: Arm, folder: Path, settings: Settings, vocabulary: int) -> Engine:
    """
    :param arm: What runs.
    :param folder: Where it was written to.
    :param settings: Threads, and OpenVINO's properties.
    :param vocabulary: Number of tokens.
    :return: A stopped process that holds a :class:`Player`.
    """
    load: Callable[[], Decoder]
    if arm.engine == LLAMA_CPP:
        load = partial(LlamaCppDecoder, folder / NAME, settings.thread_count, CONTEXT)
        prepare = partial(import_module, "llama_cpp")
    else:
        load, prepare = partial(_openvino, folder / MODEL, settings), load_plugin
    return Engine(f"{arm.name} ({settings.name})", partial(Player, load, vocabulary), prepare)


def size(arm: Arm, folder: Path) -> int:
    """:return: Bytes on disk: of the IR, or of the GGUF file, which holds the tokenizer, too."""
    files = [NAME] if arm.engine == LLAMA_CPP else [MODEL, str(Path(MODEL).with_suffix(".bin"))]
    return sum((folder / name).stat().st_size for name in files)


def _openvino(path: Path, settings: Settings) -> OpenVinoDecoder:
    return OpenVinoDecoder(compile_model(path, settings))
