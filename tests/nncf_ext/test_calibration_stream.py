"""Walking a model: what a block is given, how much is held, and models that are no simple chain."""

import gc
import weakref

import nncf
import pytest
import torch
from torch import nn

import nncf_ext
from nncf_ext import CompressMode
from nncf_ext.algorithms.sparse_weights.algorithm import MODES
from nncf_ext.calibration.chain import shared
from nncf_ext.calibration.statistics import InputStatistics, observe_inputs
from nncf_ext.calibration.stream import CalibrationStream, _merge_order, evaluation
from nncf_ext.structure.blocks import survey

WIDTH = 12


class Block(nn.Module):
    """Takes the hidden state and a mask, by position or by keyword, and returns a tensor or a tuple."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)
        self.as_tuple = as_tuple

    def forward(self, hidden, mask=None, *, bias=None):
        out = hidden + self.second(torch.tanh(self.first(hidden)))
        if mask is not None:
            out = out * mask
        if bias is not None:
            out = out + bias[0]
        return (None, out) if self.as_tuple else out


class Stack(nn.Module):
    """Blocks in a row with an embedding before and a linear layer after; `kind` says how they are called."""

    def __init__(self, kind="plain", blocks=3):
        super().__init__()
        torch.manual_seed(7)
        self.kind = kind
        self.embed = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList(Block(as_tuple=kind == "tuple") for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        hidden = self.embed(x)
        start = hidden
        for index, layer in enumerate(self.layers):
            if self.kind == "tuple":
                hidden = layer(mask=torch.ones(1), hidden=hidden)[1]
            elif self.kind == "own mask":  # every block gets another mask
                hidden = layer(hidden, torch.full((1,), 1.0 + index), bias=(x.mean(), None))
            elif self.kind == "skip":  # later blocks see an earlier block's output
                hidden = layer(hidden, None, bias=(start,))
                start = hidden if index == 0 else start
            elif self.kind == "twice":
                hidden = layer(layer(hidden))
            elif self.kind == "between":  # something happens between the blocks
                hidden = layer(hidden) * 0.5
            else:
                hidden = layer(hidden)
        return self.head(hidden)


def items(count=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3 + index, 4, generator=generator) for index in range(count)]


def inputs_of(model, name, samples):
    """Oracle: inputs of one layer in ordinary runs of the whole model."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for sample in samples:
            model(sample)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["plain", "tuple", "own mask", "skip", "twice", "between"])
def test_every_layer_sees_what_the_whole_model_would_give_it(kind):
    """Blocks are changed while walking, so this also says that inputs come from changed predecessors."""
    model, samples = Stack(kind), items()
    found = survey(model)
    visited = []
    with evaluation(model):
        for unit in CalibrationStream(model, samples, found.block_lists, found.targets).units():
            statistics = observe_inputs(unit, full=True)
            for name, layer in unit.layers.items():
                rows = torch.cat([value.reshape(-1, layer.in_features) for value in inputs_of(model, name, samples)])
                found_products = statistics[name].hessian * statistics[name].sequences / 2
                torch.testing.assert_close(found_products, rows.T @ rows, rtol=1e-4, atol=1e-4)
                visited.append(name)
            for layer in unit.layers.values():
                layer.weight.data *= 0.5
            unit.advance()
    assert visited == [f"layers.{block}.{name}" for block in range(3) for name in ("first", "second")]


@pytest.mark.parametrize(
    ("kind", "planning", "passes"), [("plain", 4, 1), ("own mask", 5, 1), ("skip", 4, 5), ("twice", 4, 5)]
)
def test_chains_run_each_block_alone(kind, planning, passes):
    """
    In a chain, the embedding before the blocks runs once per item (and for planning), not for every block. Where blocks
    differ in their masks, planning takes one forward more, for items of any length.
    """
    model, samples = Stack(kind, blocks=5), items()
    runs = []
    model.embed.register_forward_hook(lambda *_: runs.append(1))
    found = survey(model)
    with evaluation(model):
        for unit in CalibrationStream(model, samples, found.block_lists, found.targets).units():
            unit.run()
            unit.advance()
    assert len(runs) == planning + len(samples) * passes


@pytest.mark.parametrize(("kind", "whole"), [("plain", 1), ("own mask", 1), ("between", 1), ("twice", 4)])
def test_a_sample_is_run_no_further_than_to_the_last_layer(kind, whole):
    """Where each layer is called once; the first sample shows that, so it is run whole."""
    model, samples = Stack(kind), items()
    calls = []
    model.layers[1].second.register_forward_hook(lambda *_: calls.append(1))
    found = survey(model)
    with evaluation(model):
        for unit in CalibrationStream(model, samples, found.block_lists, found.targets).units():
            calls.clear()
            statistics = observe_inputs(unit, full=False)
            if "layers.1.second" in unit.layers:
                assert len(calls) == whole * (2 if kind == "twice" else 1)
                rows = sum(sample.shape[0] * sample.shape[1] for sample in samples)
                assert statistics["layers.1.second"].tokens == rows * (2 if kind == "twice" else 1)
            unit.advance()


def living_activations():
    """Numbers in all living tensors that look like a hidden state of the stack."""
    gc.collect()
    tensors = (value for value in gc.get_objects() if type(value) is torch.Tensor)
    return sum(value.numel() for value in tensors if value.dim() == 3 and value.shape[-1] == WIDTH)


@pytest.mark.slow
def test_activations_of_one_boundary_are_held():
    """At no block are there more living activations than at the first: they do not add up over the model."""
    model, samples = Stack("plain", blocks=6), items(8)
    found = survey(model)
    held = []
    with evaluation(model):
        for unit in CalibrationStream(model, samples, found.block_lists, found.targets).units():
            unit.run()
            unit.advance()
            held.append(living_activations())
    boundary = sum(sample.shape[0] * sample.shape[1] * WIDTH for sample in samples)
    assert held[0] == boundary
    assert max(held) == boundary


def test_planning_does_not_hold_what_layers_inside_blocks_read():
    model, samples = Stack("plain", blocks=5), items(2)
    read, alive = [], []
    for block in model.layers:
        block.second.register_forward_pre_hook(lambda module, args: read.append(weakref.ref(args[0])))
    model.head.register_forward_pre_hook(lambda *_: alive.append(sum(each() is not None for each in read)))
    found = survey(model)
    with evaluation(model):
        CalibrationStream(model, samples, found.block_lists, found.targets)
    assert alive
    assert not any(alive)


def test_orders_of_items_are_merged():
    order = []
    for seen, expected in [
        ("bdf", "bdf"),
        ("abcdef", "abcdef"),
        ("bxf", "abxcdef"),
        ("yzfw", "yzabxcdefw"),
        ("fb", "yzabxcdefw"),
    ]:
        _merge_order(order, seen)
        assert "".join(order) == expected


def test_orders_of_many_layers_are_merged_at_once():
    """By counting comparisons: names are compared with their neighbours by hash, not one by one with all others."""
    compared = []

    class Name(str):
        def __hash__(self):
            return super().__hash__()

        def __eq__(self, other):
            compared.append(other)
            return super().__eq__(other)

    order = []
    for _ in range(3):
        _merge_order(order, [Name(index) for index in range(300)])
    assert order == [str(index) for index in range(300)]
    assert len(compared) < 10 * 300


def test_equal_masks_are_held_once():
    mask, rope = torch.ones(4, 4), (torch.zeros(2), torch.arange(3))
    known = [mask, rope, None]
    assert shared(mask.clone(), known) is mask
    assert shared((torch.zeros(2), torch.arange(3) + 1), known)[0] is rope[0]
    other = torch.ones(4, 4, dtype=torch.bool)
    assert shared(other, known) is other
    assert shared("flag", known) == "flag"


def test_blocks_are_visited_in_order_across_two_lists():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.ModuleList(Block() for _ in range(3))  # registered first, run second
            self.encoder = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for block in self.encoder:
                x = block(x)
            for block in self.decoder:
                x = block(x, bias=(x.mean(),))
            return x

    torch.manual_seed(0)
    model, samples = Two(), [torch.randn(2, 3, WIDTH) for _ in range(2)]
    found = survey(model)
    names = []
    with evaluation(model):
        for unit in CalibrationStream(model, samples, found.block_lists, found.targets).units():
            statistics = observe_inputs(unit, full=False)
            for name in unit.layers:
                seen = inputs_of(model, name, samples)
                expected = sum(value.square().sum(dim=(0, 1)) for value in seen)
                torch.testing.assert_close(statistics[name]._products, expected)
            for layer in unit.layers.values():
                layer.weight.data *= 0.5
            unit.advance()
            names.append(unit.name)
    assert names == ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2"]


class Mlp(nn.Module):
    """No repeated blocks; two layers share an input, and one is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.last = nn.Linear(16, 8)
        self.left = nn.Linear(8, 16)
        self.right = nn.Linear(8, 16)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(torch.relu(self.left(x)) * self.right(x))


def test_model_without_blocks_is_walked_in_running_order_by_shared_input():
    model, samples = Mlp(), [torch.randn(5, 8) for _ in range(3)]
    found = survey(model)
    with evaluation(model):
        stream = CalibrationStream(model, samples, found.block_lists, found.targets)
        assert [list(unit.layers) for unit in stream.units()] == [["left", "right"], ["last"], ["unused"]]


@pytest.mark.parametrize("mode", MODES)
def test_model_without_blocks_is_compressed(mode):
    model, samples = Mlp(), [torch.randn(5, 8) for _ in range(3)]
    unused = model.unused.weight.detach().clone()
    nncf_ext.compress(model, mode, ratio=0.5, dataset=nncf.Dataset(samples))
    for name in ("left", "right", "last"):
        assert float((model.get_submodule(name).weight == 0).float().mean()) == 0.5, name
    if mode is not CompressMode.SPARSE_MAGNITUDE:
        assert torch.equal(model.unused.weight, unused)
        notes = {row.name: row.note for row in nncf_ext.compression_report(model).weights}
        assert notes["unused.weight"] == "saw no calibration token"


def test_second_layer_sees_the_pruned_first_in_a_model_without_blocks():
    model, samples = Mlp(), [torch.randn(50, 8) for _ in range(3)]
    oracle = Mlp()
    for names in (("left", "right"), ("last",)):
        squares = {}
        for name in names:
            seen = torch.cat(inputs_of(oracle, name, samples))
            squares[name] = seen.double().square().sum(dim=0)
        for name, square in squares.items():
            weight = oracle.get_submodule(name).weight.data
            order = torch.sort(weight.double().abs() * square.sqrt(), dim=1, stable=True).indices
            weight.scatter_(1, order[:, : weight.shape[1] // 2], 0.0)
    nncf_ext.compress(model, CompressMode.SPARSE_WANDA, ratio=0.5, dataset=nncf.Dataset(samples))
    for name in ("left", "right", "last"):
        assert torch.equal(model.get_submodule(name).weight, oracle.get_submodule(name).weight), name


def test_items_may_be_tensors_tuples_or_dictionaries():
    samples = items()
    results = []
    for wrapped in (samples, [(sample,) for sample in samples], [{"x": sample} for sample in samples]):
        model = nncf_ext.compress(Stack(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=nncf.Dataset(wrapped))
        results.append(model.state_dict())
    for other in results[1:]:
        assert all(torch.equal(value, results[0][name]) for name, value in other.items())


def test_transform_and_subset_are_respected():
    samples = items()
    rows = [{"text": sample, "label": 0} for sample in samples] + [None]  # the last would fail
    dataset = nncf.Dataset(rows, lambda row: row["text"])
    model = nncf_ext.compress(Stack(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=dataset, subset_size=4)
    other = nncf_ext.compress(Stack(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=nncf.Dataset(samples))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("in_features", [1, 255, 256, 257, 600])
def test_products_of_all_pairs_of_features(in_features):
    generator = torch.Generator().manual_seed(in_features)
    statistics, rows = InputStatistics(in_features, full=True), torch.randn(9, in_features, generator=generator)
    for part in rows.split(4):
        statistics.update(part)
    expected = 2 * rows.double().T @ rows.double() / 3
    torch.testing.assert_close(statistics.hessian.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(statistics.hessian, statistics.hessian.T)


@pytest.mark.parametrize("full", [False, True])
def test_statistics_merge_and_count(full):
    generator = torch.Generator().manual_seed(0)
    calls = [torch.randn(2, 5, 6, generator=generator), torch.randn(7, 6, generator=generator), torch.zeros(1, 0, 6)]
    whole, left, right = (InputStatistics(6, full) for _ in range(3))
    for call in calls:
        whole.update(call)
    left.update(calls[0])
    right.update(calls[1])
    left.merge(right)
    assert (whole.sequences, whole.tokens) == (4, 17)
    assert (left.sequences, left.tokens) == (3, 17)
    rows = torch.cat([call.reshape(-1, 6) for call in calls])
    torch.testing.assert_close(left.mean_square, rows.square().sum(dim=0) / 3)
    if full:
        torch.testing.assert_close(left.hessian, 2 * rows.T @ rows / 3)
    weight, other = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    expected = torch.linalg.norm(rows @ (weight - other).T) / torch.linalg.norm(rows @ weight.T)
    assert left.output_error(weight, other) == pytest.approx(float(expected), rel=1e-5)
    assert left.output_error(weight, weight) == 0.0
