"""One mergeable layer: values and gradients against naive formulas, and what it keeps for the backward."""

from unittest import mock

import nncf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

import nncf_ext
from nncf_ext import MergeMode
from nncf_ext.algorithms.sqft import delta
from nncf_ext.algorithms.sqft.delta import MergedLinear, pack_mask, unpack_mask
from nncf_ext.algorithms.sqft.layers import scales_on
from tests.nncf_ext.mergeable import QUANT_AWARE, mergeable, oracle_codes, oracle_delta, train


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 99))
def test_masks_of_any_width_survive_packing(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.nbytes == rows * -(-columns // 8)
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))


@st.composite
def cases(draw):
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    return {
        "inputs": groups * size,
        "groups": groups,
        "outputs": draw(st.integers(1, 9)),
        "rank": draw(st.integers(1, 5)),
        "batch": draw(st.lists(st.integers(1, 3), max_size=2)),
        "scaling": draw(st.sampled_from([0.5, 2.0, 3.7])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "seed": draw(st.integers(0, 99)),
        "block": draw(st.sampled_from([1, 20, 1 << 18])),
    }


def tensors(case, dtype=torch.float64):
    """x, A, B, signed scales as float16 holds them, W with zeros and with one row out of the grid's range."""
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = normal(case["outputs"], case["inputs"]).float()
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
    weight[0] *= 40
    scales = (normal(case["outputs"], case["groups"]).sign() * 0.3 + 0.05 * normal(case["outputs"], 1)).half()
    A, B = normal(case["rank"], case["inputs"]).float(), normal(case["outputs"], case["rank"]).float()
    x = normal(*case["batch"], case["inputs"])
    bias = normal(case["outputs"])
    return [each.to(dtype).requires_grad_() for each in (x, A, B, scales, bias)] + [weight.to(dtype)]


def naive(case, x, A, B, scales, weight, kept, trained):
    """The published formulas, in the type of the arguments, with every [out, in] matrix in the graph."""
    mask = (weight != 0).to(weight)
    change = case["scaling"] * (B @ A) * mask
    merged = weight + change
    used = merged
    if scales is not None:
        steps = scales.repeat_interleave(case["inputs"] // case["groups"], dim=1)
        position = merged / steps
        codes = position.round().clamp(-8, 7).detach()
        if trained:
            inside = (position >= -8.5) & (position <= 7.5)
            used = steps * torch.where(inside, position + (codes - position).detach(), codes)
        else:
            used = merged + (codes * steps.detach() - merged).detach()
        used = used + (used.detach().half().to(used) - used).detach()
    result = linear(x, used)
    if kept is not None:
        result = result + linear(x * kept / (1 - case["dropout"]) - x, change)
    return result


@pytest.mark.parametrize("grid", [None, "frozen", "trained"])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_values_and_gradients_are_those_of_the_naive_form(grid, case):
    x, A, B, scales, bias, weight = tensors(case)
    if grid == "frozen":
        scales.requires_grad_(False)
    given_scales = None if grid is None else scales
    torch.manual_seed(case["seed"])
    kept = torch.rand(x.shape[:-1].numel(), x.shape[-1]).reshape(x.shape) >= case["dropout"]
    kept = kept if case["dropout"] else None
    expected = bias + naive(case, x, A, B, given_scales, weight, kept, grid == "trained")
    sought = [each for each in (x, A, B, given_scales, bias) if each is not None and each.requires_grad]
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, sought, upstream)

    torch.manual_seed(case["seed"])
    with mock.patch.object(delta, "_BLOCK_ON_CPU", case["block"]):
        found = MergedLinear.apply(
            x, A, B, given_scales, weight, pack_mask(weight != 0), bias, case["scaling"], case["dropout"]
        )
        gradients = torch.autograd.grad(found, sought, upstream)
    # On the grid the arithmetic before rounding is float32: an entry may stand just beside the border of a cell.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradients_pass_a_numerical_check(monkeypatch):
    monkeypatch.setattr(delta, "_BLOCK_ON_CPU", 20)
    case = {"inputs": 6, "groups": 2, "outputs": 11, "rank": 3, "batch": [2], "scaling": 1.5, "dropout": 0.0, "seed": 1}
    x, A, B, _, bias, weight = tensors(case)
    mask = pack_mask(weight != 0)
    assert torch.autograd.gradcheck(
        lambda *of: MergedLinear.apply(*of[:3], None, weight, mask, of[3], 1.5, 0.0), (x, A, B, bias)
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_pruned_places_give_the_adapter_no_gradient(quantized):
    """If only inputs of pruned weights are not zero, neither A nor B learns."""
    torch.manual_seed(0)
    weight, A, B = torch.randn(9, 8), torch.randn(3, 8).requires_grad_(), torch.randn(9, 3).requires_grad_()
    weight[:, :4] = 0.0
    x = torch.randn(5, 8)
    x[:, 4:] = 0.0
    scales = torch.full((9, 2), 0.3).half() if quantized else None
    result = MergedLinear.apply(x, A, B, scales, weight, pack_mask(weight != 0), None, 2.0, 0.0)
    assert torch.equal(result, torch.zeros(5, 9))
    result.sum().backward()
    assert torch.equal(A.grad, torch.zeros_like(A)) and torch.equal(B.grad, torch.zeros_like(B))


@pytest.mark.parametrize("mode", list(MergeMode))
def test_inactive_ranks_have_no_influence_and_get_no_gradient(mode):
    model, _ = mergeable(mode)
    train(model, steps=2)
    net = nncf_ext.make_elastic(model, groups=[nncf_ext.RankGroup([".*"], [6, 4, 2], per="model")])
    net.activate(net.minimal())
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64)
    expected = layer(x)
    expected.sum().backward()
    assert A.grad[:2].abs().min() > 0 and B.grad[:, :2].abs().max() > 0
    assert not A.grad[2:].any() and not B.grad[:, 2:].any()
    with torch.no_grad():
        A[2:], B[:, 2:] = torch.nan, 1e9
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_computes_with_the_nearest_codes_of_the_masked_sum(dtype):
    model, grid = mergeable(QUANT_AWARE, dtype=dtype)
    train(model, steps=3 if dtype is not torch.float16 else 1)
    for path in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_base_model().get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scales = scales_on(layer.base_layer).numpy()
        codes = oracle_codes(layer.base_layer.weight, oracle_delta(A, B, 1.5), scales)
        value = (codes.astype(np.float16) * np.repeat(scales, 64, axis=1)).astype(np.float16)
        # Products with ones and zeros are exact, so the layer shows its weight.
        seen = layer(torch.eye(layer.in_features, dtype=dtype)).T
        assert torch.equal(seen, torch.from_numpy(value).to(dtype))
        assert np.array_equal(scales, hook_scales(grid, path))


def hook_scales(grid: nn.Module, path: str) -> np.ndarray:
    name = f"__nncf_hooks.post_hooks.{path.replace('.', ':')}:weight__0.0._scale"
    return grid.state_dict()[name].numpy().reshape(grid.get_submodule(path).out_features, -1)


def test_changing_the_type_of_a_model_leaves_its_scales():
    model, _ = mergeable(QUANT_AWARE)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    before = scales_on(layer.base_layer).clone()
    model.to(torch.bfloat16)
    assert torch.equal(scales_on(layer.base_layer), before) and before.dtype is torch.float16


@pytest.mark.parametrize("mode", list(MergeMode))
def test_autocast_changes_the_product_and_not_the_weight(mode):
    model, _ = mergeable(mode)
    train(model, steps=2)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    weight = layer(torch.eye(128)).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(4, 128)
        found = layer(x)
        assert found.dtype is torch.bfloat16
        assert torch.equal(found, linear(x, weight))


@pytest.mark.parametrize("where", ["adapter", "input"])
def test_dropout_of_the_adapter_spares_the_base(where):
    model, _ = mergeable(QUANT_AWARE, lora={"lora_dropout": 0.5}, dropout=where)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(6, 64)
    quiet = layer(x)
    layer.train()
    torch.manual_seed(1)
    assert torch.equal(layer(x), quiet) is (where == "adapter")  # B = 0: there is only the base
    train(model, steps=2)
    layer.train()
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(800)]).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x), rtol=0.2, atol=0.2)


def saved_bytes(model: nn.Module, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward, each storage once, parameters not counted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return sum(size for size, _ in kept.values())


class NaiveLora(nn.Module):
    """SparsePEFT as written down: the delta is an [out, in] matrix of the graph."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        base, A, B = self.layer.base_layer, self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        change = 2 * (B @ A) * (base.weight != 0)
        return linear(x, base.weight, base.bias) + linear(x, change)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_hardly_more_than_that_of_plain_lora(dropout):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2}
    tokens = torch.randint(0, 50, (1, 128))
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

    def make():
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
        for layer in (each for each in model.model.layers.modules() if isinstance(each, nn.Linear)):
            layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0.0
        lora = LoraConfig(r=32, lora_alpha=64, lora_dropout=dropout, target_modules=targets)
        return model, lambda model: get_peft_model(model, lora).train()

    model, adapt = make()
    plain = saved_bytes(adapt(model), tokens)
    model, adapt = make()
    sparse = saved_bytes(nncf_ext.make_mergeable(adapt(model), MergeMode.SPARSE), tokens)
    model, adapt = make()
    options = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 128, "all_layers": True}
    grid = nncf.compress_weights(make()[0], **options, dataset=nncf.Dataset([{"input_ids": tokens}]))
    quantized = saved_bytes(nncf_ext.make_mergeable(adapt(model), QUANT_AWARE, grid=grid), tokens)
    assert sparse <= 1.15 * plain and quantized <= 1.15 * plain, (plain, sparse, quantized)
    if not dropout:
        model, adapt = make()
        peft = adapt(model)
        for name, layer in list(peft.named_modules()):
            if hasattr(layer, "lora_A"):
                parent, _, own = name.rpartition(".")
                setattr(peft.get_submodule(parent), own, NaiveLora(layer))
        assert saved_bytes(peft, tokens) > 1.5 * max(plain, sparse, quantized)
