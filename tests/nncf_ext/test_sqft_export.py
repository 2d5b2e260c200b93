"""Merged models leave torch as they are: into folders and back, into OpenVINO, and packed without their zeros."""

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import nncf_ext
import ov_ext
import ov_ext.optimum
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode, ElasticMode, MergeMode, RankGroup
from tests.nncf_ext.adapters import randomized
from tests.nncf_ext.packed_layers import grid_of
from tests.ov_ext.conftest import TINY_LM

INT4 = nncf.CompressWeightsMode.INT4_SYM
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
# The torch form rounds code times scale to float16 (2^-11 of each weight), OpenVINO does not.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
# Every matrix with zeros, however small; activations stay floating.
ALL_SPARSE = ov_ext.SparsePolicy(min_sparsity=0.4, min_weights=0, max_growth=999, activation_group=0)


class Mlp(nn.Module):
    """Named as in a language model; without its attention, so that tracing takes it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.up_proj = nn.Linear(128, 192)
        self.down_proj = nn.Linear(192, 128, bias=False)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)))


def mlp_items():
    return [torch.randn(16, 128, generator=torch.Generator().manual_seed(index)) for index in range(4)]


def trained(base, mode, dataset, loss_of):
    """
    A base of 50 % zeros with an adapter that was really trained at several ranks; active is a lower one than the full.

    :return: The adapted model, and the weights of its sparse floating base.
    """
    quantized = mode is MergeMode.QUANT_AWARE
    advanced = AdvancedSparseWeightsParameters(
        **({"quantization": INT4, "group_size": 64, "keep_prerounding": True} if quantized else {})
    )
    compressed = nncf_ext.compress(
        base, CompressMode.SPARSE_GPT, ratio=0.5, dataset=dataset, advanced_parameters=advanced
    )
    partner = nncf_ext.prerounding(compressed) if quantized else compressed
    sparse = {name: each.weight.detach().clone() for name, each in adapted_layers(partner).items()}
    lora = LoraConfig(r=6, lora_alpha=12, target_modules=[*{name.rpartition(".")[2] for name in sparse}])
    model = randomized(get_peft_model(partner, lora))
    nncf_ext.make_mergeable(model, mode, grid=compressed if quantized else None)
    elastic = nncf_ext.make_elastic(model, ElasticMode.RANK, groups=[RankGroup([r".*_proj$"], [6, 4, 1], per="model")])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    for step in range(4):
        elastic.activate(elastic.random(seed=1, step=step))
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    elastic.activate(elastic.heuristic())
    return model.eval(), sparse


def adapted_layers(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"}


def forward_codes(model):
    """The codes that the layers of a quantization-aware adapter compute with."""
    layers = model.get_base_model().named_modules()
    mergeable = {name: layer for name, layer in layers if hasattr(layer, "merged_weight")}
    return {name: layer.merged_weight("default").codes().numpy() for name, layer in mergeable.items()}


def right_operands(ir):
    """What multiplies activations from the right: by the module's name, its operations down to the constant."""
    found = {}
    for matmul in ir.get_ops():
        if matmul.get_type_name() == "MatMul":
            chain = [matmul.input_value(1).get_node()]
            while chain[-1].get_type_name() != "Constant" and chain[-1].get_input_size():
                chain.append(chain[-1].input_value(0).get_node())
            if chain[-1].get_type_name() == "Constant":
                found[matmul.get_friendly_name().removeprefix("__module.").split("/")[0]] = chain
    return found


def grid(ir):
    """Codes [out, in], nibble by nibble, and scales of every INT4 weight."""
    found = {}
    for name, (*operations, constant) in right_operands(ir).items():
        if constant.get_element_type() == ov.Type.i4:
            data = np.ascontiguousarray(constant.get_data()).view(np.uint8).ravel()
            codes = np.stack([data & 15, data >> 4], axis=1).ravel().astype(np.int8)
            codes = np.where(codes > 7, codes - 16, codes).reshape(constant.shape[0], -1)
            (multiply,) = [each for each in operations if each.get_type_name() == "Multiply"]
            found[name] = codes, multiply.input_value(1).get_node().get_data()
    return found


def check_grid(ir, merged, codes, sparse):
    """Codes and scales of every layer are the same in the training forward, the merged model and the IR."""
    found = grid(ir)
    assert {*found} == {*codes} == {*sparse}
    for name, expected in codes.items():
        stored, scales = grid_of(merged, name)
        element_codes, element_scales = found[name]
        assert np.array_equal(stored, expected), name
        assert np.array_equal(element_codes, expected), name
        assert element_scales.tobytes() == scales.tobytes(), name
        assert not expected[sparse[name].numpy() == 0].any() and (expected == 0).mean() >= 0.5, name


def check_packed(core, ir, codes):
    """Every layer with codes, and no other, becomes a sparse INT4 product; unpacked, it has the same codes."""
    packed, report = ov_ext.pack_sparse_weights(ir, ALL_SPARSE)
    forms = [(layer.kind, layer.form) for layer in report.replaced]
    assert forms == [("int4_sym", "sparse")] * len(codes), str(report)
    products = [node for node in packed.get_ops() if node.get_type_name() == "SparseMatMul"]
    assert {node.get_attributes()["kind"] for node in products} == {"int4"}
    assert sum(node.get_input_size() - 1 for node in products) == len(codes)  # layers with one input share an operation
    restored = grid(ov_ext.unpack_sparse_weights(packed))
    assert {*restored} == {*codes}
    for name, expected in codes.items():
        assert np.array_equal(restored[name][0], expected), name


@pytest.fixture(scope="module")
def core():
    return ov_ext.add_extension(ov.Core())


def square(model):
    return sum(model(item).square().mean() for item in mlp_items())


def test_quantization_aware_merge_converts_code_for_code(core):
    item = mlp_items()[0]
    model, sparse = trained(Mlp(), MergeMode.QUANT_AWARE, nncf.Dataset(mlp_items()), square)
    merged, codes = nncf_ext.merge(model, MergeMode.QUANT_AWARE), forward_codes(model)
    with torch.no_grad():
        expected = model(item)
        assert torch.equal(merged(item), expected)
    ir = ov_ext.convert_model(merged, example_input=item)
    check_grid(ir, merged, codes, sparse)
    stock = core.compile_model(ir, "CPU", EXACT)(item.numpy())[0]
    np.testing.assert_allclose(stock, expected, **CLOSE)
    ours = ir.clone()
    check_packed(core, ir, codes)
    packed, _ = ov_ext.pack_sparse_weights(ours, ALL_SPARSE)
    np.testing.assert_allclose(core.compile_model(packed, "CPU", EXACT)(item.numpy())[0], expected, **CLOSE)


def test_sparse_merge_converts_zero_for_zero(core):
    item = mlp_items()[0]
    model, sparse = trained(Mlp(), MergeMode.SPARSE, nncf.Dataset(mlp_items()), square)
    merged = nncf_ext.merge(model, MergeMode.SPARSE)
    ir = ov_ext.convert_model(merged, example_input=item)
    constants = {name: chain[-1].get_data() for name, chain in right_operands(ir).items()}
    for name, before in sparse.items():
        expected = merged.get_parameter(f"{name}.weight").detach().numpy()
        assert np.array_equal(constants[name], expected) and not expected[before.numpy() == 0].any()
        assert np.abs(expected - before.numpy()).max() > 1e-3
    packed, report = ov_ext.pack_sparse_weights(ir, ALL_SPARSE)
    assert [(layer.kind, layer.form) for layer in report.layers] == [("f32", "sparse")] * 2
    assert all(layer.sparsity >= 0.5 for layer in report.layers)
    result = core.compile_model(packed, "CPU", EXACT)(item.numpy())[0]
    with torch.no_grad():
        np.testing.assert_allclose(result, model(item), rtol=0.02, atol=0.02)  # weights were rounded to bfloat16


@pytest.fixture(scope="module")
def language_model():
    """A tiny Llama with the committed tokenizer's vocabulary, adapted and trained quantization-aware."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=64)
    base = LlamaForCausalLM(config).eval()
    for layer in adapted_layers(base).values():
        layer.weight.data.mul_(4)
    generator = torch.Generator().manual_seed(2)
    items = [{"input_ids": torch.randint(0, len(tokenizer), (1, length), generator=generator)} for length in (24, 17)]

    def loss_of(model):
        return sum(model(**item, labels=item["input_ids"]).loss for item in items)

    model, sparse = trained(base, MergeMode.QUANT_AWARE, nncf.Dataset(items), loss_of)
    return tokenizer, model, sparse, items[0]["input_ids"]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.slow
def test_language_model_is_exported_and_packed_code_for_code(core, language_model, tmp_path):
    tokenizer, model, sparse, ids = language_model
    merged, codes = nncf_ext.merge(model, MergeMode.QUANT_AWARE), forward_codes(model)
    expected = logits_of(model, ids)
    assert torch.equal(logits_of(merged, ids), expected)
    ov_ext.optimum.export(merged, tokenizer, tmp_path / "stock", rest=None)
    ir = core.read_model(tmp_path / "stock" / "openvino_model.xml")
    check_grid(ir, merged, codes, sparse)
    check_packed(core, ir, codes)
    for source in ("stock", "packed"):
        if source == "packed":
            folder = tmp_path / "packed"
            folder.mkdir()
            for name in ("config.json", "generation_config.json"):
                (folder / name).write_bytes((tmp_path / "stock" / name).read_bytes())
            packed, _ = ov_ext.pack_sparse_weights(
                core.read_model(tmp_path / "stock" / "openvino_model.xml"), ALL_SPARSE
            )
            ov_ext.save_model(packed, folder / "openvino_model.xml")
        loaded = ov_ext.optimum.load(tmp_path / source, ov_config=EXACT)
        found = torch.as_tensor(loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merged_folder_reloads_bit_for_bit(language_model, tmp_path, dtype):
    _, model, _, ids = language_model
    merged, codes = nncf_ext.merge(model, MergeMode.QUANT_AWARE), forward_codes(model)
    nncf_ext.save_pretrained(merged, tmp_path)
    again = nncf_ext.load_pretrained(tmp_path, dtype=dtype)
    for name, expected in codes.items():
        found, scales = grid_of(again, name)
        assert np.array_equal(found, expected) and scales.tobytes() == grid_of(merged, name)[1].tobytes(), name
    if dtype is None:
        assert torch.equal(logits_of(again, ids), logits_of(model, ids))
