"""Mamba and Mamba-2, whole and cut, as stateful IR: the tokens of torch, states counted, stock Optimum and GenAI."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

import ov_ext
import ov_ext.genai
import ov_ext.optimum
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from ov_ext.state_space import CHUNK, convert_state_space_model
from tests.structure_models import STATE_SPACE, logits, make, tokens

pytestmark = pytest.mark.slow

TOKENIZER = Path(__file__).parents[2] / "samples" / "assets" / "tiny_lm"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
PROMPT = "def read_file(path):"
SIXTY_FOUR = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}


def cut(model: Any) -> Any:
    """Layer 1 gone, layer 2 without its state space."""
    return extract_structure(model, StructurePlan.dense(model).keep("layers.1.mamba", ()).keep("layers.2.mamba", (0,)))


@pytest.mark.parametrize("name", STATE_SPACE)
@pytest.mark.parametrize("smaller", [False, True])
def test_ir_is_torch_at_any_length(name: str, smaller: bool) -> None:
    model = make(name)
    model = cut(model) if smaller else model
    ir = convert_state_space_model(model)
    names = [variable.get_info().variable_id for variable in ir.get_variables()]
    assert sum("past.conv" in each for each in names) == (3 if smaller else 4)
    assert sum("past.ssm" in each for each in names) == (2 if smaller else 4)
    assert len(ir.get_sinks()) == len(names)
    request = ov.Core().compile_model(ir, "CPU", EXACT).create_infer_request()
    ids = tokens(2, 2 * CHUNK + 9)
    expected = logits(model, ids).numpy()

    def run(first: int, last: int) -> np.ndarray:
        part = ids[:, first:last].numpy()
        mask = np.ones((2, last), np.int64)  # as long as the whole text, or as the part: its end counts
        mask = mask if last % 2 else mask[:, first:]
        inputs = {"input_ids": part, "attention_mask": mask, "beam_idx": np.arange(2, dtype=np.int32)}
        return request.infer(inputs)["logits"].copy()

    whole = len(ids[0])
    for ends in ([whole], [CHUNK, whole], [1, 3, CHUNK + 7, *range(CHUNK + 8, whole + 1)]):
        request.reset_state()
        found = np.concatenate([run(first, last) for first, last in zip([0, *ends], ends, strict=False)], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # Rows change places: their states go along.
    request.reset_state()
    run(0, 5)
    swapped = {"input_ids": ids[[1, 0], 5:6].numpy(), "attention_mask": np.ones((2, 1), np.int64)}
    found = request.infer(swapped | {"beam_idx": np.array([1, 0], np.int32)})["logits"]
    np.testing.assert_allclose(found[:, 0], expected[[1, 0], 5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_generates_what_torch_generates(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ends: dict[str, Any] = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 0)
    model = cut(make(name, vocab_size=3072, **ends))
    prompt = tokenizer(PROMPT, return_tensors="pt")
    pair = tokenizer([PROMPT, "import os"], return_tensors="pt", padding=True, padding_side="left")
    expected, beams = (
        model.generate(**prompt, **SIXTY_FOUR, **more) for more in ({}, {"num_beams": 3, "use_cache": False})
    )
    both = model.generate(**pair, **SIXTY_FOUR)
    ov_ext.optimum.export(model, tokenizer, tmp_path / "ir")
    for load in (ov_ext.optimum.load, OVModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "ir", ov_config=EXACT)
        assert torch.equal(loaded.generate(**prompt, **SIXTY_FOUR), expected)
        assert torch.equal(loaded.generate(**prompt, **SIXTY_FOUR), expected)  # the state begins anew
        assert torch.equal(loaded.generate(**pair, **SIXTY_FOUR), both)
    ours = ov_ext.optimum.load(tmp_path / "ir", ov_config=EXACT)
    assert torch.equal(ours.generate(**prompt, **SIXTY_FOUR, num_beams=3), beams)
    pipe = ov_ext.genai.pipeline(tmp_path / "ir", "CPU", **EXACT)
    config = openvino_genai.GenerationConfig(max_new_tokens=64, ignore_eos=True, do_sample=False)
    made = expected[0, prompt["input_ids"].shape[1] :]
    assert pipe.generate(PROMPT, config) == tokenizer.decode(made, skip_special_tokens=True)


def test_half_precision_stays_and_other_tools_go_on(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = cut(make("mamba2", vocab_size=3072, hidden_size=128, num_heads=32, eos_token_id=0, pad_token_id=0))
    half = copy.deepcopy(model).bfloat16()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    ov_ext.optimum.export(half, tokenizer, tmp_path / "ir")
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())
    ir = ov.Core().read_model(tmp_path / "ir" / "openvino_model.xml")
    large = [op for op in ir.get_ops() if op.get_type_name() == "Constant" and np.prod(op.get_output_shape(0)) > 9000]
    assert len(large) == 8  # in and out of three layers, embedding and head
    assert {op.get_element_type().get_type_name() for op in large} == {"bf16"}
    prompt = tokenizer(PROMPT, return_tensors="pt")
    expected = half.float().generate(**prompt, **SIXTY_FOUR)
    assert torch.equal(ov_ext.optimum.load(tmp_path / "ir", ov_config=EXACT).generate(**prompt, **SIXTY_FOUR), expected)
    small = nncf.compress_weights(ir, mode=nncf.CompressWeightsMode.INT8_SYM)
    packed, report = ov_ext.pack_sparse_weights(small, ov_ext.SparsePolicy(min_sparsity=0.0, activation_group=0))
    ids = prompt["input_ids"].numpy()
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, np.int32)}
    core = ov_ext.add_extension(ov.Core())
    found = core.compile_model(packed, "CPU", EXACT)(inputs)["logits"]
    assert sum(op.get_type_name() == "SparseMatMul" for op in packed.get_ops()) == 7
    error = np.abs(found - logits(half.float(), prompt["input_ids"]).numpy()).max()
    assert error < 0.05 * np.abs(found).max()


def test_other_models_are_refused_and_private_names_exist() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no Mamba mixers.*mamba2"):
        convert_state_space_model(make("llama"))
    patches = importlib.import_module("openvino.frontend.pytorch.patch_model")
    assert callable(getattr(patches, "__make_16bit_traceable")) and callable(patches.unpatch_model)  # noqa: B009
    stateful = importlib.import_module("openvino._offline_transformations")
    assert callable(stateful.apply_make_stateful_transformation)
