"""What is measured of each arm: quality once, speed and memory side by side. Finished parts are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import Settings
from benchmarks.timing import fastest, interleave, paired_ratio
from ov_ext.machine import cpu_name
from side_by_side.arms import DENSE, Arm
from side_by_side.engines import settings_of, size, start
from side_by_side.subject import Subject, kept

QUESTION = "Why is it colder in winter than in summer? Answer in one sentence."
PROMPT, TOKENS = 128, 12  # of a timed turn: read, then generated one by one
_ANSWER = 48  # tokens at most

Record = dict[str, Any]
Texts = Mapping[str, Any]
"""int64 tensors ``[windows, tokens]`` by name."""
Say = Callable[[str, int, int], None]
"""Told what happens now, and how far it is: done, of how many."""


def folder_of(subject: Subject, arm: Arm) -> Path:
    """:return: Where an arm is kept, written first if it is not there."""
    return kept(subject.out / "arms" / arm.name, lambda folder: arm.write(subject, folder))


def quality(subject: Subject, arm: Arm, texts: Texts, say: Say) -> Record:
    """
    :param subject: What is compressed.
    :param arm: How.
    :param texts: What to measure on.
    :param say: Told what happens.
    :return: The fastest setting, bytes, losses of the windows of each text, and an answer. Kept as long as texts and
        question are the same.
    """
    file = subject.out / "quality" / f"{arm.name}.json"
    contents = QUESTION.encode() + b"".join(name.encode() + ids.numpy().tobytes() for name, ids in texts.items())
    key = hashlib.sha256(contents).hexdigest()
    if file.exists() and (known := json.loads(file.read_text()))["key"] == key:
        return known
    say("written", 0, 0)
    folder = folder_of(subject, arm)
    record: Record = {"key": key, "bytes": size(arm, folder), "losses": {}}
    settings = _fastest_setting(subject, arm, folder, say)
    record["setting"] = {"precision": settings.precision, "group": settings.group}
    with start(arm, folder, settings, len(subject.tokenizer)) as engine:
        done, of = 0, sum(map(len, texts.values()))
        for name, ids in texts.items():
            each = []
            for window in ids.numpy():
                each.append(float(engine.call("losses", window).mean()))
                say("read", done := done + 1, of)
            record["losses"][name] = each
        written = engine.call("answer", _question(subject), subject.tokenizer.eos_token_id, _ANSWER)
    record["answer"] = subject.tokenizer.decode(written)
    _write(file, record)
    return record


def _fastest_setting(subject: Subject, arm: Arm, folder: Path, say: Say) -> Settings:
    choices = settings_of(arm)
    if len(choices) == 1:
        return choices[0]
    say("tried in several settings of OpenVINO", 0, 0)
    with ExitStack() as stack:
        turns = {}
        for settings in choices:
            engine = stack.enter_context(start(arm, folder, settings, len(subject.tokenizer)))
            turns[settings] = lambda engine=engine: engine.call("generate", 32, TOKENS)[1]
        return fastest(interleave(turns, 3))


def _question(subject: Subject) -> Any:
    asked = [{"role": "user", "content": QUESTION}]
    text = subject.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return np.array(subject.tokenizer(text)["input_ids"], np.int64)


def speed(subject: Subject, arms: Sequence[Arm], found: Mapping[str, Record], rounds: int, say: Say) -> Record:
    """
    Times all arms in interleaved rounds. Kept; repeated when an arm is asked for that was not there.

    :param subject: What is compressed.
    :param arms: How; the dense one is among them.
    :param found: From :func:`quality`, by name.
    :param rounds: How often each has its turn.
    :param say: Told what happens.
    :return: By name: ``ms`` a token, ``prompt_ms``, ``resident_mib``, and ``ratio``: the dense one's time / this one's,
        the median over rounds with the least and the greatest.
    """
    file = subject.out / "speed.json"
    known = json.loads(file.read_text()) if file.exists() else {"rounds": 0, "arms": {}}
    names = [arm.name for arm in arms]
    if known["rounds"] >= rounds and set(names) <= set(known["arms"]):
        return known
    prompts: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        engines = {}
        for index, arm in enumerate(arms):
            say(f"{arm.name} is loaded", index, len(arms))
            settings = Settings(**found[arm.name]["setting"])
            engine = start(arm, folder_of(subject, arm), settings, len(subject.tokenizer))
            engines[arm.name] = stack.enter_context(engine)

        def turn(name: str) -> list[float]:
            prompt, steps = engines[name].call("generate", PROMPT, TOKENS)
            prompts[name].append(prompt)
            return steps

        for name in names:
            turn(name)  # the first prompt and token settle what is compiled late
        prompts = {name: [] for name in names}
        load, done = os.getloadavg()[0], count(1)
        turns = {name: partial(turn, name) for name in names}
        seconds = interleave(turns, rounds, after_round=lambda: say("timed", next(done), rounds))
        memory = {name: engine.call("memory")["resident_mib"] for name, engine in engines.items()}
    measured = {}
    for name in names:
        ratio = paired_ratio(seconds[DENSE], seconds[name])
        prompt_ratio = paired_ratio(np.array(prompts[DENSE])[:, None], np.array(prompts[name])[:, None])
        measured[name] = {
            "ms": float(np.median(seconds[name])) * 1e3,
            "ratio": (ratio.median, ratio.low, ratio.high),
            "prompt_ms": float(np.median(prompts[name])) * 1e3,
            "prompt_ratio": (prompt_ratio.median, prompt_ratio.low, prompt_ratio.high),
            "resident_mib": memory[name],
        }
    record = {"rounds": rounds, "cpu": cpu_name(), "load": load, "arms": measured}
    _write(file, record)
    return record


def _write(file: Path, record: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(record, indent=1))
    aside.replace(file)
