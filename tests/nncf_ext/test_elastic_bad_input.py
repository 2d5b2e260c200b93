"""What make_elastic, activate and extract refuse: with a message that says what would work, leaving no hook behind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import nncf
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import nncf_ext
from nncf_ext import ElasticMode, RankGroup
from tests.nncf_ext.adapters import adapted, base, qkv


@dataclass(frozen=True)
class BadGroups:
    """Groups for a Llama with adapters of rank 6, the error, and a part of its text."""

    id: str
    groups: Callable[[], Any]
    text: str
    error: type[Exception] = nncf.ValidationError


GROUPS = [
    BadGroups("none", lambda: [], "at least one"),
    BadGroups("no group", lambda: [[6, 4]], r"list of nncf_ext\.RankGroup"),
    BadGroups("ranks without the largest", lambda: [qkv(4, 2)],
              r"self_attn.q_proj has rank 6; the ranks of its group are \[4, 2\].*r=4, or let the list begin with 6"),
    BadGroups("ranks beyond the largest", lambda: [qkv(8, 6, 4)], "has rank 6.*make the adapter with r=8"),
    BadGroups("no such layer", lambda: [RankGroup([r".*\.query"], [6, 4])],
              "'.*query' matches no layer.*look like 'model.layers.0.self_attn.q_proj'; patterns must match from the"),
    BadGroups("one pattern of two", lambda: [RankGroup([r".*q_proj", "k_proj"], [6, 4])],
              "Pattern 'k_proj' matches no"),
    BadGroups("layer without adapter", lambda: [RankGroup([r".*o_proj"], [6, 4])], "'.*o_proj' matches no layer"),
    BadGroups("overlap", lambda: [qkv(6, 4), RankGroup([r".*\.v_proj"], [6, 3])],
              r"layers.0.self_attn.v_proj is in two groups.*qkv.*v_proj"),
    BadGroups("overlap of model and block", lambda: [RankGroup([r".*"], [6], per="model"), qkv(6, 4)], "in two groups"),
    BadGroups("same name", lambda: [RankGroup([r".*q_proj"], [6], name="a"), RankGroup([r".*k_proj"], [6], name="a")],
              r"both be named model.layers.0.a.*name=\.\.\."),
    BadGroups("patterns in one string", lambda: [RankGroup(".*", [6])],
              "must be a list of regular expressions; got '.*'"),
    BadGroups("no pattern", lambda: [RankGroup([], [6])], "must be a list of regular expressions"),
    BadGroups("no regular expression", lambda: [RankGroup(["*.q_proj"], [6])],
              r"'\*.q_proj'.*no regular expression: nothing"),
    BadGroups("no rank", lambda: [RankGroup([".*"], [])], r"distinct positive integers.*got \[\]"),
    BadGroups("rank zero", lambda: [RankGroup([".*"], [6, 0])], "distinct positive integers"),
    BadGroups("rank twice", lambda: [RankGroup([".*"], [6, 4, 4])], "distinct positive integers"),
    BadGroups("rank of a half", lambda: [RankGroup([".*"], [6, 4.5])], "distinct positive integers"),
    BadGroups("per layer", lambda: [RankGroup([".*"], [6], per="layer")], "'block' or 'model'; got 'layer'"),
]  # fmt: skip


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("case", GROUPS, ids=lambda case: case.id)
def test_groups(case):
    model = adapted()
    with pytest.raises(case.error, match=f"(?s){case.text}"):
        nncf_ext.make_elastic(model, groups=case.groups())
    assert hooks_of(model) == 0


@dataclass(frozen=True)
class BadAdapter:
    """Settings of an adapter on a Llama, and a part of the error's text."""

    id: str
    text: str
    settings: dict[str, Any] = field(default_factory=dict)


ADAPTERS = [
    BadAdapter("dora", "use_dora=True.*norm", {"use_dora": True}),
    BadAdapter("bias of the base", "bias='all'.*Use bias='none'", {"bias": "all"}),
    BadAdapter("bias of adapted layers", "bias='lora_only'", {"bias": "lora_only"}),
    BadAdapter("bias of B", "lora_bias=True.*must stay frozen", {"lora_bias": True}),
    BadAdapter("modules to save", r"modules_to_save=\['lm_head'\].*Target", {"modules_to_save": ["lm_head"]}),
    BadAdapter("tokens", "trainable_token_indices", {"trainable_token_indices": [1]}),
    BadAdapter("pissa", "init_lora_weights='pissa'.*base weight.*gaussian", {"init_lora_weights": "pissa"}),
    BadAdapter("olora", "init_lora_weights='olora'", {"init_lora_weights": "olora"}),
    BadAdapter("tied", "ensure_weight_tying", {"ensure_weight_tying": True, "target_modules": ["q_proj", "lm_head"]}),
    BadAdapter("variant", "cannot be elastic: it is no plain LoRA", {"alora_invocation_tokens": [3]}),
]


@pytest.mark.parametrize("case", ADAPTERS, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore")
def test_adapters(case):
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **case.settings}
    model = get_peft_model(base("llama"), LoraConfig(**settings))
    before = hooks_of(model)
    with pytest.raises(nncf.UnsupportedModelError, match=f"(?s){case.text}"):
        nncf_ext.make_elastic(model, groups=[RankGroup([r".*q_proj"], [4, 2])])
    assert hooks_of(model) == before


def experts() -> nn.Module:
    return adapted("mixtral")


def embedding() -> nn.Module:
    return get_peft_model(base("llama"), LoraConfig(r=4, target_modules=["embed_tokens"]))


def attention() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(r=4, target_modules=["0"]))


def grouped_convolution() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), LoraConfig(r=4, target_modules=["0"]))


@pytest.mark.parametrize(
    ("make", "group", "text"),
    [
        (
            experts,
            RankGroup([r".*experts$"], [6, 4]),
            "'down_proj' .target_parameters., of 3 experts in one tensor.*Leave",
        ),
        (embedding, RankGroup([r".*embed_tokens"], [4], per="model"), "adapts an embedding"),
        (attention, RankGroup(["0$"], [4, 2], per="model"), "MultiheadAttention merges"),
        (grouped_convolution, RankGroup(["0"], [4, 2], per="model"), "convolution in groups"),
    ],
    ids=["3-D experts", "embedding", "attention module", "grouped convolution"],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_whose_rank_cannot_be_elastic(make, group, text):
    with pytest.raises(nncf.UnsupportedModelError, match=f"(?s)cannot be elastic: .*{text}"):
        nncf_ext.make_elastic(make(), groups=[group])


def test_layer_outside_all_blocks():
    model = get_peft_model(base("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(nncf.ValidationError, match="lm_head stands in none of the model's 2 .*per='model'"):
        nncf_ext.make_elastic(model, groups=[RankGroup([r".*q_proj", "lm_head"], [4, 2])])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: base("llama"), nncf.UnsupportedModelError, "peft.get_peft_model.*got a LlamaForCausalLM"),
        (lambda: object(), nncf.UnsupportedModelError, "got a object"),
        (
            lambda: get_peft_model(base("llama"), peft.LoHaConfig(r=4, target_modules=["q_proj"])),
            nncf.UnsupportedModelError,
            "LOHA. Only the rank of LoRA",
        ),
        (
            lambda: get_peft_model(base("llama"), peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"])),
            nncf.UnsupportedModelError,
            "ADALORA. Only the rank of LoRA",
        ),
    ],
    ids=["no adapter", "no model", "other method", "method derived from LoRA"],
)
def test_models(make, error, text):
    with pytest.raises(error, match=text):
        nncf_ext.make_elastic(make(), groups=[qkv(4, 2)])


def test_merged_adapter():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(nncf.ValidationError, match=r"q_proj is merged.*unmerge_adapter\(\)"):
        nncf_ext.make_elastic(model, groups=[qkv(6, 4)])


def test_name_of_the_adapter():
    model = adapted()
    with pytest.raises(nncf.ValidationError, match=r"'other'; the model has \['default'\]"):
        nncf_ext.make_elastic(model, groups=[qkv(6, 4)], adapter_name="other")
    model.add_adapter("other", LoraConfig(r=6, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(nncf.ValidationError, match=r"Active adapters are \['default', 'other'\]. Name one"):
        nncf_ext.make_elastic(model, groups=[qkv(6, 4)])


@pytest.mark.parametrize("mode", [ElasticMode(0), "rank", None, 1])
def test_mode(mode):
    with pytest.raises(nncf.ParameterNotSupportedError, match=r"There are ElasticMode\.RANK"):
        nncf_ext.make_elastic(adapted(), mode, groups=[qkv(6, 4)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda point: point | {"model.layers.0.q_proj+k_proj+v_proj": 5}, r"v_proj = 5; its sizes are \[6, 4\]"),
        (lambda point: dict(list(point.items())[:1]), "misses .*layers.1"),
        (lambda point: point | {"q": 4}, r"unknown dimensions \['q'\]"),
        (lambda point: {}, "misses"),
    ],
    ids=["rank", "missing", "unknown", "empty"],
)
def test_points(change, text):
    net = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 4)])
    net.activate(net.minimal())
    for call in (net.activate, lambda point: nncf_ext.extract(net, point), net.adapter_parameters):
        with pytest.raises(nncf.ValidationError, match=text):
            call(change(net.maximal()))
    assert net.active == net.minimal()


def test_extract_takes_an_elastic_network():
    with pytest.raises(nncf.UnsupportedModelError, match=r"point from a PeftModel; .*make_elastic\(\)"):
        nncf_ext.extract(adapted(), {})


def test_extract_carries_out_a_plan_on_a_model_only():
    plan = nncf_ext.StructurePlan.dense(base("llama"))
    with pytest.raises(nncf.UnsupportedModelError, match="StructurePlan on a NoneType"):
        nncf_ext.extract(None, plan)
    small = nncf_ext.extract(base("llama"), plan.keep("layers.0.mlp", range(8)))
    assert small.model.layers[0].mlp.up_proj.out_features == 8


@pytest.mark.parametrize("key", ["version", "adapter", "layers"])
def test_state_of_another_network(key):
    net = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 4)])
    state = net.state_dict() | {key: "other"}
    with pytest.raises(nncf.ValidationError, match=f"its {key} is other"):
        net.load_state_dict(state)
    with pytest.raises(nncf.ValidationError, match="its version is None"):
        net.load_state_dict({})
    assert torch.equal(torch.tensor(list(net.active.values())), torch.tensor([6, 6]))
