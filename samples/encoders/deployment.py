"""An encoder in OpenVINO, floating and INT8: how long does a text take, and how many does it name rightly?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import nncf
import numpy as np

from encoders.arms import Run
from encoders.tasks import batches


def ir_of(run: Run, name: str, int8: bool) -> Path:
    """
    :param run: Its models, and texts to calibrate on.
    :param name: Folder of a model.
    :param int8: Whether to quantize it by ``nncf.quantize``, on 64 texts that were learned from.
    :return: File of its IR, which takes token ids and masks of any shape; made if it is not there.
    """
    import openvino

    import nncf_ext
    import ov_ext

    file = run.folder / f"{name}{'-int8' if int8 else ''}.xml"
    weights = (run.folder / name).glob("*.safetensors")  # nncf_model.safetensors where layers differ in size
    if not file.is_file() or file.stat().st_mtime < max(each.stat().st_mtime for each in weights):
        if int8:
            ir = openvino.Core().read_model(ir_of(run, name, False))
            items = batches(run.task.training[:64], run.tokenizer, run.plan.length, 1)
            data = nncf.Dataset([{key: each[key].numpy() for key in ("input_ids", "attention_mask")} for each in items])
            ir = nncf.quantize(ir, data, subset_size=len(items), model_type=nncf.ModelType.TRANSFORMER)
        else:
            model = nncf_ext.load_pretrained(run.folder / name).eval()
            batch = batches(run.task.training[:2], run.tokenizer, run.plan.length, 2)[0]
            # Where OpenVINO cannot trace a model, as with the masks of transformers' encoders, it is exported.
            ir = ov_ext.convert_model(model, example_input={key: batch[key] for key in ("input_ids", "attention_mask")})
        openvino.save_model(ir, file, compress_to_fp16=False)
    return file


def accuracy(run: Run, file: Path) -> float:
    """:return: Share of the test texts that an IR names rightly, 0 to 1."""
    import openvino

    compiled = openvino.compile_model(file, "CPU")
    right = []
    for batch in batches(run.task.test, run.tokenizer, run.plan.length, 32):
        inputs = {key: batch[key].numpy() for key in ("input_ids", "attention_mask")}
        right.append(compiled(inputs)[0].argmax(1) == batch["labels"].numpy())
    return float(np.concatenate(right).mean())


def times(run: Run, files: Mapping[str, Path], rounds: int = 31, calls: int = 5) -> dict[str, float]:
    """
    :param run: Its longest texts are what is timed.
    :param files: IRs by name.
    :param rounds: Of all of them, one after the other.
    :param calls: Of one turn.
    :return: Median milliseconds of a call with one text of the greatest length, on one thread, by name.
    """
    import openvino

    tokens = np.full((1, run.plan.length), 2000, np.int64)
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}

    def timer(file: Path) -> Callable[[], float]:
        settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        request: Any = openvino.compile_model(file, "CPU", settings).create_infer_request()

        def turn() -> float:
            begin = time.perf_counter()
            for _ in range(calls):
                request.infer(inputs)
            return (time.perf_counter() - begin) * 1000 / calls

        turn()
        return turn

    timers = {name: timer(file) for name, file in files.items()}
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, turn in timers.items():
            found[name].append(turn())
    return {name: median(each) for name, each in found.items()}
