"""Merging is a contract: what was trained is what comes out, with every zero and every code where it was."""

import copy

import nncf
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

import nncf_ext
from nncf_ext import MergeMode, RankGroup
from nncf_ext.algorithms.sqft.layers import MaskedLoraLinear
from nncf_ext.weights.records import record_of
from tests.nncf_ext.mergeable import (
    QUANT_AWARE,
    SPARSE,
    adapter,
    logits,
    mergeable,
    oracle_codes,
    oracle_delta,
    packed,
    sparse,
    tokens,
    train,
)
from tests.nncf_ext.packed_layers import grid_of

DTYPES = [torch.float32, torch.bfloat16]


def adapted_layers(model: PeftModel) -> dict[str, MaskedLoraLinear]:
    base = model.get_base_model()
    return {name: each for name, each in base.named_modules() if isinstance(each, MaskedLoraLinear)}


def zeros(weight: torch.Tensor | np.ndarray) -> float:
    return float((weight == 0).sum()) / weight.size if isinstance(weight, np.ndarray) else zeros(weight.float().numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("mode", list(MergeMode))
def test_merged_model_computes_what_was_trained(mode, name, dtype):
    model, origin = mergeable(mode, name, dtype)
    assert torch.equal(logits(model), logits(origin))  # an untrained adapter changes nothing: GPTQ's codes included
    net = nncf_ext.make_elastic(model, groups=[RankGroup([".*"], [6, 4, 1])])
    train(model, net=net)
    for point in (net.maximal(), net.heuristic(), net.random(5)):
        net.activate(point)
        trained, before = logits(model), {name: each.clone() for name, each in model.state_dict().items()}
        assert not torch.equal(trained, logits(origin))
        merged = nncf_ext.merge(model, mode)
        assert type(merged) is type(model.get_base_model()) and not hasattr(merged, "peft_config")
        assert not any("lora" in part for part, _ in merged.named_modules())
        assert torch.equal(logits(merged), trained)
        assert torch.equal(logits(model), trained)
        assert all(torch.equal(each, before[part]) for part, each in model.state_dict().items())
        check_contract(model, merged, origin, mode)


def check_contract(model: PeftModel, merged: nn.Module, origin: nn.Module, mode: MergeMode) -> None:
    for path, layer in adapted_layers(model).items():
        start = layer.base_layer.weight.detach()
        rank = model.active_adapters and layer.lora_A["default"].out_features
        rank = getattr(getattr(layer.lora_A["default"], "nncf_ext_elastic_rank", None), "active", rank)
        A, B = layer.lora_A["default"].weight[:rank], layer.lora_B["default"].weight[:, :rank]
        change = oracle_delta(A, B, 1.5)
        if mode is SPARSE:
            found = merged.get_submodule(path).weight.detach()
            expected = start.float() + torch.from_numpy(change) * (start != 0)
            assert found.dtype is start.dtype and torch.equal(found, expected.to(start.dtype))
            assert torch.equal(found == 0, (start == 0) | (expected.to(start.dtype) == 0))
        else:
            codes, scales = grid_of(origin, path)
            found, kept = grid_of(merged, path)
            assert kept.tobytes() == scales.tobytes()
            assert np.array_equal(found, oracle_codes(start, change, scales))
            assert zeros(codes) >= 0.5  # the base was on the grid with at least its zeros
        assert not found[(start == 0).numpy() if mode is QUANT_AWARE else start == 0].any()
        assert zeros(found) >= zeros(start) >= 0.5


def test_layers_without_an_adapter_stay_on_the_grid():
    model, origin = mergeable(QUANT_AWARE)
    merged = nncf_ext.merge(train(model, steps=2), QUANT_AWARE)
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"):
        assert path not in adapted_layers(model)
        for one, other in zip(grid_of(merged, path), grid_of(origin, path), strict=True):
            assert one.tobytes() == other.tobytes()
    report = nncf_ext.compression_report(merged)
    assert report.sparsity >= nncf_ext.compression_report(origin).sparsity >= 0.5
    assert {weight.precision for weight in report.compressed} == {"int4"} and len(report.compressed) == 14


@pytest.mark.parametrize("mode", list(MergeMode))
def test_n_of_m_stays(mode):
    if mode is SPARSE:
        model = nncf_ext.make_mergeable(adapter(sparse(pattern="2:4")), SPARSE)
    else:
        origin = packed(pattern="2:4")
        model = nncf_ext.make_mergeable(adapter(nncf_ext.prerounding(origin)), QUANT_AWARE, grid=origin)
    merged = nncf_ext.merge(train(model), mode)
    for path in adapted_layers(model):
        weight = merged.get_submodule(path).weight.detach().numpy() if mode is SPARSE else grid_of(merged, path)[0]
        assert ((weight.reshape(-1, 4) != 0).sum(axis=1) <= 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_start_rounds_the_base_to_nearest(dtype):
    origin = packed(dtype=dtype)
    base = nncf_ext.prerounding(origin)
    codes = {}
    for path, layer in base.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, nn.Linear):
            codes[path] = grid_of(origin, path)[0]
            layer.weight.data *= 1 + 0.1 * torch.randn_like(layer.weight)
    for start in ("grid", "nearest"):
        advanced = nncf_ext.AdvancedSqftParameters(start=start)
        model = adapter(copy.deepcopy(base))
        nncf_ext.make_mergeable(model, QUANT_AWARE, grid=origin, advanced_parameters=advanced)
        merged = nncf_ext.merge(model, QUANT_AWARE)
        for path, layer in adapted_layers(model).items():
            plain, scales = base.get_submodule(path).weight, grid_of(origin, path)[1]
            nearest = oracle_codes(plain, np.zeros(plain.shape, np.float32), scales)
            assert 0 < (nearest != codes[path]).mean() < 0.5
            assert np.array_equal(grid_of(merged, path)[0], codes[path] if start == "grid" else nearest)
            changed = (layer.base_layer.weight != plain).numpy()
            assert np.array_equal(changed, (nearest != codes[path]) & (start == "grid"))


def test_plain_adapter_is_masked_and_the_error_reported():
    model = train(adapter(sparse()))
    merged = nncf_ext.merge(model, SPARSE)
    errors = {}
    for path, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            start = layer.base_layer.weight.detach()
            change = torch.from_numpy(oracle_delta(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 1.5))
            found = merged.get_submodule(path).weight
            assert torch.equal(found, start + change * (start != 0))
            wanted = (start + change).norm()
            errors[f"{path}.weight"] = float((change * (start == 0)).norm() / wanted)
    report = {weight.name: weight for weight in nncf_ext.compression_report(merged).weights}
    for path, error in errors.items():
        assert report[path].error == pytest.approx(error, rel=1e-4) and error > 0.01
        assert report[path].error_of == "weight" and "masked" in report[path].note
    kept = copy.deepcopy(model).merge_and_unload()
    assert zeros(kept.model.layers[0].mlp.up_proj.weight.detach()) < 0.1  # what stock PEFT makes of the zeros


def test_mask_is_that_of_the_start_even_where_a_sum_hits_zero():
    model, _ = mergeable(SPARSE)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    row, column = (int(index[0]) for index in torch.nonzero(layer.base_layer.weight, as_tuple=True))
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()[0, column] = 1.0
        layer.lora_B["default"].weight.zero_()[row, 0] = -layer.base_layer.weight[row, column] / 1.5
    before = layer.base_layer.weight.clone()
    merged = nncf_ext.merge(model, SPARSE)
    assert merged.model.layers[0].self_attn.q_proj.weight[row, column].abs() < 1e-6
    model.merge_adapter()
    assert torch.equal((layer.base_layer.weight != 0) & (before == 0), torch.zeros_like(before, dtype=torch.bool))
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, before)
    assert torch.equal(layer.base_layer.weight != 0, before != 0)


def test_extracted_ranks_merge_to_the_same_codes():
    model, _ = mergeable(QUANT_AWARE, dtype=torch.bfloat16)
    net = nncf_ext.make_elastic(model, groups=[RankGroup([".*"], [6, 3])])
    train(model, net=net)
    net.activate(net.random(1))
    cut = nncf_ext.extract(net, net.active)
    assert adapted_layers(cut)["model.layers.0.self_attn.q_proj"].lora_A["default"].out_features in (6, 3)
    one, other = nncf_ext.merge(model, QUANT_AWARE), nncf_ext.merge(cut, QUANT_AWARE)
    for path in adapted_layers(model):
        assert np.array_equal(grid_of(one, path)[0], grid_of(other, path)[0])


def test_trained_scales_are_those_of_the_merged_model_and_travel_with_the_adapter(tmp_path):
    model, origin = mergeable(QUANT_AWARE, trainable_scales=True)
    assert torch.equal(logits(model), logits(origin))
    train(model)
    merged, trained = nncf_ext.merge(model, QUANT_AWARE), logits(model)
    assert torch.equal(logits(merged), trained)
    for path, layer in adapted_layers(model).items():
        scales = grid_of(merged, path)[1]
        assert np.array_equal(scales, layer.lora_scales["default"].detach().half().numpy())
        assert (scales != grid_of(origin, path)[1]).mean() > 0.5
    model.save_pretrained(tmp_path)
    again, _ = mergeable(QUANT_AWARE, trainable_scales=True)
    again.load_adapter(tmp_path, "default")
    assert torch.equal(logits(again.eval()), trained)
    model.set_adapter("default")
    assert all(layer.lora_scales["default"].requires_grad for layer in adapted_layers(model).values())


@pytest.mark.parametrize("mode", list(MergeMode))
def test_saved_parts_merge_to_the_same_model_later(mode, tmp_path):
    model, origin = mergeable(mode, dtype=torch.bfloat16)
    partner = copy.deepcopy(origin) if mode is SPARSE else nncf_ext.prerounding(origin)
    nncf_ext.save_pretrained(partner, tmp_path / "partner")
    nncf_ext.save_pretrained(origin, tmp_path / "origin")
    train(model).save_pretrained(tmp_path / "adapter")

    base = nncf_ext.load_pretrained(tmp_path / "partner")
    grid = None if mode is SPARSE else nncf_ext.load_pretrained(tmp_path / "origin")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = nncf_ext.merge(nncf_ext.make_mergeable(again, mode, grid=grid).eval(), mode)
    assert torch.equal(logits(merged), logits(model))
    nncf_ext.save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(logits(nncf_ext.load_pretrained(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize("mode", list(MergeMode))
def test_stock_trainer_with_checkpointing_and_autocast(mode, tmp_path):
    """Trains in bfloat16 autocast with recomputation, is interrupted, goes on, and ends where it would have ended."""

    def run(steps, resume=None):
        model, _ = mergeable(mode, lora={"lora_dropout": 0.1})
        arguments = TrainingArguments(
            str(tmp_path / f"{steps}"), max_steps=4, per_device_train_batch_size=2, bf16=True, use_cpu=True,
            gradient_checkpointing=True, save_steps=2, report_to=[], learning_rate=1e-2, seed=3, logging_steps=9,
            disable_tqdm=True,
        )  # fmt: skip
        rows = [{key: value[0] for key, value in tokens(seed, rows=1).items()} for seed in range(8)]
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model.eval()

    whole = run(4)
    merged = nncf_ext.merge(whole, mode)
    # The trainer left its autocast on the forward of the PEFT model.
    assert torch.equal(logits(merged), logits(whole.get_base_model())) and not merged.is_gradient_checkpointing
    resumed = run(5, resume=str(tmp_path / "4/checkpoint-2"))
    assert torch.equal(logits(resumed), logits(whole))


@pytest.mark.parametrize("mode", list(MergeMode))
def test_recomputation_gives_the_same_gradients(mode):
    model, _ = mergeable(mode, lora={"lora_dropout": 0.2})
    net = nncf_ext.make_elastic(model, groups=[RankGroup([".*"], [6, 4])])
    train(model, steps=1)
    net.activate(net.heuristic())
    found = []
    for settings in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if settings is not None:
            model.gradient_checkpointing_enable(settings)
            model.enable_input_require_grads()
        model.train().zero_grad()
        torch.manual_seed(8)
        model(**tokens(3)).loss.backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_stock_peft_functions_work_or_refuse():
    model, origin = mergeable(SPARSE)
    train(model)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(origin))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    for path, layer in adapted_layers(model).items():
        assert not layer.base_layer.weight[origin.get_submodule(path).weight == 0].any()
    with pytest.raises(nncf.ValidationError, match="unmerge"):
        nncf_ext.merge(model, SPARSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(origin)) or torch.allclose(logits(model), logits(origin), atol=1e-4)
    quantized, _ = mergeable(QUANT_AWARE)
    with pytest.raises(nncf.ParameterNotSupportedError, match="leave the INT4 grid"):
        quantized.merge_adapter()
    with pytest.raises(nncf.ParameterNotSupportedError, match="mixes adapters"):
        quantized(input_ids=tokens(1)["input_ids"], adapter_names=["default", "default"])


def test_adapter_loads_in_stock_peft(tmp_path):
    model, origin = mergeable(SPARSE)
    train(model).save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(origin), tmp_path)
    for path, layer in adapted_layers(model).items():
        assert torch.equal(
            stock.get_base_model().get_submodule(path).lora_B["default"].weight, layer.lora_B["default"].weight
        )
    assert torch.equal(logits(nncf_ext.merge(stock, SPARSE)), logits(model))  # masks on merging, as in training


def test_records_of_weights_before_rounding_do_not_outlive_the_partner():
    origin = packed()
    partner = nncf_ext.prerounding(origin)
    assert "__nncf_hooks" not in dict(partner.named_children())
    assert type(partner).forward is partner.forward.__func__
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(partner.get_submodule(path).weight, record_of(origin.get_submodule(path)).prerounding)
        assert record_of(partner.get_submodule(path)) is None
