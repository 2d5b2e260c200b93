"""The committed language model, half of it zeros, through every way that users run it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch

import ov_ext
import ov_ext.genai
import ov_ext.optimum
from tests.ov_ext.conftest import TINY_LM, load_sparse_lm
from tests.ov_ext.grids import grid, torch_grid
from tests.structure_models import make

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]

# One precision everywhere, so that differences are those of summation order.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
PROMPTS = (
    "def read_file(path):\n    ",
    "import os\nimport sys\n\n",
    "class Node:\n    def __init__(self",
    "for i in range(",
    "    try:\n        return ",
    "@property\ndef name(self):",
    "raise ValueError(",
    "with open(filename, ",
)


def windows(tokenizer: Any, count: int, length: int) -> np.ndarray:
    """[count, length] token ids, spread over the held-out text."""
    ids = np.array(tokenizer((TINY_LM.parent / "heldout.txt").read_text(encoding="utf-8"))["input_ids"])
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


class Session:
    """A stateful IR with its KV cache, batch 1 or more."""

    def __init__(self, core: ov.Core, folder: Path, config: dict[str, str]) -> None:
        model = core.read_model(folder / "openvino_model.xml")
        self.request = core.compile_model(model, "CPU", config).create_infer_request()

    def logits(self, ids: np.ndarray, past: int = 0) -> np.ndarray:
        """[batch, tokens] ids after `past` tokens -> [batch, tokens, vocabulary]."""
        if past == 0:
            self.request.reset_state()
        rows, tokens = ids.shape
        inputs = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((rows, past + tokens), np.int64),
            "position_ids": np.arange(past, past + tokens)[None].repeat(rows, 0),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        return self.request.infer(inputs)["logits"].copy()

    def greedy(self, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        """Greedy continuation, and the gap between the two largest logits at each step."""
        step, past, found, margins = np.array([prompt]), 0, [], []
        for _ in range(tokens):
            last = self.logits(step, past)[0, -1]
            past += step.shape[1]
            second, first = np.sort(last)[-2:]
            found.append(int(last.argmax()))
            margins.append(float(first - second))
            step = np.array([[found[-1]]])
        return found, margins


def true_logits(ids: np.ndarray, int4: Any = None) -> np.ndarray:
    """The model in float64 with the weights that the IR means: codes times scales where it is INT4."""
    model = load_sparse_lm().double()
    if int4 is not None:
        parameters = dict(model.named_parameters())
        for name, (codes, scales) in torch_grid(int4).items():
            weight = torch.from_numpy(codes * scales.astype(np.float64))
            parameters[f"{name}.weight"].data.copy_(weight.reshape(parameters[f"{name}.weight"].shape))
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.fixture(scope="module")
def sample(tokenizer: Any) -> np.ndarray:
    return windows(tokenizer, 4, 96)


@pytest.fixture(scope="module")
def errors(core: ov.Core, folders: dict[str, Path], sample: np.ndarray, int4_lm: Any) -> dict[str, float]:
    """Largest logit error against float64, per folder, in f32 and without activation quantization."""
    truth = {"plain": true_logits(sample), "int4": true_logits(sample, int4_lm)}
    return {
        name: float(np.abs(Session(core, folders[name], EXACT).logits(sample) - truth[kind]).max())
        for kind in truth
        for name in (kind, f"{kind}-packed-exact")
    }


def test_exported_int4_is_the_torch_grid(core: ov.Core, folders: dict[str, Path], int4_lm: Any) -> None:
    model = core.read_model(folders["int4"] / "openvino_model.xml")
    expected = torch_grid(int4_lm)
    found = {name: entry for name, entry in grid(model).items() if entry[0] == "i4"}
    assert len(found) == 6 * 7 + 1 and set(found) == set(expected) - {"model.embed_tokens"}
    for name, (_, codes, scales) in found.items():
        assert np.array_equal(codes, expected[name][0]) and np.array_equal(scales, expected[name][1])
    assert len(model.get_sinks()) == 2 * 6  # stateful: keys and values of six layers


def test_exported_folder_is_complete(folders: dict[str, Path]) -> None:
    for name in ("int4", "int4-packed"):
        files = {path.name for path in folders[name].iterdir()}
        assert files >= {
            f"openvino_{part}.{kind}" for part in ("model", "tokenizer", "detokenizer") for kind in ("xml", "bin")
        }
        assert files >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_every_linear_layer_is_packed(core: ov.Core, folders: dict[str, Path]) -> None:
    for name in ("plain-packed", "int4-packed"):
        types = [node.get_type_name() for node in core.read_model(folders[name] / "openvino_model.xml").get_ops()]
        assert types.count("SparseMatMul") == 6 * 4 + 1  # q, k, v and gate, up are one each; lm_head too
    size = {name: (folder / "openvino_model.bin").stat().st_size for name, folder in folders.items()}
    assert size["int4-packed"] < size["int4"] and size["plain-packed"] < 0.7 * size["plain"]


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_logits_are_as_near_the_truth_as_stock(kind: str, errors: dict[str, float]) -> None:
    """Stock f32 and packed f32 sum the same products in different orders: neither may err twice as far as the other."""
    assert errors[kind] < 1e-3  # the yardstick itself is sane
    assert errors[f"{kind}-packed-exact"] <= 2 * errors[kind]


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_greedy_tokens_equal_stock(
    core: ov.Core, folders: dict[str, Path], tokenizer: Any, kind: str, errors: dict[str, float]
) -> None:
    """64 tokens on 8 prompts; they may part only where the two best tokens are nearer than both models' errors."""
    stock, packed = (Session(core, folders[name], EXACT) for name in (kind, f"{kind}-packed-exact"))
    tolerance = 4 * (
        errors[kind] + errors[f"{kind}-packed-exact"]
    )  # error of a difference of two logits, in two models
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        expected, margins = stock.greedy(ids, 64)
        found, _ = packed.greedy(ids, 64)
        if found != expected:
            step = next(i for i in range(64) if found[i] != expected[i])
            assert margins[step] < tolerance, f"{prompt!r} parts at step {step} with a margin of {margins[step]}"


@pytest.mark.parametrize("kind", ["plain", "int4"])
def test_default_settings_lose_no_perplexity(
    core: ov.Core, folders: dict[str, Path], tokenizer: Any, kind: str
) -> None:
    """Both arms as users get them: bf16 where the CPU has it, dynamic quantization on."""
    ids = windows(tokenizer, 24, 192)
    losses = {}
    for name in (kind, f"{kind}-packed"):
        session = Session(core, folders[name], {})
        chunks = [torch.from_numpy(session.logits(part)[:, :-1]).float() for part in np.split(ids, 6)]
        targets = torch.from_numpy(ids[:, 1:]).flatten()
        losses[name] = torch.nn.functional.cross_entropy(torch.cat(chunks).flatten(0, 1), targets).item()
    assert losses[f"{kind}-packed"] - losses[kind] < np.log(1.005)


def test_stock_optimum_classes_after_register(folders: dict[str, Path], tokenizer: Any, int4_lm: Any) -> None:
    from optimum.intel import OVModelForCausalLM
    from transformers import pipeline

    assert ov_ext.optimum.register() >= 2
    stock = OVModelForCausalLM.from_pretrained(folders["int4-packed-exact"], ov_config=EXACT)
    ours = ov_ext.optimum.load(folders["int4-packed-exact"], ov_config=EXACT)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = int4_lm.generate(**inputs, **options)
    assert torch.equal(stock.generate(**inputs, **options), expected)
    assert torch.equal(ours.generate(**inputs, **options), expected)
    beams = ours.generate(**inputs, num_beams=3, **options)
    assert torch.equal(beams, int4_lm.generate(**inputs, num_beams=3, **options))
    text = pipeline("text-generation", model=stock, tokenizer=tokenizer)(PROMPTS[0], **options)[0]["generated_text"]
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_a_batch_of_prompts(folders: dict[str, Path], tokenizer: Any) -> None:
    model = ov_ext.optimum.load(folders["int4-packed-exact"], ov_config=EXACT)
    tokenizer = ov_ext.optimum.load_tokenizer(folders["int4-packed-exact"])
    tokenizer.padding_side = "left"
    single = [
        model.generate(**tokenizer(p, return_tensors="pt"), max_new_tokens=12, do_sample=False)[0] for p in PROMPTS[:3]
    ]
    batch = model.generate(
        **tokenizer(list(PROMPTS[:3]), return_tensors="pt", padding=True), max_new_tokens=12, do_sample=False
    )
    for row, alone in zip(batch, single, strict=True):
        assert row[-12:].tolist() == alone[-12:].tolist()


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_genai(folders: dict[str, Path], backend: str) -> None:
    """Paged attention and the stateful path, packed against stock."""
    options = {"max_new_tokens": 24, "do_sample": False, "apply_chat_template": False}
    texts = [
        ov_ext.genai.pipeline(folders[name], ATTENTION_BACKEND=backend, **EXACT).generate(PROMPTS[0], **options)
        for name in ("int4", "int4-packed-exact")
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 24


def test_genai_with_users_extensions(folders: dict[str, Path]) -> None:
    pipe = ov_ext.genai.pipeline(folders["int4-packed"], extensions=[str(ov_ext.extension_path())])
    assert pipe.generate(PROMPTS[1], max_new_tokens=4, do_sample=False)


def test_a_model_in_bf16_exports_without_f32_copies(
    tokenizer: Any, core: ov.Core, tmp_path: Path, folders: dict[str, Path]
) -> None:
    half = load_sparse_lm().bfloat16()
    ov_ext.optimum.export(half, tokenizer, tmp_path / "bf16", rest=None)
    weights = sum(parameter.nbytes for parameter in half.parameters())
    for folder in (tmp_path / "bf16", folders["plain"]):  # the other one computed with 16-bit values in f32
        assert (folder / "openvino_model.bin").stat().st_size < 1.02 * weights
    model, report = ov_ext.pack_sparse_weights(core.read_model(tmp_path / "bf16" / "openvino_model.xml"))
    assert len(report.replaced) == 43 and {layer.kind for layer in report.replaced} == {"bf16"}
    assert not any(layer.note for layer in report.replaced)  # nothing was rounded


# --- misuse ---------------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = load_sparse_lm()
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="3072 tokens, the model embeds 100"):
        ov_ext.optimum.export(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_few_tokens_without_a_row_are_named(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama", vocab_size=len(tokenizer) - 9, num_hidden_layers=2)
    last = {number: token for token, number in tokenizer.get_vocab().items()}[len(tokenizer) - 9]
    with caplog.at_level(logging.WARNING, "ov_ext"):
        folder = ov_ext.optimum.export(model, tokenizer, tmp_path / "out")
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ov_ext"]
    assert said.startswith(f"The model embeds {len(tokenizer) - 9} tokens, and its tokenizer has more: {last} (3063), ")
    assert said.endswith(" (3070) and 1 more. Text with these cannot be read.")
    assert len(ov_ext.optimum.load_tokenizer(folder)) == len(tokenizer)


def test_an_existing_folder_is_refused_before_the_export(tokenizer: Any, folders: dict[str, Path]) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folders["plain"].iterdir())
    with pytest.raises(ValueError, match="exists.*overwrite"):
        ov_ext.optimum.export(load_sparse_lm(), tokenizer, folders["plain"])
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folders["plain"].iterdir()) == before


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="openvino_model.xml and config.json are needed"):
        ov_ext.optimum.load(tmp_path)
    with pytest.raises(ValueError, match="lacks openvino_model.xml and openvino_tokenizer.xml"):
        ov_ext.genai.pipeline(tmp_path)
