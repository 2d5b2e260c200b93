"""Models whose layers differ in heads, or lack attention, as stateful IRs: the tokens of torch from every runtime."""

from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import pytest
import torch

import ov_ext
import ov_ext.optimum
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from tests.killing import largest_file
from tests.structure_models import CAUSAL, make

pytestmark = pytest.mark.slow

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
IDS = torch.arange(5, 12)[None]
HEADS = (3, 4, 1)


@pytest.fixture(scope="module")
def small(tokenizer: Any) -> Any:
    """Llama: layer 0 without attention, then 3, 4 and 1 key/value heads; no MLP in layer 1, 8 channels in layer 2."""
    model = make("llama", vocab_size=len(tokenizer))
    plan = (
        StructurePlan.dense(model)
        .keep("layers.0.attention", ())
        .keep("layers.1.attention", range(1, 4))
        .keep("layers.1.mlp", ())
    )
    return extract_structure(model, plan.keep("layers.2.mlp", range(3, 11)).keep("layers.3.attention", (3,)))


@pytest.fixture(scope="module")
def folder(small: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ov_ext.optimum.export(small, tokenizer, tmp_path_factory.mktemp("structure") / "ir")


def torch_tokens(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding by whole forwards, without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@pytest.mark.parametrize("size", [2_000, 15_000])
def test_a_full_disk_is_said(small: Any, tokenizer: Any, tmp_path: Path, size: int) -> None:
    """By OpenVINO while Optimum writes the model, or by the tokenizer's library, each in its own way."""
    with pytest.raises(OSError, match="File too large. Nothing was written. Free some") as caught, largest_file(size):
        ov_ext.optimum.export(small, tokenizer, tmp_path / "ir")
    assert caught.value.filename == str(tmp_path / "ir") and not [*tmp_path.iterdir()]


def test_states_have_the_shapes_of_their_layers(folder: Path) -> None:
    model = ov.Core().read_model(folder / "openvino_model.xml")
    assert len(model.get_sinks()) == 2 * len(HEADS)
    names = [op.get_variable_id() for op in model.get_ops() if op.get_type_name() == "ReadValue"]
    heads = [
        op.get_output_partial_shape(0)[1].get_length() for op in model.get_ops() if op.get_type_name() == "ReadValue"
    ]
    assert sorted(heads) == sorted(2 * HEADS) and len(set(names)) == 2 * len(HEADS)
    # Removed branches leave nothing behind: one attention and the MatMuls of what is there.
    kinds = [op.get_type_name() for op in model.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == len(HEADS)
    matmuls = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
    weights = [op for op in matmuls if len(op.input_value(1).get_partial_shape()) == 2]
    assert len(weights) == 4 * len(HEADS) + 3 * 3 + 1


def test_optimum_generates_the_tokens_of_torch(small: Any, folder: Path) -> None:
    model = ov_ext.optimum.load(folder, ov_config=EXACT)
    found = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, torch_tokens(small, IDS, 12))
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(logits, small(input_ids=IDS).logits.detach(), rtol=1e-4, atol=1e-4)


def test_stock_classes_need_nothing_of_ours(small: Any, folder: Path) -> None:
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT)
    found = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, torch_tokens(small, IDS, 5))


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_genai_generates_the_tokens_of_torch(backend: str, small: Any, folder: Path) -> None:
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND=backend, **EXACT)
    ids = openvino_genai.TokenizedInputs(ov.Tensor(IDS.numpy()), ov.Tensor(torch.ones_like(IDS).numpy()))
    settings = {"max_new_tokens": 12, "do_sample": False, "ignore_eos": True}
    assert list(pipeline.generate(ids, **settings).tokens[0]) == torch_tokens(small, IDS, 12)[0, 7:].tolist()


def test_weights_compress_and_pack_afterwards(folder: Path, core: ov.Core) -> None:
    model = nncf.compress_weights(
        core.read_model(folder / "openvino_model.xml"), mode=nncf.CompressWeightsMode.INT8_SYM
    )
    inputs = {
        "input_ids": IDS.numpy(),
        "attention_mask": torch.ones_like(IDS).numpy(),
        "position_ids": torch.arange(IDS.shape[1])[None].numpy(),
        "beam_idx": torch.zeros(1, dtype=torch.int32).numpy(),
    }
    stock = core.compile_model(model, "CPU", EXACT)(inputs)["logits"]
    policy = ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=1, max_growth=999, activation_group=0)
    packed, report = ov_ext.pack_sparse_weights(model, policy)
    kinds = [op.get_type_name() for op in packed.get_ops()]
    assert kinds.count("SparseMatMul") > len(HEADS), report
    found = core.compile_model(packed, "CPU", EXACT)(inputs)["logits"]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(stock), rtol=1e-3, atol=1e-3)


def test_gaps_in_the_cache_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = make("gemma2", vocab_size=len(tokenizer))
    gap = extract_structure(model, StructurePlan.dense(model).keep("layers.0.attention", ()))
    with pytest.raises(ValueError, match=r"places \[0, 1, 3\] of the cache"):
        ov_ext.optimum.export(gap, tokenizer, tmp_path / "ir")


# Optimum-Intel exports Gemma up to transformers 5.0 only.
@pytest.mark.parametrize("name", [name for name in CAUSAL if not name.startswith("gemma")])
def test_every_family_exports_uneven_layers(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = make(name, vocab_size=len(tokenizer))
    plan = StructurePlan.dense(model)
    if not getattr(model.config, "sliding_window", None) or name == "mistral":
        # Where layers are of two kinds, removed attention leaves gaps in the cache.
        plan = plan.keep("layers.0.attention", ()).keep("layers.1.attention", ()).keep("layers.1.mlp", ())
    heads = len(plan.kept["layers.2.attention"])
    small = extract_structure(model, plan.keep("layers.2.attention", range(1, heads)).keep("layers.3.mlp", (2, 30, 11)))
    ov_ext.optimum.export(small, tokenizer, tmp_path / "ir")
    found = ov_ext.optimum.load(tmp_path / "ir", ov_config=EXACT)
    made = found.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert torch.equal(made, small.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False))
    logits = found(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(logits, small(input_ids=IDS).logits.detach(), rtol=1e-4, atol=1e-4)
