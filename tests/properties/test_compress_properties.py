"""
One table of methods and tiny models; every row must have every property. A new method is a new row.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import nncf
import nncf.torch
import pytest
import torch
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.algorithms.sparse_weights.algorithm import MODES


class Mlp(nn.Module):
    """Three linear layers of awkward sizes, no repeated blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 37), nn.Linear(37, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width)

    def forward(self, hidden, scale):
        return (hidden + scale * self.down(torch.tanh(self.up(hidden))),)


class Blocks(nn.Module):
    """Repeated blocks that return tuples, between a convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(64) for _ in range(3))
        self.classifier = nn.Linear(64, 7)

    def forward(self, x):
        hidden = self.stem(x).transpose(1, 2)
        scale = torch.full((1,), 0.7)
        for block in self.blocks:
            (hidden,) = block(hidden, scale=scale)
        return self.classifier(hidden.mean(dim=1))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def random_items(make: Callable[[torch.Generator], Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(9)
    return [make(generator) for _ in range(4)]


@dataclass(frozen=True)
class ModelKind:
    """
    :param make: Makes the model; weights follow torch's seed.
    :param items: Model inputs.
    :param some_layer: A layer that compression changes.
    """

    name: str
    make: Callable[[], nn.Module]
    items: list[Any]
    some_layer: str


MODELS = [
    ModelKind("mlp", Mlp, random_items(lambda g: torch.randn(6, 24, generator=g)), "second"),
    ModelKind("blocks", Blocks, random_items(lambda g: (torch.randn(2, 3, 9, generator=g),)), "blocks.1.up"),
    ModelKind(
        "llama",
        llama,
        random_items(lambda g: {"input_ids": torch.randint(0, 96, (2, 13), generator=g)}),
        "model.layers.1.mlp.down_proj",
    ),
]
GRID = {"quantization": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64}


@dataclass(frozen=True)
class Case:
    """
    :param advanced: Advanced parameters.
    :param ratio: Fraction of zeros.
    :param unit: By how much, in weights a row, the number of zeros of a layer may differ from the ratio.
    """

    mode: CompressMode
    model: ModelKind
    advanced: dict[str, Any] = field(default_factory=dict)
    ratio: float = 0.6
    unit: float = 1

    def __str__(self):
        return "-".join([self.model.name, self.mode.value, *(str(value) for value in self.advanced.values())])

    @property
    def needs_data(self) -> bool:
        return self.mode is not CompressMode.SPARSE_MAGNITUDE or "quantization" in self.advanced

    def fresh(self) -> nn.Module:
        torch.manual_seed(21)
        return self.model.make().eval()

    def compress(self, model: nn.Module, **changes: Any) -> nn.Module:
        settings = {"ratio": self.ratio, "dataset": nncf.Dataset(self.model.items), **changes}
        advanced = AdvancedSparseWeightsParameters(**self.advanced)
        return nncf_ext.compress(model, self.mode, advanced_parameters=advanced, **settings)

    def run(self, model: nn.Module) -> torch.Tensor:
        item = self.model.items[0]
        with torch.no_grad():
            if isinstance(item, dict):
                return model(**item).logits
            return model(*item) if isinstance(item, tuple) else model(item)


CASES = [
    *(Case(mode, model) for mode in MODES for model in MODELS),
    *(Case(mode, MODELS[1], {"pattern": "2:4"}, ratio=0.5) for mode in MODES),
    *(Case(mode, model, GRID, unit=float("inf")) for mode in MODES for model in MODELS[1:]),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(model: nn.Module) -> dict[str, Any]:
    return {row.name: row for row in nncf_ext.compression_report(model).weights}


@each_case
def test_shapes_are_kept(case):
    model = case.fresh()
    shapes = {name: row.shape for name, row in rows_of(model).items()}
    output = case.run(model)
    case.compress(model)
    assert {name: row.shape for name, row in rows_of(model).items()} == shapes
    assert case.run(model).shape == output.shape
    assert bool(case.run(model).isfinite().all())


@each_case
def test_ratio_is_reached_within_one_unit(case):
    rows = nncf_ext.compression_report(case.compress(case.fresh())).compressed
    assert rows
    for row in rows:
        surplus = row.sparsity - case.ratio
        assert -1 / row.shape[1] <= surplus <= case.unit / row.shape[1] + 1e-9, row.name


@each_case
def test_ignored_scope_is_respected(case):
    model = case.fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = case.model.some_layer
    case.compress(model, ignored_scope=nncf.IgnoredScope(names=[layer]))
    rows = rows_of(model)
    assert torch.equal(model.get_submodule(layer).weight, before[f"{layer}.weight"])
    assert rows[f"{layer}.weight"].note == "ignored scope"
    assert sum(row.mode is not None for row in rows.values()) >= 2


@each_case
def test_same_seed_gives_the_same_model(case):
    one, other = case.compress(case.fresh()).state_dict(), case.compress(case.fresh()).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@each_case
def test_saved_and_loaded_gives_the_same_output(case):
    model = case.compress(case.fresh())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(99)
    other = case.model.make().eval()
    if "quantization" in case.advanced:
        other = nncf_ext.load_compressed(other, nncf.torch.get_config(model), state)
    else:
        other.load_state_dict(state)
    assert torch.equal(case.run(other), case.run(model))


@each_case
def test_copy_leaves_the_input(case):
    model = case.fresh()
    before = copy.deepcopy(model.state_dict())
    other = case.compress(model, do_copy=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(case.run(other), case.run(model))


@pytest.mark.parametrize("case", [case for case in CASES if case.needs_data], ids=str)
def test_empty_dataset_is_an_error(case):
    model = case.fresh()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(nncf.ValidationError, match="dataset is empty"):
        case.compress(model, dataset=nncf.Dataset([]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@each_case
def test_resumed_from_a_finished_journal_gives_the_same_model(case, tmp_path):
    whole = case.compress(case.fresh(), resume=tmp_path / "journal").state_dict()
    again = case.compress(case.fresh(), resume=tmp_path / "journal").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
