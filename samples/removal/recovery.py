"""Bring a smaller model closer to its dense parent: distillation, into adapters that are merged or into all weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

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
    dense.eval().requires_grad_(False)
    learner.train()
    parameters = [each for each in learner.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    warmup = max(1, steps // 15)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(show, total=steps)
        for step in range(steps):
            rate = (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = learning_rate * rate
            ids = stream.batch(step).to(model.device)
            with torch.no_grad():
                wanted = dense(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
            found = learner(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
            F.kl_div(found, wanted, reduction="batchmean", log_target=True).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(task)
    return (learner.merge_and_unload() if rank is not None else model).eval()
