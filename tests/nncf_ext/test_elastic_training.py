"""Training by the Trainer: which ranks each forward, each recomputation and each process uses; kill and resume."""

import faulthandler
import json
import math
import os
import socket
from pathlib import Path

import nncf
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import Trainer, TrainerCallback, TrainingArguments

import nncf_ext
from nncf_ext import ElasticCallback, sandwich_loss
from nncf_ext.algorithms.elastic_lora.adapter import active_rank
from tests.nncf_ext.adapters import VOCABULARY, adapted, qkv, tokens

pytestmark = pytest.mark.slow

CHECKPOINTING = [None, False, True]
NAMES = ["stored", "checkpoints", "reentrant checkpoints"]


def elastic(name: str = "llama", **settings):
    model = adapted(name, **settings)
    return nncf_ext.make_elastic(model, groups=[qkv(6, 5, 4, 3, 2, 1)])


def items(count: int = 24, length: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    rows = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def trainer(net, folder: Path, *callbacks, kind: type[Trainer] = Trainer, **settings) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "seed": 11,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        **settings,
    }
    return kind(
        model=net.model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=items(),
        eval_dataset=items(2),
        callbacks=list(callbacks),
    )


def adapter_state(net) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.model.state_dict().items() if "lora_" in name}


def enable_checkpointing(model, reentrant: bool | None) -> None:
    if reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()


class Recorder(TrainerCallback):
    """Writes down the active rank at every run of every A, by optimizer step."""

    def __init__(self, net) -> None:
        self.runs: dict[int, list[tuple[str, int]]] = {}
        self.step = -1
        layers = dict(net.model.get_base_model().named_modules())
        for name, paths in net.layers.items():
            for path in paths:
                lora_A = layers[path].lora_A["default"]
                lora_A.register_forward_hook(lambda module, *_, name=name: self.note(name, active_rank(module)))

    def note(self, name: str, rank: int) -> None:
        self.runs.setdefault(self.step, []).append((name, rank))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.step = -1


@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
def test_one_uniform_point_for_each_step_forward_and_backward(tmp_path, reentrant):
    net = elastic()
    recorder = Recorder(net)
    checkpointing = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run = trainer(
        net,
        tmp_path,
        recorder,
        ElasticCallback(net, seed=3),
        gradient_accumulation_steps=3,
        gradient_checkpointing=reentrant is not None,
        eval_strategy="steps",
        eval_steps=2,
        **checkpointing,
    )
    run.train()
    # Forward, and with checkpointing again in the backward: of 3 micro-batches, q, k and v of 2 blocks.
    times = 3 * (1 if reentrant is None else 2)
    for step in range(6):
        point = net.random(3, step)
        assert len(recorder.runs[step]) == times * 6
        assert all(rank == point[name] for name, rank in recorder.runs[step])
    assert {rank for _, rank in recorder.runs[-1]} == {6}, "evaluation sees the maximal point"
    assert net.active == net.maximal()
    assert len({tuple(net.random(3, step).values()) for step in range(6)}) > 3


@pytest.mark.parametrize("reentrant", [False, True], ids=NAMES[1:])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_gradients_do_not_depend_on_checkpointing(name, reentrant):
    gradients = []
    for mode in (None, reentrant):
        net = elastic(name)
        enable_checkpointing(net.model, mode)
        net.activate(net.random(9))
        net.model(**tokens()).loss.backward()
        gradients.append([parameter.grad for parameter in net.model.parameters() if parameter.requires_grad])
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.at = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise Killed


RESUMED = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("restores", [False, True], ids=["", "with callbacks restored by the Trainer"])
def test_kill_and_resume_gives_the_same_weights(tmp_path, restores, caplog):
    net = elastic(lora_dropout=0.2)
    trainer(net, tmp_path / "whole", ElasticCallback(net, seed=3), **RESUMED).train()
    expected = adapter_state(net)

    net = elastic(lora_dropout=0.2)
    with pytest.raises(Killed):
        trainer(net, tmp_path / "parts", ElasticCallback(net, seed=3), KillAt(3), **RESUMED).train()

    # What the process held is gone; another one forgets to give the seed.
    net = elastic(seed=99, lora_dropout=0.2)
    again = trainer(
        net,
        tmp_path / "parts",
        ElasticCallback(net, seed=0),
        restore_callback_states_from_checkpoint=restores,
        **RESUMED,
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    found = adapter_state(net)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert "checkpoint's seed 3, not 0" in caplog.text

    state = json.loads((tmp_path / "parts/checkpoint-2/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["nncf_ext.ElasticCallback"]["space"] == net.space.to_dict()


def test_another_seed_gives_other_weights(tmp_path):
    states = []
    for seed in (3, 4):
        net = elastic()
        trainer(net, tmp_path, ElasticCallback(net, seed=seed)).train()
        states.append(adapter_state(net))
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_resuming_with_another_space_is_refused(tmp_path):
    net = elastic()
    trainer(net, tmp_path, ElasticCallback(net), max_steps=2, **RESUMED).train()
    other = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 5)])
    with pytest.raises(nncf.ValidationError, match="trained over the space"):
        trainer(other, tmp_path, ElasticCallback(other), **RESUMED).train(resume_from_checkpoint=True)


def naive_sandwich(net, inputs, active, items: int | None = None) -> torch.Tensor:
    """The losses one by one, each with a backward of its own, without checkpoints; gradients are left in the model."""
    labels = inputs["labels"][:, 1:]
    there = labels != -100
    count = int(there.sum()) if items is None else items
    net.activate(net.maximal())
    logits = net.model(input_ids=inputs["input_ids"]).logits[:, :-1]
    loss = cross_entropy(logits[there], labels[there], reduction="sum") / count
    loss.backward()
    total, target = loss.detach(), log_softmax(logits.detach()[there], -1)
    for point in (net.minimal(), active):
        net.activate(point)
        found = log_softmax(net.model(input_ids=inputs["input_ids"]).logits[:, :-1][there], -1)
        loss = (target.exp() * (target - found)).sum() / count
        loss.backward()
        total = total + loss.detach()
    return total


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("reentrant", CHECKPOINTING, ids=NAMES)
def test_sandwich_loss_is_three_losses(reentrant, items):
    inputs = tokens()
    inputs["labels"][0, :5] = -100
    one, two = elastic(), elastic()
    point = one.random(5)
    assert point not in (one.maximal(), one.minimal())
    expected = naive_sandwich(one, inputs, point, items)

    enable_checkpointing(two.model, reentrant)
    runs = Recorder(two)
    two.activate(point)
    loss = sandwich_loss(two, two.model, inputs, num_items_in_batch=items)
    assert two.active == point
    torch.testing.assert_close(loss.detach(), expected)
    (loss * 8).backward()
    assert two.active == two.maximal()
    for (name, parameter), other in zip(two.model.named_parameters(), one.model.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad / 8, other.grad, msg=name)
    # In the backward, the blocks of the last forward are run again first.
    again = runs.runs[-1][3 * 6 :]
    assert len(again) == (0 if reentrant is None else 3 * 6)
    for number, expected_point in enumerate((point, two.minimal(), two.maximal()) if again else ()):
        assert all(rank == expected_point[name] for name, rank in again[number * 6 : number * 6 + 6])


@pytest.mark.parametrize("which", ["maximal", "minimal"])
def test_sandwich_loss_counts_no_point_twice(which):
    net = elastic()
    runs = Recorder(net)
    net.activate(getattr(net, which)())
    loss = sandwich_loss(net, net.model, tokens())
    assert len(runs.runs[-1]) == 2 * 6
    loss.backward()


def test_sandwich_loss_of_a_classifier():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.nncf_ext.adapters import GROUPED, randomized

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**GROUPED, num_labels=3, pad_token_id=0))
    model = randomized(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])))
    net = nncf_ext.make_elastic(model, groups=[nncf_ext.RankGroup([r".*q_proj"], [4, 1])])
    net.activate(net.minimal())
    inputs = {"input_ids": tokens()["input_ids"], "labels": torch.tensor([2, 0])}
    loss = sandwich_loss(net, model, inputs, causal=False)
    with torch.no_grad():
        net.activate(net.maximal())
        target = model(**inputs)
        net.activate(net.minimal())
        found = log_softmax(model(**inputs).logits, -1)
    expected = log_softmax(target.logits, -1)
    divergence = (expected.exp() * (expected - found)).sum() / 2
    torch.testing.assert_close(loss.detach(), target.loss + divergence)


def sandwich_trainer(net) -> type[Trainer]:
    class SandwichTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return sandwich_loss(net, model, inputs, num_items_in_batch=num_items_in_batch)

    return SandwichTrainer


def test_sandwich_training_with_accumulation_and_checkpoints(tmp_path):
    states, losses = [], []
    for reentrant in CHECKPOINTING:
        net = elastic()
        checkpointing = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        recorder = Recorder(net)
        run = trainer(
            net,
            tmp_path,
            recorder,
            ElasticCallback(net, seed=3),
            kind=sandwich_trainer(net),
            gradient_accumulation_steps=2,
            gradient_checkpointing=reentrant is not None,
            optim="sgd",
            **checkpointing,
        )
        run.train()
        states.append(adapter_state(net))
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        for step in range(6):
            forwards = [net.maximal(), net.minimal(), net.random(3, step)]
            # Of each micro-batch: the forwards and, with checkpoints, their blocks again from the last to the first.
            order = 2 * (forwards if reentrant is None else forwards + forwards[::-1])
            runs = recorder.runs[step]
            assert len(runs) == 6 * len(order)
            for number, point in enumerate(order):
                assert all(rank == point[name] for name, rank in runs[6 * number : 6 * number + 6])
    for other, loss in zip(states[1:], losses[1:], strict=True):
        assert all(math.isclose(mine, theirs, rel_tol=1e-4) for mine, theirs in zip(losses[0], loss, strict=True))
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_sandwich_loss_refuses_what_it_cannot_do():
    net = elastic()
    with pytest.raises(nncf.ValidationError, match=r"needs labels; the inputs are \['input_ids'\]"):
        sandwich_loss(net, net.model, {"input_ids": tokens()["input_ids"]})
    net.model.get_base_model().lm_head.to("meta")
    with pytest.raises(nncf.ParameterNotSupportedError, match=r"on one device; they are on \['cpu', 'meta'\]"):
        sandwich_loss(net, net.model, tokens())
    assert net.active == net.maximal()


KINDS = ["uniform", "sandwich"]
DISTRIBUTED = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}


def distributed_process(rank: int, port: int, folder: str) -> None:
    """One of two processes of data-parallel trainings; writes down what it drew and what it learnt."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    # A process that waits for ever says where, and ends.
    faulthandler.dump_traceback_later(900, exit=True)
    results = {}
    for kind in KINDS:
        net = elastic()
        recorder = Recorder(net)
        run = trainer(
            net,
            Path(folder),
            recorder,
            ElasticCallback(net, seed=3),
            kind=sandwich_trainer(net) if kind == "sandwich" else Trainer,
            per_device_train_batch_size=1,
            ddp_backend="gloo",
            average_tokens_across_devices=False,
            **DISTRIBUTED,
        )
        assert run.args.world_size == 2
        run.train()
        results[kind] = {"runs": recorder.runs, "state": adapter_state(net)}
    torch.save(results, Path(folder, f"{rank}.pt"))
    # The store lives in the first process: it must not leave before the other.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_draw_the_same_and_learn_what_one_would(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(distributed_process, (port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for kind in KINDS:
        assert one[kind]["runs"] == two[kind]["runs"] and set(one[kind]["runs"]) == {0, 1, 2, 3}
        state = one[kind]["state"]
        assert all(torch.equal(value, two[kind]["state"][name]) for name, value in state.items())

        net = elastic()
        before = adapter_state(net)
        trainer_class = sandwich_trainer(net) if kind == "sandwich" else Trainer
        trainer(net, tmp_path, ElasticCallback(net, seed=3), kind=trainer_class, **DISTRIBUTED).train()
        for name, value in adapter_state(net).items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5)
        assert any((value - before[name]).abs().max() > 1e-2 for name, value in state.items())
