"""How many zeros each layer gets: sums kept, optimal for the measured prices, nothing of the model changed."""

import math

import nncf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode, SparsityAllocation
from nncf_ext.algorithms.sparse_weights import allocation
from nncf_ext.algorithms.sparse_weights.allocation import Curve, allocate, parts_of
from nncf_ext.calibration.stream import CalibrationStream, evaluation
from nncf_ext.structure.blocks import survey

WIDTH = 32
MEASURED = (SparsityAllocation.SENSITIVITY, SparsityAllocation.OUTLIERS)


class Block(nn.Module):
    def __init__(self, loudness):
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(WIDTH, WIDTH), "out": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.loudness = loudness

    def forward(self, x):
        x = x + self.loudness * self.attention["out"](torch.tanh(self.attention["query"](x)))
        return x + self.loudness * torch.relu(self.mlp(x))


class Stack(nn.Module):
    """Blocks that change the hidden state by more or less."""

    def __init__(self, *loudness):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(each) for each in loudness)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def items(count=3):
    generator = torch.Generator().manual_seed(1)
    scales = torch.exp(torch.randn(WIDTH, generator=generator))
    return [torch.randn(1, 40, WIDTH, generator=generator) * scales for _ in range(count)]


def allocated(model, how=SparsityAllocation.SENSITIVITY, ratio=0.5, spread=0.2, data=None):
    found, data = survey(model), items() if data is None else data
    with evaluation(model):
        stream = CalibrationStream(model, data, found.block_lists, found.targets)
        parts = parts_of(found.block_lists, found.targets)
        return allocate(stream, data, parts, how, ratio, spread, lambda done: None)


def mean(ratios, model):
    sizes = {name: model.get_submodule(name).weight.numel() for name in ratios}
    return sum(ratios[name] * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("how", MEASURED)
@pytest.mark.parametrize("ratio", [0.02, 0.25, 0.5, 0.75, 0.995])
@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_the_sum_is_the_one_asked_for_and_no_layer_is_far_from_it(how, ratio, spread):
    model = Stack(1.0, 0.3, 0.1)
    ratios = allocated(model, how, ratio, spread)
    assert set(ratios) == set(survey(model).targets)
    assert mean(ratios, model) == pytest.approx(ratio, abs=1e-6)
    # OWL scales to a range of twice the spread about a mean that is not its middle.
    reach = spread if how is SparsityAllocation.SENSITIVITY else 2 * spread
    assert all(abs(each - ratio) <= reach + 1e-9 for each in ratios.values())
    assert len(set(ratios.values())) > 1 or ratio > 0.99


def test_what_the_output_hardly_hears_gets_more_zeros():
    ratios = allocated(Stack(1.0, 0.01, 1.0))
    quiet = [ratio for name, ratio in ratios.items() if name.startswith("layers.1.")]
    loud = [ratio for name, ratio in ratios.items() if not name.startswith("layers.1.")]
    assert min(quiet) > max(loud)


def test_layers_of_one_child_of_a_block_are_measured_together():
    model = Stack(1.0, 0.5)
    found = survey(model)
    parts = [[*part.layers] for part in parts_of(found.block_lists, found.targets)]
    assert parts == [
        [f"layers.{block}.{name}" for name in names]
        for block in (0, 1)
        for names in (("attention.query", "attention.out"), ("mlp",))
    ]
    layer = nn.Linear(2, 2)
    assert [part.block for part in parts_of((), {"one": layer, "two": layer})] == ["one", "two"]


@st.composite
def curves(draw):
    found = {}
    for name in range(draw(st.integers(2, 5))):
        size, seed = draw(st.integers(50, 400)), draw(st.integers(0, 1000))
        energy = np.sort(np.random.default_rng(seed).standard_normal(size) ** 2)
        levels = torch.tensor(energy / energy.sum())
        found[str(name)] = Curve(size, levels, 0.0, 0.0), draw(st.floats(0.1, 10.0))
    return found


@settings(max_examples=60, deadline=None)
@given(curves(), st.floats(0.2, 0.8), st.integers(0, 10**6))
def test_no_other_ratios_with_the_same_sum_cost_less(drawn, ratio, seed):
    """Moving zeros from one layer to another, within the spread, never lowers the energy lost times its price."""
    spread = 0.15
    known, prices = {n: each[0] for n, each in drawn.items()}, {n: each[1] for n, each in drawn.items()}
    ratios = allocation._by_price(known, prices, ratio, spread)

    def cost(chosen):
        total = 0.0
        for name, curve in known.items():
            lost = np.concatenate([[0.0], np.cumsum(curve.levels.numpy())])
            total += prices[name] * np.interp(chosen[name] * curve.size, np.arange(curve.size + 1), lost)
        return total

    sizes = {name: curve.size for name, curve in known.items()}
    assert sum(ratios[n] * sizes[n] for n in known) == pytest.approx(ratio * sum(sizes.values()), abs=1e-6)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        one, other = rng.choice([*known], 2, replace=False)
        most = min((ratio + spread - ratios[one]) * sizes[one], (ratios[other] - ratio + spread) * sizes[other])
        moved = rng.random() * max(most, 0.0)
        changed = {**ratios, one: ratios[one] + moved / sizes[one], other: ratios[other] - moved / sizes[other]}
        # A weight more or less in each layer, since ratios are no whole numbers of weights.
        slack = sum(prices[name] * float(known[name].levels[-1]) for name in (one, other))
        assert cost(changed) >= cost(ratios) - 0.05 * slack


def test_the_energy_lost_is_that_of_what_is_taken_away():
    """Rows of very different size: what goes is the smallest of each row, not of the matrix."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(8, 64, generator=generator) * torch.logspace(-2, 0, 8)[:, None]
    energy = scores.double().square().numpy()
    expected = sum(np.sort(row)[:32].sum() for row in energy) / energy.sum()
    assert allocation._curve(scores, 0.5).lost == pytest.approx(expected, rel=1e-6)


def test_outliers_are_those_of_the_paper():
    model, ratio, spread = Stack(1.0, 1.0, 1.0), 0.6, 0.08
    with torch.no_grad():
        model.layers[1].mlp.weight[:, :2] *= 30
    ratios = allocated(model, SparsityAllocation.OUTLIERS, ratio, spread)
    seen = {name: [] for name in survey(model).targets}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in seen
    ]
    with torch.no_grad():
        for item in items():
            model(item)
    for hook in hooks:
        hook.remove()
    shares = []
    for block in range(3):
        names = [name for name in seen if name.startswith(f"layers.{block}.")]
        above = 0
        for name in names:
            norms = torch.cat(seen[name], dim=1)[0].double().square().sum(dim=0).sqrt().numpy()
            scores = np.abs(model.get_submodule(name).weight.detach().double().numpy()) * norms
            above += (scores > 5 * scores.mean()).sum()
        shares.append(above / (len(names) * WIDTH**2))
    scaled = (np.array(shares) - min(shares)) / (max(shares) - min(shares)) * 2 * spread
    expected = ratio + scaled.mean() - scaled
    assert len({*expected}) > 1
    for name, found in ratios.items():
        assert found == pytest.approx(expected[int(name.split(".")[1])], abs=1e-9)


def test_a_layer_that_sees_nothing_keeps_the_ratio_asked_for():
    model = Stack(1.0, 0.1)
    data = [torch.zeros(1, 4, WIDTH)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
    assert allocated(model, data=data) == dict.fromkeys(survey(model).targets, 0.5)


@pytest.mark.parametrize("how", MEASURED)
def test_the_model_is_as_it_was(how):
    model = Stack(1.0, 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    allocated(model, how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.layers[1].register_forward_hook(lambda *_: torch.full((1, 40, WIDTH), math.nan))
    with pytest.raises(nncf.ValidationError, match="not finite"):
        allocated(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", [CompressMode.SPARSE_MAGNITUDE, CompressMode.SPARSE_WANDA, CompressMode.SPARSE_ADMM])
def test_compression_keeps_to_the_allocation(tiny_llama, mode):
    ids = torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(3))
    data = nncf.Dataset([{"input_ids": row[None]} for row in ids])
    models = {}
    for how in ("uniform", "sensitivity"):
        options = AdvancedSparseWeightsParameters(allocation=how)
        models[how] = nncf_ext.compress(tiny_llama(), mode, ratio=0.5, dataset=data, advanced_parameters=options)
    weights = {how: nncf_ext.compression_report(model).weights for how, model in models.items()}
    found = {how: [each.sparsity for each in own if each.mode] for how, own in weights.items()}
    sizes = [math.prod(each.shape) for each in weights["uniform"] if each.mode]
    assert max(found["uniform"]) - min(found["uniform"]) < 0.01 < max(found["sensitivity"]) - min(found["sensitivity"])
    for each in found.values():  # a row has a whole number of zeros
        assert np.average(each, weights=sizes) == pytest.approx(0.5, abs=1 / 128)


def test_an_interrupted_run_keeps_its_allocation(tiny_llama, tmp_path, monkeypatch):
    """Resumed with a model of which the first block is compressed: measured anew, the ratios would be others."""
    ids = torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(3))

    def run(model, resume):
        return nncf_ext.compress(
            model,
            CompressMode.SPARSE_WANDA,
            ratio=0.5,
            dataset=nncf.Dataset([{"input_ids": row[None]} for row in ids]),
            resume=resume,
            advanced_parameters=AdvancedSparseWeightsParameters(allocation=SparsityAllocation.SENSITIVITY),
        )

    expected = run(tiny_llama(), None)
    from nncf_ext.algorithms.sparse_weights.units import FinishedUnits

    store = FinishedUnits.store

    def once(self, *arguments):
        store(self, *arguments)
        raise KeyboardInterrupt

    model = tiny_llama()
    with monkeypatch.context() as patch:
        patch.setattr(FinishedUnits, "store", once)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "journal")
    found = run(model, tmp_path / "journal")
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"allocation": "sensitivity", "pattern": "2:4"}, nncf.ValidationError, "same zeros"),
        ({"allocation": "sensitivity", "allocation_spread": 1.5}, nncf.ValidationError, "allocation_spread"),
        ({"allocation": "guess"}, nncf.ParameterNotSupportedError, "UNIFORM"),
    ],
)
def test_what_cannot_be_is_refused(tiny_llama, options, error, match):
    parameters = AdvancedSparseWeightsParameters(**options)
    data = nncf.Dataset([{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}])
    with pytest.raises(error, match=match):
        nncf_ext.compress(
            tiny_llama(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=data, advanced_parameters=parameters
        )


def test_what_is_measured_needs_data(tiny_llama):
    parameters = AdvancedSparseWeightsParameters(allocation=SparsityAllocation.SENSITIVITY)
    with pytest.raises(nncf.ValidationError, match="allocation by sensitivity"):
        nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_MAGNITUDE, ratio=0.5, advanced_parameters=parameters)
