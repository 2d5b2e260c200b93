"""Measures decode speed and resident memory of exported language models. It needs OpenVINO only."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov

from ov_ext import runtime


@dataclass(frozen=True)
class DecodeRecord:
    """What it takes to decode one token with a model.

    :param folder: Model folder.
    :param ms_per_token: Median time of one decode step, in milliseconds.
    :param ratio: Speed relative to the first model: the time of the first model / the time of this one, computed in
        each round; the median over all rounds.
    :param resident_mib: Resident memory of a fresh process that decodes with this model, in MiB; None where unknown.
    """

    folder: str
    ms_per_token: float
    ratio: float
    resident_mib: float | None


class Decoder:
    """Greedy decoding with a stateful IR, batch 1.

    :param folder: Model folder with openvino_model.xml.
    :raises ValueError: The folder holds no stateful language model.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "openvino_model.xml"
        if not path.is_file():
            raise ValueError(f"{folder} is no exported language model: openvino_model.xml is needed.")
        model = runtime.read_model(path)
        self._names = {name for port in model.inputs for name in port.get_names()}
        if "input_ids" not in self._names or not model.get_sinks():
            raise ValueError(f"{path} is no stateful language model: it needs an input input_ids and a KV cache state.")
        compiled = ov.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        self._request = compiled.create_infer_request()
        self._length = 0

    def reset(self) -> None:
        """Forget the sequence."""
        self._request.reset_state()
        self._length = 0

    def step(self, tokens: list[int]) -> int:
        """Append tokens.

        :param tokens: At least one token id.
        :return: The most likely next token.
        """
        start, self._length = self._length, self._length + len(tokens)
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(start, self._length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: value for name, value in inputs.items() if name in self._names})
        return int(self._request.get_tensor("logits").data[0, -1].argmax())


def measure(folders: list[Path], *, tokens: int = 32, prompt: int = 32, rounds: int = 5) -> list[DecodeRecord]:
    """Compare the speed of models. They take turns, so that other load on the machine slows all of them alike.

    :param folders: Model folders. Ratios refer to the first one.
    :param tokens: Number of decode steps in each round.
    :param prompt: Number of tokens before the first timed step.
    :param rounds: Number of turns that each model takes.
    :return: One record for each folder.
    :raises ValueError: A number below 1, or a folder without a stateful language model.
    """
    if min(tokens, prompt, rounds) < 1:
        raise ValueError(f"tokens, prompt and rounds must be at least 1, got {tokens}, {prompt} and {rounds}.")
    resident = [_resident_of_process(folder) for folder in folders]
    decoders = [Decoder(folder) for folder in folders]
    times: list[list[float]] = [[] for _ in folders]
    for turn in range(rounds + 1):
        for decoder, mine in zip(decoders, times, strict=True):
            decoder.reset()
            token = decoder.step([1 + i % 64 for i in range(prompt)])  # speed does not depend on the tokens
            steps = []
            for _ in range(tokens):
                begin = time.perf_counter()
                token = decoder.step([token])
                steps.append(time.perf_counter() - begin)
            if turn:  # not the first: it loads pages from the file, and OpenVINO compiles for new shapes
                mine.append(statistics.median(steps) * 1e3)
    return [
        DecodeRecord(
            str(folder),
            statistics.median(mine),
            statistics.median(first / own for first, own in zip(times[0], mine, strict=True)),
            mib,
        )
        for folder, mine, mib in zip(folders, times, resident, strict=True)
    ]


def resident_mib() -> float | None:
    """:return: Resident memory of this process in MiB, or None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _resident_of_process(folder: Path) -> float | None:
    """:return: Resident memory in MiB of a new process that decodes a few tokens with this model and no other."""
    command = [sys.executable, "-m", "ov_ext.decode", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"Decoding with {folder} failed: {finished.stderr.strip().splitlines()[-1:]}")
    return json.loads(finished.stdout)


def _main(folder: str) -> None:
    decoder = Decoder(Path(folder))
    token = decoder.step(list(range(1, 33)))
    for _ in range(4):
        token = decoder.step([token])
    sys.stdout.write(json.dumps(resident_mib()))


if __name__ == "__main__":
    _main(sys.argv[1])
