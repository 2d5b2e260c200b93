"""A task as files for the lm-eval harness, and its score of an OpenVINO model, packed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.task import Task

_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
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


def write_task(task: Task, folder: Path) -> Path:
    """
    :param task: The task; its test items are written.
    :param folder: Folder for ``<name>.yaml`` and ``<name>.jsonl``.
    :return: The folder, for ``lm_eval --include_path``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{task.name}.jsonl").resolve()
    lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in task.test]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{task.name}.yaml").write_text(_YAML.format(name=task.name, data=data), encoding="utf-8")
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
