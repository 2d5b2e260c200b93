"""Training of an adapter on a task, by the Trainer of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import nncf_ext
from adapters.task import collate
from nncf_ext.training.progress import ProgressBar

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 2.0  # alpha / rank
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Settings:
    """
    What every arm of a comparison shares.

    :param steps: Optimizer steps.
    :param batch: Items for a step.
    :param learning_rate: Highest rate; warm-up, then a cosine to zero.
    :param ranks: Ranks of NLS, the largest first, which is the rank of LoRA; alpha is twice that.
    :param search: Sub-adapters of NLS that are measured to choose one.
    :param seed: Of the adapter's beginning, the order of the items, and the draws of NLS.
    :param half: Multiply in bfloat16; weights, optimizer and loss stay in float32.
    """

    steps: int = 120
    batch: int = 32
    learning_rate: float = 4e-3
    ranks: tuple[int, ...] = (32, 24, 16)
    search: int = 6
    seed: int = 0
    half: bool = False


def add_adapter(model: nn.Module, settings: Settings) -> PeftModel:
    """
    :param model: Language model with layers named as those of Llama.
    :param settings: Settings.
    :return: The model with an adapter on every linear layer of its blocks, by stock PEFT.
    """
    rank = settings.ranks[0]
    torch.manual_seed(settings.seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=list(LINEARS)))


def add_elastic_ranks(model: PeftModel, settings: Settings) -> nncf_ext.ElasticLora:
    """
    :param model: From `add_adapter`.
    :param settings: Settings.
    :return: Its ranks made elastic: in each block one for q, k and v, one for gate and up, one for o, one for down.
    """
    spaces = [nncf_ext.RankGroup([rf".*\.({'|'.join(names)})$"], settings.ranks) for names in GROUPS]
    return nncf_ext.make_elastic(model, groups=spaces)


def train(
    model: nn.Module,
    rows: Sequence[dict[str, list[int]]],
    padding: int,
    settings: Settings,
    net: nncf_ext.ElasticLora | None = None,
    show: str = "training",
) -> None:
    """
    :param model: Model whose trainable parameters learn.
    :param rows: Tokens and labels of the items.
    :param padding: Id of the padding token.
    :param settings: Settings.
    :param net: Elastic ranks: each step trains a sub-adapter drawn at random.
    :param show: Description of the progress bar.
    """
    callbacks: list[TrainerCallback] = [ProgressBar(show)]
    if net is not None:
        callbacks.append(nncf_ext.ElasticCallback(net, settings.seed))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 15),
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            label_names=["labels"],
            bf16=settings.half,
            use_cpu=next(model.parameters()).device.type == "cpu",
            seed=settings.seed,
            data_seed=settings.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        collator: Any = partial(collate, padding=padding)
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=list(rows), callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
