"""Ways from a pretrained encoder to a smaller one for a task, each with as many steps, and what comes out."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import nncf_ext
from encoders.tasks import Texts, batches, task

BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.2)


@dataclass(frozen=True)
class Plan:
    """
    :param task: Its name.
    :param training: Texts to learn from.
    :param validation: Texts to choose by.
    :param test: Texts to report, at most.
    :param length: Longer texts are cut, tokens.
    :param dense: Epochs of the whole encoder.
    :param shrinking: Epochs of a super-network, of three networks each.
    :param tuning: Epochs of what was extracted, alone.
    :param budget: Points that the search measures for each target.
    :param targets: Shares of the whole encoder's multiplications.
    :param rate: The largest learning rate.
    """

    task: str = "libraries"
    training: int = 512
    validation: int = 128
    test: int = 512
    length: int = 32
    dense: int = 3
    shrinking: int = 2
    tuning: int = 1
    budget: int = 12
    targets: tuple[float, ...] = (0.5, 0.25)
    rate: float = 2e-4
    batch: int = 16


class Run:
    """
    Everything that one seed says.

    :param seed: Of texts, head, batches and search.
    :param plan: Sizes and steps.
    :param source: Folder of the pretrained encoder.
    :param folder: For models.
    :param cache: For texts.
    """

    def __init__(self, seed: int, plan: Plan, source: Path, folder: Path, cache: Path) -> None:
        from transformers import AutoTokenizer

        self.seed, self.plan, self.source, self.folder = seed, plan, source, folder
        self.task = task(plan.task, seed, plan.training, plan.validation, plan.test, cache)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.example = {"input_ids": torch.full((1, plan.length), self.tokenizer.unk_token_id)}

        weights = (source / "model.safetensors").read_bytes()
        self.of = {**json.loads(json.dumps(asdict(plan))), "model": hashlib.sha256(weights).hexdigest()}
        """What results depend on: they are not kept for another plan, nor for another model."""

    def record(self) -> dict[str, Any]:
        """:return: Of this seed, by arm: what each test text costs, nats; which are named rightly; multiplications."""
        pretrained = self._pretrained()
        dense = copy.deepcopy(pretrained)
        importance = nncf_ext.FirstOrderImportance(dense, self.example)
        self._train(dense, self.plan.dense, 0, after_backward=importance.add)
        answers = self._answers(dense)
        uniform = {target: self._uniform(importance, target) for target in self.plan.targets}
        whole = importance.macs(importance.point(1.0))
        found = {}

        def judge(arm: str, model: Any, macs: int) -> None:
            found[arm] = self._judged(arm, model, macs)

        judge("dense", dense, whole)
        widths = importance.widths(BUDGETS, multiple=16)
        orders = {"EFTNAS": importance.scores(), "magnitude order": nncf_ext.UnitImportance.L1}
        for arm, order in orders.items():
            for target, (small, macs) in self._searched(dense, answers, importance, widths, order, uniform).items():
                self._train(small, self.plan.tuning, 2, answers)
                judge(f"{arm} {target:g}", small, macs)
        for target, point in uniform.items():
            small = self._cut(dense, importance, point, importance.scores())
            self._train(small, self.plan.shrinking + self.plan.tuning, 1, answers)
            judge(f"uniform widths {target:g}", small, importance.macs(point))
            blind = self._cut(pretrained, importance, point, None)
            self._train(blind, self.plan.dense + self.plan.shrinking + self.plan.tuning, 0)
            judge(f"blind cut {target:g}", blind, importance.macs(point))
        return {"arms": found, "widths": widths, "classes": len(self.task.classes)}

    def _pretrained(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(self.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.source, num_labels=len(self.task.classes), dtype=torch.float32
        )
        model.bert.embeddings.requires_grad_(False)
        return model

    def _searched(
        self, dense: Any, answers: Tensor, importance: Any, widths: Any, order: Any, uniform: dict[float, Any]
    ) -> dict[float, tuple[Any, int]]:
        """A super-network of the fine-tuned encoder, trained, and the best of it for each target."""
        net = nncf_ext.make_elastic(
            copy.deepcopy(dense),
            nncf_ext.ElasticMode.WIDTH,
            example_input=self.example,
            advanced_parameters=nncf_ext.AdvancedBootstrapNasParameters(widths=widths),
        )
        net.reorganize(order)
        for step, batch, _ in self._steps(net.model, self.plan.shrinking, 1):
            nncf_ext.sandwich_step(
                net,
                nncf_ext.sandwich(net, self.seed, step),
                lambda batch=batch: logits_of(net.model, batch),
                None,
                teacher=answers[batch["places"]],
                distance=nncf_ext.eftnas_loss(batch["labels"]),
            )

        def loss(point: dict[str, int]) -> float:
            net.activate(point)
            return float(self._losses(net.model, self.task.validation)[0].mean())

        found = {}
        for target, point in uniform.items():
            most = importance.macs(point)
            report = nncf_ext.search(
                net,
                [nncf_ext.Objective("loss", loss, False), nncf_ext.Objective("macs", net.macs, False)],
                constraints=(f"macs <= {most}", f"macs >= {0.9 * most:.0f}"),
                sampler=nncf_ext.LinasSampler(10, resets=True, seed=self.seed, inner_evaluations=1000),
                budget=self.plan.budget,
                seed=self.seed,
            )
            # What the threshold alone would choose is a point of the space as well.
            cut = [importance.point(share * target, multiple=16) for share in (1.0, 0.95, 0.9)]
            cut = [{name: each[name] for name in net.space.dimensions} for each in cut]
            points = [*(each.point for each in report.evaluations), *map(net.space.clip, cut)]
            best = min((each for each in points if net.macs(each) <= most), key=loss)
            found[target] = nncf_ext.extract(net, best), net.macs(best)
        return found

    def _uniform(self, importance: Any, target: float) -> dict[str, int]:
        """A share of the heads and of the channels of each layer, to whole heads and 16 channels."""
        sizes = {}
        for name, whole in importance.point(1.0).items():
            step = 16 if name.endswith("mlp") else 1
            sizes[name] = max(round(target * whole / step), 1) * step
        return sizes

    def _cut(self, model: Any, importance: Any, point: dict[str, int], scores: Any) -> Any:
        """The units with the highest scores; without scores, those that stand first."""
        whole, dimensions = importance.point(1.0), importance.dimensions
        lists = {name: [each * dimensions[name].granularity for each in (whole[name], point[name])] for name in point}
        net = nncf_ext.make_elastic(
            copy.deepcopy(model),
            nncf_ext.ElasticMode.WIDTH,
            example_input=self.example,
            advanced_parameters=nncf_ext.AdvancedBootstrapNasParameters(widths=lists),
        )
        if scores is not None:
            net.reorganize(scores)
        return nncf_ext.extract(net, net.minimal())

    def _train(
        self,
        model: Any,
        epochs: int,
        part: int,
        answers: Tensor | None = None,
        after_backward: Callable[[], object] = lambda: None,
    ) -> None:
        """A network learns alone: from labels, and with answers of the fine-tuned encoder from these as well."""
        for _, batch, _ in self._steps(model, epochs, part):
            logits = logits_of(model, batch)
            if answers is None:
                loss = cross_entropy(logits, batch["labels"])
            else:
                loss = nncf_ext.eftnas_loss(batch["labels"])(logits, answers[batch["places"]])
            loss.backward()
            after_backward()

    def _steps(self, model: Any, epochs: int, part: int) -> Iterator[tuple[int, dict[str, Tensor], Any]]:
        """Batches; when the next one is asked for, the optimizer takes its step. Trains until they are over."""
        rate = self.plan.rate
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], rate)
        torch.manual_seed(self.seed + 1000 * part)
        count, step = epochs * math.ceil(self.plan.training / self.plan.batch), 0
        model.train()
        for epoch in range(epochs):
            seed = 100 * (1000 * self.seed + part) + epoch
            for batch in batches(self.task.training, self.tokenizer, self.plan.length, self.plan.batch, seed):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / (0.1 * count)) * (1 - step / count)
                yield step, batch, optimizer
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        model.eval()

    @torch.no_grad()
    def _answers(self, model: Any) -> Tensor:
        found = torch.zeros(len(self.task.training), len(self.task.classes))
        for batch in batches(self.task.training, self.tokenizer, self.plan.length, 64):
            found[batch["places"]] = logits_of(model, batch)
        return found

    @torch.no_grad()
    def _losses(self, model: Any, texts: Texts) -> tuple[Tensor, Tensor]:
        losses, right = [], []
        for batch in batches(texts, self.tokenizer, self.plan.length, 64):
            logits = logits_of(model, batch)
            losses.append(cross_entropy(logits, batch["labels"], reduction="none"))
            right.append(logits.argmax(1) == batch["labels"])
        return torch.cat(losses), torch.cat(right)

    def _judged(self, arm: str, model: Any, macs: int) -> dict[str, Any]:
        if arm == "dense" or arm.startswith("EFTNAS"):
            nncf_ext.save_pretrained(model, self.folder / arm.replace(" ", "-"))
        losses, right = self._losses(model, self.task.test)
        print(f"seed {self.seed}, {arm}: {right.float().mean():.1%} right, loss {losses.mean():.3f}", flush=True)
        return {"losses": losses.tolist(), "right": right.int().tolist(), "macs": macs}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """:return: ``[texts, classes]``."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
