"""A plan carried out computes what the plan tried by masks computes, in every family, with and without a cache."""

import copy

import nncf
import pytest
import torch
import transformers
from torch import nn

from nncf_ext.structure.counting import count_costs
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from tests.structure_models import CAUSAL, ENCODERS, FOUR, LAYERS, SIZES, blocks_of, cached_logits, logits, make, tokens

CHANNELS = tuple(range(1, 40, 3)) + (0,)


def plans(model: nn.Module) -> dict[str, StructurePlan]:
    dense = StructurePlan.dense(model)
    heads = len(dense.kept["layers.0.attention"])
    return {
        "all": dense,
        "widths": dense.keep("layers.1.mlp", CHANNELS).keep("layers.3.mlp", (7,)),
        "heads": dense.keep("layers.0.attention", range(1, heads)).keep("layers.2.attention", (heads - 1,)),
        "first attention": dense.keep("layers.0.attention", ()),
        "last layer": dense.keep(f"layers.{LAYERS - 1}.attention", ()).keep(f"layers.{LAYERS - 1}.mlp", ()),
        "first layer": dense.keep("layers.0.attention", ()).keep("layers.0.mlp", ()),
        "attention of a prefix": dense.keep("layers.0.attention", ())
        .keep("layers.1.attention", ())
        .keep("layers.2.mlp", CHANNELS),
        "everything at once": dense.keep("layers.0.attention", ())
        .keep("layers.1.attention", ())
        .keep("layers.1.mlp", ())
        .keep("layers.2.attention", (heads - 1, 0))
        .keep("layers.2.mlp", ())
        .keep("layers.3.mlp", CHANNELS),
        "uniform": dense.keep("layers.0.mlp", range(8))
        .keep("layers.1.mlp", range(8, 16))
        .keep("layers.2.mlp", range(8))
        .keep("layers.3.mlp", range(8)),
    }


def zero_output(model: nn.Module, plan: StructurePlan) -> nn.Module:
    """An oracle without hooks or stand-ins: columns of output projections, whole branches included, become zero."""
    model = copy.deepcopy(model)
    for name, dimension in dimensions_of(model).items():
        (reader,) = dimension.readers
        projection, size = model.get_submodule(reader.module), dimension.granularity
        for unit in range(dimension.size):
            if unit not in plan.kept[name]:
                projection.weight.data[:, unit * size : (unit + 1) * size] = 0
        if not plan.kept[name] and projection.bias is not None:
            projection.bias.data.zero_()
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_extracted_equals_masked(name: str) -> None:
    model, ids = make(name).double(), tokens()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = logits(model, ids)
    for label, plan in plans(model).items():
        with masked(model, plan):
            tried, tried_cached = logits(model, ids), cached_logits(model, ids)
        small = extract_structure(model, plan)
        for found in (tried_cached, logits(small, ids), cached_logits(small, ids)):
            torch.testing.assert_close(found, tried, rtol=1e-9, atol=1e-9, msg=lambda text, at=label: f"{at}: {text}")
        if label != "all":
            assert not torch.allclose(tried, dense, atol=1e-4), label
        if not name.startswith(("gemma2", "gemma3")) and name != "opt_post_norm":
            torch.testing.assert_close(logits(zero_output(model, plan), ids), tried, rtol=1e-9, atol=1e-9)
        assert count_costs(small).parameters == sum(each.numel() for each in small.parameters())
        assert count_costs(small) == count_costs(model, plan), label
    assert torch.equal(logits(model, ids), dense)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str) -> None:
    model, ids = make(name).double(), tokens()
    dense = logits(model, ids)
    for label, plan in plans(model).items():
        with masked(model, plan):
            tried = logits(model, ids)
        small = extract_structure(model, plan)
        torch.testing.assert_close(logits(small, ids), tried, rtol=1e-9, atol=1e-9)
        assert label == "all" or not torch.allclose(tried, dense, atol=1e-4)
        assert count_costs(small) == count_costs(model, plan)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("name", ["gemma2", "opt_post_norm", "bert"])
def test_a_removed_branch_passes_hidden_states_unchanged(name: str) -> None:
    model = make(name)
    plan = StructurePlan.dense(model).keep("layers.1.attention", ()).keep("layers.1.mlp", ())
    seen = {}
    block = blocks_of(model)[1]
    handle = block.register_forward_hook(
        lambda _module, inputs, output: seen.update(
            before=inputs[0], after=output[0] if isinstance(output, tuple) else output
        )
    )
    with masked(model, plan):
        logits(model, tokens())
    handle.remove()
    assert torch.equal(seen["before"], seen["after"])


def test_the_extracted_model_is_new_and_plain() -> None:
    model = make("llama")
    small = extract_structure(model, plans(model)["everything at once"])
    theirs = {each.data_ptr() for each in model.parameters()}
    assert not theirs & {each.data_ptr() for each in small.parameters()}
    assert small.config.num_hidden_layers == LAYERS - 1 == model.config.num_hidden_layers - 1
    attention = small.model.layers[1].self_attn
    assert attention.layer_idx == 0 and attention.k_proj.weight.shape == (12, 32)
    assert small.model.layers[2].self_attn.layer_idx == 1
    assert small.model.layers[2].mlp.down_proj.in_features == len(CHANNELS)
    assert all(each.requires_grad for each in small.parameters())


def test_generation_with_cache_is_greedy_decoding_without() -> None:
    model, ids = make("qwen3"), tokens(rows=1, length=5)
    small = extract_structure(model, plans(model)["attention of a prefix"])
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, logits(small, expected)[:, -1:].argmax(dim=-1)], dim=1)
    found = small.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected)


def test_an_extracted_model_can_be_cut_again() -> None:
    model, ids = make("phi3"), tokens()
    once = extract_structure(
        model, StructurePlan.dense(model).keep("layers.0.mlp", (3, 5, 8)).keep("layers.1.attention", (1,))
    )
    twice = extract_structure(
        once, StructurePlan.dense(once).keep("layers.0.mlp", (0, 2)).keep("layers.2.attention", (1,))
    )
    plan = (
        StructurePlan.dense(model)
        .keep("layers.0.mlp", (3, 8))
        .keep("layers.1.attention", (1,))
        .keep("layers.2.attention", (1,))
    )
    assert torch.equal(logits(extract_structure(model, plan), ids), logits(twice, ids))


def test_an_error_inside_the_context_leaves_the_model_whole() -> None:
    model, ids = make("opt"), tokens()
    dense = logits(model, ids)
    with pytest.raises(KeyError), masked(model, plans(model)["everything at once"]):
        raise KeyError
    assert torch.equal(logits(model, ids), dense) and torch.equal(logits(model, ids), dense)
    torch.testing.assert_close(cached_logits(model, ids), dense, rtol=1e-4, atol=1e-4)


def test_bert_as_decoder() -> None:
    torch.manual_seed(3)
    config = transformers.BertConfig(**SIZES, **FOUR, is_decoder=True)
    model, ids = transformers.BertLMHeadModel(config).eval().double(), tokens()
    plan = (
        StructurePlan.dense(model)
        .keep("layers.0.attention", ())
        .keep("layers.2.attention", (3, 1))
        .keep("layers.1.mlp", ())
    )
    with masked(model, plan):
        tried, tried_cached = logits(model, ids), cached_logits(model, ids)
    small = extract_structure(model, plan)
    for found in (tried_cached, logits(small, ids), cached_logits(small, ids)):
        torch.testing.assert_close(found, tried, rtol=1e-9, atol=1e-9)
    assert count_costs(small).kv_bytes_per_token == 2 * (4 + 2 + 4) * 8 * 8


def test_a_model_that_attends_to_an_encoder_is_refused() -> None:
    config = transformers.BertConfig(**SIZES, **FOUR, is_decoder=True, add_cross_attention=True)
    with pytest.raises(nncf.UnsupportedModelError, match="attends to an encoder"):
        StructurePlan.dense(transformers.BertLMHeadModel(config))
