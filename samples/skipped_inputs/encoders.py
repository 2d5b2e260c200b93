"""What a centre is worth behind GELU, whose activations pile up below zero: embeddings of passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import torch
from evidence.scores import Losses
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import nncf_ext
from samples.real_models.texts import english
from skipped_inputs.counting import Skipped

ZERO = "zero"
CENTRES: dict[str, dict[str, Any]] = {
    ZERO: {},
    "median": {"centering": "median"},
    "mode (SCAP)": {"centering": "mode"},
    "zero, means of channels": {"mean_replacement": True},
    "mode, means of channels": {"centering": "mode", "mean_replacement": True},
}
"""Options of the mode, by the name in the table."""
_BATCH = 32


@dataclass(frozen=True)
class Found:
    """
    :param errors: ``[passages]``: 1 less the cosine between a passage's embedding and that by the dense encoder.
    :param same: Share of the passages whose nearest other passage is that by the dense encoder.
    :param share: Of the weights behind GELU, those that were not needed.
    """

    errors: Losses
    same: float
    share: float


class Encoder:
    """
    An encoder of the names that BERT has, and what it makes of passages of English.

    :param folder: Hugging Face folder.
    :param length: Tokens of a passage.
    :param calibration: Passages to calibrate on.
    :param held_out: Passages to measure on.
    """

    def __init__(self, folder: Path, length: int, calibration: int, held_out: int) -> None:
        self._folder = folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._calibration, self._held_out = (
            _passages(tokenizer, text, length, limit)
            for text, limit in zip(english(), (calibration, held_out), strict=True)
        )
        self._dense = self._embeddings(self._model())

    def measured(self, centre: str, share: float) -> Found:
        """
        :param centre: One of the centres.
        :param share: Of the inputs of the layers behind GELU.
        :return: What it costs.
        """
        model = self._model()
        nncf_ext.compress(
            model,
            nncf_ext.CompressMode.ACTIVATION_SPARSITY,
            ratio=0.0,
            dataset=nncf.Dataset([{"input_ids": part} for part in self._calibration.split(_BATCH)]),
            advanced_parameters=nncf_ext.AdvancedActivationSparsityParameters(
                targets={r".*\d\.output\.dense": share}, **CENTRES[centre]
            ),
        )
        skipped = Skipped.inputs_of(model)
        found = self._embeddings(model)
        errors = 1 - (found * self._dense).sum(-1).double().numpy()
        same = _nearest(found) == _nearest(self._dense)
        return Found(errors, float(same.double().mean()), skipped.share())

    def _model(self) -> Any:
        return AutoModel.from_pretrained(self._folder, dtype=torch.float32).eval()

    def _embeddings(self, model: Any) -> Tensor:
        """``[passages, hidden]`` of length 1: means over tokens, as the encoder was trained to be used."""
        with torch.no_grad():
            parts = [model(input_ids=part).last_hidden_state.mean(1) for part in self._held_out.split(_BATCH)]
        return normalize(torch.cat(parts), dim=-1)


def _passages(tokenizer: Any, text: str, length: int, limit: int) -> Tensor:
    """int64 ``[passages, length]``, spread evenly over the text."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    inside = length - 2
    starts = np.arange(0, len(ids) - inside, inside)
    chosen = starts[np.linspace(0, len(starts) - 1, min(limit, len(starts))).astype(int)]
    return torch.tensor(
        [[tokenizer.cls_token_id, *ids[start : start + inside], tokenizer.sep_token_id] for start in chosen]
    )


def _nearest(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-1.0).argmax(1)
