"""Super-networks: points, what they compute, cost and become; published numbers; bad input."""

import copy
import json

import nncf
import pytest
import torch
from torch import Tensor, nn

import nncf_ext
from nncf_ext import ElasticMode, ShrinkingStage, UnitImportance
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters, kernel_list, width_list
from nncf_ext.algorithms.bootstrap_nas.shrinking import stage_space
from tests.networks import SMALL, Basic, Bottleneck, DenseNet, MobileNetV2, ResNet, network, vgg_11
from tests.structure_models import make, tokens

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ALL = ElasticMode.WIDTH | ElasticMode.DEPTH | ElasticMode.KERNEL
FINE = AdvancedBootstrapNasParameters(min_width=2, width_step=3)


def supernet(name: str, mode: ElasticMode = ALL, model: nn.Module | None = None):
    model = network(name) if model is None else model
    return nncf_ext.make_elastic(model, mode, example_input=IMAGES[:1], advanced_parameters=FINE)


def points(net, count: int = 3):
    return [net.minimal(), *(net.random(5, step) for step in range(count))]


# Lists of sizes


@pytest.mark.parametrize(
    ("width", "rules", "widths"),
    [
        (32, {}, [32]),
        (16, {}, [16]),
        (64, {}, [64, 32]),
        (144, {}, [144, 112, 80, 48]),
        (64, {"width_multipliers": [0.25, 0.5, 0.125], "min_width": 8}, [64, 32, 16, 8]),
        (64, {"width_step": 16, "max_num_widths": 3}, [64, 48, 32]),
        (32, {"min_width": 16}, [32]),
        (32, {"min_width": 16, "width_step": 16}, [32, 16]),
        (100, {"width_multipliers": [0.5, 1.0], "multiple": 16}, [100, 48]),
    ],
)
def test_published_width_lists(width, rules, widths) -> None:
    # A step of 32 from 32 gives nothing above 16: [32] is what the published rules say, too.
    assert width_list(width, AdvancedBootstrapNasParameters(**rules)) == widths


@pytest.mark.parametrize(
    ("kernel", "padding", "kernels"), [(3, 1, [3]), (5, 2, [5, 3]), (7, 3, [7, 5, 3]), (7, 1, [7, 5]), (5, 0, [5])]
)
def test_published_kernel_lists(kernel, padding, kernels) -> None:
    assert kernel_list(kernel, padding, AdvancedBootstrapNasParameters()) == kernels


@pytest.mark.slow
def test_published_multiplications_of_resnet_50() -> None:
    """The numbers of NNCF's own tests for 10 classes and images of 32 x 32: whole, and with parts at their smallest."""
    model = ResNet(Bottleneck, [3, 4, 6, 3]).eval()
    net = nncf_ext.make_elastic(model, ALL, example_input=torch.rand(1, 3, 32, 32))
    point, found = net.maximal(), []
    one_block = {"conv1.kernel": 3}, {"layer1.depth": 2}
    widths = {name: size for name, size in net.minimal().items() if not name.endswith((".kernel", ".depth"))}
    for change in ({}, *one_block, widths):
        point |= change
        weights = sum(each.weight.numel() for each in net.extract(point).modules() if is_layer(each))
        found.append((2 * net.macs(point), weights))
    assert found == [(166862848, 23475392), (162930688, 23467712), (154017792, 23398080), (5679744, 174240)]
    # The numbers of sizes, as its search had them.
    sizes = sorted(len(net.space.dimensions[name]) - 1 for name in widths)
    assert sizes == sorted([7, 15, 31, 63, *[1] * 7, *[3] * 8, *[7] * 12, *[15] * 6])
    # Its blocks in four chains, of which the last ones may go.
    chains = [name for name in net.space.dimensions if name.endswith(".depth")]
    blocks = [path for name in chains for path in net.dimensions[name].replacements[1]]
    assert len(blocks) == 12
    for depth, wanted, count in ((1, [1, 4, 9, 11], 16), (2, [0, 1, 3, 4, 8, 9, 10, 11], 81)):
        space = stage_space(net, ShrinkingStage(ElasticMode.DEPTH, depth=depth))
        least = space.minimal()
        gone = {path for name in chains for path in net.dimensions[name].replaced(range(least[name]))}
        assert ([number for number, path in enumerate(blocks) if path in gone], space.size) == (wanted, count)


def test_published_depths_of_resnet_18() -> None:
    net = nncf_ext.make_elastic(ResNet(Basic, [2, 2, 2, 2], width=4), ElasticMode.DEPTH, example_input=IMAGES[:1])
    sizes = {f"layer{number}.depth": [3, 2, 1] if number == 1 else [2, 1] for number in range(1, 5)}
    assert net.space.to_dict() == sizes
    assert stage_space(net, ShrinkingStage(ElasticMode.DEPTH, depth=1)).size == 16


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "kernels"), [(3, []), (7, [2] * 8)])
def test_published_sizes_of_vgg_11(kernel, kernels) -> None:
    mode = ElasticMode.WIDTH | ElasticMode.KERNEL
    net = nncf_ext.make_elastic(vgg_11(kernel), mode, example_input=IMAGES[:1])
    assert [len(sizes) - 1 for sizes in net.space.dimensions.values()] == [1, 3, 7, 7, 15, 15, 15, 15, *kernels]


@pytest.mark.slow
def test_published_multiplications_of_densenet_121() -> None:
    net = nncf_ext.make_elastic(DenseNet([6, 12, 24, 16]), ElasticMode.WIDTH, example_input=torch.rand(1, 3, 32, 32))
    found = []
    for point in (net.maximal(), net.minimal()):
        weights = sum(each.weight.numel() for each in net.extract(point).modules() if is_layer(each))
        found.append((2 * net.macs(point), weights))
    assert found == [(1776701440, 6872768), (358165120, 1134752)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "classes", "published"),
    [
        (32, 10, [(12249856, 2202560), (10750720, 2180336), (1717376, 35728)]),
        (224, 1000, [(601548544, 3469760), (528090880, 3447536), (84184064, 67408)]),
    ],
)
def test_published_multiplications_of_mobilenet_v2(side, classes, published) -> None:
    net = nncf_ext.make_elastic(
        MobileNetV2(classes=classes).eval(),
        ElasticMode.WIDTH | ElasticMode.DEPTH,
        example_input=torch.rand(1, 3, side, side),
    )
    point, found = net.maximal(), []
    widths = {name: size for name, size in net.minimal().items() if not name.endswith(".depth")}
    # Published were the blocks features.3 and features.5; features.5 is the first of its two, so here both ways: each
    # block of the same shape costs the same.
    for change in ({}, {"features.3.depth": 1, "features.5.depth": 2}, widths):
        point |= change
        weights = sum(each.weight.numel() for each in net.extract(point).modules() if is_layer(each))
        found.append((2 * net.macs(point), weights))
    assert found == published


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


# What points compute


@pytest.mark.parametrize("name", SMALL)
def test_a_sub_network_is_its_extraction(name) -> None:
    model = network(name)
    before, modules = model(IMAGES), dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    net = supernet(name, model=model)
    assert torch.equal(model(IMAGES), before)
    for point in points(net):
        net.activate(point)
        small = net.extract(point)
        active = model(IMAGES)
        # Linear layers with slices may be computed in another order of sums.
        torch.testing.assert_close(small(IMAGES), active, rtol=1e-5, atol=1e-5)
        assert net.parameter_count(point) == sum(each.numel() for each in small.parameters())
        assert net.weight_bytes(point) == 4 * net.parameter_count(point)
        assert counted_macs(small, IMAGES[:1]) == net.macs(point)
        assert not any("nncf_ext" in type(each).__module__ for each in small.modules() if each not in stand_ins(small))
    net.activate(net.maximal())
    assert torch.equal(model(IMAGES), before)
    net.activate(net.minimal())
    net.release()
    assert torch.equal(model(IMAGES), before) and dict(model.named_modules()) == modules
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(not each._forward_hooks and not each._forward_pre_hooks for each in model.modules())


def stand_ins(model: nn.Module) -> set[nn.Module]:
    return {each for each in model.modules() if type(each).__name__.startswith("SkippedBlock")}


def counted_macs(model: nn.Module, images: Tensor) -> int:
    """Multiplications with weights, by hooks on the layers that there are."""
    total = 0

    def count(module, _inputs, output) -> None:
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):
            total += module.weight.numel() * output.numel() // output.shape[1] // module.kernel_size[0] ** 2
        else:
            positions = output.numel() // output.shape[1 if isinstance(module, nn.Conv2d) else -1]
            total += module.weight.numel() * positions

    kinds = nn.Conv2d | nn.Linear | nn.ConvTranspose2d
    hooks = [each.register_forward_hook(count) for each in model.modules() if isinstance(each, kinds)]
    model(images)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", ["basic", "mobilenet_v2"])
def test_convolutions_agree_bit_for_bit(name) -> None:
    model = network(name)
    net = supernet(name, model=model)
    # The last layer is the only one that reads a slice without copying it.
    features: list[Tensor] = []
    last = [each for each in model.modules() if isinstance(each, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0].detach()))
    for point in points(net, 2):
        net.activate(point)
        model(IMAGES)
        net.extract(point)(IMAGES)
        assert torch.equal(features[-1], features[-2])


def test_also_after_training_with_batch_norm() -> None:
    model = network("basic").train()
    net = supernet("basic", model=model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    whole = copy.deepcopy(model.state_dict())
    for step in range(4):
        net.activate(net.random(0, step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), torch.tensor([1, 2])).backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(whole["bn1.running_mean"], model.bn1.running_mean)
    for point in points(net):
        net.activate(point)
        torch.testing.assert_close(net.extract(point)(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_what_is_not_active_gets_no_gradient() -> None:
    model = network("basic")
    net = supernet("basic", model=model)
    net.activate({**net.maximal(), "conv1": 2, "layer1.depth": 2})
    model(IMAGES).sum().backward()
    assert model.conv1.weight.grad[2:].abs().max() == 0 < model.conv1.weight.grad[:2].abs().min()
    assert model.layer1[1].conv1.weight.grad is None and model.layer1[0].conv1.weight.grad[:, 2:].abs().max() == 0


def test_a_skipped_block_is_not_there() -> None:
    model = network("basic")
    net = supernet("basic", model=model)
    net.activate({**net.maximal(), "layer1.depth": 2, "layer2.depth": 1})
    by_hand = model.maxpool(model.relu(model.bn1(model.conv1(IMAGES))))
    by_hand = model.layer2[0](model.layer1[0](by_hand))
    assert torch.equal(model(IMAGES), model.fc(torch.flatten(model.avgpool(by_hand), 1)))


def test_a_smaller_kernel_is_the_centre_times_a_matrix() -> None:
    model = network("convnext")
    net = supernet("convnext", ElasticMode.KERNEL, model)
    convolution = model.blocks[0].depthwise
    matrix = torch.randn(25, 25)
    convolution.elastic_kernel.to_5.data.copy_(matrix)
    for size, padding in ((5, 2), (3, 1)):
        net.activate({**net.maximal(), "blocks.0.depthwise.kernel": size})
        weight = convolution.weight[:, :, 1:-1, 1:-1].reshape(8, 1, 25) @ matrix.T
        weight = weight.view(8, 1, 5, 5)
        weight = weight if size == 5 else weight[:, :, 1:-1, 1:-1]
        x = torch.rand(1, 8, 6, 6)
        wanted = nn.functional.conv2d(x, weight, convolution.bias, padding=padding, groups=8)
        torch.testing.assert_close(convolution(x), wanted)
        small = net.extract(net.active).blocks[0].depthwise
        assert small.kernel_size == (size, size) and small.padding == (padding, padding)
        torch.testing.assert_close(small(x), wanted)
    assert convolution.padding == (3, 3) and "weight" not in convolution.__dict__
    net.release()
    assert not hasattr(convolution, "elastic_kernel") and sorted(model.state_dict()) == sorted(
        network("convnext").state_dict()
    )


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3", "gpt_neox"])
def test_language_models(name) -> None:
    model = make(name)
    ids = tokens(2, 5)
    before = model(input_ids=ids).logits
    net = nncf_ext.make_elastic(
        model,
        ElasticMode.WIDTH | ElasticMode.DEPTH,
        example_input={"input_ids": ids[:1]},
        advanced_parameters=AdvancedBootstrapNasParameters(min_width=4, width_step=4),
    )
    assert "layers.0.attention" in net.space.dimensions and "layers.3.mlp" in net.space.dimensions
    for point in points(net, 2):
        net.activate(point)
        small = net.extract(point)
        torch.testing.assert_close(small(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert sum(each.numel() for each in small.parameters()) == net.parameter_count(point)
    assert len(small.get_submodule(net.dimensions.blocks)) < 4 or point == net.maximal()
    net.activate(net.maximal())
    assert torch.equal(model(input_ids=ids).logits, before)


# Order


@pytest.mark.parametrize("importance", list(UnitImportance))
@pytest.mark.parametrize("name", SMALL)
def test_reorganizing_keeps_the_function(name, importance) -> None:
    model = network(name).double()
    images = IMAGES.double()
    parameters = list(model.parameters())
    net = nncf_ext.make_elastic(model, ElasticMode.WIDTH, example_input=images[:1], advanced_parameters=FINE)
    model(images).square().sum().backward()
    before = model(images).detach()
    net.reorganize(importance)
    torch.testing.assert_close(model(images), before, rtol=1e-10, atol=1e-10)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    state = copy.deepcopy(model.state_dict())
    net.reorganize(importance)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_importance_by_hand_falls_and_momenta_move_along() -> None:
    model = network("basic")
    net = supernet("basic", model=model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    convolution = model.layer1[0].conv1
    rows = convolution.weight.detach().clone()
    momentum = optimizer.state[convolution.weight]["momentum_buffer"].clone()
    norms = rows.abs().flatten(1).sum(1)
    net.reorganize(optimizer=optimizer)
    order = norms.argsort(descending=True)
    assert torch.equal(convolution.weight.abs().flatten(1).sum(1).argsort(descending=True), torch.arange(8))
    # Its inputs, the channels of the stem, have moved as well; sums over them have not.
    torch.testing.assert_close(convolution.weight.flatten(1).sum(1), rows[order].flatten(1).sum(1))
    moved = optimizer.state[convolution.weight]["momentum_buffer"]
    torch.testing.assert_close(moved.flatten(1).sum(1), momentum[order].flatten(1).sum(1))


# Batch norms


def test_statistics_do_not_reach_other_points() -> None:
    model = network("basic")
    net = supernet("basic", model=model)
    data = [torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    before = copy.deepcopy(model.state_dict())

    def judge(point) -> Tensor:
        net.activate(point)
        with nncf_ext.adapted_batch_norm(model, data):
            small = net.extract(point)
            result = model(IMAGES)
            torch.testing.assert_close(small(IMAGES), result, rtol=1e-5, atol=1e-5)
        return result

    order = points(net)
    first = [judge(point) for point in order]
    second = [judge(point) for point in reversed(order)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    net.activate(net.maximal())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.bn1.momentum == 0.1 and not model.bn1.training


def test_statistics_by_hand() -> None:
    model = network("basic")
    data = [torch.rand(4, 3, 32, 32), 2 * torch.rand(4, 3, 32, 32)]
    assert nncf_ext.adapt_batch_norm(model, nncf.Dataset(data)) == 2
    means = torch.stack([model.conv1(each).mean((0, 2, 3)) for each in data])
    torch.testing.assert_close(model.bn1.running_mean, means.mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(nncf.ValidationError, match="data are empty"):
        nncf_ext.adapt_batch_norm(model, [])


# States, and what is refused


def test_state() -> None:
    net = supernet("basic")
    net.activate(net.random(1))
    state = json.loads(json.dumps(net.state_dict()))
    other = supernet("basic")
    other.load_state_dict(state)
    assert other.active == net.active and torch.equal(other.model(IMAGES), net.model(IMAGES))
    with pytest.raises(nncf.ValidationError, match="of another network: its space"):
        supernet("dense").load_state_dict(state)


def test_ignored_scope_and_widths_by_hand() -> None:
    scope = nncf.IgnoredScope(patterns=[r"layer2\..*"], types=["Linear"])
    net = nncf_ext.make_elastic(
        network("basic"),
        ALL,
        example_input=IMAGES[:1],
        ignored_scope=scope,
        advanced_parameters=AdvancedBootstrapNasParameters(widths={"layer1.0.conv1": [8, 5, 1]}),
    )
    assert net.space.to_dict() == {"layer1.0.conv1": [8, 5, 1], "conv1.kernel": [7, 5, 3], "layer1.depth": [3, 2, 1]}
    assert net.refused["layer2.0.conv1"] == "layer2.0.conv1 is in the ignored scope"
    assert net.refused["layer1.1.conv1"] == "there is one size to choose from"


class Hard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # what a forward does with other data is not seen
            return self.two(self.one(x).view(-1, 64))
        return self.two(self.one(x).view(-1, 64)) * 0


def test_bad_input() -> None:
    model = network("basic")
    with pytest.raises(nncf.ValidationError, match="give example_input=, what ResNet is called with"):
        nncf_ext.make_elastic(model, ALL)
    with pytest.raises(nncf.ParameterNotSupportedError, match="Unknown mode 'width'"):
        nncf_ext.make_elastic(model, "width", example_input=IMAGES)  # type: ignore[arg-type]
    with pytest.raises(nncf.ValidationError, match="does not run with the example input"):
        nncf_ext.make_elastic(model, ALL, example_input=torch.rand(1, 4))
    with pytest.raises(nncf.UnsupportedModelError, match="Nothing of Hard can be elastic.*asks for the whole size"):
        nncf_ext.make_elastic(Hard().eval(), ElasticMode.WIDTH, example_input=torch.ones(1, 4))
    with pytest.raises(nncf.ValidationError, match="match no layer"):
        scope = nncf.IgnoredScope(names=["layer9"])
        nncf_ext.make_elastic(model, ALL, example_input=IMAGES, ignored_scope=scope)
    for wrong in ({"conv1": [8, 9]}, {"conv1": [4]}, {"nowhere": [4]}):
        with pytest.raises(nncf.ValidationError, match="widths"):
            advanced = AdvancedBootstrapNasParameters(widths=wrong)
            nncf_ext.make_elastic(model, ALL, example_input=IMAGES, advanced_parameters=advanced)
    for rules in ({"min_width": 0}, {"width_multipliers": [2.0]}, {"width_multipliers": []}):
        with pytest.raises(nncf.ValidationError):
            AdvancedBootstrapNasParameters(**rules)
    net = supernet("basic")
    with pytest.raises(nncf.ValidationError, match="Asked for conv1 = 7"):
        net.activate({**net.maximal(), "conv1": 7})
    assert net.active == net.maximal()
    with pytest.raises(nncf.ValidationError, match="no parameter has one"):
        net.reorganize(UnitImportance.FIRST_ORDER)


def test_copies_are_apart() -> None:
    net = supernet("basic")
    net.activate(net.minimal())
    twin = copy.deepcopy(net.model)
    small = twin(IMAGES)
    net.activate(net.maximal())
    assert torch.equal(twin(IMAGES), small) and not torch.equal(net.model(IMAGES), small)


# What makes no difference


@pytest.mark.parametrize("name", ["basic", "convnext", "llama"])
def test_dimensions_of_blocks_that_are_left_out_are_inactive(name: str) -> None:
    if name == "llama":
        model, example = make("llama"), {"input_ids": tokens()}
        mode = ElasticMode.WIDTH | ElasticMode.DEPTH
        net = nncf_ext.make_elastic(model, mode, example_input=example, advanced_parameters=FINE)
    else:
        model, example = network(name), IMAGES[:1]
        net = supernet(name, model=model)
    changed = 0

    def output() -> Tensor:
        found = model(**example) if isinstance(example, dict) else model(example)
        return found if isinstance(found, Tensor) else found.logits

    for step in range(12):
        point = net.random(7, step)
        canonical = net.space.canonical(point)
        others = {key: net.random(8, step)[key] for key in point if canonical[key] != point[key]}
        changed += bool(others)
        with torch.no_grad():
            net.activate(canonical)
            expected = output()
            for same in (point, {**point, **others}):
                assert net.space.canonical(same) == canonical
                net.activate(same)
                assert torch.equal(output(), expected)
                assert net.macs(same) == net.macs(canonical)
                assert net.parameter_count(same) == net.parameter_count(canonical)
    assert changed > 3
    assert net.space.canonical(net.maximal()) == net.maximal()
