"""Ranks and widths together: a point is its extraction, merged or not, also after training."""

import nncf
import peft
import pytest
import torch

import nncf_ext
from nncf_ext import ElasticMode, RankGroup
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from tests.structure_models import make, tokens

IDS = tokens(2, 5)
GROUPS = [RankGroup([r".*[qv]_proj$"], ranks=[6, 4, 1]), RankGroup([r".*(up|down)_proj$"], ranks=[6, 3])]


def adapted() -> peft.PeftModel:
    config = peft.LoraConfig(r=6, lora_alpha=12, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(make("llama"), config).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return model


def elastic(model: peft.PeftModel):
    return nncf_ext.make_elastic(
        model,
        ElasticMode.RANK | ElasticMode.WIDTH,
        groups=GROUPS,
        example_input={"input_ids": IDS[:1]},
        advanced_parameters=AdvancedBootstrapNasParameters(min_width=8, width_step=8),
    )


def test_a_point_is_its_extraction() -> None:
    model = adapted()
    before = model(input_ids=IDS).logits
    net = elastic(model)
    assert net.space.dimensions["model.layers.0.mlp.gate_proj"] == (40, 32, 24, 16, 8)
    assert any("lora" not in name and "embed" in name for name in net.space.dimensions)
    assert torch.equal(model(input_ids=IDS).logits, before)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.01)
    for step in range(2):
        net.activate(net.space.draw(0, step))
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for point in (net.space.minimal(), net.space.draw(1), net.space.draw(2)):
        net.activate(point)
        active = model(input_ids=IDS).logits
        small = nncf_ext.extract(net, point)
        torch.testing.assert_close(small(input_ids=IDS).logits, active, rtol=1e-4, atol=1e-4)
        assert sum(each.numel() for each in small.parameters()) == net.parameter_count(point)
        assert net.macs(point) <= net.macs(net.space.maximal())
        ranks = small.peft_config["default"]
        assert set(ranks.rank_pattern.values()) | {ranks.r} >= {point["model.layers.0.q_proj+v_proj"]}
        plain = small.merge_and_unload()
        torch.testing.assert_close(plain(input_ids=IDS).logits, active, rtol=1e-3, atol=1e-3)
        up = plain.model.layers[0].mlp.up_proj
        assert up.out_features == point["model.layers.0.mlp.gate_proj"] and type(up) is torch.nn.Linear
    net.release()
    assert all(not each._forward_pre_hooks for each in model.modules())


def test_bad_input() -> None:
    model = adapted()
    with pytest.raises(nncf.ValidationError, match="give example_input="):
        nncf_ext.make_elastic(model, ElasticMode.RANK | ElasticMode.WIDTH, groups=GROUPS)
    with pytest.raises(nncf.ValidationError, match="give groups="):
        nncf_ext.make_elastic(model, ElasticMode.RANK | ElasticMode.WIDTH, example_input={"input_ids": IDS})
    with pytest.raises(nncf.ParameterNotSupportedError, match="Kernels and ranks do not go together"):
        mode = ElasticMode.RANK | ElasticMode.KERNEL
        nncf_ext.make_elastic(model, mode, groups=GROUPS, example_input={"input_ids": IDS})
