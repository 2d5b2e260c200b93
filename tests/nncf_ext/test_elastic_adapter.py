"""One elastic rank: the leading rows of A and columns of B, in values and in gradients."""

import copy
import pickle

import nncf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from nncf_ext.algorithms.elastic_lora.adapter import active_rank, attach_rank, detach_rank, elastic_rank

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def layer_of(module: nn.Module, rank: int, alpha: float, seed: int = 0) -> nn.Module:
    """A module inside a PEFT layer with random A and B."""
    model = get_peft_model(nn.Sequential(module), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"]))
    layer = model.base_model.model[0]
    generator = torch.Generator().manual_seed(seed)
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.weight.data.copy_(torch.randn(part.weight.shape, generator=generator))
    return layer


@st.composite
def cases(draw):
    rank = draw(st.integers(1, 9))
    return {
        "rank": rank,
        "active": draw(st.integers(1, rank)),
        "inputs": draw(st.integers(1, 7)),
        "outputs": draw(st.integers(1, 7)),
        "batch": draw(st.lists(st.integers(1, 3), max_size=3)),
        "alpha": draw(st.sampled_from([1, 7, 16, 64])),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=60, deadline=None)
@given(cases())
def test_output_is_that_of_sliced_factors_with_constant_scaling(case):
    torch.manual_seed(case["seed"])
    layer = layer_of(nn.Linear(case["inputs"], case["outputs"]), case["rank"], case["alpha"], case["seed"])
    layer.to(case["dtype"])
    attach_rank(layer.lora_A["default"]).active = case["active"]
    x = torch.randn(*case["batch"], case["inputs"]).to(case["dtype"])
    with torch.no_grad():
        found = layer(x)

    A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    scaling = case["alpha"] / case["rank"]
    delta = scaling * B[:, : case["active"]] @ A[: case["active"]]
    weight, bias = layer.base_layer.weight.detach().double(), layer.base_layer.bias.detach().double()
    expected = x.double() @ (weight + delta).T + bias
    size = 1 + (x.double().abs() @ (weight.abs() + scaling * B.abs() @ A.abs()).T).max()
    assert (found.double() - expected).abs().max() <= TOLERANCE[case["dtype"]] * size


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.data())
def test_gradients_in_double_precision(rank, data):
    active = data.draw(st.integers(1, rank))
    layer = layer_of(nn.Linear(4, 3), rank, 5).double()
    attach_rank(layer.lora_A["default"]).active = active
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        return (layer(x) ** 3).sum()

    loss().backward()
    assert (A.grad[active:] == 0).all() and (B.grad[:, active:] == 0).all()
    assert (A.grad[:active] != 0).any() and (B.grad[:, :active] != 0).any()
    step = 1e-6
    for parameter in (A, B):
        for at in range(parameter.numel()):
            entries = parameter.data.view(-1)
            value = entries[at].item()
            with torch.no_grad():
                entries[at] = value + step
                above = loss()
                entries[at] = value - step
                slope = (above - loss()) / (2 * step)
            entries[at] = value
            assert abs(slope - parameter.grad.view(-1)[at]) <= 1e-6 * (1 + abs(slope))


def test_inactive_parameters_stay_under_an_optimizer_without_memory():
    layer = layer_of(nn.Linear(4, 3), 5, 5)
    attach_rank(layer.lora_A["default"]).active = 2
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before = A.detach().clone(), B.detach().clone()
    layer(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD([A, B], lr=0.1).step()
    assert torch.equal(A[2:], before[0][2:]) and torch.equal(B[:, 2:], before[1][:, 2:])
    assert not torch.equal(A[:2], before[0][:2]) and not torch.equal(B[:, :2], before[1][:, :2])


def test_what_inactive_rows_hold_has_no_influence():
    layer = layer_of(nn.Linear(4, 3), 5, 5)
    attach_rank(layer.lora_A["default"]).active = 2
    x = torch.randn(2, 4)
    expected = layer(x).detach()
    layer.lora_A["default"].weight.data[2:] = float("nan")
    found = layer(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert layer.lora_B["default"].weight.grad.isfinite().all()


def test_the_maximal_rank_is_the_adapter_itself():
    layer = layer_of(nn.Linear(4, 3), 5, 5)
    x = torch.randn(2, 4)
    expected = layer(x)
    hook = attach_rank(layer.lora_A["default"])
    assert hook.active == hook.maximum == active_rank(layer.lora_A["default"]) == 5
    assert torch.equal(layer(x), expected)
    hook.active = 1
    assert not torch.equal(layer(x), expected)
    detach_rank(layer.lora_A["default"])
    detach_rank(layer.lora_A["default"])
    assert active_rank(layer.lora_A["default"]) == 5 and torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)), (nn.Conv1d(3, 4, 2), (2, 3, 7)), (nn.Conv2d(3, 4, 2), (3, 5, 6))],
    ids=["2-D", "1-D", "without batch"],
)
def test_convolutions(module, shape):
    layer = layer_of(module, 4, 3)
    attach_rank(layer.lora_A["default"]).active = 3
    x = torch.randn(shape)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    conv = nn.functional.conv1d if isinstance(module, nn.Conv1d) else nn.functional.conv2d
    inner = conv(x, A.weight[:3], stride=A.stride, padding=A.padding)
    expected = module(x) + 3 / 4 * conv(inner, B.weight[:, :3])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_a_rank_of_their_own(duplicate):
    original = nn.Linear(3, 6, bias=False)
    attach_rank(original).active = 4
    twin = duplicate(original)
    assert active_rank(twin) == 4 and elastic_rank(twin) is not elastic_rank(original)
    elastic_rank(twin).active = 1
    x = torch.ones(1, 3)
    assert int((twin(x) == 0).sum()) == 5 and int((original(x) == 0).sum()) == 2
    detach_rank(twin)
    assert int((twin(x) == 0).sum()) == 0 and active_rank(original) == 4
    assert list(original.state_dict()) == ["weight"]


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_rank_out_of_range(rank):
    hook = attach_rank(nn.Linear(3, 6))
    with pytest.raises(nncf.ValidationError, match=f"active rank {rank} .* rank 6: use 1 to 6"):
        hook.active = rank
    assert hook.active == 6


def test_only_modules_that_have_outputs_by_rank():
    with pytest.raises(nncf.UnsupportedModelError, match="Embedding"):
        attach_rank(nn.Embedding(3, 4))
