"""A group size that does not divide a layer's inputs: refused, a smaller one taken, or the layer left floating."""

import nncf
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.cli import app
from nncf_ext.weights.int4 import codes_and_scales, decompressors

ERROR, IGNORE, ADJUST = nncf.GroupSizeFallbackMode


class Chain(nn.Module):
    """Layers of 576, 192, 256 and 96 inputs: 128 divides the third, 64 the first three."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c, self.d = nn.Linear(576, 192), nn.Linear(192, 256), nn.Linear(256, 96), nn.Linear(96, 8)

    def forward(self, x):
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


def compress(fallback, group_size=128, mode=CompressMode.SPARSE_GPT, model=None, **settings):
    generator = torch.Generator().manual_seed(4)
    items = [torch.randn(16, 576, generator=generator) for _ in range(4)]
    return nncf_ext.compress(
        Chain() if model is None else model,
        mode,
        ratio=0.5,
        dataset=nncf.Dataset(items),
        advanced_parameters=AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM,
            group_size=group_size,
            group_size_fallback_mode=fallback,
            **settings,
        ),
    )


def groups(model):
    """Number of groups and columns in each, by layer."""
    return {name: tuple(hook.compressed_weight_shape[1:]) for name, hook in decompressors(model).items()}


def notes(model):
    return {row.name.removesuffix(".weight"): row.note for row in nncf_ext.compression_report(model).weights}


@pytest.mark.parametrize("mode", [CompressMode.SPARSE_GPT, CompressMode.SPARSE_WANDA])
@pytest.mark.parametrize("fallback", [ADJUST, "adjust"])
def test_the_largest_smaller_group_that_divides_the_inputs_is_taken(mode, fallback):
    model = compress(fallback, mode=mode, keep_prerounding=True)
    assert groups(model) == {"a.weight": (9, 64), "b.weight": (3, 64), "c.weight": (2, 128)}
    assert notes(model) == {
        "a": "group size 64: 576 inputs are no multiple of group size 128",
        "b": "group size 64: 192 inputs are no multiple of group size 128",
        "c": None,
        "d": "not quantized: 96 inputs are no multiple of group size 128",
    }
    assert model.d.weight.dtype is torch.float32
    assert all(row.sparsity >= 0.49 for row in nncf_ext.compression_report(model).weights)
    # The first layer sees the same inputs, whatever becomes of the others.
    outright = compress(IGNORE, group_size=64, mode=mode)
    for found, wanted in zip(
        codes_and_scales(model.a.weight, decompressors(model)["a.weight"]),
        codes_and_scales(outright.a.weight, decompressors(outright)["a.weight"]),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        assert bool(model(torch.randn(2, 576)).isfinite().all())


def test_ignored_layers_stay_floating():
    model = compress(IGNORE)
    assert groups(model) == {"c.weight": (2, 128)}
    assert [name for name, note in notes(model).items() if note is not None and "not quantized" in note] == [*"abd"]
    # Below 64 there is nothing to adjust to.
    assert groups(compress(ADJUST, group_size=64)) == groups(compress(IGNORE, group_size=64))


def test_an_error_says_which_fallback_would_do():
    with pytest.raises(nncf.InvalidGroupSizeError, match=r"128 in a, b, d\. .*ADJUST takes groups of 64 .*IGNORE"):
        compress(ERROR)
    with pytest.raises(nncf.InvalidGroupSizeError, match=r"64 in d\. .*IGNORE leaves") as error:
        compress(ERROR, group_size=64)
    assert "ADJUST" not in str(error.value)
    with pytest.raises(nncf.ParameterNotSupportedError, match=r"Unknown group_size_fallback_mode 'shrink'.*ADJUST"):
        compress("shrink")


def test_nothing_left_to_quantize_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(576, 8)

        def forward(self, x):
            return self.a(x)

    with pytest.raises(nncf.ValidationError, match=r"ADJUST takes groups of 64.*No layer would be quantized"):
        compress(IGNORE, model=Odd())
    assert groups(compress(ADJUST, model=Odd())) == {"a.weight": (9, 64)}


def test_command_line(folder, tiny_llama, tmp_path):
    tiny_llama(hidden_size=192, intermediate_size=576, num_attention_heads=3).save_pretrained(folder)

    def run(*more):
        arguments = ["compress", folder, tmp_path / "out", "--dataset", tmp_path / "text.txt", "--window", "32", *more]
        result = CliRunner().invoke(app, [str(each) for each in arguments])
        return result.exit_code, " ".join(result.output.split())

    code, output = run("--quantization", "int4_sym")
    assert code == 2 and "--group-size-fallback" in output, output
    code, output = run("--quantization", "int4_sym", "--group-size-fallback", "shrink")
    assert code == 2 and "'shrink'" in output, output
    code, output = run("--mode", "multipruner", "--group-size-fallback", "adjust")
    assert code == 2 and "--group-size-fallback with mode multipruner" in output, output
    code, output = run("--quantization", "int4_sym", "--group-size-fallback", "adjust")
    assert code == 0, output
    found = groups(nncf_ext.load_pretrained(tmp_path / "out"))
    assert found["model.layers.1.mlp.down_proj.weight"] == (9, 64)
    assert found["model.layers.1.self_attn.q_proj.weight"] == (3, 64)
    assert len(found) == 14
