"""Training of super-networks: stages, what they draw, sandwiches; interrupted, in two processes, by a Trainer."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import nncf
import pytest
import torch
from torch import Tensor, nn

import nncf_ext
from nncf_ext import BOOTSTRAP_NAS_STAGES, ElasticMode, ShrinkingStage
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from nncf_ext.algorithms.bootstrap_nas.shrinking import stage_space
from tests.networks import network

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
ALL = ElasticMode.WIDTH | ElasticMode.DEPTH | ElasticMode.KERNEL
FINE = AdvancedBootstrapNasParameters(min_width=2, width_step=3)


def supernet(name: str = "basic"):
    return nncf_ext.make_elastic(network(name), ALL, example_input=IMAGES[:1], advanced_parameters=FINE)


def test_stages_by_hand() -> None:
    net = supernet()
    whole = {name: sizes[:1] for name, sizes in net.space.dimensions.items()}
    kernel = whole | {"conv1.kernel": (7, 5, 3)}
    one_block = kernel | {"layer1.depth": (3, 2), "layer2.depth": (2, 1)}
    two_blocks = one_block | {"layer1.depth": (3, 2, 1)}
    found = [stage_space(net, stage).dimensions for stage in BOOTSTRAP_NAS_STAGES]
    assert found[:4] == [kernel, one_block, two_blocks, two_blocks]
    assert found[4]["conv1"] == (8, 5) and found[4]["layer2.1.conv1"] == (16, 13)
    every = ShrinkingStage(ALL, depth=None, width=None)
    assert stage_space(net, every) == net.space


def loop(net, schedule, optimizer, stop: int | None = None) -> None:
    """Two steps a stage; stops after so many steps in all."""
    criterion, steps = nn.CrossEntropyLoss(), 0
    for stage in schedule:
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(0.25) or 0.01
        while stage.step < 2:
            if steps == stop:
                return
            stage.next_point()
            optimizer.zero_grad()
            criterion(net.model.train()(IMAGES), LABELS).backward()
            optimizer.step()
            steps += 1


STAGES = (
    ShrinkingStage(ElasticMode.KERNEL, learning_rate=0.02),
    ShrinkingStage(ElasticMode.KERNEL | ElasticMode.WIDTH, width=2, reorganize=True, adapt_batch_norm=True),
    ShrinkingStage(ALL, width=None, depth=None),
)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_an_interrupted_training_goes_on_to_the_same_end(stop) -> None:
    def start():
        net = supernet()
        optimizer = torch.optim.SGD(net.model.parameters(), 0.01, momentum=0.9)
        return net, optimizer, nncf_ext.shrinking_schedule(net, STAGES, seed=3, data=[IMAGES], optimizer=optimizer)

    net, optimizer, schedule = start()
    loop(net, schedule, optimizer)
    through = copy.deepcopy(net.model.state_dict())

    net, optimizer, schedule = start()
    loop(net, schedule, optimizer, stop)
    kept = copy.deepcopy((net.model.state_dict(), optimizer.state_dict(), json.dumps(schedule.state_dict())))

    net, optimizer, schedule = start()
    net.model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    schedule.load_state_dict(json.loads(kept[2]))
    loop(net, schedule, optimizer)
    assert all(torch.equal(through[name], value) for name, value in net.model.state_dict().items())
    with pytest.raises(nncf.ValidationError, match="another schedule: its seed"):
        nncf_ext.shrinking_schedule(net, STAGES, data=[IMAGES]).load_state_dict(json.loads(kept[2]))


DRAWS = """
import sys
import torch
sys.path.insert(0, {root!r})
from tests.nncf_ext.test_bootstrap_training import supernet
import nncf_ext
net = supernet()
stages = nncf_ext.shrinking_schedule(net, nncf_ext.BOOTSTRAP_NAS_STAGES[3:4], seed=7)
print([[stage.next_point() for _ in range(4)] for stage in stages])
print([nncf_ext.uniform_over_macs(net, 7, step) for step in range(4)], nncf_ext.sandwich(net, 7, 2, between=2))
"""


@pytest.mark.slow
def test_two_processes_draw_the_same() -> None:
    program = DRAWS.format(root=str(Path(__file__).parents[2]))
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={"PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    one, other = (run.communicate()[0] for run in runs)
    assert one == other and one.count("conv1.kernel") > 8


def test_a_sandwich_by_hand() -> None:
    net = supernet()
    model = net.model
    points = nncf_ext.sandwich(net, 1, 5)
    assert points[:2] == [net.maximal(), net.minimal()] and len(points) == 3
    total = nncf_ext.sandwich_step(
        net, points, lambda: model(IMAGES), lambda logits: nn.functional.cross_entropy(logits, LABELS)
    )
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    net.activate(points[0])
    logits = model(IMAGES)
    wanted = nn.functional.cross_entropy(logits, LABELS)
    target = logits.detach().softmax(1)
    for point in points[1:]:
        small = net.extract(point)(IMAGES)
        net.activate(point)
        far = -(target * model(IMAGES).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(-(target * small.log_softmax(1)).sum(1).mean(), far, rtol=1e-4, atol=1e-5)
        far.backward()
        wanted = wanted + far.detach()
    net.activate(points[0])
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    torch.testing.assert_close(total, wanted.detach())
    assert net.active == points[0]
    for name, each in model.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(found[name], each.grad, rtol=1e-4, atol=1e-6)


def test_a_teacher_teaches_all_points() -> None:
    net = supernet()
    teacher, seen = torch.randn(4, 10), []

    def distance(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return (logits - target).square().mean()

    nncf_ext.sandwich_step(
        net,
        nncf_ext.sandwich(net, 0, 0),
        lambda: net.model(IMAGES),
        lambda logits: logits.sum() * 0,
        teacher=teacher,
        distance=distance,
    )
    assert len(seen) == 3 and all(each is teacher for each in seen)


def test_distances_by_hand() -> None:
    logits, target = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    wanted = torch.zeros(())
    for row, wish in zip(logits / 2, target / 2, strict=True):
        probabilities = wish.exp() / wish.exp().sum()
        wanted += -(probabilities * (row.exp() / row.exp().sum()).log()).sum()
    torch.testing.assert_close(nncf_ext.soft_cross_entropy(logits, target, 2.0), 4 * wanted / 2)


class Many:
    """Forty dimensions, each of which costs what its size is."""

    space = nncf_ext.SearchSpace({f"width {number}": [8, 6, 4, 2] for number in range(40)})

    def macs(self, point: dict[str, int]) -> int:
        return sum(point.values())


def test_costs_are_drawn_evenly() -> None:
    net = Many()

    def thirds(points: list[dict[str, int]]) -> list[int]:
        shares = [(net.macs(point) - 80) / 240 for point in points]
        return [sum(low <= share < low + 1 / 3 for share in shares) for low in (0, 1 / 3, 2 / 3)]

    assert min(thirds([nncf_ext.uniform_over_macs(net, 0, step) for step in range(90)])) >= 15
    assert min(thirds([net.space.draw(0, step) for step in range(90)])) < 3


class Classifier(nn.Module):
    """What a transformers Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network("basic")

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(images)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def test_a_trainer_trains_it(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    model = Classifier()
    net = nncf_ext.make_elastic(model, ALL, example_input={"images": IMAGES[:1]}, advanced_parameters=FINE)
    (stage,) = [each for each in nncf_ext.shrinking_schedule(net, BOOTSTRAP_NAS_STAGES[3:4])]
    before, seen = copy.deepcopy(model.state_dict()), []
    model.register_forward_pre_hook(lambda *_: seen.append(tuple(net.active.values())))
    data = [{"images": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[nncf_ext.ElasticCallback(stage, seed=0)]).train()
    assert len({*seen}) > 1 and net.active == net.maximal()
    assert all(point in {tuple(each.values()) for each in stage.space.enumerate()} for point in seen)
    assert not torch.equal(before["network.conv1.weight"], model.network.conv1.weight)


def test_bad_input() -> None:
    net = supernet()
    with pytest.raises(nncf.ValidationError, match="at least one stage"):
        nncf_ext.shrinking_schedule(net, [])
    with pytest.raises(nncf.ValidationError, match="Stages may only add"):
        nncf_ext.shrinking_schedule(net, [ShrinkingStage(ALL), ShrinkingStage(ElasticMode.KERNEL)])
    with pytest.raises(nncf.ValidationError, match="Give data="):
        nncf_ext.shrinking_schedule(net)
    for wrong in ({"epochs": 0}, {"width": 0}, {"depth": -1}):
        with pytest.raises(nncf.ValidationError, match="positive integer"):
            ShrinkingStage(ALL, **wrong)
    with pytest.raises(nncf.ValidationError, match="at least one point"):
        nncf_ext.sandwich_step(net, [], lambda: net.model(IMAGES), lambda logits: logits.sum())
    with pytest.raises(nncf.ValidationError, match="is nan"):
        nncf_ext.sandwich_step(
            net, [net.maximal()], lambda: net.model(IMAGES), lambda logits: logits.sum() * float("nan")
        )
    (stage,) = nncf_ext.shrinking_schedule(net, BOOTSTRAP_NAS_STAGES[:1])
    with pytest.raises(nncf.ValidationError, match="Asked for conv1 = 5"):
        stage.activate({**net.maximal(), "conv1": 5})
