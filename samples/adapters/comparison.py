"""Which runs does the comparison consist of, what is kept of each, and which are still to be done?"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_lm.corpus import STDLIB
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import nncf_ext
from adapters import deployment, recipes
from adapters.arithmetic import arithmetic_task
from adapters.libraries import LIBRARIES, libraries_task
from adapters.scoring import logits_of, right_answers
from adapters.signatures import HELD_OUT_PACKAGES, TRAINING_PACKAGES, signatures_task
from adapters.task import Item, Task, encode
from adapters.training import ALPHA, LINEARS, Settings
from nncf_ext.files import write_whole

ASSETS = Path(__file__).parents[1] / "assets"
TINY = ASSETS / "tiny_lm"
TASKS = ("signatures", "arithmetic", "libraries")
ARMS = ("lora", "shears", "sqft", "sqft_sparse_peft", "sqft_qa_sparse_peft")
FORMS = ("lora", "nls")
PARTS = ("training", "validation", "test")
MADE_OF: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
    "signatures": (signatures_task, (*TRAINING_PACKAGES, *HELD_OUT_PACKAGES)),
    "libraries": (libraries_task, LIBRARIES),
}
"""What makes a task, and the packages that it reads."""
INT4 = ("sqft", "sqft_qa_sparse_peft")
LONGEST = {"signatures": 40, "arithmetic": 40, "libraries": 64}  # tokens of an item
RATIO = 0.5  # of zeros

console = Console()


@dataclass(frozen=True)
class Plan:
    """
    :param tasks: Names from TASKS.
    :param arms: Names of functions in `recipes`.
    :param forms: Names from FORMS.
    :param seeds: Runs of each.
    :param steps: Optimizer steps of a run.
    :param training: Items to learn from.
    :param validation: Items to choose by.
    :param test: Items to report.
    :param windows: Windows of 256 tokens of calibration text.
    :param base: Folder of the language model.
    :param learning_rate: The highest.
    :param group_size: Columns that share an INT4 scale.
    :param half: Learn and score with products in bfloat16.
    :param sparse_base: Folder of a sparse floating model, such as one that recovered, from which the sparse arms
        start. None: they prune the base.
    """

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    forms: tuple[str, ...]
    seeds: int
    steps: int
    training: int
    validation: int
    test: int
    windows: int = 128
    base: Path = TINY
    learning_rate: float = 4e-3
    group_size: int = 128
    half: bool = False
    sparse_base: Path | None = None


def run(plan: Plan, out: Path, *, train: bool = True) -> list[dict[str, Any]]:
    """
    Does the runs that have no record yet, seed by seed, so that an early end leaves a complete smaller comparison.

    :param plan: The runs.
    :param out: Folder of the records.
    :param train: False takes what is there.
    :return: Records of the plan's runs.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    records = []
    for name, seed, arm, form in itertools.product(plan.tasks, range(plan.seeds), plan.arms, plan.forms):
        settings = Settings(steps=plan.steps, learning_rate=plan.learning_rate, seed=seed, half=plan.half)
        sizes = {key: getattr(plan, key) for key in ("training", "validation", "test", "windows")}
        if plan.sparse_base is not None and arm != "lora":
            sizes["sparse_base"] = str(plan.sparse_base.resolve())
        chosen = {key: value for key, value in asdict(settings).items() if key != "half" or value}
        wanted = json.loads(json.dumps(chosen | sizes))  # as it comes back from a file
        which = {"task": name, "arm": arm, "form": form, "seed": seed}
        file = _file(which, out)
        record = json.loads(file.read_text()) if file.exists() else None
        if record is None or record["settings"] != wanted:
            if not train:
                continue
            console.print(f"{name}: {arm}, {form}, seed {seed}")
            record = which | {"settings": wanted} | _run(name, arm, form, settings, plan, out)
            _write(file, record)
        records.append(record)
    return records


def measure(records: list[dict[str, Any]], out: Path) -> None:
    """
    Speed and size of the exported models, those of one seed: what is not in their records yet is added.

    :param records: From `run`.
    :param out: Folder of records and models.
    """
    for record in records:
        file = _file(record, out)
        for part in ("separate", "merged"):
            folder, kept = out / "models" / file.stem / part, record["deployed"].get(part, {})
            if folder.is_dir() and "tokens_per_s" not in kept:
                console.print(f"measuring {file.stem}, {part}")
                record["deployed"][part] = kept | deployment.measure(folder, ALPHA)
                _write(file, record)


def _file(record: dict[str, Any], out: Path) -> Path:
    return out / "runs" / f"{record['task']}-{record['arm']}-{record['form']}-{record['seed']}.json"


def _run(name: str, arm: str, form: str, settings: Settings, plan: Plan, out: Path) -> dict[str, Any]:
    task, tokenizer = task_of(name, plan, out), _tokenizer(plan.base)
    padding = tokenizer.pad_token_id
    rows = {part: encode(tokenizer, getattr(task, part), LONGEST[name]) for part in PARTS}

    def right(model: nn.Module, part: str = "test") -> torch.Tensor:
        return right_answers(logits_of(model, plan.half), rows[part], padding, show=f"scoring {part}")

    def validate(model: nn.Module) -> float:
        return float(right(model, "validation").float().mean())

    calibration = _calibration(plan.base, plan.windows)
    data = recipes.Data(rows["training"], calibration, padding, validate, plan.group_size)
    # On short items the backward of torch's fused attention takes a quarter of a step in bfloat16.
    attention = "eager" if plan.half else None
    start_from = plan.base if arm == "lora" else plan.sparse_base or plan.base
    model = AutoModelForCausalLM.from_pretrained(start_from, dtype=torch.float32, attn_implementation=attention)
    options: dict[str, Any] = {}
    if arm != "lora":
        options["ratio"] = RATIO if plan.sparse_base is None else 0.0  # adds no zeros, keeps those that are there
        options["keep"] = out / ("compressed-int4" if arm in INT4 else "compressed")
    start = time.perf_counter()
    tuned = getattr(recipes, arm)(model, data, settings, nls=form == "nls", **options)
    seconds = time.perf_counter() - start
    record: dict[str, Any] = {"seconds": seconds, "point": tuned.point, "items": len(rows["test"]), "deployed": {}}
    folder = out / "models" / f"{name}-{arm}-{form}-{settings.seed}"
    if arm != "lora":
        record["separate"] = _score(right(tuned.model))
        if arm in ("shears", "sqft") and settings.seed == 0:
            base = AutoModelForCausalLM.from_pretrained(start_from, dtype=torch.float32)
            recipes.sparsify(base, data, options["ratio"], int4=arm in INT4, keep=options["keep"])
            deployment.export_separate(base, tuned.model, tokenizer, folder / "separate")
    if arm == "sqft":  # its adapter cannot be merged onto the grid: that is what QA-SparsePEFT is for
        return record
    merged = tuned.merged if tuned.merged is not None else copy.deepcopy(tuned.model).merge_and_unload()
    report = nncf_ext.compression_report(merged)
    linears = [weight for weight in report.weights if weight.name.split(".")[-2] in LINEARS]
    sizes = [math.prod(weight.shape) for weight in linears]
    zeros = sum(weight.sparsity * size for weight, size in zip(linears, sizes, strict=True))
    record["merged"] = {**_score(right(merged)), "sparsity": zeros / sum(sizes)}
    if settings.seed == 0 or arm == "sqft_qa_sparse_peft":
        deployment.export_merged(merged, tokenizer, folder / "merged")
        there = right_answers(
            deployment.logits_in_openvino(folder / "merged"), rows["test"], padding, show="scoring in OpenVINO"
        )
        record["deployed"]["merged"] = {"accuracy": float(there.float().mean())}
    return record


@cache
def _tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


@cache
def _calibration(base: Path, count: int) -> torch.Tensor:
    ids = torch.tensor(_tokenizer(base)((ASSETS / "calibration.txt").read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def task_of(name: str, plan: Plan, out: Path) -> Task:
    """
    :param name: A member of TASKS.
    :param plan: How many items, and whose tokens count.
    :param out: Folder that keeps the items, since reading the packages takes a minute.
    :return: The task.
    """
    if name == "arithmetic":
        return arithmetic_task(min(plan.training, 6000), plan.validation, plan.test)
    make, read = MADE_OF[name]
    packages = {*read} - {STDLIB}
    versions = {package: metadata.version(package) for package in sorted(packages)}
    file = out / f"{name}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    wanted = {"versions": versions, "sizes": [plan.training, plan.validation, plan.test]}
    if {key: kept.get(key) for key in wanted} != wanted:
        tokenizer = _tokenizer(plan.base)

        def fits(item: Item) -> bool:
            return len(tokenizer.backend_tokenizer.encode(item.prompt + item.answer).ids) < LONGEST[name]

        with console.status(f"Reading {name}"):
            task = make(fits, plan.training, plan.validation, plan.test)
        kept = wanted | {part: [[item.prompt, item.answer] for item in getattr(task, part)] for part in PARTS}
        _write(file, kept)
    return Task(name, *(tuple(Item(*item) for item in kept[part]) for part in PARTS))


def _score(right: torch.Tensor) -> dict[str, Any]:
    return {"accuracy": float(right.float().mean()), "right": "".join(map(str, right.int().tolist()))}


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, lambda path: path.write_text(json.dumps(content)))
