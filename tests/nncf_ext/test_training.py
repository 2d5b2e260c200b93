"""Distillation and zeros that stay, in the Trainer of transformers."""

import copy
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from nncf_ext import DistillationTrainer, KeepZeros
from nncf_ext.training.distillation import divergence

TOKENS = 61


def make(seed: int = 0, vocabulary: int = TOKENS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.3, **shape)).eval()


def halved(model: LlamaForCausalLM) -> LlamaForCausalLM:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight[module.weight.abs() < module.weight.abs().median()] = 0
    return model


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    common = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": []}
    quiet = {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), **{**common, **quiet, **options})


def rows(count: int = 24, length: int = 8) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, TOKENS, (count, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row} for row in ids]


def kl(model: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor], there: Tensor) -> Tensor:
    """Mean over the places of sum p (log p - log q), in float64."""
    q, p = (each(**inputs).logits.double().log_softmax(-1) for each in (model, teacher))
    return (p.exp() * (p - q)).sum(-1)[there].mean()


@pytest.mark.parametrize("case", ["plain", "mask", "labels", "weighted"])
def test_the_loss_is_the_divergence_where_predictions_count(case: str, tmp_path: Path) -> None:
    model, teacher = make(0), make(1)
    weight = 0.3 if case == "weighted" else 0.0
    trainer = DistillationTrainer(model, arguments(tmp_path), teacher=teacher, label_weight=weight)
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows(2)])}
    there = torch.ones(2, 8, dtype=torch.bool)
    if case == "mask":
        inputs["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        there = inputs["attention_mask"].bool()
    given = dict(inputs)
    if case in ("labels", "weighted"):
        given["labels"] = torch.where(torch.arange(8) < 3, -100, inputs["input_ids"])
        there = ((torch.arange(8) >= 2) & (torch.arange(8) < 7)).expand(2, 8)  # places before a label
    with torch.no_grad():
        found = trainer.compute_loss(model.train(), given)
        wanted = kl(model, teacher, inputs, there)
        if weight:
            wanted = (1 - weight) * wanted + weight * model(**given).loss
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)
        loss, outputs = trainer.compute_loss(model, given, return_outputs=True)
        assert loss == found and outputs.logits.shape == (2, 8, TOKENS)
        if "labels" in given:  # evaluation is on the labels
            assert trainer.compute_loss(model.eval(), given) == model(**given).loss


@pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("counting", [0, 1, 17, 33])  # of 33 places; with 70,000 classes, three are in work at a time
def test_gradients_of_the_divergence(dtype: torch.dtype, accuracy: float, counting: int) -> None:
    drawn = torch.Generator().manual_seed(counting)
    logits, wanted = (3 * torch.randn(3, 11, 70_000, generator=drawn).to(dtype) for _ in range(2))
    there = (torch.randperm(33, generator=drawn) < counting).reshape(3, 11)
    found = logits.requires_grad_()
    divergence(found, wanted, there, items=5).mul(2.0).backward()
    exact = logits.detach().double().requires_grad_()
    p, q = wanted.double().log_softmax(-1), exact.log_softmax(-1)
    ((p.exp() * (p - q)).sum(-1)[there].sum() * 2.0 / 5).backward()
    assert found.grad.dtype == dtype and not found.grad[~there].any()
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=accuracy, atol=1e-6)


def test_a_model_comes_closer_to_its_teacher_which_stays(tmp_path: Path) -> None:
    teacher = make()
    model = halved(copy.deepcopy(teacher))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows()])}
    there = torch.ones(24, 8, dtype=torch.bool)
    with torch.no_grad():
        far = kl(model, teacher, inputs, there)
    trainer = DistillationTrainer(model, arguments(tmp_path, max_steps=24), train_dataset=rows(), teacher=teacher)
    trainer.train()
    with torch.no_grad():
        assert kl(model.eval(), teacher, inputs, there) < 0.5 * far
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class Restless(torch.optim.SGD):
    """Moves every weight, whether it has a gradient or not, as optimizers that mix a matrix's values do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "restless"])
def test_zeros_stay_and_the_others_learn(optimizer: str, tmp_path: Path) -> None:
    model = halved(make())
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {} if optimizer == "adamw" else {"optimizers": (Restless(model.parameters(), lr=1e-2), None)}
    trainer = DistillationTrainer(
        model,
        arguments(tmp_path, weight_decay=0.1),
        train_dataset=rows(),
        teacher=make(1),
        callbacks=[KeepZeros()],
        **options,
    )
    trainer.train()
    zeros = 0
    for name, value in model.named_parameters():
        assert torch.equal(value == 0, before[name] == 0), name
        assert not torch.equal(value, before[name]), name
        zeros += int((value == 0).sum())
    assert zeros > 1000
    with torch.no_grad():  # after the training, zeros may move
        model.lm_head.weight.grad = None
        model(input_ids=rows(1)[0]["input_ids"][None]).logits.sum()
    model.train()(input_ids=rows(1)[0]["input_ids"][None]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None and (model.lm_head.weight.grad != 0).all()


def test_fresh_adapters_learn_beside_kept_zeros(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(halved(make()), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = DistillationTrainer(
        model, arguments(tmp_path), train_dataset=rows(), teacher=make(1), callbacks=[KeepZeros()]
    )
    trainer.train()
    second = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert second and all((value != 0).any() for value in second)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    found = []
    for stop in (6, 3):
        model, folder = halved(make()), tmp_path / str(stop)
        options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", "max_steps": stop}
        made = {"train_dataset": rows(), "teacher": make(1), "callbacks": [KeepZeros()]}
        DistillationTrainer(model, arguments(folder, **options), **made).train()
        if stop == 3:
            model = halved(make(5))  # another one: everything comes from the checkpoint
            options["max_steps"] = 6
            made["callbacks"] = [KeepZeros()]
            resumed = DistillationTrainer(model, arguments(folder, **options), **made)
            resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(nncf.ValidationError, match="fraction from 0 to 1; got 2"):
        DistillationTrainer(model, arguments(tmp_path), teacher=make(1), label_weight=2)
    with pytest.raises(nncf.ValidationError, match="shares trainable weights"):
        DistillationTrainer(model, arguments(tmp_path), teacher=model)
    with pytest.raises(nncf.ValidationError, match="one vocabulary"):
        DistillationTrainer(model, arguments(tmp_path), train_dataset=rows(), teacher=make(1, TOKENS + 1)).train()
    with pytest.raises(nncf.ValidationError, match="no labels"):
        DistillationTrainer(model, arguments(tmp_path), train_dataset=rows(), teacher=make(1), label_weight=0.5).train()
