"""Dimensions of any model: what is found, and that a model cut by it is the model with the rest at zero."""

import copy
import random
from collections.abc import Mapping, Sequence

import nncf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nncf_ext.structure.counting import lost_numbers
from nncf_ext.structure.dimensions import Dimensions, tensor_at
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.slicing import Slices, sliced
from nncf_ext.structure.surgery import cut_tensors
from nncf_ext.structure.tracing.front import trace
from tests.networks import SMALL, network
from tests.structure_models import make, tokens

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FOUND = {
    "basic": {
        "conv1": 8,
        "layer1.0.conv1": 8,
        "layer1.1.conv1": 8,
        "layer2.0.conv1": 16,
        "layer2.0.conv2": 16,
        "layer2.1.conv1": 16,
    },
    "dense": {"stem": 8, "layers.0": 6, "layers.1": 6, "layers.2": 6, "transition": 10},
    "squeeze": {
        "features.0.0": 8,
        "features.1.conv.3.fc1": 2,
        "features.2.conv.0": 32,
        "features.2.conv.6.fc1": 8,
        "features.2.conv.7": 10,
        "features.3.conv.0": 40,
        "features.3.conv.6.fc1": 10,
        "features.4.conv.0": 40,
        "features.4.conv.6.fc1": 10,
        "features.5.0": 40,
    },
    "convnext": {"stem": 8, "blocks.0.up": 24, "blocks.1.up": 24, "reduce": 12, "more.0.up": 36, "more.1.up": 36},
    "vit": {
        "patches": 24,
        "blocks.0.attention.qkv": 4,
        "blocks.0.mlp.0": 40,
        "blocks.1.attention.qkv": 4,
        "blocks.1.mlp.0": 40,
    },
    "shuffle": {"one": 8, "gated": 10, "up": 6},
}
NORMALIZED = {"stem", "reduce", "patches"}
"""Dimensions that a layer norm counts along."""


def some_units(dimensions: Dimensions, seed: int) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {
        name: sorted(draw.sample(range(each.size), draw.randint(1, each.size))) for name, each in dimensions.items()
    }


def zeroed(model: nn.Module, dimensions: Dimensions, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """The whole model, in which nobody reads the units that are not kept: their columns are zero."""
    whole = copy.deepcopy(model)
    for name, each in dimensions.items():
        gone = sorted({*each.all_units} - {*kept[name]})
        for cut in each.cuts:
            tensor = tensor_at(whole, cut.tensor)
            transposed = isinstance(whole.get_submodule(cut.module), nn.ConvTranspose2d)
            if tensor.ndim > 1 and cut.axis == (0 if transposed else 1):
                tensor.data.index_fill_(cut.axis, cut.indices(gone), 0)
    return whole


class NormOfSome(nn.Module):
    """A layer norm that counts some channels, and gives zero for the others."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        some = x[..., self.kept]
        centred = some - some.mean(-1, keepdim=True)
        some = centred / (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
        out = torch.zeros_like(x)
        out[..., self.kept] = some * self.norm.weight[self.kept] + self.norm.bias[self.kept]
        return out


def cut(model: nn.Module, dimensions: Dimensions, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    small = copy.deepcopy(model)
    cut_tensors(small, kept, dimensions)
    return small


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(name) -> None:
    traced = trace(network(name), IMAGES)
    assert {each: dimension.size for each, dimension in traced.dimensions.items()} == FOUND[name]
    assert [why for why in traced.refused.values() if why == "reaches an output of the model"]


def test_cuts_by_hand() -> None:
    traced = trace(network("dense"), IMAGES)
    first = traced.dimensions["layers.0"]
    found = {(each.tensor, each.axis): each.segments for each in first.cuts}
    norms = {
        (f"norms.{place}.{tensor}", 0): ((8, 1),)
        for place in (1, 2)
        for tensor in ("weight", "bias", "running_mean", "running_var")
    }
    assert found == norms | {
        ("layers.0.weight", 0): ((0, 1),),
        ("layers.0.bias", 0): ((0, 1),),
        ("layers.1.weight", 1): ((8, 1),),
        ("layers.2.weight", 1): ((8, 1),),
        ("transition.weight", 1): ((8, 1),),
    }
    flattened = {(each.tensor, each.axis): each.segments for each in traced.dimensions["transition"].cuts}
    assert flattened["fc.weight", 1] == ((0, 4),)
    heads = trace(network("vit"), IMAGES).dimensions["blocks.0.attention.qkv"]
    assert {(each.tensor, each.segments) for each in heads.cuts} == {
        ("blocks.0.attention.qkv.weight", ((0, 6), (24, 6), (48, 6))),
        ("blocks.0.attention.qkv.bias", ((0, 6), (24, 6), (48, 6))),
        ("blocks.0.attention.proj.weight", ((0, 6),)),
    }
    assert heads.granularity == 18 and dict(heads.numbers) == {"blocks.0.attention.num_heads": 1}


@pytest.mark.parametrize("name", SMALL)
def test_a_cut_model_is_the_model_with_the_rest_at_zero(name) -> None:
    model, images = network(name).double(), IMAGES.double()
    dimensions = trace(model, images).dimensions
    for seed in range(3):
        kept = some_units(dimensions, seed)
        whole = zeroed(model, dimensions, kept)
        normalized = [each for each in dimensions if each in NORMALIZED]
        for each in normalized:
            for tensor in dimensions[each].cuts:
                if isinstance(norm := whole.get_submodule(tensor.module), nn.LayerNorm):
                    whole.set_submodule(tensor.module, NormOfSome(norm, tensor.indices(kept[each])))
        small = cut(model, dimensions, kept)
        torch.testing.assert_close(small(images), whole(images), rtol=1e-9, atol=1e-9)
        with sliced(model, dimensions, kept):
            torch.testing.assert_close(model(images), small(images), rtol=1e-12, atol=1e-12)
        lost = lost_numbers(model, kept, dimensions)
        assert sum(each.numel() - lost[id(each)] for each in model.parameters()) == sum(
            each.numel() for each in small.parameters()
        )


@pytest.mark.parametrize("name", ["llama", "bert", "llama_biases"])
def test_the_records_say_the_same(name) -> None:
    model = make(name)
    traced = trace(model, {"input_ids": tokens(1, 5)})
    by_cuts = {
        frozenset((each.tensor, each.axis, each.segments) for each in found.cuts)
        for found in traced.dimensions.values()
    }
    record = dimensions_of(model)
    for each in record.values():
        assert frozenset((cut.tensor, cut.axis, cut.segments) for cut in each.cuts) in by_cuts
    # And beside what the record names, the stream between the blocks.
    assert len(traced.dimensions) == len(record) + 1
    (chain,) = [each for each in traced.chains if len(each.blocks) > 1]
    assert chain.blocks == tuple(f"{record.blocks}.{index}" for index in range(4)) and chain.same_widths


@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("basic", {"layer1": ["layer1.0", "layer1.1"], "layer2": ["layer2.1"]}),
        ("bottleneck", {"layer1": ["layer1.1", "layer1.2"], "layer2": ["layer2.1"]}),
        ("dense", {}),
        ("vit", {"blocks": ["blocks.0", "blocks.1"]}),
    ],
)
def test_chains(name, chains) -> None:
    found = trace(network(name), IMAGES).chains
    assert {each.name: list(each.blocks) for each in found} == chains


class Graph(nn.Module):
    """A random network: each layer reads a sum, a concatenation or one of the tensors before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        widths, self.steps = [4], []
        self.layers = nn.ModuleList()
        for _ in range(draw.randint(3, 7)):
            how = draw.choice(["one", "sum", "cat"])
            at = [draw.randrange(len(widths)) for _ in range(1 if how == "one" else 2)]
            if how == "sum":
                at[1] = draw.choice([place for place, width in enumerate(widths) if width == widths[at[0]]])
            read = sum(widths[place] for place in at) if how == "cat" else widths[at[0]]
            kind = draw.choice(["conv", "depthwise", "shared", "grouped"])
            width = draw.choice([4, 6, 8])
            if kind == "depthwise":
                layer, width = nn.Conv2d(read, read, 3, padding=1, groups=read), read
            elif kind == "shared" and any(each.in_channels == read and each.groups == 1 for each in self.layers):
                layer = next(each for each in self.layers if each.in_channels == read and each.groups == 1)
                width = layer.out_channels
            elif kind == "grouped":
                layer = nn.Conv2d(read, width, 1, groups=2)
            else:
                layer = nn.Conv2d(read, width, 1)
            self.layers.append(layer)
            self.steps.append((how, at))
            widths.append(width)
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.first(x)]
        for layer, (how, at) in zip(self.layers, self.steps, strict=True):
            read = [seen[place] for place in at]
            joined = torch.cat(read, 1) if how == "cat" else read[0] + read[1] if how == "sum" else read[0]
            seen.append(torch.relu(layer(joined)))
        return self.last(seen[-1].mean((2, 3)))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_random_networks(seed) -> None:
    torch.manual_seed(seed)
    model, images = Graph(seed).double().eval(), IMAGES[:1, :, :4, :4].double()
    traced = trace(model, images)
    kept = some_units(traced.dimensions, seed)
    small = cut(model, traced.dimensions, kept)
    whole = zeroed(model, traced.dimensions, kept)
    # What goes around depthwise convolutions alone must not be read behind them, either; the columns see to that.
    torch.testing.assert_close(small(images), whole(images), rtol=1e-9, atol=1e-9)


class Odd(nn.Module):
    """Things that keep widths from changing."""

    def __init__(self) -> None:
        super().__init__()
        self.hard, self.after = nn.Linear(6, 8), nn.Linear(4, 6)
        self.sorted, self.sliced, self.last = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.hard(x).view(-1, 2, 4).sum(1))
        x = torch.linalg.qr(self.sorted(x)[:, :, None])[0].squeeze(2)
        x = self.sliced(x)
        x[:, 3:5] += 1
        return self.last(x[:, 1:5])


def test_what_cannot_be_elastic_has_a_reason() -> None:
    refused = trace(Odd().eval(), torch.rand(5, 6)).refused
    assert "torch's linalg_qr, for which there is no rule" in refused["sorted"]
    assert "at a fixed place (slice)" in refused["sliced"]
    assert refused["last"] == "reaches an output of the model"
    assert "the model's code asks for the whole size" in refused["hard"]


def test_an_input_that_does_not_fit() -> None:
    with pytest.raises(nncf.ValidationError, match="ResNet does not run with the example input"):
        trace(network("basic"), torch.rand(1, 4, 32, 32))


def test_ignored_modules_keep_their_shapes() -> None:
    traced = trace(network("basic"), IMAGES, ignored=["layer1.1.conv2"])
    assert traced.refused["conv1"] == "layer1.1.conv2 is in the ignored scope"
    assert "layer1.1.conv1" not in traced.dimensions and "layer1.0.conv1" in traced.dimensions


def test_products_by_hand() -> None:
    traced = trace(network("dense"), IMAGES[:1])
    assert traced.products["stem.weight"] == 32 * 32 and traced.products["fc.weight"] == 1
    vit = trace(network("vit"), IMAGES[:1]).products
    assert vit["blocks.0.attention.qkv.weight"] == 17 and vit["patches.weight"] == 16


# Slices


def test_the_model_is_left_as_it_was() -> None:
    model = network("dense")
    before, state = model(IMAGES), copy.deepcopy(model.state_dict())
    trace(model, IMAGES)
    assert torch.equal(model(IMAGES), before)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_gradients_reach_the_whole_weights_and_statistics_their_parts() -> None:
    model = network("dense")
    dimensions = trace(model, IMAGES).dimensions
    slices = Slices(model, dimensions)
    slices.keep({"stem": range(5), "layers.0": range(2)})
    before = copy.deepcopy(model.state_dict())
    model.train()(IMAGES).sum().backward()
    gradient = model.layers[1].weight.grad
    read = [*range(5), *range(8, 10)]
    assert gradient.shape == (6, 14, 3, 3) and gradient[:, read].abs().sum(dim=(0, 2, 3)).min() > 0
    assert gradient[:, [5, 6, 7, 10, 11, 12, 13]].abs().max() == 0
    # The norm behind a concatenation sees two pieces: what it learns of them is written back, and nothing else.
    moved = (model.norms[1].running_mean != before["norms.1.running_mean"]).nonzero().flatten().tolist()
    assert moved == read
    model.eval()
    slices.remove()
    assert all(not module._forward_hooks for module in model.modules())
    assert "weight" not in model.stem.__dict__ and model.stem.out_channels == 8


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = network("basic")
    dimensions = trace(model, IMAGES).dimensions
    with sliced(model, dimensions, {"conv1": range(3)}):
        with pytest.raises(RuntimeError):
            model(torch.rand(2, 5, 32, 32))
        assert model.conv1.weight.shape[0] == 8
        assert model(IMAGES).shape == (2, 10)
