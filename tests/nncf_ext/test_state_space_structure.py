"""Mamba, Mamba-2 and Zamba2: what removal means, against mixers written here; masks, surgery, files, counts."""

import json

import nncf
import pytest
import torch
import transformers
from torch.nn import functional as F

import nncf_ext
from nncf_ext.standalone.gated_convolution import GatedConvMixer
from nncf_ext.structure.counting import count_costs
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.masking import masked
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.reference import plan_from_reference, plan_to_reference
from nncf_ext.structure.surgery import extract_structure
from tests.structure_models import HYBRIDS, STATE_SPACE, blocks_of, by_layer, cached_logits, logits, make, tokens

MODELS = STATE_SPACE | HYBRIDS
NO_SSM = (0,)


def plans(dense: StructurePlan, name: str) -> dict[str, StructurePlan]:
    last = len(by_layer(dense)) - 1
    found = {
        "first block": dense.keep("layers.0.mamba", ()),
        "last block": dense.keep(f"layers.{last}.mamba", ()),
        "two blocks": dense.keep("layers.0.mamba", ()).keep("layers.2.mamba", ()),
        "one state space": dense.keep("layers.1.mamba", NO_SSM),
        "mixed": dense.keep("layers.0.mamba", ()).keep("layers.1.mamba", NO_SSM).keep(f"layers.{last}.mamba", NO_SSM),
    }
    found["all state spaces"] = dense
    for layer in range(last + 1):
        found["all state spaces"] = found["all state spaces"].keep(f"layers.{layer}.mamba", NO_SSM)
    if name in HYBRIDS:
        channels = (3, *range(5, 37))
        found |= {
            "attention": dense.keep("layers.3.attention", ()).keep("layers.4.attention", ()),
            "one MLP": dense.keep("layers.2.mlp", ()),
            "all MLPs": dense.keep("layers.2.mlp", ()).keep("layers.3.mlp", ()).keep("layers.4.mlp", ()),
            "shared channels": dense.keep("layers.2.mlp", channels).keep("layers.4.mlp", channels),
            "channels of the other use": dense.keep("layers.2.mlp", ()).keep("layers.4.mlp", channels),
            "everything of a layer": dense.keep("layers.3.mlp", ())
            .keep("layers.3.attention", ())
            .keep("layers.3.mamba", ()),
        }
    return found


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_extracted_is_reloaded(name, tmp_path) -> None:
    model, ids = make(name), tokens()
    before = logits(model, ids)
    own = (logits(model, ids) - cached_logits(model, ids)).abs().max()
    for what, plan in plans(StructurePlan.dense(model), name).items():
        small = extract_structure(model, plan)
        with masked(model, plan):
            expected, expected_cached = logits(model, ids), cached_logits(model, ids)
        assert not torch.allclose(expected, before, atol=1e-3), what
        torch.testing.assert_close(logits(small, ids), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cached_logits(small, ids), expected_cached, rtol=1e-5, atol=1e-5)
        # Zamba2's own decoding differs from its own whole passes by more than rounding.
        torch.testing.assert_close(expected_cached, expected, rtol=0, atol=float(5 * own + 1e-5))
        assert count_costs(model, plan) == count_costs(small), what
        assert count_costs(small).parameters == sum(each.numel() for each in small.parameters()), what
        folder = tmp_path / what.replace(" ", "-")
        nncf_ext.save_pretrained(small, folder)
        loaded = nncf_ext.load_pretrained(folder)
        assert torch.equal(logits(loaded, ids), logits(small, ids)), what
        assert torch.equal(cached_logits(loaded, ids), cached_logits(small, ids)), what
        assert sum(each.numel() for each in loaded.parameters()) == sum(each.numel() for each in small.parameters())
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", STATE_SPACE)
def test_blocks_go_without_a_trace_and_stock_transformers_reads_the_rest(name, tmp_path) -> None:
    model, ids = make(name), tokens()
    small = extract_structure(model, StructurePlan.dense(model).keep("layers.1.mamba", ()).keep("layers.3.mamba", ()))
    assert small.config.num_hidden_layers == len(small.backbone.layers) == 2
    kept = model.backbone.layers[0], model.backbone.layers[2]
    with torch.no_grad():
        hidden = model.backbone.embeddings(ids)
        for block in kept:
            hidden = hidden + block.mixer(block.norm(hidden))
        expected = model.lm_head(model.backbone.norm_f(hidden))
    torch.testing.assert_close(logits(small, ids), expected, rtol=1e-5, atol=1e-5)
    nncf_ext.save_pretrained(small, tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(input_ids=ids, **asked), small.generate(input_ids=ids, **asked))


@pytest.mark.parametrize("name", MODELS)
def test_a_mixer_without_its_state_space_is_a_gated_convolution(name) -> None:
    """Written out: loops over tokens and channels, weights by their places in the dense tensors."""
    model = make(name)
    block = blocks_of(model)[0]
    mixer = block.mamba if name in HYBRIDS else block.mixer
    hidden = torch.randn(2, 5, 32)
    width, kernel = mixer.intermediate_size, mixer.conv_kernel_size
    bias = 0 if mixer.in_proj.bias is None else mixer.in_proj.bias
    projected = hidden @ mixer.in_proj.weight.T + bias
    second_kind = hasattr(mixer, "dt_bias")
    gate = projected[..., :width] if second_kind else projected[..., width : 2 * width]
    x = projected[..., width : 2 * width] if second_kind else projected[..., :width]
    mixed = torch.zeros_like(x)
    for token in range(5):
        for back in range(min(kernel, token + 1)):
            mixed[:, token] += x[:, token - back] * mixer.conv1d.weight[:width, 0, kernel - 1 - back]
    mixed = F.silu(mixed + (0 if mixer.conv1d.bias is None else mixer.conv1d.bias[:width]))
    mixed = mixed * F.silu(gate)
    if second_kind:
        groups = getattr(mixer, "n_groups", 1) if name in HYBRIDS else 1  # Mamba-2 of transformers norms all channels
        parts = mixed.unflatten(-1, (groups, -1))
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
        mixed = parts.flatten(-2) * mixer.norm.weight
    expected = F.linear(mixed, mixer.out_proj.weight, mixer.out_proj.bias)
    gated = GatedConvMixer(mixer)
    torch.testing.assert_close(gated(hidden), expected, rtol=1e-4, atol=1e-5)
    assert all(each.data_ptr() for each in gated.parameters())
    assert gated.in_proj.weight.data_ptr() == mixer.in_proj.weight.data_ptr()  # seen, not copied
    assert gated.out_proj is mixer.out_proj


def test_padding_on_the_left_changes_nothing() -> None:
    for name in ("mamba", "mamba2"):
        model = make(name)
        plan = StructurePlan.dense(model).keep("layers.1.mamba", NO_SSM).keep("layers.2.mamba", NO_SSM)
        small, ids = extract_structure(model, plan), tokens(2, 7)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], dim=1)
        asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        plain = small.generate(input_ids=ids, **asked)[:, 7:]
        assert torch.equal(small.generate(input_ids=padded, attention_mask=mask, **asked)[:, 10:], plain), name


def test_zamba2_parts_are_bypassed_as_published() -> None:
    """Attention gone: no embeddings beside the stream, straight to the MLP. MLP gone: attention's output as it is.
    Mamba gone in a hybrid layer: what the transformer gave stays in the stream."""
    model = make("zamba2")
    layer, hidden, embeddings = model.model.layers[3], torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    shared = layer.shared_transformer
    positions = model.model.rotary_emb(hidden, position_ids=torch.arange(5)[None])

    def attention(x):
        joined = shared.input_layernorm(torch.cat([x, embeddings], dim=-1))
        mask = torch.full((5, 5), -torch.inf).triu(1)[None, None].expand(2, 1, 5, 5)
        return shared.self_attn(joined, layer_idx=3, attention_mask=mask, position_embeddings=positions)[0]

    def mlp(x):
        x = shared.pre_ff_layernorm(x)
        feed = shared.feed_forward
        both = feed.gate_up_proj(x) + feed.gate_up_proj_adapter_list[1](x)
        return feed.down_proj(F.gelu(both[..., :40]) * both[..., 40:])

    def mamba(x, added):
        decoder = layer.mamba_decoder
        return x + decoder.mamba(decoder.input_layernorm(x + added))

    expected = {
        "attention": lambda x: mamba(x, layer.linear(mlp(x))),
        "mlp": lambda x: mamba(x, layer.linear(attention(x))),
        "mamba": lambda x: x + layer.linear(mlp(attention(x))),
    }
    mask = torch.full((5, 5), -torch.inf).triu(1)[None, None].expand(2, 1, 5, 5)
    with torch.no_grad():
        wanted = {name: function(hidden) for name, function in expected.items()}
        for name, value in wanted.items():
            with masked(model, StructurePlan.dense(model).keep(f"layers.3.{name}", ())):
                found = model.model.layers[3](hidden, embeddings, 3, causal_mask=mask, position_embeddings=positions)
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=name)


def test_shared_weights_stay_shared() -> None:
    model = make("zamba2")
    dense = StructurePlan.dense(model)
    users = dimensions_of(model).users
    assert users("layers.2.mlp") == ("layers.2.mlp", "layers.4.mlp") and users("layers.3.mlp") == ("layers.3.mlp",)
    small = extract_structure(model, dense.keep("layers.2.mlp", range(8)).keep("layers.4.mlp", range(8)))
    first, second = (small.model.layers[index].shared_transformer.feed_forward for index in (2, 4))
    assert first.down_proj.weight is second.down_proj.weight and first.down_proj.weight.shape == (32, 8)
    # One use goes: the file does not get smaller. Both go: the block goes.
    one, both = dense.keep("layers.2.mlp", ()), dense.keep("layers.2.mlp", ()).keep("layers.4.mlp", ())
    whole = count_costs(model).parameters
    assert count_costs(model, one).parameters == whole
    gone = {id(each): each.numel() for each in model.model.layers[2].shared_transformer.feed_forward.parameters()}
    assert count_costs(model, both).parameters == whole - sum(gone.values()) - 32  # and one normalization
    with pytest.raises(nncf.ValidationError, match="Layers 2, 4 share the weights of their mlp.*8 in layer 2, 40 in"):
        extract_structure(model, dense.keep("layers.2.mlp", range(8)))


def test_plans_that_cannot_work() -> None:
    model = make("mamba2")
    plan = StructurePlan.dense(model)
    for layer in range(4):
        plan = plan.keep(f"layers.{layer}.mamba", ())
    for wrong, message in (
        (plan, "Mamba mixer of every layer.*Keep one"),
        (StructurePlan.dense(model).keep("layers.0.mamba", (1,)), "state space of layer 0 without the mixer"),
        (StructurePlan.dense(model).keep("layers.0.mamba", (0, 2)), r"0\.\.1, once.*Unit 0 is the mixer"),
    ):
        with pytest.raises(nncf.ValidationError, match=message):
            extract_structure(model, wrong)
    hybrid = make("zamba2")
    with pytest.raises(nncf.ValidationError, match="attention of layer 2, the first"):
        extract_structure(hybrid, StructurePlan.dense(hybrid).keep("layers.2.attention", ()))


def test_mixers_without_a_place_in_the_cache_are_refused() -> None:
    model = make("mamba2")
    del model.backbone.layers[2].mixer.layer_idx
    with pytest.raises(nncf.UnsupportedModelError, match=r"layers\.2\.mixer is a Mamba2Mixer without layer_idx.*cache"):
        StructurePlan.dense(model)


def test_stock_classes_refuse_what_lacks_state_spaces(tmp_path) -> None:
    model = make("mamba2")
    nncf_ext.save_pretrained(
        extract_structure(model, StructurePlan.dense(model).keep("layers.1.mamba", NO_SSM)), tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["per_layer_config"] == {"1": {"skip": ["ssm"]}}
    assert config["base_model_type"] == "mamba2" and config["model_type"] == "nncf_structured"
    with pytest.raises((OSError, ValueError, RuntimeError)):
        transformers.Mamba2ForCausalLM.from_pretrained(tmp_path)


def test_plans_of_the_published_files() -> None:
    model = make("mamba2")
    content = {"pruned_mamba_block_idx": [3, 0], "pruned_ssm_idx": [2]}
    plan = plan_from_reference(content, model)
    assert [len(each["mamba"]) for each in by_layer(plan)] == [0, 2, 1, 0]
    assert plan_to_reference(plan, model) == content
    hybrid = make("zamba2")
    content |= {"pruned_mha_idx": [3], "pruned_mlp_idx": [4, 2]}
    assert plan_to_reference(plan_from_reference(content, hybrid), hybrid) == content
    for wrong, message in (
        ({"pruned_mamba_block_idx": [4]}, "layers 0 to 3"),
        ({"pruned_mha_idx": [1]}, "no such layer"),
    ):
        with pytest.raises(nncf.ValidationError, match=message):
            plan_from_reference(wrong, model)
    with pytest.raises(nncf.ValidationError, match="uses share their weights"):
        plan_from_reference({"pruned_mlp_channels": {"1": 1024}}, hybrid)


def on_meta(kind: str, **settings: object) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))


def test_published_totals() -> None:
    """Parameters of the published results, from configurations alone."""
    model = on_meta("Mamba", hidden_size=2560, num_hidden_layers=64, vocab_size=50280, time_step_rank=160)
    dense = count_costs(model)
    assert dense.parameters == 2_768_345_600
    for blocks, parameters in ((7, 2_768_345_600 - 7 * 41_244_160), (14, 2_190_927_360)):
        plan = plan_from_reference({"pruned_mamba_block_idx": [*range(2, 2 + blocks)]}, model)
        assert count_costs(model, plan).parameters == parameters
    model = on_meta(
        "Mamba2",
        **{"hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50288, "state_size": 128, "n_groups": 1},
        **{"num_heads": 80, "head_dim": 64, "tie_word_embeddings": True},
    )
    assert count_costs(model).parameters == 2_702_599_680
    # The published files keep the projections of a removed state space; here they go: B, C and dt, the convolution of
    # B and C with its bias, A, D and the bias of dt.
    gone = (2 * 128 + 80) * 2560 + 2 * 128 * (4 + 1) + 3 * 80
    for count in (16, 20, 22, 24):
        plan = plan_from_reference({"pruned_ssm_idx": [*range(63, 63 - count, -1)]}, model)
        costs = count_costs(model, plan)
        assert costs.parameters == 2_702_599_680 - count * gone
        states = 4 * (64 * (5120 + 256) * 4 + 64 * 5120 * 128) - count * 4 * (256 * 4 + 5120 * 128)
        assert costs.state_bytes == states
    plan = plan_from_reference({"pruned_mamba_block_idx": [0]}, model)
    assert count_costs(model, plan).parameters == 2_702_599_680 - 40_216_560


def test_published_totals_of_zamba2() -> None:
    """Published ratios count nine transformers that were made of the two shared ones, adapters merged. transformers
    5.5 builds alternating blocks only, so the nine stand at other places here."""
    hybrids = (6, 13, 18, 25, 30, 37, 42, 47, 52)
    model = on_meta(
        "Zamba2",
        layers_block_type=["hybrid" if layer in hybrids else "mamba" for layer in range(54)],
        **{"hidden_size": 2560, "num_hidden_layers": 54, "vocab_size": 32000, "num_mem_blocks": 2},
        **{"n_mamba_heads": 80, "mamba_d_state": 64, "num_attention_heads": 32, "intermediate_size": 10240},
        use_mem_rope=True,
    )
    unshared = sum(
        each.numel()
        for name, each in model.named_parameters(remove_duplicate=False)
        if "adapter" not in name and "lm_head" not in name
    )
    assert unshared == 3_828_481_440
    assert count_costs(model).parameters == sum(each.numel() for each in model.parameters()) < unshared
    dense = StructurePlan.dense(model)
    dimensions = dimensions_of(model)
    users, others = (
        tuple(dimensions[each].block for each in dimensions.users(name)) for name in ("layers.6.mlp", "layers.13.mlp")
    )
    assert users == (6, 18, 30, 42, 52) and others == (13, 25, 37, 47)
    narrow, none = dense, dense
    for layer in users:
        narrow, none = narrow.keep(f"layers.{layer}.mlp", range(9216)), none.keep(f"layers.{layer}.mlp", ())
    adapters = 5 * 128 * 2 * 1024  # their second matrices; the first ones stay
    assert count_costs(model).parameters - count_costs(model, narrow).parameters == 7_864_320 + adapters
    adapters = 5 * 128 * (2560 + 2 * 10240)
    assert count_costs(model).parameters - count_costs(model, none).parameters == 78_643_200 + 2560 + adapters
    assert (3 * 78_643_200 + 20 * 7_864_320) / unshared == pytest.approx(0.1027, abs=5e-5)  # the published 10 %
