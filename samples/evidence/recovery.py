"""Bring a smaller model closer to its dense parent: distillation, into adapters that are merged or into all weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import nncf_ext
from nncf_ext import DistillationTrainer, KeepZeros
from nncf_ext.training.progress import ProgressBar

WINDOW = 256  # tokens
CHECKPOINT_STEPS = 50


class Stream(IterableDataset[dict[str, Tensor]]):
    """
    Batches of windows without end; each pass over the text is in an order of its own.

    :param tokens: ``[tokens]``.
    :param batch: Windows of a batch.
    :param seed: Of the order.
    :param window: Tokens of a window.
    """

    def __init__(self, tokens: NDArray[np.uint16], batch: int, seed: int, window: int = WINDOW) -> None:
        self._tokens, self.size, self._seed, self._window = tokens, batch, seed, window
        self._steps = len(tokens) // window // batch
        if not self._steps:
            raise ValueError(f"One batch needs {batch * window} tokens, the text has {len(tokens)}.")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in count():
            yield from ({"input_ids": row} for row in self.batch(step))

    def batch(self, step: int) -> Tensor:
        """
        :param step: From 0.
        :return: int64 ``[batch, window]``, a pure function of the step.
        """
        window = self._window
        order = np.random.default_rng([self._seed, step // self._steps]).permutation(len(self._tokens) // window)
        first = step % self._steps * self.size
        rows = [self._tokens[index * window : (index + 1) * window] for index in order[first : first + self.size]]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def recover(
    model: Any,
    dense: Any,
    stream: Stream,
    *,
    steps: int,
    learning_rate: float,
    rank: int | None,
    show: str = "recovery",
    half: bool = False,
    folder: Path | None = None,
) -> Any:
    """
    Learns to predict what the dense model predicts: the loss is the divergence of the next token's distribution.
    Weights that are zero in a sparse matrix stay zero, unless adapters are merged into it.

    :param model: The smaller model; changed in place. What needs no gradient stays.
    :param dense: Its parent.
    :param stream: Text.
    :param steps: Optimizer steps.
    :param learning_rate: Highest rate; a short warm-up, then a cosine to zero.
    :param rank: Rank of LoRA adapters on all linear layers of the blocks, which are merged at the end. None: all
        parameters learn.
    :param show: Description of the progress bar.
    :param half: Multiply in bfloat16; weights, optimizer and loss stay in float32.
    :param folder: Of checkpoints, by which an interrupted run goes on; None: there are none.
    :return: The model, with the same shapes as before, in evaluation mode.
    """
    learner = model if rank is None else _with_adapters(model, rank)
    _train(learner, dense, stream, steps, learning_rate, show, half, folder)
    return (learner.merge_and_unload() if rank is not None else model).eval()


def recover_on_grid(
    grid: Any,
    dense: Any,
    stream: Stream,
    *,
    steps: int,
    learning_rate: float,
    rank: int,
    show: str = "recovery on the grid",
    half: bool = False,
    folder: Path | None = None,
) -> Any:
    """
    The same for a model on the INT4 grid: QA-SparsePEFT adapters learn, which are then merged into its codes. Zeros and
    scales stay.

    :param grid: The smaller model, compressed with ``keep_prerounding=True``.
    :param dense: Its parent.
    :param stream: Text.
    :param steps: Optimizer steps.
    :param learning_rate: Highest rate.
    :param rank: Of the adapters.
    :param show: Description of the progress bar.
    :param half: Multiply in bfloat16.
    :param folder: Of checkpoints, by which an interrupted run goes on; None: there are none.
    :return: A new model in NNCF's INT4 form, in evaluation mode.
    """
    learner = _with_adapters(nncf_ext.prerounding(grid), rank)
    nncf_ext.make_mergeable(learner, nncf_ext.MergeMode.QUANT_AWARE, grid=grid)
    _train(learner, dense, stream, steps, learning_rate, show, half, folder)
    return nncf_ext.merge(learner.eval(), nncf_ext.MergeMode.QUANT_AWARE)


def _with_adapters(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    linears = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears))


def _train(
    learner: Any,
    dense: Any,
    stream: Stream,
    steps: int,
    learning_rate: float,
    show: str,
    half: bool,
    folder: Path | None,
) -> None:
    with _folder(folder) as kept:
        arguments = TrainingArguments(
            output_dir=str(kept),
            max_steps=steps,
            per_device_train_batch_size=stream.size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 15),
            adam_beta2=0.95,
            bf16=half,
            use_cpu=learner.device.type == "cpu",
            save_strategy="no" if folder is None else "steps",
            save_steps=CHECKPOINT_STEPS,
            save_total_limit=1,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        callbacks = [ProgressBar(show), KeepZeros()]
        trainer = DistillationTrainer(learner, arguments, train_dataset=stream, teacher=dense, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(kept)))


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as own:
            yield Path(own)
