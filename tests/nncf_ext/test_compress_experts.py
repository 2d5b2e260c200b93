"""Mixtures of experts: what chooses between experts keeps its weights, unless it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass

import nncf
import pytest
import torch
import transformers
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
}


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    )
    return transformers.Qwen2MoeForCausalLM(config)


def phimoe() -> nn.Module:
    return transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**SIZES, num_local_experts=4))


def granitemoe() -> nn.Module:
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**SIZES, num_local_experts=4))


class ListOfExperts(nn.Module):
    """Experts in a list, as models of one's own have them. As many experts as features: a count alone tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(8))
        self.shared = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.how_much = nn.Linear(8, 1)

    def forward(self, x):
        scores = self.chooser(x).softmax(dim=-1)
        found = sum(scores[..., index, None] * expert(x) for index, expert in enumerate(self.experts))
        return x + found + self.how_much(x).sigmoid() * self.shared(x)


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": ListOfExperts()}) for _ in range(2))

    def forward(self, input_ids):
        x = input_ids[..., None] * torch.linspace(-0.1, 0.1, 8)
        for layer in self.layers:
            x = layer["mlp"](x)
        return x


@dataclass(frozen=True)
class Mixture:
    """`routers`: ends of the paths of linear layers that must be left alone; `treated`: some that must not."""

    name: str
    make: Callable[[], nn.Module]
    routers: tuple[str, ...]
    treated: tuple[str, ...]


MIXTURES = [
    Mixture("shared expert", qwen2_moe, ("mlp.shared_expert_gate",), ("mlp.shared_expert.gate_proj", "q_proj")),
    Mixture("router", phimoe, ("mlp.router",), ("q_proj", "o_proj")),
    Mixture("router of one layer", granitemoe, ("block_sparse_moe.router.layer",), ("q_proj", "o_proj")),
    Mixture("own", OwnModel, ("mlp.chooser", "mlp.how_much"), ("mlp.shared.0", "mlp.shared.2", "mlp.experts.7.2")),
]
mixtures = pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: mixture.name)


def compressed(mixture: Mixture, **advanced) -> nn.Module:
    torch.manual_seed(0)
    model = mixture.make().eval()
    dataset = nncf.Dataset([{"input_ids": torch.randint(0, 128, (2, 16))} for _ in range(2)])
    parameters = AdvancedSparseWeightsParameters(**advanced)
    return nncf_ext.compress(model, "sparse_wanda", ratio=0.5, dataset=dataset, advanced_parameters=parameters)


def zeros(model: nn.Module, ending: str) -> list[float]:
    found = [module for name, module in model.named_modules() if name.endswith(ending)]
    assert found, ending
    return [float((module.weight == 0).float().mean()) for module in found]


@mixtures
def test_routers_and_gates_are_left_alone(mixture):
    model = compressed(mixture)
    for ending in mixture.routers:
        assert set(zeros(model, ending)) == {0.0}
        notes = [
            row.note for row in nncf_ext.compression_report(model).weights if row.name.endswith(f"{ending}.weight")
        ]
        assert notes and all(note.startswith("router or gate of experts") for note in notes)
    for ending in mixture.treated:
        assert set(zeros(model, ending)) == {0.5}


@mixtures
def test_routers_and_gates_are_treated_when_asked_for(mixture):
    wanted, *others = mixture.routers
    model = compressed(mixture, include=[rf".*{wanted}$"])
    assert set(zeros(model, wanted)) == {0.5}
    for ending in others:
        assert set(zeros(model, ending)) == {0.0}


@mixtures
@pytest.mark.parametrize("include", [["no_such_gate"], [r".*q_proj"]])
def test_what_is_no_router_cannot_be_included(mixture, include):
    with pytest.raises(nncf.ValidationError, match=f"match no router.*The model has .*{mixture.routers[0]}"):
        compressed(mixture, include=include)


def test_include_takes_a_list():
    with pytest.raises(nncf.ValidationError, match="list of patterns; got the text"):
        compressed(MIXTURES[0], include=".*gate")


def test_ignored_routers_stay_ignored():
    torch.manual_seed(0)
    model = OwnModel()
    dataset = nncf.Dataset([{"input_ids": torch.randint(0, 128, (2, 16))}])
    with pytest.raises(nncf.ValidationError, match="match no router"):
        nncf_ext.compress(
            model, "sparse_wanda", ratio=0.5, dataset=dataset, ignored_scope=nncf.IgnoredScope(patterns=[".*chooser"]),
            advanced_parameters=AdvancedSparseWeightsParameters(include=[".*chooser"]),
        )  # fmt: skip
