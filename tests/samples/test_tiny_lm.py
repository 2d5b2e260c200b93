"""The committed language model is what its provenance says, and the script that made it does what it says."""

from __future__ import annotations

import ast
import collections
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_tokenizers
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))

import train_tiny_lm as script  # noqa: E402
from tiny_lm import corpus as text  # noqa: E402
from tiny_lm.kneser_ney import KneserNey  # noqa: E402

pytestmark = pytest.mark.slow

ASSETS = SAMPLES / "assets"
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module")
def provenance() -> dict[str, Any]:
    return json.loads((ASSETS / "provenance.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_lm")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The committed files


def test_files_are_those_of_the_provenance_and_small_enough(provenance: dict[str, Any]) -> None:
    listed = provenance["sha256"]
    assert set(listed) >= {"calibration.txt", "heldout.txt", "tiny_lm/model.safetensors", "tiny_lm/tokenizer.json"}
    assert {f"tiny_lm/{path.name}" for path in (ASSETS / "tiny_lm").iterdir()} <= set(listed)
    for name, expected in listed.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == expected, name
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    mamba = sum(size for path, size in sizes.items() if path.parent.name == "tiny_mamba2")
    assert mamba < 8_000_000 and sum(sizes.values()) - mamba < 14_000_000
    assert sizes[ASSETS / "calibration.txt"] + sizes[ASSETS / "heldout.txt"] <= 400_000


def test_texts_are_the_quoted_files_in_order(provenance: dict[str, Any]) -> None:
    for name, quoted in provenance["quoted"].items():
        content = (ASSETS / name).read_text(encoding="utf-8")
        assert content.endswith(SEPARATOR)
        documents = content.split(SEPARATOR)[:-1]
        hashes = [hashlib.sha256(document.encode()).hexdigest() for document in documents]
        assert hashes == [entry["sha256"] for entry in quoted]
        assert len(set(hashes)) == len(hashes) >= 30


def test_held_out_packages_are_not_trained_on(provenance: dict[str, Any]) -> None:
    training = {package["name"] for package in provenance["packages"] if not package["held_out"]}
    held_out = {package["name"] for package in provenance["packages"] if package["held_out"]}
    assert training & held_out == {"python-stdlib"}
    assert {entry["package"] for entry in provenance["quoted"]["calibration.txt"]} <= training
    for entry in provenance["quoted"]["heldout.txt"]:
        assert entry["package"] in held_out
        if entry["package"] == "python-stdlib":
            assert {"asyncio", "email", "test_asyncio", "test_email"} & set(entry["path"].split("/"))


def test_every_quoted_package_has_its_licence(provenance: dict[str, Any]) -> None:
    quoted = {entry["package"] for entries in provenance["quoted"].values() for entry in entries}
    assert {path.stem for path in (ASSETS / "licenses").iterdir()} == quoted
    for name in quoted:
        content = (ASSETS / "licenses" / f"{name}.txt").read_text(encoding="utf-8").lower()
        assert "copyright" in content and ("license" in content or "permission" in content), name
    assert all(text.is_permissive(package["licence"]) for package in provenance["packages"])


def test_provenance_text_repeats_the_figures(provenance: dict[str, Any]) -> None:
    content = (ASSETS / "PROVENANCE.md").read_text(encoding="utf-8")
    for value in ("model_bits_per_byte", "kneser_ney_bits_per_byte"):
        assert f" {provenance['held_out'][value]} |" in content
    assert f"{provenance['model']['tokens']:,} tokens" in content and "Apache-2.0" in content
    assert all(f"| {package['name']} | {package['version']} |" in content for package in provenance["packages"])


def test_weights_are_bfloat16_untied_and_fit_int4_groups(provenance: dict[str, Any], model: Any) -> None:
    with safe_open(ASSETS / "tiny_lm" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(tensors)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not model.config.tie_word_embeddings
    assert all(size % 128 == 0 for tensor in tensors.values() if tensor.ndim == 2 for size in tensor.shape)
    assert sum(tensor.numel() for tensor in tensors.values()) == provenance["model"]["parameters"]
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_training_was_finished_and_beats_counting(provenance: dict[str, Any]) -> None:
    assert provenance["model"]["finished"]
    assert provenance["held_out"]["model_bits_per_byte"] < provenance["held_out"]["kneser_ney_bits_per_byte"]


def test_held_out_figure_holds_without_our_code(
    provenance: dict[str, Any], model: Any, tokenizer: Any, one_thread: None
) -> None:
    # The oracle predicts blocks of 128 tokens, each after the 128 before it, on a sixth of the files.
    documents = (ASSETS / "heldout.txt").read_text(encoding="utf-8").split(SEPARATOR)[1:-1:6]
    joined = "".join(document + SEPARATOR for document in documents)
    size = len(joined.encode()) - len(documents) * len(SEPARATOR)
    ids = tokenizer(SEPARATOR + joined, return_tensors="pt").input_ids[0]
    nats = 0.0
    for start in range(1, len(ids), 128):
        targets = ids[start : start + 128]
        context = ids[max(start - 128, 0) : start + len(targets) - 1]
        with torch.inference_mode():
            logits = model(context[None]).logits[0, -len(targets) :]
        scores = logits.log_softmax(-1)[range(len(targets)), targets]
        nats -= float(scores[targets != 0].sum())
    oracle = nats / math.log(2) / size
    ours = script.bits_per_byte(model, ids.numpy().astype(np.uint16), size)
    assert ours == pytest.approx(oracle, rel=0.01)
    assert provenance["held_out"]["model_bits_per_byte"] == pytest.approx(ours, rel=0.1)


# The tokenizer


@pytest.mark.parametrize(
    "sample", ["def f(x):\n\treturn x  # 日本\n", "", " ", "\x00\x7f\u0080", "a" * 300, "\r\n  \n\n", "🙂é́"], ids=ascii
)
def test_tokenizer_is_lossless(tokenizer: Any, sample: str) -> None:
    ids = tokenizer(sample).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == sample
    assert all(0 < token < 3072 for token in ids)


def test_special_tokens_and_generation_config(tokenizer: Any) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == SEPARATOR
    assert tokenizer(f"x{SEPARATOR}").input_ids[-1] == 0 == tokenizer.eos_token_id
    assert len(tokenizer) == 3072
    generation = GenerationConfig.from_pretrained(ASSETS / "tiny_lm")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 0, 0)
    assert generation.max_new_tokens == 64 and not generation.do_sample


def test_openvino_tokenizer_agrees(tokenizer: Any) -> None:
    models = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
    encode, decode = (ov.Core().compile_model(model, "CPU") for model in models)
    documents = (ASSETS / "heldout.txt").read_text(encoding="utf-8").split(SEPARATOR)[:4]
    for document in documents:
        ids = encode([document])["input_ids"][0]
        assert ids.tolist() == tokenizer(document).input_ids
        assert decode([ids[None]])["string_output"][0] == document


def test_model_generates_python_from_a_prompt(model: Any, tokenizer: Any, one_thread: None) -> None:
    inputs = tokenizer("import os\n\n\nclass Reader:\n    def __init__(self", return_tensors="pt")
    output = tokenizer.decode(model.generate(**inputs)[0])
    ast.parse(output[: output.rindex("\n\n    def ")])  # the methods before the one that the limit cut short
    assert "        self." in output


# Training


def _training(steps: int) -> script.Training:
    stream = np.random.default_rng(3).integers(0, 128, 997).astype(np.uint16)
    config = script.model_config(vocab_size=128, hidden_size=128, layers=1, window=16)
    plan = script.Plan(steps=steps, batch=4, window=16, warmup=0.3, seed=5)
    return script.Training(config, plan, stream, compiled=False)


def test_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path, one_thread: None) -> None:
    whole = _training(steps=7)
    expected = list(whole.run(tmp_path / "whole.pt"))
    stopped = _training(steps=7)
    losses = list(itertools.islice(stopped.run(tmp_path / "stopped.pt"), 3))
    stopped.save(tmp_path / "stopped.pt")
    resumed = _training(steps=7)
    with torch.no_grad():  # whatever it began with
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.load(tmp_path / "stopped.pt")
    assert resumed.step == 3
    losses += resumed.run(tmp_path / "stopped.pt")
    assert losses == expected and len(set(losses)) == 7
    final = dict(resumed.model.named_parameters())
    assert all(torch.equal(parameter, final[name]) for name, parameter in whole.model.named_parameters())
    assert not list(tmp_path.glob("*.part"))


def test_interruption_inside_an_update_does_not_spoil_the_checkpoint(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _training(steps=6)
    expected = list(whole.run(tmp_path / "whole.pt"))
    stopped = _training(steps=6)
    run = stopped.run(tmp_path / "stopped.pt", save_every=0.0)
    losses = list(itertools.islice(run, 3))

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped.adamw, "step", interrupt)  # Muon has moved the matrices by then
    with pytest.raises(KeyboardInterrupt):
        next(run)
    resumed = _training(steps=6)
    resumed.load(tmp_path / "stopped.pt")
    assert resumed.step == 3
    assert losses + list(resumed.run(tmp_path / "stopped.pt")) == expected


def test_matrices_change_hands_once(tmp_path: Path, one_thread: None) -> None:
    training = _training(steps=10)
    matrix = training.model.model.layers[0].mlp.down_proj.weight
    owners = []
    for _ in training.run(tmp_path / "checkpoint.pt"):
        owners.append(matrix in training.adamw.state)
    assert owners == [False] * 6 + [True] * 4  # 0.55 of ten steps
    assert set(training.muon.state) | set(training.adamw.state) == set(training.model.parameters())
    assert len(training.muon.state) == 7 and not {training.model.lm_head.weight} & set(training.muon.state)


def test_training_learns(tmp_path: Path, one_thread: None) -> None:
    training = _training(steps=25)
    training.tokens = np.resize(np.arange(7, 20), 997).astype(np.uint16)
    losses = list(training.run(tmp_path / "checkpoint.pt"))
    assert losses[0] == pytest.approx(math.log(128), rel=0.1) and losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(("name", "value"), [("batch", 2), ("window", 8), ("seed", 6)])
def test_checkpoint_of_another_order_is_refused(tmp_path: Path, name: str, value: int) -> None:
    first = _training(steps=3)
    first.save(tmp_path / "checkpoint.pt")
    plan = {"steps": 3, "batch": 4, "window": 16, "seed": 5, name: value}
    other = script.Training(first.model.config, script.Plan(**plan), first.tokens, compiled=False)
    with pytest.raises(ValueError, match=f"{name}={value}.*{name}={getattr(first.plan, name)}"):
        other.load(tmp_path / "checkpoint.pt")


def test_a_pass_sees_every_window_once_and_the_next_in_another_order() -> None:
    training = _training(steps=1)
    training.tokens = np.arange(16 * 61 + 5).astype(np.uint16)
    passes = [torch.cat([training.windows(step) for step in range(first, first + 15)]) for first in (0, 15)]
    for windows in passes:
        assert windows.shape == (60, 17) and (windows.diff(dim=1) == 1).all() and (windows[:, 0] % 16 == 0).all()
        assert len(windows[:, 0].unique()) == 60
    assert not torch.equal(*passes)


@dataclass(frozen=True)
class Rate:
    progress: float
    expected: float


@pytest.mark.parametrize("case", [Rate(0.1, 0.5), Rate(0.2, 1.0), Rate(0.6, 0.55), Rate(1.0, 0.1)], ids=str)
def test_learning_rate(case: Rate) -> None:
    plan = script.Plan(steps=10, learning_rate=2.0, warmup=0.2, final=0.1)
    assert plan.rate(case.progress) == pytest.approx(2 * case.expected)


def test_a_run_is_as_long_as_asked() -> None:
    assert script.Plan(steps=10).progress(5, 1e9) == 0.5
    assert script.Plan(minutes=2).progress(10**9, 30.0) == 0.25
    assert script.Plan(minutes=2).progress(1, 121.0) == 1.0
    for arguments in ([], ["--steps", "5", "--minutes", "1"]):
        result = CliRunner().invoke(script.app, ["train", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 2 and "either steps or minutes" in result.output


@pytest.mark.parametrize(
    ("step", "missing"), [("tokenizer", "corpus"), ("train", "tokenizer"), ("ngram", "tokenizer"), ("export", "ngram")]
)
def test_a_step_names_the_one_it_needs(tmp_path: Path, step: str, missing: str) -> None:
    arguments = [step, "--work-dir", str(tmp_path), *(["--steps", "1"] if step == "train" else [])]
    result = CliRunner().invoke(script.app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 2 and f"run the step '{missing}' first" in result.output


def test_text_shorter_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 64 tokens, the text has 64"):
        script.Training(script.model_config(128), script.Plan(steps=1, batch=4, window=16), np.zeros(64, np.uint16))


def test_bits_per_byte_predicts_each_token_once(one_thread: None) -> None:
    training = _training(steps=1)
    with torch.no_grad():  # all tokens equally likely: log2(128) = 7 bits each
        training.model.lm_head.weight.zero_()
    for length in (2, 15, 16, 17, 18, 24, 25, 40, 41, 95):
        stream = np.full(length + 1, 9, dtype=np.uint16)
        stream[0] = 0  # the separator
        if length > 20:
            stream[20] = 0
        scored = length - (length > 20)
        assert script.bits_per_byte(training.model, stream, 2 * scored, window=16) == pytest.approx(3.5, rel=1e-5)


# The n-gram model


def _oracle_probability(stream: list[int], vocab: int, order: int, context: tuple[int, ...], token: int) -> float:
    """Chen and Goodman's recursion, written from the definitions with dictionaries and sets."""
    if not order:
        return 1 / vocab
    grams = [tuple(stream[i : i + order]) for i in range(len(stream) - order + 1)]
    if order == ORDER:
        counts = collections.Counter(grams)
    else:
        longer = {tuple(stream[i : i + ORDER]) for i in range(len(stream) - ORDER + 1)}
        # Sets of continuations, level by level, as the counts are of distinct longer n-grams.
        for length in range(ORDER - 1, order - 1, -1):
            counts = collections.Counter(gram[1:] for gram in longer)
            longer = set(counts)
            assert all(len(gram) == length for gram in longer)
    n = [sum(count == k for count in counts.values()) for k in range(5)]
    discount = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
    for k in (1, 2, 3):
        if n[1] and n[k] and n[k + 1]:
            estimate = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k]
            if 0 < estimate < k:
                discount[k] = estimate
    context = context[len(context) - order + 1 :]
    followers = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
    lower = _oracle_probability(stream, vocab, order - 1, context[1:], token)
    if not followers:
        return lower
    total = sum(followers.values())
    count = followers.get(token, 0)
    weight = sum(discount[min(c, 3)] for c in followers.values()) / total
    return (count - discount[min(count, 3)]) / total + weight * lower


ORDER = 3


def _toy_stream() -> list[int]:
    random = np.random.default_rng(1)
    return [int(token) for token in np.minimum(random.geometric(0.3, 400), 11) - 1]


def test_kneser_ney_equals_the_definition() -> None:
    stream = _toy_stream()
    model = KneserNey(np.array(stream, dtype=np.uint16), vocab_size=13, order=ORDER)
    queries = np.array([0, 1, 0, 10, 10, 12, 3, 0, 0, 0, 2, 9, 11, 1], dtype=np.uint16)
    actual = model.probabilities(queries)
    for i, token in enumerate(queries.tolist()):
        context = tuple(queries[max(i - ORDER + 1, 0) : i].tolist())
        expected = _oracle_probability(stream, 13, min(ORDER, len(context) + 1), context, token)
        assert actual[i] == pytest.approx(expected, rel=1e-12), (context, token)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_kneser_ney_probabilities_sum_to_one(order: int) -> None:
    stream = _toy_stream()
    model = KneserNey(np.array(stream, dtype=np.uint16), vocab_size=13, order=order)
    for context in ([0, 0, 0, 0], stream[100:104], [12, 12, 12, 12], [10, 0, 12, 1], stream[-4:]):
        sums = [model.probabilities(np.array([*context, token], dtype=np.uint16))[-1] for token in range(13)]
        assert sum(sums) == pytest.approx(1.0, abs=1e-12) and min(sums) > 0


def test_kneser_ney_handles_the_largest_token_and_short_text() -> None:
    model = KneserNey(np.full(5, 4095, dtype=np.uint16), vocab_size=4096)
    probabilities = model.probabilities(np.full(6, 4095, dtype=np.uint16))
    assert (probabilities > 0.4).all() and len(model.probabilities(np.array([3], dtype=np.uint16))) == 1
    for stream, vocab, order in (
        (np.zeros(4), 10, 5),
        (np.full(9, 10), 10, 5),
        (np.zeros(9), 4097, 5),
        (np.zeros(9), 10, 6),
    ):
        with pytest.raises(ValueError, match="[Ee]xpected|packing"):
            KneserNey(stream.astype(np.uint16), vocab, order)


# The corpus


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 AND (MIT OR BSD-3-Clause)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("Python Software Foundation License", True),
        ("MPL-2.0", False),
        ("MIT AND GPL-3.0-only", False),
        ("unknown", False),
        ("", False),
        ("BSD-3-Clause-No-Nuclear-License", False),
    ],
)
def test_licences(licence: str, permissive: bool) -> None:
    assert text.is_permissive(licence) is permissive


def test_notice_is_split_from_text() -> None:
    source = (
        "#!/usr/bin/env python\n# Copyright 2020 A\n#\n# (c) COPYRIGHT B\n\n# licence\nimport os\n# Copyright C\n\n\n"
    )
    assert text.split_notice(source) == ("import os\n# Copyright C\n", ("Copyright 2020 A", "(c) COPYRIGHT B"))


def _document(package: str, name: str, content: str) -> text.Document:
    return text.Document(package, name, content, (), hashlib.sha256(content.encode()).hexdigest())


def test_quotes_take_turns_and_keep_the_limit() -> None:
    documents = [
        _document(p, f"{i}.py", f"{p}{i}\n" * 600) for p, n in (("a", 9), ("b", 2), ("c", 9)) for i in range(n)
    ]
    chosen = text.quote(documents, 11_000, ("a", "b"))
    assert sorted(d.package for d in chosen) == ["a"] * 4 + ["b"] * 2
    assert len(text.join(chosen).encode()) <= 11_000 and text.join(chosen).split(SEPARATOR)[:-1] == [
        d.text for d in chosen
    ]


def test_documents_that_are_not_text_are_left_out(tmp_path: Path) -> None:
    good = "def function(argument):\n    return argument\n" * 8
    contents = {
        "good.py": b"# Copyright me\n" + good.encode(),
        "short.py": b"x = 1\n",
        "wide.py": b"x = '" + b"a" * 500 + b"'\n",
        "foreign.py": ("# \u65e5\u672c\u8a9e\n" + good + "'\u65e5\u672c\u8a9e'" * 9).encode(),
        "binary.py": good.encode() + b"\xff\xfe",
        "separator.py": good.encode() + SEPARATOR.encode(),
        "huge.py": good.encode() * 600,
        "_vendor/copy.py": good.encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    package = text.Package("p", "1", "MIT", tmp_path, tuple(tmp_path / name for name in contents), tmp_path / "none")
    assert [(d.path, d.text, d.notice) for d in text.read_documents(package)] == [("good.py", good, ("Copyright me",))]
    with pytest.raises(RuntimeError, match="came without one"):
        package.licence_text()


def test_packages_that_may_not_be_used_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not installed"):
        text.find_package("no-such-package-anywhere")
    with pytest.raises(RuntimeError, match="permissive"):
        text.find_package("hypothesis")
    assert text.find_package("safetensors").licence_text().strip().startswith(b"Apache License")
