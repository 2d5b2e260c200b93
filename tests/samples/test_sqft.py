"""The tasks, the scoring and the pipelines of samples/02_sqft.py, with a budget of seconds."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "samples"))

from adapters import comparison, libraries, scoring, signatures, task  # noqa: E402
from adapters.arithmetic import arithmetic_task  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("signature", "prompt", "answer"),
    [
        ("f(a, b)", "f(a, b)", "f(a, b)"),
        ("f(self, a, b=None)", "f(self, a, b=None)", "self.f(a, b=b)"),
        ("f(cls, a: int = 3, *rest: str)", "f(cls, a=3, *rest)", "cls.f(a=a, *rest)"),
        ("f(a, /, b=(1, 2), *, c, d: 'T' = {}) -> int", "f(a, /, b=(1, 2), *, c, d={})", "f(a, b=b, c=c, d=d)"),
        ("f(a=1, /, **more)", "f(a=1, /, **more)", "f(a, **more)"),
        ("f(self, a)", None, None),
        ("f()", None, None),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_call_of_a_signature(kind: str, signature: str, prompt: str | None, answer: str | None) -> None:
    function = ast.parse(f"{kind} {signature}: ...").body[0]
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    item = signatures.item_of(function)
    expected = None if prompt is None else task.Item(f"def {prompt}:\n    return", f" {answer}")
    assert item == expected
    if item is not None:
        ast.parse(item.prompt + item.answer)


def test_signatures_are_not_learned_and_reported() -> None:
    found = signatures.signatures_task(lambda item: len(item.prompt) < 60, 60, 10, 30)
    again = signatures.signatures_task(lambda item: len(item.prompt) < 60, 60, 10, 30)
    assert found == again
    assert [len(part) for part in (found.training, found.validation, found.test)] == [60, 10, 30]
    answers = [item.answer for part in (found.training, found.validation, found.test) for item in part]
    assert len(set(answers)) == 100
    assert all(len(item.prompt) < 60 for item in found.test)


def test_too_few_signatures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "TRAINING_PACKAGES", ("yarl",))
    with pytest.raises(RuntimeError, match="Asked for 1 signatures, but yarl have 0"):
        signatures.signatures_task(lambda item: "zzzz" in item.answer, 1, 0, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return the sum of all elements.  More of it.\n\nParameters", "Return the sum of all elements."),
        ("Return the sum\n    of all elements, by rows\n\nMore.", "Return the sum of all elements, by rows"),
        ("Return it.", None),
        (None, None),
        ("Return what NumPy would return for this.", None),
        ("long " * 60, None),
    ],
)
def test_the_first_sentence_of_a_documentation_string(text: str | None, sentence: str | None) -> None:
    assert libraries.sentence_of(text) == sentence


def test_sentences_of_libraries_are_not_learned_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "LIBRARIES", ("networkx", "yarl", "rich"))
    found = libraries.libraries_task(lambda item: len(item.prompt) < 150, 6, 3, 9)
    assert found == libraries.libraries_task(lambda item: len(item.prompt) < 150, 6, 3, 9)
    assert [len(part) for part in (found.training, found.validation, found.test)] == [6, 3, 9]
    everything = [item for part in (found.training, found.validation, found.test) for item in part]
    assert len({item.prompt for item in everything}) == 18 and all(len(item.prompt) < 150 for item in everything)
    assert [item.answer for item in found.test] == 3 * [" networkx", " yarl", " rich"]
    with pytest.raises(RuntimeError, match="yarl has"):
        libraries.libraries_task(lambda item: True, 6, 3, 30_000)


def test_arithmetic_problems_are_true_and_apart() -> None:
    found = arithmetic_task(300, 20, 100)
    assert found == arithmetic_task(300, 20, 100) != arithmetic_task(300, 20, 100, seed=1)
    keys = []
    for item in (*found.training, *found.validation, *found.test):
        a, b = [int(word) for word in item.prompt.replace(",", " ").replace(";", " ").split() if word.isdecimal()][:2]
        grows = any(word in item.prompt for word in ("more.", "more than"))
        larger, smaller = max(a, b), min(a, b)
        assert int(item.answer) == (larger + smaller if grows else larger - smaller)
        keys.append(item.prompt)
    assert len(set(keys)) == len(keys)


def test_a_pass_over_the_answer_is_greedy_decoding() -> None:
    """What `generate` writes counts as right, and nothing else does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
        initializer_range=1.0,
    )
    model = LlamaForCausalLM(config).eval()
    rows, expected = [], []
    for length in range(2, 40):
        prompt = torch.randint(1, 6, (1, length))
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[
            0, length:
        ].tolist()
        ended = written[-1] == 0
        answer = written if ended else [*written, 0]
        rows.append({"input_ids": prompt[0].tolist() + answer, "labels": [task.IGNORED] * length + answer})
        # Where it has not ended after 8 tokens, the ninth is or is not the end.
        full = model(torch.tensor([rows[-1]["input_ids"]])).logits[0, -2].argmax().item() == 0
        expected.append(ended or full)
        wrong = [answer[0] % 5 + 1, *answer[1:]]
        rows.append({"input_ids": prompt[0].tolist() + wrong, "labels": [task.IGNORED] * length + wrong})
        expected.append(False)
    assert 3 < sum(expected) < len(expected) - 3
    right = scoring.right_answers(scoring.logits_of(model), rows, 0, batch=7)
    assert right.tolist() == expected


@pytest.fixture(scope="module")
def plan() -> comparison.Plan:
    return comparison.Plan(
        tasks=("arithmetic",),
        arms=("lora", "shears", "sqft_qa_sparse_peft"),
        forms=("nls",),
        seeds=1,
        steps=3,
        training=60,
        validation=16,
        test=32,
        windows=8,
    )


def test_runs_are_kept_and_not_repeated(plan: comparison.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = {record["arm"]: record for record in comparison.run(plan, tmp_path)}
    quantized = records["sqft_qa_sparse_peft"]
    assert quantized["merged"]["right"] == quantized["separate"]["right"]
    assert quantized["merged"]["sparsity"] >= 0.5
    assert records["shears"]["merged"]["sparsity"] < 0.1  # a naive merge fills the zeros
    assert records["lora"]["merged"]["sparsity"] < 0.1
    assert set(quantized["point"].values()) <= {32, 24, 16}
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert len(files) == 3

    def forbidden(*args: Any) -> None:
        raise AssertionError("a finished run is repeated")

    monkeypatch.setattr(comparison, "_run", forbidden)
    assert {record["arm"]: record for record in comparison.run(plan, tmp_path)} == records
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == files
    with pytest.raises(AssertionError, match="repeated"):  # other settings are another run
        comparison.run(replace(plan, steps=4), tmp_path)
    assert comparison.run(replace(plan, steps=4), tmp_path, train=False) == []
