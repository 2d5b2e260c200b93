"""A small model, and what it becomes in other forms: for the tests of control of accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nncf_ext
from nncf_ext.algorithms.accuracy_control.catalogue import Catalogue
from nncf_ext.algorithms.accuracy_control.network import FormNetwork
from nncf_ext.calibration.stream import evaluation
from nncf_ext.journal import Journal
from nncf_ext.structure.blocks import survey
from tests.structure_models import VOCABULARY, make

SIZES = {"hidden_size": 64, "num_hidden_layers": 2}
FEW = nncf_ext.AdvancedAccuracyControlParameters(forms=("float16", "int8", "int4", "int4-s50"))


def items(count: int = 8) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, 24))} for _ in range(count)]


def llama() -> nn.Module:
    return make("llama", **SIZES, intermediate_size=128, head_dim=16)


def network(model: nn.Module, folder: Path, parameters: Any = FEW) -> FormNetwork:
    with evaluation(model):
        journal = Journal(folder / "journal", "test", {})
        return FormNetwork(model, Catalogue(model, survey(model), items(), parameters, journal))


def logits(model: nn.Module, item: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**item, use_cache=False).logits
        return found


def divergence(dense: nn.Module, model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """What the user is promised: nats a token, over all positions of all items, in float64."""
    total = []
    for item in data:
        expected = logits(dense, item).double().log_softmax(-1)
        total.append((expected.exp() * (expected - logits(model, item).double().log_softmax(-1))).sum(-1).mean())
    return float(torch.stack(total).mean())
