"""Bring a smaller model closer to its dense parent: distillation, into adapters that are merged or into all weights."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainingArguments

from nncf_ext import DistillationTrainer
from nncf_ext.training.progress import ProgressBar
from removal.text import Stream


def recover(
    model: Any,
    dense: Any,
    stream: Stream,
    *,
    steps: int,
    learning_rate: float,
    rank: int | None,
    show: str = "recovery",
) -> Any:
    """
    Learns to predict what the dense model predicts: the loss is the divergence of the next token's distribution.

    :param model: The smaller model; changed in place.
    :param dense: Its parent.
    :param stream: Text.
    :param steps: Optimizer steps.
    :param learning_rate: Highest rate; a short warm-up, then a cosine to zero.
    :param rank: Rank of LoRA adapters on all linear layers of the blocks, which are merged at the end. None: all
        parameters learn.
    :param show: Description of the progress bar.
    :return: The model, with the same shapes as before, in evaluation mode.
    """
    learner = model
    if rank is not None:
        from peft import LoraConfig, get_peft_model

        head = model.get_output_embeddings()
        linears = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head]
        learner = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=stream.size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 15),
            adam_beta2=0.95,
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        callbacks = [ProgressBar(show)]
        trainer = DistillationTrainer(learner, arguments, train_dataset=stream, teacher=dense, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return (learner.merge_and_unload() if rank is not None else model).eval()
