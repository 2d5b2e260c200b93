"""Tasks as files for the lm-eval harness, and their scores of an OpenVINO model, packed or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.task import Task

_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
_ANSWERS = """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs:
  until: ["<|endoftext|>", "\\n"]
  max_gen_toks: 48
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_PERPLEXITY = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def write_task(task: Task, folder: Path) -> Path:
    """
    :param task: The task; its test items are written.
    :param folder: Folder for ``<name>.yaml`` and ``<name>.jsonl``.
    :return: The folder, for ``lm_eval --include_path``.
    """
    rows = [{"prompt": item.prompt, "answer": item.answer} for item in task.test]
    return _write(folder, task.name, rows, _ANSWERS)


def write_text(documents: Sequence[str], folder: Path, name: str) -> Path:
    """
    :param documents: Texts whose perplexity to measure. Each is read from its first token to its last; one that is
        longer than the model's context, in pieces of that length.
    :param folder: Folder for ``<name>.yaml`` and ``<name>.jsonl``.
    :param name: Of the task.
    :return: The folder, for ``lm_eval --include_path``. The harness gives perplexities of a word and of a byte, and
        bits per byte, none of which depends on the tokenizer.
    """
    return _write(folder, name, [{"text": each} for each in documents], _PERPLEXITY)


def _write(folder: Path, name: str, rows: Sequence[dict[str, str]], rest: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(_YAML.format(name=name, data=data) + rest, encoding="utf-8")
    return folder


def score(model: Path, tasks: Path, name: str, limit: int | None = None, batch: int = 16) -> dict[str, Any]:
    """
    :param model: Folder of an OpenVINO language model.
    :param tasks: Folder from `write_task`.
    :param name: Name of the task.
    :param limit: Number of items; None for all.
    :param batch: Items at a time.
    :return: The harness's results of the task, such as ``exact_match,none``.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    import ov_ext.optimum

    # The harness loads the model through Optimum-Intel, which has to know our operations.
    ov_ext.optimum.register()
    found = lm_eval.simple_evaluate(
        model="openvino",
        model_args={"pretrained": str(model)},
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch,
        limit=limit,
        bootstrap_iters=0,
    )
    return found["results"][name]
