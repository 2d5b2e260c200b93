"""Ranks and widths together: one adapted language model that is many smaller ones (LoNAS), searched, cut, exported.

Proves what a sub-network with 100 to 60 % of each MLP's channels is worth on a task with held-out items: the adapters
of one model learn while its widths and ranks change, a search over the super-network chooses by validation items, the
choice is cut, merged and exported. Beside it, at as many parameters: MultiPruner, then an adapter on what it left. The
task is that of sample 02: the call for a signature, right to the letter. Prints one table: parameters, right answers
with paired intervals, tokens a second in OpenVINO. Finished runs are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from evidence.show import in_words, quiet, table

SAMPLES = Path(__file__).parent
TINY = SAMPLES / "assets" / "tiny_lm"
PROMPT = "def read_file(self, path, encoding=None):\n    return"
TARGETS = (0.9, 0.85)  # of all parameters, adapters merged
GROUP = 64  # channels that go together
TASK = "signatures"


class Arms:
    """
    Ways to a smaller adapted model, on one seed.

    :param base: Folder of the language model.
    :param data: Rows to learn from, to choose by and to report, by part; ``"padding"`` is the id of the padding token.
    :param settings: Of the training.
    :param calibration: ``[windows, tokens]``, for MultiPruner.
    :param budget: Points that a search measures.
    """

    def __init__(self, base: Path, data: dict[str, Any], settings: Any, calibration: Any, budget: int) -> None:
        self.base, self.data, self.settings = base, data, settings
        self.calibration, self.budget = calibration, budget

    def load(self) -> Any:
        """:return: The language model in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def right(self, model: Any, part: str = "test") -> Any:
        """:return: bool ``[items]``: which answers are right to the letter."""
        from adapters.scoring import logits_of, right_answers

        return right_answers(logits_of(model), self.data[part], self.data["padding"])

    def lora(self, model: Any) -> Any:
        """:return: The model after an adapter has learned on it and was merged."""
        from adapters.training import add_adapter, train

        adapted = add_adapter(model, self.settings)
        train(adapted, self.data["training"], self.data["padding"], self.settings)
        return adapted.merge_and_unload().eval()

    def lonas(self) -> dict[str, Any]:
        """:return: Merged models out of one super-network: the whole one, the middle one, and those searched."""
        import nncf
        from adapters.training import GROUPS, add_adapter, train

        import nncf_ext

        mlp_alone = nncf.IgnoredScope(patterns=[r".*self_attn.*", r".*embed.*", r".*lm_head.*"])
        widths = nncf_ext.AdvancedBootstrapNasParameters(
            width_multipliers=[1, 0.9, 0.8, 0.7, 0.6], multiple=GROUP, min_width=GROUP
        )
        example = {"input_ids": self.calibration[:1, :8]}
        model = self.load()
        base = nncf_ext.make_elastic(
            model,
            nncf_ext.ElasticMode.WIDTH,
            example_input=example,
            ignored_scope=mlp_alone,
            advanced_parameters=widths,
        )
        base.reorganize(nncf_ext.UnitImportance.L1)
        base.release()
        whole = sum(each.numel() for each in model.parameters())
        adapted = add_adapter(model, self.settings)
        net = nncf_ext.make_elastic(
            adapted,
            nncf_ext.ElasticMode.RANK | nncf_ext.ElasticMode.WIDTH,
            groups=[nncf_ext.RankGroup([rf".*\.({'|'.join(names)})$"], self.settings.ranks) for names in GROUPS],
            example_input=example,
            ignored_scope=mlp_alone,
            advanced_parameters=widths,
        )
        train(adapted, self.data["training"], self.data["padding"], self.settings, net)
        # Of the merged model: a channel of an MLP is a row or a column of three weights.
        channels = {name for name, each in net.dimensions.items() if each.kind == "width"}
        largest, hidden = net.space.maximal(), model.config.hidden_size

        def merged(point: dict[str, int]) -> float:
            return whole - 3 * hidden * sum(largest[name] - size for name, size in point.items() if name in channels)

        points = {"whole": largest, "middle": net.space.heuristic()}
        for target in TARGETS:
            report = nncf_ext.search(
                net,
                [
                    nncf_ext.Objective(
                        "accuracy", lambda point: float(self.right(adapted, "validation").float().mean())
                    ),
                    nncf_ext.Objective("parameters", merged, maximize=False),
                ],
                constraints=(f"parameters <= {target * whole:.0f}",),
                sampler=nncf_ext.LinasSampler(max(5, self.budget // 3), resets=True, seed=self.settings.seed),
                budget=self.budget,
                seed=self.settings.seed,
            )
            points[f"searched {target:g}"] = report.pick(parameters=target * whole).point
        return {
            f"LoNAS, {name}": nncf_ext.extract(net, point).merge_and_unload().eval() for name, point in points.items()
        }

    def multipruner(self, parameters: int) -> Any:
        """:return: A model that MultiPruner made as small as that, after an adapter has learned on it."""
        import nncf
        from evidence.text import batches

        import nncf_ext

        model = self.load()
        small = nncf_ext.compress(
            model,
            nncf_ext.CompressMode.MULTIPRUNER,
            ratio=1 - parameters / sum(each.numel() for each in model.parameters()),
            dataset=nncf.Dataset(batches(self.calibration, 4)),
            advanced_parameters=nncf_ext.AdvancedMultiPrunerParameters(mlp_group=GROUP, joint_cost="parameters"),
        )
        return self.lora(small)

    def all(self, keep: Callable[[str, Any], None]) -> dict[str, Any]:
        """:return: By arm, parameters and right answers; `keep` is given every model."""
        found: dict[str, Any] = {}

        def record(name: str, model: Any) -> None:
            count = sum(each.numel() for each in model.parameters())
            found[name] = {"parameters": count, "right": self.right(model).int().tolist()}
            keep(name, model)

        record("LoRA, dense", self.lora(self.load()))
        for name, model in self.lonas().items():
            record(name, model)
        for target in TARGETS:
            as_many = found[f"LoNAS, searched {target:g}"]["parameters"]
            record(f"MultiPruner + LoRA {target:g}", self.multipruner(as_many))
        return found


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder; see python -m samples.real_models.")] = TINY,
    quick: Annotated[bool, typer.Option(help="One seed, a few steps and items. Its figures mean little.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs of every arm.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of every run; 0 is the default.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of records and models.")] = SAMPLES / "out" / "08",
) -> None:
    """Runs what has no record yet, and prints the table."""
    quiet()
    import numpy as np
    import optuna
    from adapters import comparison
    from adapters.task import encode
    from adapters.training import Settings
    from evidence import scores, text
    from removal.models import speed
    from transformers import AutoTokenizer

    import ov_ext.optimum

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = out / model.name / "quick" if quick else out / model.name
    seeds, steps = (1, steps or 6) if quick else (seeds, steps or 120)
    sizes = (
        {"training": 200, "validation": 32, "test": 64}
        if quick
        else {"training": 8000, "validation": 256, "test": 2048}
    )
    rate = 4e-3 if model == TINY else 1e-3  # larger models learn at lower rates
    plan = comparison.Plan((TASK,), (), (), seeds, steps, **sizes, base=model, learning_rate=rate)
    tokenizer = AutoTokenizer.from_pretrained(model)
    out.mkdir(parents=True, exist_ok=True)
    task = comparison.task_of(TASK, plan, out)
    data = {part: encode(tokenizer, getattr(task, part), comparison.LONGEST[TASK]) for part in comparison.PARTS}
    data["padding"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    calibration = text.windows(tokenizer, text.python("calibration"), 128, 4 if quick else 32)

    def export(name: str, small: Any) -> None:
        folder = out / "models" / name.replace(" ", "-")
        ov_ext.optimum.export(small.bfloat16(), tokenizer, folder, overwrite=folder.exists())

    records = []
    for seed in range(seeds):
        file = out / f"seed-{seed}-{steps}.json"
        if not file.is_file():
            settings = Settings(steps=steps, learning_rate=rate, seed=seed)
            arms = Arms(model, data, settings, calibration, 8 if quick else 24)
            content = json.dumps(arms.all(export if seed == 0 else lambda name, small: None))
            file.with_suffix(".part").write_text(content)
            file.with_suffix(".part").replace(file)
        records.append(json.loads(file.read_text()))

    prompt = tokenizer(PROMPT, return_tensors="pt")
    rows = []
    for name in records[0]:
        folder = out / "models" / name.replace(" ", "-")
        pace = speed(ov_ext.optimum.load(folder), prompt, 16 if quick else 128)
        right = np.mean([record[name]["right"] for record in records], axis=0)
        target = name.split()[-1]
        rival = name.startswith("MultiPruner")
        against = np.mean(
            [record[f"LoNAS, searched {target}" if rival else "LoRA, dense"]["right"] for record in records], axis=0
        )
        apart = "" if name == "LoRA, dense" else in_words(scores.interval(scores.difference, right, against), "+.1%")
        count = int(np.mean([record[name]["parameters"] for record in records]))
        rows.append((name, f"{count:,}", f"{right.mean():.1%}", apart, f"{pace:.0f}"))
    table(
        f"{model.name}, {sizes['test']} held-out items, {seeds} seeds; MultiPruner against LoNAS, LoNAS against LoRA",
        ("", "parameters", "right", "difference, paired", "tokens/s"),
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
