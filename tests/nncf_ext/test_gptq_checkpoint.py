"""GPTQ checkpoints, packed here nibble by nibble, land on the grid code for code and scale for scale."""

import copy
import json

import nncf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import nncf_ext
from nncf_ext import MergeMode
from tests.nncf_ext.adapters import randomized
from tests.nncf_ext.packed_layers import grid_of


class OneLayer(nn.Module):
    def __init__(self, columns, rows, bias=False, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(columns, rows, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def signed(words):
    """Unsigned 32-bit words as the int32 tensor of the same bits."""
    return torch.from_numpy(np.asarray(words, np.uint32).view(np.int32).copy())


def packed(codes, scales, zero=8, less_one=True, order=None):
    """
    Oracle of the format: codes [out, in] in 0..15, scales [out, groups]. Eight inputs fill a word of qweight, eight
    outputs one of qzeros, from the lowest bits up.
    """
    rows, columns = codes.shape
    groups = scales.shape[1]
    qweight = [
        [sum(int(codes[row, first + place]) << 4 * place for place in range(8)) for row in range(rows)]
        for first in range(0, columns, 8)
    ]
    zeros = [
        [sum(zero - less_one << 4 * place for place in range(8)) for _ in range(0, rows, 8)] for _ in range(groups)
    ]
    tensors = {"qweight": signed(qweight), "qzeros": signed(zeros), "scales": torch.tensor(scales.T.copy())}
    if order is not None:
        tensors["g_idx"] = torch.tensor(order, dtype=torch.int32)
    return tensors


def write(folder, layers, config=None, file="model.safetensors"):
    tensors = {f"{layer}.{name}": tensor for layer, parts in layers.items() for name, tensor in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def quantized(weight, group):
    """GPTQ's symmetric grid without its corrections: scale 2 max / 15 as float16, zero point 8, nearest code."""
    grouped = weight.reshape(weight.shape[0], -1, group).astype(np.float32)
    scales = (2 * np.abs(grouped).max(axis=2) / 15).astype(np.float16)
    codes = np.clip(np.rint(grouped / scales.astype(np.float32)[..., None]) + 8, 0, 15)
    return codes.reshape(weight.shape).astype(np.int64), scales


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_codes_and_scales_arrive_unchanged(tmp_path_factory, data):
    group = data.draw(st.sampled_from([64, 128, None]), "group")
    columns = (
        data.draw(st.integers(1, 12), "eights of columns") * 8
        if group is None
        else group * data.draw(st.integers(1, 3), "groups")
    )
    rows = 8 * data.draw(st.integers(1, 3), "eights of rows")
    version = data.draw(st.sampled_from([None, "gptq", "gptq_v2"]), "format")
    # Some writers say gptq, or nothing, and store zero points as gptq_v2 does.
    less_one = version != "gptq_v2" and data.draw(st.booleans(), "zero points less 1")
    key = data.draw(st.sampled_from(["checkpoint_format", "format"]), "key of the format")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "partner")
    random = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    codes = random.integers(0, 16, (rows, columns))
    scales = random.uniform(0.001, 0.1, (rows, columns // (group or columns))).astype(np.float16)
    order = np.arange(columns) // (group or columns) if data.draw(st.booleans(), "g_idx") else None
    partner = OneLayer(columns, rows, bias=True, dtype=dtype)
    before = copy.deepcopy(partner.state_dict())
    config = None if version is None else {"bits": 4, key: version}
    folder = tmp_path_factory.mktemp("gptq")
    write(folder, {"layer": packed(codes, scales, less_one=less_one, order=order)}, config)
    model = nncf_ext.load_gptq(folder, partner)
    found_codes, found_scales = grid_of(model, "layer")
    assert np.array_equal(found_codes, codes - 8) and found_scales.tobytes() == scales.tobytes()
    dense = (codes - 8).astype(np.float16) * np.repeat(scales, columns // scales.shape[1], axis=1)
    inputs = torch.eye(columns, dtype=dtype)  # one product for each output: nothing but the weight's own rounding
    expected = nn.functional.linear(inputs, torch.from_numpy(dense).to(dtype), partner.layer.bias)
    assert torch.equal(model(inputs), expected)
    assert all(torch.equal(partner.state_dict()[name], tensor) for name, tensor in before.items())


def sparse_llama():
    """A bfloat16 Llama with biases; half of each row of its linear layers is zero, lm_head excepted."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, vocab_size=96, max_position_embeddings=64, attention_bias=True
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, layer in linear_layers(model).items():
        layer.weight.data.mul_(4)
        smallest = layer.weight.abs().argsort(dim=1)[:, : layer.in_features // 2]
        layer.weight.data.scatter_(1, smallest, 0.0)
        assert "layers" in name
    return model.to(torch.bfloat16)


def linear_layers(model):
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def test_adapters_train_on_a_checkpoint_and_merge_into_its_scales(tmp_path):
    """The whole way: two shards, base and grid, training with elastic ranks, merge; only codes are new."""
    partner = sparse_llama()
    grids = {
        name: quantized(layer.weight.detach().float().numpy(), 64) for name, layer in linear_layers(partner).items()
    }
    halves = [dict(list(grids.items())[:5]), dict(list(grids.items())[5:])]
    for place, half in enumerate(halves):
        layers = {name: packed(*grid, order=np.arange(grid[0].shape[1]) // 64) for name, grid in half.items()}
        write(tmp_path, layers, {"bits": 4, "sym": True}, f"model-0000{place + 1}-of-00002.safetensors")
    grid = nncf_ext.load_gptq(tmp_path, partner)
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = grid(input_ids=ids).logits

    model = get_peft_model(copy.deepcopy(partner), LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
    nncf_ext.make_mergeable(model, MergeMode.QUANT_AWARE, grid=grid)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    elastic = nncf_ext.make_elastic(
        model, nncf_ext.ElasticMode.RANK, groups=[nncf_ext.RankGroup([r".*_proj$"], [4, 2], name="all")]
    )
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    randomized(model)
    for step in range(3):
        elastic.activate(elastic.random(seed=3, step=step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    elastic.activate(elastic.minimal())
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    merged = nncf_ext.merge(model, MergeMode.QUANT_AWARE)
    changed = 0
    for name, (codes, scales) in grids.items():
        found, kept = grid_of(merged, name)
        assert kept.tobytes() == scales.tobytes(), name
        weight = linear_layers(partner)[name].weight
        assert not found[weight.float().detach().numpy() == 0].any(), name
        changed += int((found != codes - 8).sum())
    assert changed > 1000
    with torch.no_grad():
        assert torch.equal(merged(input_ids=ids).logits, trained)


def test_codes_that_gptq_put_on_pruned_weights_are_taken_back_and_counted(tmp_path):
    random = np.random.default_rng(5)
    codes, scales = random.integers(0, 16, (16, 128)), random.uniform(0.01, 0.1, (16, 2)).astype(np.float16)
    partner = OneLayer(128, 16)
    zero = random.random((16, 128)) < 0.5
    partner.layer.weight.data[torch.from_numpy(zero)] = 0.0
    model = nncf_ext.load_gptq(write(tmp_path, {"layer": packed(codes, scales)}), partner)
    assert np.array_equal(grid_of(model, "layer")[0], np.where(zero, 0, codes - 8))
    (row,) = nncf_ext.compression_report(model).weights
    assert row.note == f"{(zero & (codes != 8)).sum()} codes of pruned weights were set to zero"
    weight = partner.layer.weight.detach().numpy()
    value = np.where(zero, 0, codes - 8) * np.repeat(scales.astype(np.float32), 64, axis=1)
    assert row.error == pytest.approx(np.linalg.norm(value - weight) / np.linalg.norm(weight), rel=1e-3)
    assert torch.equal(nncf_ext.prerounding(model).layer.weight, partner.layer.weight)


def one_layer_files(**changes):
    """A sound checkpoint of one layer [16, 128] in groups of 64, with some tensors replaced or (None) left out."""
    random = np.random.default_rng(3)
    scales = random.uniform(0.01, 0.1, (16, 2)).astype(np.float16)
    sound = packed(random.integers(0, 16, (16, 128)), scales, order=np.arange(128) // 64)
    return {name: tensor for name, tensor in {**sound, **changes}.items() if tensor is not None}


ASYMMETRIC = packed(np.zeros((16, 128), int), np.ones((16, 2), np.float16), zero=7)["qzeros"]
SHUFFLED = torch.tensor(np.random.default_rng(1).permutation(np.arange(128) // 64), dtype=torch.int32)
AS_THEY_ARE = packed(np.zeros((16, 128), int), np.ones((16, 2), np.float16), less_one=False)["qzeros"]
NOT_FINITE = torch.full((2, 16), torch.inf, dtype=torch.float16)
THIRTY_TWO = packed(np.zeros((16, 128), int), np.ones((16, 4), np.float16))
BAD_FILES = [
    ({"qzeros": ASYMMETRIC}, None, nncf.ParameterNotSupportedError, r"layer has zero points \[7\].*sym=True"),
    ({"g_idx": SHUFFLED}, None, nncf.ParameterNotSupportedError, r"layer.*desc_act=False"),
    (THIRTY_TWO | {"g_idx": None}, None, nncf.ParameterNotSupportedError, r"4 groups for 128 inputs.*64 or 128"),
    ({}, {"bits": 8}, nncf.ParameterNotSupportedError, r"8 bits.*only 4"),
    ({}, {"bits": 4, "checkpoint_format": "gptq_v2"}, nncf.ParameterNotSupportedError, r"zero points \[7\]"),
    ({"scales": torch.full((2, 16), 1e-9)}, None, nncf.ParameterNotSupportedError, r"scales is torch.float32"),
    ({"qzeros": AS_THEY_ARE}, {"sym": False}, nncf.ParameterNotSupportedError, r"zero points \[9\]"),
    ({}, {"checkpoint_format": "marlin"}, nncf.ParameterNotSupportedError, r"format is 'marlin'.*Save it as 'gptq'"),
    ({}, {"is_marlin_format": True}, nncf.ParameterNotSupportedError, r"format is 'marlin'"),
    ({}, {"quant_method": "awq"}, nncf.ParameterNotSupportedError, r"format is 'awq'"),
    (
        {},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        nncf.ParameterNotSupportedError,
        r"format is 'auto_round:auto_awq'",
    ),
    ({}, {"group_size": 64.5}, nncf.ValidationError, r"group_size is 64.5; it must be of type int"),
    ({}, {"group_size": 128.0}, nncf.ValidationError, r"2 groups for 128 inputs.*says group_size=128"),
    ({}, {"group_size": 128}, nncf.ValidationError, r"2 groups for 128 inputs.*says group_size=128"),
    ({}, {"group_size": -1}, nncf.ValidationError, r"says group_size=-1"),
    ({}, {"group_size": 0}, nncf.ValidationError, r"says group_size=0"),
    ({}, {"group_size": "64"}, nncf.ValidationError, r"group_size is '64'; it must be of type int"),
    ({"g_idx": None}, {"desc_act": True}, nncf.ValidationError, r"desc_act=True, and.*layer.g_idx, is missing"),
    (
        {"qweight": torch.zeros(16, 16)},
        None,
        nncf.ValidationError,
        r"layer.qweight is torch.float32; it must be torch.i",
    ),
    ({"qweight": torch.zeros(16, 16, dtype=torch.uint8)}, None, nncf.ValidationError, r"layer.qweight is torch.uint8"),
    ({"qzeros": torch.full((2, 2), 7, dtype=torch.int64)}, None, nncf.ValidationError, r"layer.qzeros is torch.int64"),
    ({"g_idx": torch.zeros(128)}, None, nncf.ValidationError, r"layer.g_idx is torch.float32"),
    ({"scales": torch.ones(2, 16, dtype=torch.int32)}, None, nncf.ValidationError, r"layer.scales is torch.int32"),
    ({"scales": torch.ones(())}, None, nncf.ValidationError, r"layer.qzeros is \[2, 2\]; .* 0 groups needs \[0, 2\]"),
    ({"scales": NOT_FINITE}, None, nncf.ValidationError, r"layer.scales holds values that are not finite"),
    ({"scales": NOT_FINITE * 0}, None, nncf.ValidationError, r"layer.scales holds values that are not finite"),
    ({"scales": None}, None, nncf.ValidationError, r"lacks scales of layer"),
    ({"qzeros": None, "scales": None}, None, nncf.ValidationError, r"lacks qzeros, scales of layer"),
    ({"qweight": torch.zeros(8, 16, dtype=torch.int32)}, None, nncf.ValidationError, r"\[8, 16\].*needs \[16, 16\]"),
    ({"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, None, nncf.ValidationError, r"\[2, 4\].*needs \[2, 2\]"),
]


@pytest.mark.parametrize(("changes", "config", "kind", "text"), BAD_FILES)
def test_what_the_grid_cannot_hold_is_refused(tmp_path, changes, config, kind, text):
    write(tmp_path, {"layer": one_layer_files()})
    nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))  # the very same without the change is read
    write(tmp_path, {"layer": one_layer_files(**changes)}, config)
    with pytest.raises(kind, match=text):
        nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))


@pytest.mark.parametrize("left", ["qzeros", "scales", "g_idx"])
def test_a_layer_without_its_words_is_not_left_floating(tmp_path, left):
    write(tmp_path, {"layer": one_layer_files(), "second": {left: one_layer_files()[left]}})
    with pytest.raises(nncf.ValidationError, match=r"lacks qweight of second"):
        nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))


def test_what_the_tensors_agree_with_is_read(tmp_path):
    """A configuration that says as much as it can; the partner has a parameter with the name of a GPTQ tensor."""
    partner = OneLayer(128, 16)
    partner.norm = nn.Module()
    partner.norm.scales = nn.Parameter(torch.ones(3))
    layers = {"layer": one_layer_files(), "norm": {"scales": torch.ones(3)}}
    config = {"bits": 4, "group_size": 64, "sym": True, "desc_act": True, "quant_method": "gptq", "format": "gptq"}
    expected = grid_of(nncf_ext.load_gptq(write(tmp_path, layers), partner), "layer")
    found = grid_of(nncf_ext.load_gptq(write(tmp_path, layers, config), partner), "layer")
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        {"quant_method": "intel/auto-round", "packing_format": "auto_round:gptq"},
        {"quant_method": "auto-round"},
        {"quant_method": "gptq", "group_size": 64.0},
    ],
    ids=str,
)
def test_other_writers_of_the_same_words_are_read(config, tmp_path):
    codes, scales = np.arange(16 * 128).reshape(16, 128) * 7 % 16, np.full((16, 2), 0.5, np.float16)
    write(tmp_path, {"layer": packed(codes, scales)}, {"bits": 4, "sym": True, **config})
    found = grid_of(nncf_ext.load_gptq(tmp_path, OneLayer(128, 16)), "layer")
    assert np.array_equal(found[0], codes - 8) and np.array_equal(found[1], scales)


class Transposed(nn.Module):
    """A square weight [in, out], as GPT-2 has: its shape tells nothing."""

    def __init__(self):
        super().__init__()
        self.layer = transformers.pytorch_utils.Conv1D(128, 128)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 128)
        self.layer = nn.Linear(128, 16, bias=False)
        self.layer.weight = self.embedding.weight


def already_packed(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    return nncf_ext.load_gptq(write(folder, {"layer": one_layer_files()}), OneLayer(128, 16))


def test_partners_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path, {"layer": one_layer_files()})
    with pytest.raises(nncf.ValidationError, match="no such layer"):
        nncf_ext.load_gptq(tmp_path, nn.Bilinear(2, 2, 2))
    with pytest.raises(nncf.ValidationError, match=r"needs \[8, 16\]"):
        nncf_ext.load_gptq(tmp_path, OneLayer(64, 16))
    with pytest.raises(nncf.UnsupportedModelError, match=r"embedding.weight, layer.weight are one weight"):
        nncf_ext.load_gptq(tmp_path, Tied())
    with pytest.raises(nncf.UnsupportedModelError, match=r"layer is a Linear with a weight of torch.uint8"):
        nncf_ext.load_gptq(tmp_path, already_packed(tmp_path))
    square = packed(np.full((128, 128), 9), np.ones((128, 2), np.float16))
    write(tmp_path, {"layer": square})
    with pytest.raises(nncf.UnsupportedModelError, match="layer is a Conv1D"):
        nncf_ext.load_gptq(tmp_path, Transposed())


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(nncf.ValidationError, match=r"no \*\.safetensors file.*pickle"):
        nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))
    write(tmp_path, {"layer": {"weight": torch.ones(16, 128)}})
    with pytest.raises(nncf.ValidationError, match=r"no tensor named \*\.qweight"):
        nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))
    write(tmp_path, {"layer": one_layer_files()})
    for content, text in (
        ("{", "config.json is no JSON"),
        ("[" * 100_000, "config.json is no JSON"),
        ("[1]", "config.json holds a list"),
        ('{"quantization_config": 3}', "config.json holds a int"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(nncf.ValidationError, match=text):
            nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))
    (tmp_path / "config.json").unlink()
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(nncf.ValidationError, match="model.safetensors is damaged"):
        nncf_ext.load_gptq(tmp_path, OneLayer(128, 16))
