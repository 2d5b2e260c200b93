"""How many answers are right to the letter?

Greedy decoding writes an answer exactly when every one of its tokens, the end of text included, is the likeliest one
after the prompt and the tokens of the answer before it. One pass over prompt and answer tells that for all tokens at
once, so nothing needs to be generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rich.progress import track
from torch import Tensor, nn

from adapters.task import IGNORED, collate

Logits = Callable[[Tensor, Tensor], Tensor]
"""From int64 [rows, tokens] ids and mask to [rows, tokens, vocabulary] logits."""


def logits_of(model: nn.Module, half: bool = False) -> Logits:
    """
    :param model: A causal language model of transformers, with or without adapters.
    :param half: Multiply in bfloat16.
    :return: Its forward, without gradients, in evaluation mode.
    """

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        device = next(model.parameters()).device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            return model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.cpu()

    model.eval()
    return forward


def right_answers(
    logits: Logits, rows: Sequence[dict[str, list[int]]], padding: int, *, batch: int = 64, show: str | None = None
) -> Tensor:
    """
    :param logits: The model.
    :param rows: Tokens and labels, as `encode` gives them.
    :param padding: Id of the padding token.
    :param batch: Rows at a time; rows of like length go together.
    :param show: Description of a progress bar, or None for none.
    :return: bool [rows]: greedy decoding writes this answer and then ends the text.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    right = torch.zeros(len(rows), dtype=torch.bool)
    for start in track(range(0, len(rows), batch), show or "", disable=show is None, transient=True):
        chosen = order[start : start + batch]
        inputs = collate([rows[row] for row in chosen], padding)
        likeliest = logits(inputs["input_ids"], inputs["attention_mask"])[:, :-1].argmax(dim=2)
        labels = inputs["labels"][:, 1:]
        right[chosen] = ((likeliest == labels) | (labels == IGNORED)).all(dim=1)
    return right
