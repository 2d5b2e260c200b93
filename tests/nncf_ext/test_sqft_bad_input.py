"""What cannot be merged is refused before training, and a merge that would lose something does not return."""

import copy

import nncf
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode, MergeMode
from tests.nncf_ext.mergeable import (
    MAKERS,
    QUANT_AWARE,
    SPARSE,
    TEXT,
    adapter,
    logits,
    mergeable,
    packed,
    sparse,
    tokens,
    train,
)


def refuse(error, match, model, mode=SPARSE, **settings):
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(error, match=match):
        nncf_ext.make_mergeable(model, mode, **settings)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora=True.*whole rows"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'.*zeros"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens adapts a Embedding.*torch.nn.Linear"),
    ],
)
def test_adapters_of_another_kind_are_refused(settings, match):
    refuse(nncf.UnsupportedModelError, match, adapter(sparse(), **settings))
    with pytest.raises(nncf.UnsupportedModelError, match=match):
        nncf_ext.merge(adapter(sparse(), **settings), SPARSE)


def test_models_of_another_kind_are_refused():
    with pytest.raises(nncf.UnsupportedModelError, match="get_peft_model.*LlamaForCausalLM"):
        nncf_ext.make_mergeable(sparse(), SPARSE)
    other = get_peft_model(sparse(), LoHaConfig(target_modules=["q_proj"]))
    refuse(nncf.UnsupportedModelError, "LOHA.*Only LoRA", other)
    with pytest.raises(nncf.ParameterNotSupportedError, match="MergeMode.SPARSE, MergeMode.QUANT_AWARE"):
        nncf_ext.make_mergeable(adapter(sparse()), "dense")
    with pytest.raises(nncf.ParameterNotSupportedError, match="MergeMode.SPARSE"):
        nncf_ext.merge(adapter(sparse()), "dense")


def test_experts_in_one_tensor_are_refused_with_that_reason():
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model = get_peft_model(sparse("mixtral"), lora)
    refuse(nncf.UnsupportedModelError, "experts adapts the parameter 'down_proj' of MixtralExperts", model)


def test_transposed_weights_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32))
    for settings in ({"fan_in_fan_out": True}, {}):
        with pytest.warns(UserWarning) if not settings else torch.no_grad():
            model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["c_attn"], **settings))
        refuse(nncf.UnsupportedModelError, "fan_in_fan_out=True", model)


def test_bases_that_cannot_carry_the_mask_are_refused():
    dense = MAKERS["llama"]()
    refuse(nncf.ValidationError, "None of the 10 adapted weights has a zero", adapter(dense))
    empty = sparse()
    empty.model.layers[1].mlp.up_proj.weight.data[7] = 0.0
    refuse(nncf.ValidationError, r"layers.1.mlp.up_proj has 1 rows without any weight", adapter(empty))
    broken = sparse()
    broken.model.layers[0].mlp.up_proj.weight.data[3, 3] = torch.nan
    refuse(nncf.ValidationError, r"layers.0.mlp.up_proj holds values that are not finite", adapter(broken))
    tied = sparse()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    model = adapter(tied, target_modules=["q_proj", "lm_head"])
    refuse(nncf.ValidationError, "weight of lm_head is shared.*embed_tokens", model)


def test_order_of_steps():
    model, _ = mergeable(SPARSE)
    refuse(nncf.ValidationError, "mergeable already", model)
    plain = adapter(sparse())
    plain.merge_adapter()
    refuse(nncf.ValidationError, "is merged.*unmerge_adapter", plain)
    two = adapter(sparse())
    two.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "second"])
    refuse(nncf.ValidationError, "exactly one", two)
    with pytest.raises(nncf.ParameterNotSupportedError, match="belong to MergeMode.QUANT_AWARE"):
        nncf_ext.make_mergeable(adapter(sparse()), SPARSE, grid=packed())
    for wrong in ({"dropout": "all"}, {"start": "zero"}):
        with pytest.raises(nncf.ValidationError, match="must be one of"):
            nncf_ext.AdvancedSqftParameters(**wrong)


def test_quantized_base_without_its_floating_partner():
    refuse(nncf.ValidationError, r"is packed.*nncf_ext.prerounding", adapter(packed()))
    refuse(nncf.ValidationError, r"is packed.*nncf_ext.prerounding", adapter(packed()), QUANT_AWARE, grid=packed())
    refuse(nncf.ValidationError, "needs the grid", adapter(sparse()), QUANT_AWARE)
    with pytest.raises(nncf.ValidationError, match="no packed INT4 weight"):
        nncf_ext.prerounding(sparse())
    stock = nncf.compress_weights(
        sparse(),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=64,
        all_layers=True,
        dataset=nncf.Dataset([{"input_ids": tokens(1)["input_ids"]}]),
    )
    with pytest.raises(nncf.ValidationError, match="no record of its weight before rounding"):
        nncf_ext.prerounding(stock)
    # The sparse model that NNCF quantized is a partner: rounding to nearest keeps its zeros.
    model = nncf_ext.make_mergeable(adapter(sparse()), QUANT_AWARE, grid=stock)
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-3, atol=1e-3)


def test_base_whose_zeros_are_not_zero_on_the_grid():
    base = nncf_ext.prerounding(packed())
    weight = base.model.layers[0].self_attn.k_proj.weight
    row, column = (int(index[0]) for index in torch.nonzero(weight.abs() == weight.abs().max(), as_tuple=True))
    weight.data[row, column] = 0.0
    refuse(
        nncf.ValidationError,
        r"layers.0.self_attn.k_proj has 1 zeros whose codes in the grid are not zero",
        adapter(base),
        QUANT_AWARE,
        grid=packed(),
    )


def test_grids_that_do_not_fit():
    from transformers import LlamaConfig, LlamaForCausalLM

    partner = nncf_ext.prerounding(packed())
    refuse(nncf.ValidationError, "no packed weight at model.layers.0", adapter(partner), QUANT_AWARE, grid=sparse())
    longer = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 3}, num_key_value_heads=1))
    model = adapter(longer)
    refuse(nncf.ValidationError, "no such layer at model.layers.2", model, QUANT_AWARE, grid=packed())
    wider = LlamaForCausalLM(LlamaConfig(**{**TEXT, "intermediate_size": 192}, num_key_value_heads=1))
    model = adapter(wider, target_modules=["q_proj"])
    for layer in (each for each in wider.modules() if isinstance(each, nn.Linear)):
        layer.weight.data.fill_(1.0)
    refuse(
        nncf.ValidationError,
        r"\[192, 64\] in the base and \[128, 64\].*not partners",
        model,
        QUANT_AWARE,
        grid=packed(),
    )


def test_group_size_that_does_not_divide():
    from transformers import LlamaConfig, LlamaForCausalLM

    odd = LlamaForCausalLM(LlamaConfig(**{**TEXT, "intermediate_size": 96}, num_key_value_heads=1))

    def compress(**settings):
        return nncf_ext.compress(
            odd,
            CompressMode.SPARSE_WANDA,
            ratio=0.5,
            dataset=nncf.Dataset([{"input_ids": tokens(1)["input_ids"]}]),
            advanced_parameters=AdvancedSparseWeightsParameters(
                quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64, keep_prerounding=True, **settings
            ),
        )

    with pytest.raises(nncf.InvalidGroupSizeError, match="down_proj"):
        compress()
    grid = compress(group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE)
    refuse(
        nncf.ValidationError,
        "no packed weight at model.layers.0.mlp.down_proj.*96 inputs are no multiple of group size 64",
        adapter(nncf_ext.prerounding(grid)),
        QUANT_AWARE,
        grid=grid,
    )


@pytest.mark.parametrize("kind", ["asymmetric", "adapters of NNCF"])
def test_grids_of_nncf_that_are_not_symmetric_codes(kind):
    dataset = nncf.Dataset([{"input_ids": tokens(1)["input_ids"]}])
    options = {"group_size": 64, "all_layers": True, "dataset": dataset}
    base = sparse()
    if kind == "asymmetric":
        grid = nncf.compress_weights(copy.deepcopy(base), mode=nncf.CompressWeightsMode.INT4_ASYM, **options)
        refuse(nncf.ValidationError, "Asymmetric grids are not supported", adapter(base), QUANT_AWARE, grid=grid)
        return
    grid = nncf.compress_weights(
        copy.deepcopy(base),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=4),
        **options,
    )
    refuse(nncf.ValidationError, r"FQ_LORA in training. nncf.strip", adapter(base), QUANT_AWARE, grid=grid)


@pytest.mark.parametrize("mode", list(MergeMode))
def test_merge_names_the_first_layer_that_would_break_the_contract(mode):
    model, _ = mergeable(mode)
    train(model, steps=1)
    base = model.get_base_model().model
    weight = base.layers[1].mlp.up_proj.base_layer.weight
    row, column = (int(index[0]) for index in torch.nonzero(weight == 0, as_tuple=True))
    weight.data[row, column] = 0.5
    with pytest.raises(nncf.ValidationError, match=r"layers.1.mlp.up_proj cannot be merged.*other zeros"):
        nncf_ext.merge(model, mode)
    weight.data[row, column] = 0.0
    nncf_ext.merge(model, mode)
    factor = base.layers[0].mlp.down_proj.lora_B["default"].weight
    factor.data[1, 1] = torch.inf
    with pytest.raises(nncf.ValidationError, match=r"layers.0.mlp.down_proj cannot be merged.*not finite"):
        nncf_ext.merge(model, mode)


def test_merge_finds_layers_that_left_the_grid():
    model, _ = mergeable(QUANT_AWARE)
    weight = model.get_base_model().model.layers[1].self_attn.o_proj.weight
    weight.data[0, 0] += 1e-3
    with pytest.raises(nncf.ValidationError, match=r"layers.1.self_attn.o_proj cannot be merged.*left the grid"):
        nncf_ext.merge(model, QUANT_AWARE)
    trained, _ = mergeable(QUANT_AWARE, trainable_scales=True)
    trained.get_base_model().model.layers[0].self_attn.q_proj.lora_scales["default"].data[0, 0] = 0.0
    with pytest.raises(nncf.ValidationError, match=r"q_proj cannot be merged.*scales are zero"):
        nncf_ext.merge(trained, QUANT_AWARE)


def test_merge_in_the_other_mode():
    with pytest.raises(nncf.ValidationError, match="Use QUANT_AWARE"):
        nncf_ext.merge(mergeable(QUANT_AWARE)[0], SPARSE)
    for model in (mergeable(SPARSE)[0], adapter(sparse())):
        with pytest.raises(nncf.ValidationError, match="make_mergeable"):
            nncf_ext.merge(model, QUANT_AWARE)
