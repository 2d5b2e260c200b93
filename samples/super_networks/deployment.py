"""What was extracted, elsewhere: in a process that knows torch alone, and in OpenVINO, also as INT8."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import nncf
import numpy as np
import torch

from super_networks import network
from super_networks.digits import Digits

_RELOAD = """
import importlib.util, sys
import torch
sys.modules["nncf_ext"] = sys.modules["nncf"] = None  # whoever imports them now fails
spec = importlib.util.spec_from_file_location("network", {file!r})
network = importlib.util.module_from_spec(spec)
spec.loader.exec_module(network)
from pathlib import Path
torch.set_num_threads({threads})
model = network.load(Path({folder!r}))
with torch.no_grad():
    torch.save(model(torch.load({folder!r} + "/images.pt")), {folder!r} + "/logits.pt")
"""


def reloads(folder: Path, images: torch.Tensor) -> bool:
    """
    :param folder: From :func:`super_networks.network.save`.
    :param images: ``[images, 1, 8, 8]``.
    :return: Whether a fresh process, in which neither this package nor NNCF can be imported, loads the network strictly
        and computes the same, bit for bit.
    """
    torch.save(images, folder / "images.pt")
    script = _RELOAD.format(file=str(Path(network.__file__)), folder=str(folder), threads=torch.get_num_threads())
    subprocess.run([sys.executable, "-c", script], check=True)
    with torch.no_grad():
        return torch.equal(torch.load(folder / "logits.pt"), network.load(folder)(images))


def ir_of(model: torch.nn.Module, calibration: Digits | None = None) -> Any:
    """
    :param model: A network.
    :param calibration: Images to quantize by; None: no quantization.
    :return: Its IR for any number of images, INT8 by ``nncf.quantize`` where there is calibration.
    """
    import openvino

    ir = openvino.convert_model(model, example_input=torch.zeros(2, 1, 8, 8))
    if calibration is None:
        return ir
    batches = [each.numpy() for each in calibration.images.split(20)]
    return nncf.quantize(ir, nncf.Dataset(batches), subset_size=len(batches))


def accuracy(ir: Any, data: Digits) -> float:
    """:return: Share of images that an IR names rightly, 0 to 1."""
    import openvino

    logits = openvino.compile_model(ir, "CPU")(data.images.numpy())[0]
    return float((logits.argmax(1) == data.labels.numpy()).mean())


def times(irs: Mapping[str, Any], images: np.ndarray, rounds: int = 41) -> dict[str, float]:
    """
    :param irs: By name.
    :param images: ``[images, 1, 8, 8]``, of one call.
    :param rounds: Of all of them, one after the other.
    :return: Median milliseconds of a call on one thread, by name.
    """
    import openvino

    def timer(ir: Any) -> Callable[[], float]:
        ir.reshape(list(images.shape))
        request = openvino.compile_model(
            ir, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        ).create_infer_request()

        def turn() -> float:
            begin = time.perf_counter()
            for _ in range(10):
                request.infer([images])
            return (time.perf_counter() - begin) * 100

        turn()
        return turn

    timers = {name: timer(ir) for name, ir in irs.items()}
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, turn in timers.items():
            found[name].append(turn())
    return {name: median(each) for name, each in found.items()}
