"""The quantized model is NNCF's own torch form: same arithmetic; stock tools save, strip, export and reload it."""

import json

import nncf
import nncf.torch
import numpy as np
import openvino as ov
import pytest
import torch
from nncf.torch.quantization.layers import INT4SymmetricWeightsDecompressor
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.weights.records import record_of

INT4 = nncf.CompressWeightsMode.INT4_SYM


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.first = nn.Linear(128, 192)
        self.second = nn.Linear(192, 128, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def mlp_items():
    return [torch.randn(16, 128, generator=torch.Generator().manual_seed(index)) for index in range(4)]


def on_the_grid(model, dataset, group_size=64, **settings):
    advanced = AdvancedSparseWeightsParameters(quantization=INT4, group_size=group_size, **settings)
    return nncf_ext.compress(model, CompressMode.SPARSE_GPT, ratio=0.5, dataset=dataset, advanced_parameters=advanced)


def hooks_of(model):
    """Decompressors by the path of the weight, found by name only."""
    found = {}
    for name, module in model.named_modules():
        if name.startswith("__nncf_hooks.post_hooks.") and name.endswith("weight__0.0"):
            found[name.removeprefix("__nncf_hooks.post_hooks.").removesuffix("__0.0").replace(":", ".")] = module
    return found


def grid_weight(packed, scale, shape):
    """Oracle: low nibble first, codes shifted by 8, one float16 scale for each group."""
    data = packed.numpy().ravel()
    codes = np.stack([data & 15, data >> 4], axis=1).ravel().astype(np.int8) - 8
    codes = codes.reshape(shape)
    scales = scale.numpy().reshape(shape[0], -1)
    return codes.astype(np.float16) * np.repeat(scales, shape[1] // scales.shape[1], axis=1), codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_form_is_that_of_nncf(dtype):
    model = on_the_grid(Mlp().to(dtype), nncf.Dataset([item.to(dtype) for item in mlp_items()]))
    stock = nncf.compress_weights(
        Mlp().to(dtype),
        mode=INT4,
        group_size=64,
        all_layers=True,
        dataset=nncf.Dataset([mlp_items()[0].to(dtype)]),
    )
    assert model.state_dict().keys() == stock.state_dict().keys()
    for name, value in stock.state_dict().items():
        ours = model.state_dict()[name]
        assert (ours.dtype, ours.shape) == (value.dtype, value.shape), name
    for name, hook in hooks_of(stock).items():
        ours = hooks_of(model)[name]
        assert isinstance(ours, INT4SymmetricWeightsDecompressor)
        assert tuple(ours.compressed_weight_shape) == tuple(hook.compressed_weight_shape)
        assert tuple(ours.result_shape) == tuple(hook.result_shape) and ours.result_dtype is hook.result_dtype
        assert model.get_parameter(name).requires_grad is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decompressor_gives_our_grid_bit_for_bit(dtype):
    dataset = nncf.Dataset([item.to(dtype) for item in mlp_items()])
    model = on_the_grid(Mlp().to(dtype), dataset, keep_prerounding=True)
    for name, hook in hooks_of(model).items():
        expected, codes = grid_weight(model.get_parameter(name), hook._scale, hook.result_shape)
        seen = hook(model.get_parameter(name))
        assert torch.equal(seen, torch.from_numpy(expected).to(dtype)), name
        prerounding = record_of(model.get_submodule(name.removesuffix(".weight"))).prerounding
        scales = hook._scale.float().reshape(codes.shape[0], -1).repeat_interleave(64, dim=1)
        assert np.array_equal((prerounding / scales).round().clamp(-8, 7).numpy(), codes)
        assert int((prerounding == 0).sum()) >= prerounding.numel() // 2


def test_forward_uses_the_grid():
    item = mlp_items()[0]
    model = on_the_grid(Mlp(), nncf.Dataset(mlp_items()))
    weights = {name: hook(model.get_parameter(name)) for name, hook in hooks_of(model).items()}
    plain = Mlp()
    plain.first.weight.data, plain.second.weight.data = weights["first.weight"], weights["second.weight"]
    assert torch.equal(model(item), plain(item))


def test_blocks_after_a_packed_one_see_its_grid(tiny_llama, token_items, token_dataset):
    """Reconstruction error noted for the last block equals one computed from the packed model's own activations."""
    model = on_the_grid(tiny_llama(), token_dataset)
    name = "model.layers.1.self_attn.q_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for item in token_items:
            model(**item)
    handle.remove()
    rows = [
        value[0, torch.arange(min(16, value.shape[1])) * value.shape[1] // min(16, value.shape[1])] for value in seen
    ]
    tokens = torch.cat(rows)
    exact = tiny_llama().get_submodule(name).weight.detach()
    weight = hooks_of(model)[f"{name}.weight"](model.get_submodule(name).weight)
    error = torch.linalg.norm(tokens @ (exact - weight).T) / torch.linalg.norm(tokens @ exact.T)
    assert record_of(model.get_submodule(name)).error == pytest.approx(float(error), rel=1e-4)


def test_stock_config_round_trip(tiny_llama, token_dataset, logits_of):
    model = on_the_grid(tiny_llama(), token_dataset)
    config = json.loads(json.dumps(nncf.torch.get_config(model)))
    state = model.state_dict()

    again = nncf_ext.load_compressed(tiny_llama(), config, state)
    assert torch.equal(logits_of(again), logits_of(model))
    assert nncf.torch.get_config(again) == nncf.torch.get_config(model)

    # The same with NNCF alone: decompressors from the config, packed parameters by hand.
    stock = nncf.torch.load_from_config(tiny_llama(), config, allowed_modules=("nncf.*", "nncf_ext.*"))
    for name, value in state.items():
        if value.dtype is torch.uint8:
            parameter = stock.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.data = torch.empty_like(value)
    stock.load_state_dict(state)
    assert torch.equal(logits_of(stock), logits_of(model))


def test_state_dict_of_another_model_is_refused(tiny_llama, token_dataset):
    model = on_the_grid(tiny_llama(), token_dataset)
    config, state = nncf.torch.get_config(model), dict(model.state_dict())
    del state["model.norm.weight"]
    with pytest.raises(nncf.ValidationError, match="missing.*model.norm.weight"):
        nncf_ext.load_compressed(tiny_llama(), config, state)


def test_strip_leaves_the_result(tiny_llama, token_items, token_dataset, logits_of):
    model = on_the_grid(tiny_llama(), token_dataset)
    for strip_format in (nncf.StripFormat.DQ, nncf.StripFormat.NATIVE):
        stripped = nncf.strip(model, strip_format=strip_format, example_input=token_items[0])
        assert torch.equal(logits_of(stripped), logits_of(model)), strip_format


def int4_constants(ir):
    """INT4 constants and their float16 scales, as numpy, in the IR's order."""
    found = []
    for op in ir.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_element_type() == ov.Type.i4:
            convert = next(iter(op.output(0).get_target_inputs())).get_node()
            multiply = next(iter(convert.output(0).get_target_inputs())).get_node()
            scale = multiply.input_value(1).get_node()
            found.append((np.asarray(op.data), np.asarray(scale.data)))
    return found


def unpack_i4(data):
    raw = np.ascontiguousarray(data).view(np.uint8).ravel()
    nibbles = np.stack([raw & 15, raw >> 4], axis=1).ravel().astype(np.int16)
    return np.where(nibbles > 7, nibbles - 16, nibbles)


def check_same_grid(ir, model):
    expected = []
    for name, hook in hooks_of(model).items():
        codes = grid_weight(model.get_parameter(name), hook._scale, hook.result_shape)[1]
        expected.append((codes.tobytes(), hook._scale.numpy().tobytes()))
    found = [(unpack_i4(data).astype(np.int8).tobytes(), scale.tobytes()) for data, scale in int4_constants(ir)]
    assert sorted(found) == sorted(expected)


def test_convert_model_lands_on_the_same_grid():
    item = mlp_items()[0]
    model = on_the_grid(Mlp(), nncf.Dataset(mlp_items()))
    ir = ov.convert_model(model, example_input=item)
    check_same_grid(ir, model)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    result = ov.compile_model(ir, "CPU", exact)(item.numpy())[0]
    np.testing.assert_allclose(result, model(item).detach().numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_optimum_export_lands_on_the_same_grid(tiny_llama, token_items, token_dataset, logits_of, tmp_path):
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVModelForCausalLM

    model = on_the_grid(tiny_llama(), token_dataset)
    expected = logits_of(model)
    export_from_model(model, output=tmp_path, task="text-generation-with-past", stateful=True)
    check_same_grid(ov.Core().read_model(tmp_path / "openvino_model.xml"), model)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    exported = OVModelForCausalLM.from_pretrained(tmp_path, ov_config=exact)
    logits = exported(**token_items[0], attention_mask=torch.ones_like(token_items[0]["input_ids"])).logits
    torch.testing.assert_close(torch.as_tensor(logits), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_saved_folder_reloads(tiny_llama, token_dataset, logits_of, tmp_path, dtype):
    model = tiny_llama()
    for parameter in model.parameters():  # as from_pretrained(dtype=...): rotary frequencies stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    on_the_grid(model, token_dataset)
    nncf_ext.save_pretrained(model, tmp_path / "int4")
    assert not list(tmp_path.glob("int4/*.bin"))
    again = nncf_ext.load_pretrained(tmp_path / "int4", dtype=dtype)
    for name, hook in hooks_of(model).items():
        assert torch.equal(again.get_parameter(name), model.get_parameter(name))
        assert torch.equal(hooks_of(again)[name]._scale, hook._scale)
    if dtype is None:
        assert torch.equal(logits_of(again), logits_of(model))
    else:
        assert logits_of(again).dtype is torch.float32
        torch.testing.assert_close(logits_of(again), logits_of(model).float(), rtol=0.1, atol=0.3)


def test_saved_folder_of_a_tied_model_reloads(tiny_llama, token_dataset, logits_of, tmp_path):
    model = on_the_grid(tiny_llama(tie_word_embeddings=True), token_dataset)
    nncf_ext.save_pretrained(model, tmp_path)
    again = nncf_ext.load_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again), logits_of(model))


def test_sparse_folder_is_an_ordinary_one(tiny_llama, token_dataset, logits_of, tmp_path):
    from transformers import AutoModelForCausalLM

    model = nncf_ext.compress(tiny_llama(), CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)
    nncf_ext.save_pretrained(model, tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), nncf_ext.load_pretrained(tmp_path)):
        assert torch.equal(logits_of(again), logits_of(model))


def test_bare_container_is_refused_before_any_change():
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(nncf.UnsupportedModelError, match="Sequential"):
        on_the_grid(model, nncf.Dataset(mlp_items()))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
