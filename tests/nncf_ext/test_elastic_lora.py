"""make_elastic, points and extract: over architectures, against adapters with columns zeroed by hand."""

import copy
import json
import math

import nncf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import nncf_ext
from nncf_ext import ElasticMode, RankGroup
from tests.nncf_ext.adapters import ALPHA, ARCHITECTURES, BY_NAME, RANK, adapted, base, logits, qkv, randomized


def zeroed_by_hand(model: PeftModel, ranks: dict[str, int]) -> PeftModel:
    """What a point means, by other means: a copy of a model that is not elastic, with columns of B set to zero."""
    twin = copy.deepcopy(model)
    layers = dict(twin.get_base_model().named_modules())
    for path, rank in ranks.items():
        layers[path].lora_B["default"].weight.data[:, rank:] = 0
    return twin


def ranks_by_path(net, point) -> dict[str, int]:
    return {path: point[name] for name, paths in net.layers.items() for path in paths}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_points_and_extraction(architecture, tmp_path):
    name = architecture.name.split()[0]
    plain = adapted(name).double()
    full = logits(plain)
    model = copy.deepcopy(plain)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    net = nncf_ext.make_elastic(model, ElasticMode.RANK, groups=architecture.groups)
    assert list(net.space.dimensions) == architecture.dimensions
    assert torch.equal(logits(model), full)

    for count, point in enumerate((net.minimal(), net.heuristic(), net.random(seed=8))):
        net.activate(point)
        assert net.active == point
        found = logits(model)
        scale = found.abs().max()
        expected = logits(zeroed_by_hand(plain, ranks_by_path(net, point)))
        torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-11 * scale))
        assert point == net.maximal() or (found - full).abs().max() > 1e-3 * scale

        small = nncf_ext.extract(net, point)
        assert net.active == point and model.state_dict().keys() == state.keys()
        torch.testing.assert_close(logits(small), found, rtol=0, atol=float(1e-11 * scale))
        own = [parameter for key, parameter in small.named_parameters() if "lora_" in key]
        assert sum(map(torch.numel, own)) == net.adapter_parameters(point)
        assert all(parameter.requires_grad for parameter in own)

        folder = tmp_path / str(count)
        small.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base(name).double(), folder)
        assert torch.equal(logits(loaded), logits(small))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    net.activate(net.maximal())
    assert torch.equal(logits(model), full)
    assert net.adapter_parameters(net.maximal()) == sum(
        parameter.numel() for key, parameter in plain.named_parameters() if "lora_" in key
    )


def test_shapes_and_patterns_of_an_extracted_adapter():
    net = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 4, 1), RankGroup([r".*up_proj$"], [6, 2])])
    assert net.space.dimensions == {
        "model.layers.0.q_proj+k_proj+v_proj": (6, 4, 1),
        "model.layers.0.up_proj": (6, 2),
        "model.layers.1.q_proj+k_proj+v_proj": (6, 4, 1),
        "model.layers.1.up_proj": (6, 2),
    }
    assert net.layers["model.layers.1.up_proj"] == ("model.layers.1.mlp.up_proj",)
    assert list(net.heuristic().values()) == [4, 6, 4, 6]
    assert list(net.minimal().values()) == [1, 2, 1, 2]
    point = dict(zip(net.space.dimensions, [4, 2, 6, 6], strict=True))
    small = nncf_ext.extract(net, point)
    shapes = {key: tuple(value.shape) for key, value in small.state_dict().items() if "lora_" in key}
    prefix = "base_model.model.model.layers"
    assert shapes[f"{prefix}.0.self_attn.k_proj.lora_A.default.weight"] == (4, 32)
    assert shapes[f"{prefix}.0.self_attn.k_proj.lora_B.default.weight"] == (16, 4)
    assert shapes[f"{prefix}.0.mlp.up_proj.lora_B.default.weight"] == (48, 2)
    assert shapes[f"{prefix}.0.mlp.down_proj.lora_A.default.weight"] == (6, 48)
    assert shapes[f"{prefix}.1.self_attn.q_proj.lora_A.default.weight"] == (6, 32)
    config = small.peft_config["default"]
    attention = [f"^model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert config.r == RANK and config.lora_alpha == ALPHA
    assert config.rank_pattern == {**dict.fromkeys(attention, 4), "^model.layers.0.mlp.up_proj": 2}
    # The scaling 9 / 6 at rank 4 is alpha 6.
    assert config.alpha_pattern == {**dict.fromkeys(attention, 6), "^model.layers.0.mlp.up_proj": 3}
    assert not [key for key in net.model.peft_config["default"].rank_pattern]


class TwoLayers(nn.Module):
    """A model of no known architecture, with a list of blocks and a layer outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"inner": nn.Linear(3, 3)}) for _ in range(2)])
        self.out = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["inner"](x).tanh()
        return self.out(x)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 40),
    alpha=st.one_of(st.integers(1, 99), st.floats(0.01, 99)),
    rslora=st.booleans(),
    data=st.data(),
)
def test_stock_peft_loads_the_very_scaling(tmp_path_factory, rank, alpha, rslora, data):
    others = data.draw(st.sets(st.integers(1, rank), max_size=3))
    ranks = sorted({rank, *others})
    torch.manual_seed(0)
    plain = TwoLayers()
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["inner", "out"])
    model = randomized(get_peft_model(copy.deepcopy(plain), config))
    groups = [RankGroup([r"blocks\..*"], ranks), RankGroup(["out"], ranks, per="model", name="head")]
    net = nncf_ext.make_elastic(model, groups=groups)
    assert list(net.space.dimensions) == ["head", "blocks.0.inner", "blocks.1.inner"]
    point = {name: data.draw(st.sampled_from(ranks)) for name in net.space.dimensions}
    net.activate(point)
    folder = tmp_path_factory.mktemp("adapter")
    nncf_ext.extract(net, point).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    scaling = alpha / (math.sqrt(rank) if rslora else rank)
    for path, size in ranks_by_path(net, point).items():
        layer = loaded.get_base_model().get_submodule(path)
        assert layer.r["default"] == size
        assert math.isclose(layer.scaling["default"], scaling, rel_tol=2.3e-16)
    x = torch.randn(4, 3)
    torch.testing.assert_close(loaded(x), model(x))


def test_scaling_changed_by_the_user_is_kept():
    model = adapted()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.7)
    net = nncf_ext.make_elastic(model, groups=[qkv(6, 4)])
    net.activate(net.minimal())
    torch.testing.assert_close(logits(nncf_ext.extract(net, net.minimal())), logits(model), rtol=1e-4, atol=1e-5)


def test_state_comes_back_in_another_process(tmp_path):
    net = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 4, 1)])
    net.activate(net.random(seed=2))
    expected = logits(net.model)
    text = json.dumps(net.state_dict())
    net.model.save_pretrained(tmp_path)

    again = nncf_ext.make_elastic(PeftModel.from_pretrained(base("llama"), tmp_path), groups=[qkv(1, 4, 6)])
    assert not torch.equal(logits(again.model), expected)
    again.load_state_dict(json.loads(text))
    assert again.active == net.active and torch.equal(logits(again.model), expected)

    other = nncf_ext.make_elastic(PeftModel.from_pretrained(base("llama"), tmp_path), groups=[qkv(6, 5, 1)])
    with pytest.raises(nncf.ValidationError, match="another network: its space"):
        other.load_state_dict(json.loads(text))


def test_saved_super_adapter_is_an_ordinary_adapter(tmp_path):
    model = adapted()
    full = logits(model)
    net = nncf_ext.make_elastic(model, groups=[qkv(6, 1)])
    net.activate(net.minimal())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base("llama"), tmp_path)), full)


def test_release_and_make_elastic_again():
    model = adapted()
    full = logits(model)
    net = nncf_ext.make_elastic(model, groups=[qkv(6, 1)])
    net.activate(net.minimal())
    with pytest.raises(nncf.ValidationError, match=r"elastic already.*release\(\)"):
        nncf_ext.make_elastic(model, groups=[qkv(6, 1)])
    net.release()
    assert torch.equal(logits(model), full)
    assert nncf_ext.make_elastic(model, groups=[qkv(6, 2)]).minimal()["model.layers.0.q_proj+k_proj+v_proj"] == 2


def test_a_refused_group_leaves_no_hook():
    model = adapted()
    with pytest.raises(nncf.ValidationError):
        nncf_ext.make_elastic(model, groups=[qkv(6, 1), RankGroup([r".*up_proj"], [5])])
    nncf_ext.make_elastic(model, groups=[qkv(6, 1)])


def test_random_points_depend_on_seed_and_step_alone():
    one = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 5, 4, 3, 2, 1)])
    two = nncf_ext.make_elastic(adapted(), groups=[qkv(6, 5, 4, 3, 2, 1)])
    torch.manual_seed(0)
    draws = [one.random(7, step) for step in range(50)]
    torch.manual_seed(1)
    assert [two.random(7, step) for step in reversed(range(50))] == draws[::-1]
    assert one.active == one.maximal()
    assert len({tuple(draw.values()) for draw in draws}) > 20
    assert [one.random(8, step) for step in range(50)] != draws


def test_extraction_is_independent_of_its_source():
    model = adapted()
    net = nncf_ext.make_elastic(model, groups=[qkv(6, 4)])
    # What wraps the forward of the one model object, as compilation does, is copied without its model.
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs)
    small = nncf_ext.extract(net, net.minimal())
    before = logits(small)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(small), before)
    assert before.abs().max() > 0


def test_second_adapter_and_its_name():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    randomized(model)
    net = nncf_ext.make_elastic(model, groups=[RankGroup([r".*q_proj"], [4, 2])])
    assert net.adapter_name == "second"
    net.activate(net.minimal())
    found = logits(model)
    small = nncf_ext.extract(net, net.minimal())
    torch.testing.assert_close(logits(small), found, rtol=1e-4, atol=1e-5)
    small.set_adapter("default")
    model.set_adapter("default")
    assert torch.equal(logits(small), logits(model))
    assert nncf_ext.make_elastic(model, groups=[qkv(6, 1)]).adapter_name == "default"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, tmp_path):
    model = adapted().to(dtype)
    net = nncf_ext.make_elastic(model, groups=[qkv(6, 4, 1)])
    net.activate(net.heuristic())
    small = nncf_ext.extract(net, net.heuristic())
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    torch.testing.assert_close(logits(small), logits(model), rtol=0.05, atol=0.05)
    small.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("llama").to(dtype), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded), logits(small))


def test_one_rank_for_all_of_the_model():
    net = nncf_ext.make_elastic(adapted(), groups=[RankGroup([r".*"], [6, 3], per="model", name="rank")])
    assert net.space.dimensions == {"rank": (6, 3)}
    assert len(net.layers["rank"]) == 2 * len(BY_NAME["llama"].lora["target_modules"])
    net.activate({"rank": 3})
    small = nncf_ext.extract(net, {"rank": 3})
    assert set(small.peft_config["default"].rank_pattern.values()) == {3}
    torch.testing.assert_close(logits(small), logits(net.model), rtol=1e-4, atol=1e-5)
