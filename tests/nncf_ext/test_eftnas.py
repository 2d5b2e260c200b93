"""EFTNAS: scores of weights along a training, the space that they make, and what does not fit."""

import copy
from typing import Any

import nncf
import pytest
import torch
import transformers
from torch import Tensor, nn

import nncf_ext
from nncf_ext import AdvancedBootstrapNasParameters, ElasticMode, FirstOrderImportance
from tests.networks import network
from tests.structure_models import make, tokens

HEADS, HEAD, HIDDEN, CHANNELS, LAYERS = 4, 8, 32, 40, 3
LAYER = "bert.encoder.layer.{}."
QUERY, KEY, VALUE, OUTPUT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
)


def classifier(labels: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=CHANNELS,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(count: int = 3, labels: int = 3) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, 96, (4, 7), generator=draw), "labels": torch.arange(4) % labels}
        for _ in range(count)
    ]


EXAMPLE = {"input_ids": tokens(1, 7)}
FINE = AdvancedBootstrapNasParameters(min_width=8, width_step=8)


def scored(model: Any, **settings: Any) -> FirstOrderImportance:
    """Importance after gradients drawn at random."""
    importance = FirstOrderImportance(model, EXAMPLE, **settings)
    draw = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    importance.add()
    return importance


# Scores


@pytest.mark.parametrize("movement", [False, True])
def test_along_a_training_scores_are_the_closed_form(movement) -> None:
    """With the loss sum w^2 / 2 the gradient is w, and SGD shrinks w by 1 - rate at each step."""
    model, rate, steps = classifier(), 0.1, 5
    before = copy.deepcopy(model)
    importance = FirstOrderImportance(model, EXAMPLE, movement=movement)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        sum(each.square().sum() for each in model.parameters()).div(2).backward()
        importance.add(rate)
        optimizer.step()
        optimizer.zero_grad()
    assert importance.steps == steps
    sign = -1 if movement else 1
    share = sign * rate * sum((1 - rate) ** (2 * step) for step in range(steps))
    for index in range(LAYERS):
        layer = before.get_submodule(LAYER.format(index)[:-1])
        rows = layer.intermediate.dense.weight.square().sum(1)
        torch.testing.assert_close(importance.scores()[f"layers.{index}.mlp"], share * rows, rtol=1e-4, atol=1e-6)
        heads = sum(layer.get_submodule(path).weight.square().reshape(HEADS, -1).sum(1) for path in (QUERY, KEY, VALUE))
        torch.testing.assert_close(
            importance.scores()[f"layers.{index}.attention"], share * heads, rtol=1e-4, atol=1e-6
        )


def naive_peaks(model: Any, index: int, block: int) -> tuple[list[float], list[float]]:
    """Of heads and channels of one layer, cell by cell, from weights and gradients."""
    layer = model.get_submodule(LAYER.format(index)[:-1])

    def score(path: str, kind: str = "weight") -> Tensor:
        parameter = getattr(layer.get_submodule(path), kind)
        return (parameter * parameter.grad).abs().detach()

    heads = []
    for head in range(HEADS):
        rows = range(head * HEAD, (head + 1) * HEAD)
        cells = []
        for path in (QUERY, KEY, VALUE, OUTPUT):
            matrix = score(path)[rows] if path != OUTPUT else score(path)[:, rows].T
            for top in range(0, HEAD, block):
                for left in range(0, HIDDEN, block):
                    cells.append(matrix[top : top + block, left : left + block].sum())
            if path != OUTPUT:
                cells.append(score(path, "bias")[rows].sum())
        heads.append(float(max(cells)))
    into, out, bias = score("intermediate.dense"), score("output.dense"), score("intermediate.dense", "bias")
    channels = [float(max(into[unit].sum(), out[:, unit].sum(), bias[unit])) for unit in range(CHANNELS)]
    return heads, channels


@pytest.mark.parametrize("block", [1, 3, 8, 32])
def test_peaks_are_the_highest_cells(block) -> None:
    model = classifier()
    peaks = scored(model, block=block).peaks()
    assert list(peaks) == [f"layers.{index}.{part}" for index in range(LAYERS) for part in ("attention", "mlp")]
    for index in range(LAYERS):
        heads, channels = naive_peaks(model, index, block)
        torch.testing.assert_close(peaks[f"layers.{index}.attention"], torch.tensor(heads))
        torch.testing.assert_close(peaks[f"layers.{index}.mlp"], torch.tensor(channels))


@pytest.mark.parametrize(
    ("tensor", "place", "dimension", "unit"),
    [
        (f"{QUERY}.weight", (9, 31), "attention", 1),
        (f"{KEY}.weight", (0, 0), "attention", 0),
        (f"{VALUE}.weight", (31, 5), "attention", 3),
        (f"{OUTPUT}.weight", (5, 17), "attention", 2),
        (f"{VALUE}.bias", (16,), "attention", 2),
        ("intermediate.dense.weight", (39, 0), "mlp", 39),
        ("intermediate.dense.bias", (7,), "mlp", 7),
        ("output.dense.weight", (31, 12), "mlp", 12),
    ],
)
def test_one_cell_keeps_its_unit(tensor, place, dimension, unit) -> None:
    """Whichever matrix it stands in: what a unit has of any of them is enough."""
    model = classifier()
    importance = FirstOrderImportance(model, EXAMPLE)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    model.get_parameter(LAYER.format(1) + tensor).grad[place] = 2.0
    importance.add()
    for name, peaks in importance.peaks().items():
        high = [unit] if name == f"layers.1.{dimension}" else []
        assert peaks.nonzero().flatten().tolist() == high and set(peaks.tolist()) <= {0.0, 2.0}


def test_what_is_not_used_scores_nothing_and_goes_first() -> None:
    model = classifier()
    useless = torch.arange(CHANNELS) % 2 == 0
    for index in range(LAYERS):
        layer = model.get_submodule(LAYER.format(index)[:-1])
        layer.output.dense.weight.data[:, useless] = 0
    importance = FirstOrderImportance(model, EXAMPLE)
    assert importance.add_dataset(batches()) == 3 and all(each.grad is None for each in model.parameters())
    for index in range(LAYERS):
        scores = importance.scores()[f"layers.{index}.mlp"]
        assert scores[useless].abs().max() == 0 and scores[~useless].min() > 0
    whole = importance.point(1.0)
    half = {name: CHANNELS // 2 if "mlp" in name else size for name, size in whole.items()}
    budget = importance.macs(half) / importance.macs(whole)
    assert importance.point(budget, multiple=1) == half
    widths = importance.widths([budget], multiple=1)
    net = nncf_ext.make_elastic(
        model,
        ElasticMode.WIDTH,
        example_input=EXAMPLE,
        advanced_parameters=AdvancedBootstrapNasParameters(widths=widths),
    )
    before = model(**batches()[0]).logits
    net.reorganize(importance.scores())
    net.activate(net.minimal())
    torch.testing.assert_close(model(**batches()[0]).logits, before, rtol=1e-4, atol=1e-5)


# The space


@pytest.mark.parametrize(("multiple", "discard"), [(1, 0.0), (8, 0.02), (3, 0.3)])
@pytest.mark.parametrize("budget", [1.0, 0.8, 0.5, 0.2, 0.01])
def test_the_point_of_a_budget_is_the_nearest_of_all_thresholds(budget, multiple, discard) -> None:
    model = classifier()
    importance = scored(model)
    peaks = importance.peaks()

    def sizes(threshold: float) -> dict[str, int]:
        found = {}
        for name, each in peaks.items():
            count, whole = sum(value > threshold for value in each.tolist()), len(each)
            step = 1 if whole == HEADS else multiple
            if count == whole:
                found[name] = whole
            elif count < discard * whole and not name.startswith("layers.0"):
                found[name] = 0
            else:
                found[name] = min(whole, step * max(1, round(count / step)))
        return found

    def macs(point: dict[str, int]) -> int:
        rows = sum(7 * 2 * HIDDEN * (2 * HEAD if "attention" in name else 1) * size for name, size in point.items())
        return rows + HIDDEN * HIDDEN + HIDDEN * 3  # pooler and head see one token

    points = [sizes(each) for each in [-1.0, *sorted(torch.cat([*peaks.values()]).tolist())]]
    target = budget * macs(points[0])
    found = importance.point(budget, multiple=multiple, discard=discard)
    assert importance.macs(found) == macs(found)
    assert abs(macs(found) - target) == min(abs(macs(each) - target) for each in points)
    assert found in points


def test_equal_scores_end_with_the_whole_or_the_least() -> None:
    model = classifier()
    importance = FirstOrderImportance(model, EXAMPLE)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    importance.add()
    assert importance.point(0.9) == {name: len(each) for name, each in importance.peaks().items()}
    assert importance.point(0.1)["layers.1.mlp"] == 0 and importance.point(0.1, discard=0.0)["layers.0.mlp"] == 8


def test_widths_are_the_union_over_budgets() -> None:
    importance = scored(classifier())
    budgets = (1.0, 0.7, 0.45, 0.2)
    points = [importance.point(each) for each in budgets]
    for larger, smaller in zip(points, points[1:], strict=False):
        assert all(larger[name] >= smaller[name] for name in larger)
    widths = importance.widths(budgets)
    for name, list_ in widths.items():
        granularity = HEAD if "attention" in name else 1
        assert list_ == sorted({point[name] * granularity for point in points}, reverse=True)
    more = importance.widths((*budgets, 0.6))
    assert all({*widths[name]} <= {*more[name]} for name in widths)


def test_branches_that_are_left_out() -> None:
    """A width of 0: the active network is the extracted one, and what it costs is counted."""
    model = classifier()
    widths = {
        "layers.1.attention": [32, 16, 0],
        "layers.1.mlp": [40, 0],
        "layers.2.mlp": [40, 8, 0],
        "layers.0.attention": [32, 8],
    }
    net = nncf_ext.make_elastic(
        model,
        ElasticMode.WIDTH,
        example_input=EXAMPLE,
        advanced_parameters=AdvancedBootstrapNasParameters(widths=widths),
    )
    batch = {"input_ids": tokens(3, 7)}
    before = model(**batch).logits
    counts = {"layers.1.mlp": 0, "layers.1.attention": 0}
    for point in (net.maximal() | {"layers.2.mlp": 0}, net.maximal() | counts, net.minimal(), net.random(3)):
        net.activate(point)
        small = net.extract(point)
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
        assert net.parameter_count(point) == sum(each.numel() for each in small.parameters())
        kept = {name: range(size) for name, size in point.items()}
        plan = nncf_ext.StructurePlan.dense(model)
        for name, units in kept.items():
            plan = plan.keep(name, list(units))
        net.activate(net.maximal())
        with nncf_ext.masked(model, plan):
            torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert len(net.extract(net.minimal()).bert.encoder.layer) == 2  # layer 1 has nothing left
    assert torch.equal(model(**batch).logits, before)


def test_importance_comes_first_and_the_function_stays() -> None:
    model = classifier().double()
    importance = scored(model)
    batch = {"input_ids": tokens(3, 7)}
    before = model(**batch).logits
    net = nncf_ext.make_elastic(model, ElasticMode.WIDTH, example_input=EXAMPLE, advanced_parameters=FINE)
    scores = importance.scores()
    for parameter in model.parameters():
        parameter.grad = None
    query = model.bert.encoder.layer[0].attention.self.query.weight.clone()
    net.reorganize(scores)
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-10)
    order = scores["layers.0.attention"].argsort(descending=True)
    moved = model.bert.encoder.layer[0].attention.self.query.weight
    assert torch.equal(moved.view(HEADS, HEAD, HIDDEN), query.view(HEADS, HEAD, HIDDEN)[order])


def test_the_whole_way_ends_at_a_plain_model() -> None:
    model = classifier()
    importance = FirstOrderImportance(model, EXAMPLE, movement=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    data = batches(6)
    for batch in data:
        model(**batch).loss.backward()
        importance.add()
        optimizer.step()
        optimizer.zero_grad()
    parameters = AdvancedBootstrapNasParameters(widths=importance.widths((1.0, 0.5, 0.25)))
    teacher = copy.deepcopy(model)
    net = nncf_ext.make_elastic(model, ElasticMode.WIDTH, example_input=EXAMPLE, advanced_parameters=parameters)
    net.reorganize(importance.scores())
    for step, batch in enumerate(data):
        ids = {"input_ids": batch["input_ids"]}
        nncf_ext.sandwich_step(
            net,
            nncf_ext.sandwich(net, 0, step),
            lambda ids=ids: model(**ids).logits,
            None,
            teacher=teacher(**ids).logits,
            distance=nncf_ext.eftnas_loss(batch["labels"]),
        )
        optimizer.step()
        optimizer.zero_grad()
    small = nncf_ext.extract(net, net.minimal())
    net.activate(net.minimal())
    torch.testing.assert_close(small(**EXAMPLE).logits, model(**EXAMPLE).logits, rtol=1e-4, atol=1e-5)
    assert net.macs(net.minimal()) == importance.macs(net.minimal()) < 0.3 * net.macs(net.maximal())


def test_any_architecture_with_a_record_has_a_space() -> None:
    model = make("llama")
    importance = FirstOrderImportance(model, {"input_ids": tokens(1, 5)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    importance.add()
    # A decoder's cache counts its layers: no branch is left out.
    assert min(min(each) for each in importance.widths((1.0, 0.05)).values()) > 0


# Losses


def test_the_loss_is_the_published_one() -> None:
    draw = torch.Generator().manual_seed(3)
    logits, teacher = torch.randn(5, 4, generator=draw, requires_grad=True), torch.randn(5, 4, generator=draw)
    labels = torch.tensor([0, 3, 1, 1, 2])
    own = -logits.log_softmax(1)[torch.arange(5), labels].mean()
    p, q = (teacher / 2).softmax(1), (logits / 2).log_softmax(1)
    divergence = (p * (p.log() - q)).sum(1).mean()
    wanted = torch.autograd.grad(0.1 * own + 0.9 * 4 * divergence, logits)[0]
    (found,) = torch.autograd.grad(nncf_ext.eftnas_loss(labels)(logits, teacher), logits)
    torch.testing.assert_close(found, wanted)


# Bad input


def test_architectures_without_a_record_are_refused() -> None:
    config = transformers.DistilBertConfig(vocab_size=96, dim=32, n_layers=1, n_heads=4, hidden_dim=40)
    model = transformers.DistilBertForSequenceClassification(config)
    with pytest.raises(nncf.UnsupportedModelError, match="'distilbert'.*Known: .*bert, roberta"):
        FirstOrderImportance(model, EXAMPLE)
    with pytest.raises(nncf.UnsupportedModelError, match="no record describes"):
        FirstOrderImportance(network("basic"), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("classes", "labels", "text"),
    [
        (3, [0, 3, 1, 1], r"labels are 0 to 3.* has 3 classes.*num_labels=4"),
        (3, [-1, 0, 1, 1], "labels are -1 to 2"),
        (3, [1, 1, 1, 1], r"one class.*\[1\]"),
        (1, [0, 1, 1, 0], "one class.*has 1 classes"),
    ],
)
def test_labels_that_do_not_match_are_refused_before_any_work(classes, labels, text) -> None:
    model = classifier(classes)
    importance = FirstOrderImportance(model, EXAMPLE)
    data = [*([] if classes == 1 or len({*labels}) == 1 else batches(1)), EXAMPLE | {"labels": torch.tensor(labels)}]
    with pytest.raises(nncf.ValidationError, match=text):
        importance.add_dataset(data)
    assert importance.steps == 0


def test_other_bad_input() -> None:
    model = classifier()
    importance = FirstOrderImportance(model, EXAMPLE)
    with pytest.raises(nncf.ValidationError, match="No gradient was added"):
        importance.widths()
    with pytest.raises(nncf.ValidationError, match="behind backward"):
        importance.add()
    with pytest.raises(nncf.ValidationError, match="gave no loss"):
        importance.add_dataset([EXAMPLE])
    with pytest.raises(nncf.ValidationError, match="data are empty"):
        importance.add_dataset([])
    with pytest.raises(nncf.ValidationError, match="over after one pass"):
        importance.add_dataset(iter(batches()))
    with pytest.raises(nncf.ValidationError, match="block is a number"):
        FirstOrderImportance(model, EXAMPLE, block=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.bert.encoder.layer[1].intermediate.dense.weight.grad = None
    with pytest.raises(nncf.ValidationError, match="1 of 30 .*layer.1.intermediate.dense.weight: .*Unfreeze"):
        importance.add()
    model.bert.encoder.layer[1].intermediate.dense.weight.grad = torch.ones(CHANNELS, HIDDEN)
    model.bert.encoder.layer[0].output.dense.weight.grad = torch.full((HIDDEN, CHANNELS), torch.nan)
    with pytest.raises(nncf.ValidationError, match="layer.0.output.dense.weight are not finite"):
        importance.add()
    importance = scored(model)
    for budgets, settings in (
        ((0.0,), {}),
        ((1.5,), {}),
        ((0.5,), {"multiple": 0}),
        ((0.5,), {"discard": 1.0}),
        ((), {}),
    ):
        with pytest.raises(nncf.ValidationError, match="budgets are shares"):
            importance.widths(budgets, **settings)
    net = nncf_ext.make_elastic(model, ElasticMode.WIDTH, example_input=EXAMPLE, advanced_parameters=FINE)
    with pytest.raises(nncf.ValidationError, match="scores of layers.0.mlp have shape"):
        net.reorganize({"layers.0.mlp": torch.ones(3)})
    with pytest.raises(nncf.ValidationError, match="not there"):
        net.reorganize({"layers.9.mlp": torch.ones(3)})
    with pytest.raises(nncf.ValidationError, match="nothing to learn from"):
        nncf_ext.sandwich_step(net, [net.maximal()], lambda: model(**EXAMPLE).logits, None)
    net.release()
    decoder = make("llama")
    with pytest.raises(nncf.ValidationError, match="must fall from 40"):
        nncf_ext.make_elastic(
            decoder,
            ElasticMode.WIDTH,
            example_input={"input_ids": tokens(1, 5)},
            advanced_parameters=AdvancedBootstrapNasParameters(widths={"layers.0.mlp": [40, 0]}),
        )


def test_data_of_nncf() -> None:
    model, data = classifier(), batches()
    one, other = FirstOrderImportance(model, EXAMPLE), FirstOrderImportance(model, EXAMPLE)
    one.add_dataset(nncf.Dataset(data))
    labels: list[Tensor] = [each["labels"] for each in data]
    inputs = [{"input_ids": each["input_ids"]} for each in data]
    turns = iter(labels)
    other.add_dataset(inputs, lambda output: nn.functional.cross_entropy(output.logits, next(turns)))
    for name, each in one.scores().items():
        torch.testing.assert_close(other.scores()[name], each)
