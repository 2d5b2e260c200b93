"""Super-networks at their edges: unusual outputs, shared weights, broken-off runs, and what must not change."""

import copy
import dataclasses

import nncf
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nncf_ext
from nncf_ext import ElasticMode, ShrinkingStage, UnitImportance
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from nncf_ext.algorithms.bootstrap_nas.reorder import importance_order
from nncf_ext.structure.tracing.front import trace

FINE = AdvancedBootstrapNasParameters(min_width=2, width_step=2)
WIDTH, DEPTH, KERNEL = ElasticMode.WIDTH, ElasticMode.DEPTH, ElasticMode.KERNEL
ROWS = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def elastic(model: nn.Module, mode: ElasticMode, example: object):
    return nncf_ext.make_elastic(model.eval(), mode, example_input=example, advanced_parameters=FINE)


class Ends(nn.Module):
    """Two layers, and some end."""

    def __init__(self, end) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Linear(4, 8), nn.Linear(8, 6), end

    def forward(self, x: Tensor):
        return self.end(self.b(self.a(x).relu()))


@dataclasses.dataclass
class Out:
    logits: Tensor


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Slotted:
    __slots__ = ("logits", "__weakref__")

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Ring(Plain):
    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self.again = self


ENDS = {
    "argmax": lambda y: y.argmax(-1),
    "argmin of all": lambda y: y.argmin(),
    "max": lambda y: y.max(-1),
    "min": lambda y: y.min(-1, keepdim=True)[1],
    "sort": lambda y: y.sort(-1)[1],
    "dataclass": Out,
    "dataclass in a tuple": lambda y: (y.sum(), [Out(y)]),
    "object": Plain,
    "object in a tuple": lambda y: (y.sum(), {"end": Plain(y)}),
    "object in an object": lambda y: Plain([Plain(y)]),
    "object with slots": lambda y: [Slotted(y)],
    "object that holds itself": Ring,
}


@pytest.mark.parametrize("end", ENDS)
def test_classes_stay(end) -> None:
    net = elastic(Ends(ENDS[end]), WIDTH, ROWS)
    assert list(net.space.dimensions) == ["a"] and "b" in net.refused
    assert net.extract(net.minimal()).b.out_features == 6


class KeptCache(Plain):
    """What a model keeps for its next call."""


def test_a_cache_beside_the_output_shrinks_with_the_model() -> None:
    class Keeps(Ends):
        def forward(self, x: Tensor):
            hidden = self.a(x)
            return self.b(hidden), KeptCache(hidden)

    assert list(elastic(Keeps(None), WIDTH, ROWS).space.dimensions) == ["a"]


class Silent(Ends):
    """What a branch gives is multiplied by zero, so outputs say nothing about it."""

    def __init__(self, code) -> None:
        super().__init__(code)
        self.c, self.d = nn.Linear(4, 8), nn.Linear(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(x)) + 0 * self.d(self.end(self.a(x).relu()))


@pytest.mark.parametrize("frozen", [False, True])
def test_what_no_output_depends_on_is_judged_by_modules(frozen) -> None:
    torch.manual_seed(0)  # channels that give zero on all rows would hide a wrong answer
    model = Silent(lambda hidden: hidden.mean(1, keepdim=True)).requires_grad_(not frozen)
    assert list(elastic(model, WIDTH, ROWS).space.dimensions) == ["c", "a"]
    assert all(each.requires_grad is not frozen and each.grad is None for each in model.parameters())
    assert all(not each._forward_hooks for each in model.d.modules())
    # How many there are is a number in this code, not something that the forward sees.
    model = Silent(lambda hidden: hidden.sum(1, keepdim=True) / hidden.shape[1]).requires_grad_(not frozen)
    net = elastic(model, WIDTH, ROWS)
    assert list(net.space.dimensions) == ["c"]
    assert net.refused["a"] == "the model with a part of it differs from the model with the rest at zero"


def test_an_output_without_tensors_is_refused() -> None:
    with pytest.raises(nncf.UnsupportedModelError, match="gives no tensor"):
        elastic(Ends(lambda y: y.tolist()), WIDTH, ROWS)


# What making it elastic must not change


def residual(sizes: int = 4) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(sizes, 8), nn.BatchNorm1d(8), nn.Linear(8, sizes)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(self.drop(self.norm(self.one(x)).relu()))

    return nn.Sequential(
        nn.Linear(4, sizes), nn.Sequential(Block(), Block()), nn.BatchNorm1d(sizes), nn.Linear(sizes, 2)
    )


def test_a_model_in_training_mode_stays_as_it_is() -> None:
    model = residual().train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    # Batch norms refuse a batch of one row in training mode.
    net = nncf_ext.make_elastic(model, DEPTH, example_input=ROWS[:1])
    assert net.space.to_dict() == {"1.depth": [3, 2, 1]} and model[2].training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_state_and_input_stay_as_they_are() -> None:
    class Stateful(Ends):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.register_buffer("mean", torch.ones(8))
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor, seen: list) -> Tensor:
            x.sub_(0.5)
            hidden = self.a(x)
            seen.append(hidden)
            self.mean.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
            self.steps = self.steps + 1
            return self.b(hidden - self.mean)

    model, rows, seen = Stateful().eval(), ROWS.clone(), []
    state = copy.deepcopy(model.state_dict())
    assert list(trace(model, (rows, seen)).dimensions) == ["a"]
    assert torch.equal(rows, ROWS) and not seen
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_model_that_draws_is_refused() -> None:
    model = Ends(lambda y: y + torch.randn_like(y)).eval()
    random = torch.get_rng_state()
    with pytest.raises(nncf.UnsupportedModelError, match="gives other results each time"):
        trace(model, ROWS)
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0])
def test_what_is_found_does_not_depend_on_the_weights(scale) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(4, 6)
            self.gamma = nn.Parameter(torch.full((6,), scale))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.h(x) + self.gamma * self.b(y / y.shape[-1] ** 0.5)

    traced = trace(Scaled().eval(), ROWS)
    assert not traced.dimensions and "differs from the model" in traced.refused["a"]


# Batch norms


def normalized() -> nn.Module:
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    model = nn.Sequential(*layers)
    model.train()(IMAGES)
    return model.eval()


@pytest.mark.parametrize("data", [[], [IMAGES, IMAGES[:, :2]]], ids=["empty", "of a wrong shape"])
def test_statistics_survive_bad_data(data) -> None:
    model = normalized()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises((nncf.ValidationError, RuntimeError)):
        nncf_ext.adapt_batch_norm(model, data)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_statistics_of_what_is_not_active_stay() -> None:
    model = normalized()
    mean = model[1].running_mean.clone()
    net = elastic(model, WIDTH, IMAGES)
    net.activate({"0": 2})
    nncf_ext.adapt_batch_norm(model, [2 * IMAGES, IMAGES])
    assert torch.equal(model[1].running_mean[2:], mean[2:])
    wanted = (model[0](IMAGES)[:, :2].mean((0, 2, 3)) + model[0](2 * IMAGES)[:, :2].mean((0, 2, 3))) / 2
    torch.testing.assert_close(model[1].running_mean[:2], wanted)

    model = residual()
    model.train()(ROWS)
    state = copy.deepcopy(model[1][1].state_dict())
    net = elastic(model, DEPTH, ROWS)
    net.activate({"1.depth": 2})
    nncf_ext.adapt_batch_norm(model, [ROWS])
    assert all(torch.equal(state[name], value) for name, value in model[1][1].state_dict().items())


@pytest.mark.parametrize("count", [8, 40])
def test_batch_norms_without_weights(count) -> None:
    layers = nn.Conv2d(3, count, 1), nn.BatchNorm2d(count, affine=False), nn.ReLU(), nn.Conv2d(count, 2, 1)
    model = nn.Sequential(*layers)
    net = elastic(model, WIDTH, IMAGES)
    net.activate({"0": 2})
    small = net.extract({"0": 2})
    assert small[1].num_features == 2
    torch.testing.assert_close(small(IMAGES), model(IMAGES))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(4, 8, affine=False)])
def test_other_norms_without_weights_are_refused_by_name(norm) -> None:
    layers = nn.Conv1d(4, 8, 1), *([norm] if isinstance(norm, nn.GroupNorm) else [Turned(norm)]), nn.Conv1d(8, 2, 1)
    refused = trace(nn.Sequential(*layers).eval(), ROWS[..., None]).refused
    assert "has no weight that could be cut" in refused["0"]


class Turned(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


# Weights with several names


def test_parameters_that_share_their_numbers_move_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.o = nn.Linear(4, 8), nn.Linear(8, 2)
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.i(x)
            return self.o(x + self.a(x) + self.b(x.tanh()))

    model, rows = Shared().double(), ROWS.double()
    model.b.weight.data = model.a.weight.data
    net = elastic(model, WIDTH, rows)
    before = model(rows)
    before.sum().backward()
    moment = model.b.weight.grad.clone()
    order = importance_order(model, net.dimensions, UnitImportance.L1)["i"]
    net.reorganize()
    torch.testing.assert_close(model(rows), before)
    assert torch.equal(model.b.weight.grad, moment[order][:, order])
    net.activate(net.minimal())
    torch.testing.assert_close(net.extract(net.minimal())(rows), model(rows))


def test_costs_of_a_layer_that_blocks_share() -> None:
    class Block(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.up, self.down, self.shared = nn.Linear(8, 8), nn.Linear(8, 8), shared

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shared(self.down(self.up(x).relu()))

    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(Block(shared) for _ in range(3))), nn.Linear(8, 2))
    net = elastic(model, DEPTH, ROWS[:1])
    # 48 numbers at both ends, three times 64 in each block.
    assert [net.macs({"1.depth": depth}) for depth in (4, 3, 2, 1)] == [624, 432, 240, 48]


def test_kernels_with_several_names_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 5, padding=2), nn.ReLU(), nn.Conv2d(3, 3, 5, padding=2))
    model[2].weight = model[0].weight
    with pytest.raises(nncf.UnsupportedModelError, match="several names: 0.weight, 2.weight"):
        elastic(model, KERNEL, IMAGES)


# Importance


def by_hand(weight: Tensor, gradient: Tensor, importance: UnitImportance) -> Tensor:
    """Scores of rows."""
    if importance is UnitImportance.L1:
        return weight.abs().flatten(1).sum(1)
    if importance is UnitImportance.L2:
        return weight.square().flatten(1).sum(1).sqrt()
    return (weight * gradient).abs().flatten(1).sum(1)


@pytest.mark.parametrize("importance", list(UnitImportance))
@pytest.mark.parametrize("kind", ["Conv1D", "ConvTranspose2d"])
def test_what_writes_the_units_scores_them(kind, importance) -> None:
    torch.manual_seed(0)
    if kind == "Conv1D":
        model, example = nn.Sequential(nn.Linear(4, 6), Conv1D(8, 6), nn.GELU(), Conv1D(2, 8)), ROWS
    else:
        layers = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 2, 1)
        model, example = nn.Sequential(*layers), IMAGES
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    net = elastic(model, WIDTH, example)
    model(example).square().sum().backward()
    found = importance_order(model, net.dimensions, importance)["1"]
    weight, gradient = (each.transpose(0, 1) for each in (model[1].weight.detach(), model[1].weight.grad))
    scores = by_hand(weight, gradient, importance)
    assert found == scores.argsort(descending=True).tolist()
    assert [cut.tensor for cut in net.dimensions["1"].readers] == ["3.weight"]


# Hooks


@pytest.mark.parametrize("mode", [WIDTH, KERNEL, WIDTH | KERNEL])
def test_an_interrupted_forward_leaves_nothing_behind(mode) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    before = model.eval()(IMAGES)
    net = elastic(model, mode, IMAGES)
    for then in ("extract", "activate", "release"):
        net.activate(net.minimal())
        convolve, model[0]._conv_forward = model[0]._conv_forward, interrupt
        with pytest.raises(KeyboardInterrupt):
            model(IMAGES)
        model[0]._conv_forward = convolve
        if then == "extract":
            torch.testing.assert_close(net.extract(net.maximal())(IMAGES), before)
            torch.testing.assert_close(net.extract(net.minimal())(IMAGES), model(IMAGES))
        elif then == "activate":
            net.activate(net.maximal())
            assert torch.equal(model(IMAGES), before)
        else:
            net.release()
    assert torch.equal(model(IMAGES), before) and model[0].out_channels == 8 and "weight" not in model[0].__dict__


def interrupt(*_args: object) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", [WIDTH, KERNEL])
def test_one_super_network_a_model_as_long_as_it_is_not_released(mode) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    net = elastic(model, mode, IMAGES)
    with pytest.raises(nncf.ValidationError, match="already elastic: release"):
        elastic(model, mode, IMAGES)
    net.release()
    for use in (net.activate, net.extract):
        with pytest.raises(nncf.ValidationError, match="was released"):
            use(net.minimal())
    assert elastic(model, mode, IMAGES).space == net.space


@pytest.mark.parametrize("mode", [WIDTH, KERNEL])
def test_replicas_are_refused(mode) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    net = elastic(model, mode, IMAGES)
    net.activate(net.minimal())
    replica = model[0]._replicate_for_data_parallel()
    replica._parameters = dict(model[0]._parameters)
    replica._modules = {name: each._replicate_for_data_parallel() for name, each in model[0].named_children()}
    with pytest.raises(nncf.UnsupportedModelError, match="DistributedDataParallel"):
        replica(IMAGES)


def test_a_buffer_that_is_cut_on_two_axes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("mix", torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y + y @ self.mix)

    model = Mixed()
    net = elastic(model, WIDTH, ROWS)
    net.activate({"a": 4})
    torch.testing.assert_close(net.extract({"a": 4})(ROWS), model(ROWS))
    assert net.extract({"a": 4}).mix.shape == (4, 4)


# Schedules


def test_schedules_that_would_stop_in_the_middle_are_refused() -> None:
    net = elastic(normalized(), WIDTH, IMAGES)
    stages = [ShrinkingStage(WIDTH), ShrinkingStage(WIDTH, width=2, reorganize=True, adapt_batch_norm=True)]
    with pytest.raises(nncf.ValidationError, match="over after one pass"):
        nncf_ext.shrinking_schedule(net, stages, data=iter([IMAGES]))
    with pytest.raises(nncf.ValidationError, match="Give gradients="):
        nncf_ext.shrinking_schedule(net, stages, data=[IMAGES], importance=UnitImportance.FIRST_ORDER)


def test_first_order_importance_in_a_schedule() -> None:
    model = normalized()
    net, called = elastic(model, WIDTH, IMAGES), []

    def gradients() -> None:
        called.append(net.active == net.maximal())
        model(IMAGES).square().sum().backward()

    stages = [ShrinkingStage(WIDTH), ShrinkingStage(WIDTH, width=2, reorganize=True)]
    schedule = nncf_ext.shrinking_schedule(net, stages, importance=UnitImportance.FIRST_ORDER, gradients=gradients)
    weight = model[0].weight.detach().clone()
    model(IMAGES).square().sum().backward()
    gradient = model[0].weight.grad.clone()
    order = (weight * gradient).abs().flatten(1).sum(1).argsort(descending=True)
    for stage in schedule:
        if stage.number:
            assert called == [True] and model[0].weight.grad is None
            assert torch.equal(model[0].weight.detach(), weight[order])


def test_steps_left_go_on_after_an_interruption() -> None:
    net = elastic(normalized(), WIDTH, IMAGES)
    stages = [ShrinkingStage(WIDTH, epochs=2, width=2), ShrinkingStage(WIDTH, width=None)]
    schedule = nncf_ext.shrinking_schedule(net, stages)
    stage = next(iter(schedule))
    for _ in range(4):
        stage.next_point()
    again = nncf_ext.shrinking_schedule(net, stages)
    again.load_state_dict(schedule.state_dict())
    assert [stage.steps_left(3) for stage in again] == [2, 3]


def test_an_optimizer_with_other_state_is_refused() -> None:
    class Factored(torch.optim.Optimizer):
        """Keeps a number for each row, as Adafactor does."""

        def step(self, closure=None) -> None:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["row"] = parameter.detach().flatten(1).sum(1) if parameter.ndim > 1 else None

    model = normalized()
    net, optimizer = elastic(model, WIDTH, IMAGES), Factored(model.parameters(), {})
    optimizer.step()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(nncf.UnsupportedModelError, match="Factored keeps row of shape"):
        net.reorganize(optimizer=optimizer)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
