"""What compress() refuses: before any weight is changed, with a message that says what would work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import nncf
import pytest
import torch
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode

INT4 = nncf.CompressWeightsMode.INT4_SYM


@dataclass(frozen=True)
class BadCase:
    """Arguments that replace those of a call that would work, the error, and a part of its text."""

    id: str
    error: type[Exception]
    text: str
    change: dict[str, Any] = field(default_factory=dict)
    advanced: dict[str, Any] = field(default_factory=dict)


CASES = [
    BadCase("ratio one", nncf.ValidationError, r"\[0, 1\).*got 1", {"ratio": 1.0}),
    BadCase("ratio negative", nncf.ValidationError, r"got -0.1", {"ratio": -0.1}),
    BadCase("ratio in percent", nncf.ValidationError, r"got 50", {"ratio": 50}),
    BadCase("ratio nan", nncf.ValidationError, r"got nan", {"ratio": float("nan")}),
    BadCase("empty dataset", nncf.ValidationError, "dataset is empty", {"dataset": nncf.Dataset([])}),
    BadCase("no dataset", nncf.ValidationError, "sparse_wanda .*needs a dataset", {"dataset": None}),
    BadCase("bare list", nncf.ValidationError, r"must be an nncf\.Dataset; got list", {"dataset": [1]}),
    BadCase("items of text", nncf.ValidationError, "Item 0 .* is a str", {"dataset": nncf.Dataset(["text"])}),
    BadCase("items the model cannot take", nncf.ValidationError, "cannot be run on item 0",
            {"dataset": nncf.Dataset([{"pixels": torch.zeros(1)}])}),
    BadCase("no items wanted", nncf.ValidationError, "at least 1; got 0", {"subset_size": 0}),
    BadCase("unknown mode", nncf.ParameterNotSupportedError, "Unknown mode.*SPARSE_GPT", {"mode": "sparse_magic"}),
    BadCase("not a model", nncf.UnsupportedModelError, r"torch\.nn\.Module", {"model": object()}),
    BadCase("no linear layer", nncf.ValidationError, "no linear layer.*convolution",
            {"model": nn.ModuleList([nn.Conv2d(1, 1, 3)])}),
    BadCase("no weight at all", nncf.ValidationError, "there are none", {"model": nn.ReLU()}),
    BadCase("scope that matches nothing", nncf.ValidationError, "no_such_layer.*match no layer",
            {"ignored_scope": nncf.IgnoredScope(names=["no_such_layer"])}),
    BadCase("scope with subgraphs", nncf.ParameterNotSupportedError, "subgraphs",
            {"ignored_scope": nncf.IgnoredScope(subgraphs=[nncf.Subgraph(inputs=["a"], outputs=["b"])])}),
    BadCase("everything ignored", nncf.ValidationError, "no linear layer.*ignored scope",
            {"ignored_scope": nncf.IgnoredScope(types=["linear"])}),
    BadCase("M not above N", nncf.ValidationError, "0 < N < M", {}, {"pattern": "4:4"}),
    BadCase("M below N", nncf.ValidationError, "0 < N < M", {}, {"pattern": "4:2"}),
    BadCase("zero of four", nncf.ValidationError, "0 < N < M", {}, {"pattern": "0:4"}),
    BadCase("no pattern", nncf.ValidationError, "must be 'N:M'", {}, {"pattern": "half"}),
    BadCase("ratio against pattern", nncf.ValidationError, "keeps 1 of 4 .* must be 0.75; got 0.5", {},
            {"pattern": "1:4"}),
    BadCase("pattern that does not divide", nncf.ValidationError, "divisible by 6; not so in model.layers.0", {},
            {"pattern": "3:6", "block_size": 126}),
    BadCase("group size", nncf.ValidationError, r"group size 32.*\(64, 128\)", {},
            {"quantization": INT4, "group_size": 32}),
    BadCase("other quantization", nncf.ParameterNotSupportedError, "int8_asym.*INT4_SYM", {},
            {"quantization": nncf.CompressWeightsMode.INT8_ASYM}),
    BadCase("prerounding of nothing", nncf.ValidationError, "no quantization", {}, {"keep_prerounding": True}),
    BadCase("damping", nncf.ValidationError, "above 0.*got 0", {}, {"damping": 0.0}),
    BadCase("block against group", nncf.ValidationError, "multiple of 128.*got 64", {},
            {"quantization": INT4, "block_size": 64}),
    BadCase("block against pattern", nncf.ValidationError, "multiple of 8.*got 12", {},
            {"pattern": "4:8", "block_size": 12}),
    BadCase("block of nothing", nncf.ValidationError, "positive", {}, {"block_size": 0}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refused_before_any_change(tiny_llama, token_dataset, case):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments: dict[str, Any] = {"model": model, "mode": CompressMode.SPARSE_WANDA, "ratio": 0.5}
    arguments |= {"dataset": token_dataset, **case.change}
    with pytest.raises(case.error, match=f"(?s){case.text}"):
        nncf_ext.compress(**arguments, advanced_parameters=AdvancedSparseWeightsParameters(**case.advanced))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def packed(make, dataset):
    advanced = AdvancedSparseWeightsParameters(quantization=INT4)
    return nncf_ext.compress(make(), "sparse_gpt", ratio=0.0, dataset=dataset, advanced_parameters=advanced)


def packed_by_nncf(make, dataset):
    return nncf.compress_weights(make(), mode=INT4, group_size=128, ratio=1.0, dataset=dataset)


def pruned_by_nncf(make, dataset):
    example = next(iter(dataset.get_inference_data()))
    return nncf.prune(make(), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=example)


def not_finite(make, dataset):
    model = make()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    return model


def without_values(make, dataset):
    return make().to("meta")


def with_adapters(make, dataset):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(make(), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("prepare", "error", "text"),
    [
        (packed, nncf.ValidationError, "already compressed"),
        (packed_by_nncf, nncf.ValidationError, "already compressed"),
        (pruned_by_nncf, nncf.ValidationError, "already compressed"),
        (not_finite, nncf.ValidationError, "layers.1.mlp.up_proj.*not finite"),
        (without_values, nncf.ValidationError, "meta"),
        (with_adapters, nncf.UnsupportedModelError, "adapters"),
    ],
)
@pytest.mark.parametrize("mode", [CompressMode.SPARSE_MAGNITUDE, CompressMode.SPARSE_WANDA])
def test_model_in_a_state_that_cannot_be_compressed(
    tiny_llama, token_dataset, prepare: Callable[..., nn.Module], error, text, mode
):
    model = prepare(tiny_llama, token_dataset)
    with pytest.raises(error, match=text):
        nncf_ext.compress(model, mode, ratio=0.5, dataset=token_dataset)
