"""Layers of a block share a target: against a naive greedy that the test runs itself."""

import nncf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nncf_ext
from nncf_ext import ActivationAllocation
from nncf_ext.algorithms.activation_sparsity.allocation import greedy_fractions
from nncf_ext.weights.activation_sparsity import activation_sparsity_of
from tests.properties.cases import Mlp, llama

SHARE = 0.4
MLP = r".*mlp\..*"


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 90, (2, 11), generator=generator)} for _ in range(3)]


def sparse(model, items, targets, **advanced):
    return nncf_ext.compress(
        model,
        nncf_ext.CompressMode.ACTIVATION_SPARSITY,
        ratio=0.0,
        dataset=nncf.Dataset(items),
        do_copy=True,
        advanced_parameters=nncf_ext.AdvancedActivationSparsityParameters(targets=targets, **advanced),
    )


def fractions(model):
    named = {name: activation_sparsity_of(module) for name, module in model.named_modules()}
    return {name: sparsity.target for name, sparsity in named.items() if sparsity is not None}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.floats(0.01, 0.99))
def test_the_share_is_met_and_no_fraction_is_too_large(sizes, share):
    found = greedy_fractions(sizes, share, lambda tried: sum(x * x for x in tried))
    assert sum(x * size for x, size in zip(found, sizes, strict=True)) == pytest.approx(share * sum(sizes), rel=1e-5)
    assert all(0.0 <= x <= 0.99 for x in found)


def test_the_cheapest_raise_is_taken_each_time():
    """Groups of 2 and 1 parts; 0.4 of 3 parts in 8 steps of 0.15 parts, counted by hand on costs 3 x^2 and y^2."""
    x = y = 0.0
    for _ in range(8):
        one, other = 3 * (x + 0.075) ** 2 + y**2, 3 * x**2 + (y + 0.15) ** 2
        x, y = (x + 0.075, y) if one < other else (x, y + 0.15)
    found = greedy_fractions([2, 1], 0.4, lambda tried: 3 * tried[0] ** 2 + tried[1] ** 2)
    assert found == pytest.approx([x, y]) and 0 < x < y


def test_layers_share_a_target_and_groups_have_one_fraction(items):
    torch.manual_seed(1)
    result = sparse(llama(), items, {MLP: SHARE, r".*o_proj": 0.1}, allocation=ActivationAllocation.GREEDY)
    found = fractions(result)
    for layer in ("model.layers.0", "model.layers.1"):
        gate, up, down = (found[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert gate == up and (gate + up + down) / 3 == pytest.approx(SHARE)
        assert found[f"{layer}.self_attn.o_proj"] == 0.1
    rows = nncf_ext.compression_report(result).compressed
    assert all(row.input_sparsity == pytest.approx(found[row.name.removesuffix(".weight")], abs=0.02) for row in rows)


def block_error(model, items, layer):
    """Of one block of a model, on the same dense hidden states: mean squared relative change of a token."""
    changes = []
    dense = llama_of(model)
    hook = dense.model.layers[layer].register_forward_hook(
        lambda block, args, kwargs, output: changes.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        for item in items:
            dense(**item, use_cache=False)
        hook.remove()
        errors = []
        for args, kwargs, output in changes:
            now = model.model.layers[layer](*args, **kwargs)
            now, output = (each if isinstance(each, torch.Tensor) else each[0] for each in (now, output))
            errors.append(((now - output).norm(dim=-1) / output.norm(dim=-1)).square().flatten())
    return float(torch.cat(errors).mean())


def llama_of(model):
    dense = llama()
    dense.load_state_dict(model.state_dict())
    return dense


def test_the_output_of_a_block_changes_less():
    torch.manual_seed(2)
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:  # so that the inputs of down are what the output bears least
            layer.mlp.down_proj.weight.mul_(40)
            layer.mlp.gate_proj.weight[:, ::2] = 0
            layer.mlp.up_proj.weight[:, ::2] = 0
    generator = torch.Generator().manual_seed(5)
    items = [{"input_ids": torch.randint(3, 90, (2, 11), generator=generator)} for _ in range(2)]
    uniform, greedy = (sparse(model, items, {MLP: SHARE}, allocation=each) for each in ActivationAllocation)
    assert block_error(greedy, items, 0) < 0.95 * block_error(uniform, items, 0)


@pytest.mark.parametrize(
    "options",
    [{"centering": "median"}, {"weight_norms": True}, {"mean_replacement": True}, {"sequential": False}],
    ids=str,
)
def test_it_goes_with_the_other_options_and_is_the_same_twice(items, options):
    torch.manual_seed(1)
    model = llama()
    first, second = (sparse(model, items, {MLP: SHARE}, allocation="greedy", **options) for _ in range(2))
    assert fractions(first) == fractions(second)
    with torch.no_grad():
        assert torch.equal(first(**items[0]).logits, second(**items[0]).logits)
    found = [each for name, each in fractions(first).items() if "layers.0" in name]
    assert sum(found) / 3 == pytest.approx(SHARE)


def test_without_blocks_targets_are_those_of_each_layer():
    torch.manual_seed(3)
    result = sparse(Mlp().eval(), [torch.randn(9, 24)], {".*": SHARE}, allocation="greedy")
    assert set(fractions(result).values()) == {SHARE}


def test_codes_on_a_grid_count_as_their_bytes(items):
    torch.manual_seed(4)
    grid = nncf_ext.compress(
        llama(),
        nncf_ext.CompressMode.SPARSE_MAGNITUDE,
        ratio=0.5,
        dataset=nncf.Dataset(items),
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64
        ),
    )
    state = {name: value.clone() for name, value in grid.state_dict().items()}
    result = sparse(grid, items, {MLP: SHARE}, allocation="greedy")
    found = [each for name, each in fractions(result).items() if "layers.1" in name]
    assert sum(found) / 3 == pytest.approx(SHARE)
    assert all(torch.equal(value, state[name]) for name, value in result.state_dict().items())


def test_what_does_not_exist_is_refused(items):
    for options, text in (
        ({"allocation": "random"}, "Unknown allocation 'random'"),
        ({"allocation": "greedy", "moving_average": True}, "no centre, norms or allocation"),
    ):
        with pytest.raises(nncf.ParameterNotSupportedError, match=text):
            sparse(nn.Sequential(nn.Linear(4, 4)), items, {".*": 0.5}, **options)
