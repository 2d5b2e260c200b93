"""Blocks trained to give what the dense model gave."""

import copy

import nncf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.weights.int4 import codes_and_scales, decompressors, round_to_grid
from nncf_ext.weights.records import record_of

INT4 = {"quantization": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64}


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that blocks change what passes through them
    return model


@pytest.fixture(scope="module")
def items():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 96, (1, 48), generator=generator)} for _ in range(9)]


def hidden(model, items):
    with torch.no_grad():
        return [model(**item, output_hidden_states=True).hidden_states[-1].float() for item in items]


def error(model, dense, items):
    pairs = list(zip(hidden(model, items), hidden(dense, items), strict=True))
    return sum(float((a - b).square().mean() / b.square().mean()) for a, b in pairs) / len(pairs)


def compressed(dense, items, mode=CompressMode.SPARSE_GPT, epochs=0, dtype=torch.float32, ratio=0.625, **options):
    settings = {"reconstruction_learning_rate": 3e-3, "reconstruction_epochs": epochs}
    settings |= {name: options.pop(name) for name in settings if name in options}
    resume = options.pop("resume", None)
    return nncf_ext.compress(
        copy.deepcopy(dense).to(dtype),
        mode,
        ratio=ratio,
        dataset=nncf.Dataset(items),
        resume=resume,
        advanced_parameters=AdvancedSparseWeightsParameters(**settings, **options),
    )


@pytest.mark.parametrize("mode", [CompressMode.SPARSE_MAGNITUDE, CompressMode.SPARSE_GPT, CompressMode.SPARSE_ADMM])
@pytest.mark.parametrize("options", [{}, INT4, {"pattern": "3:8"}], ids=["floating", "int4", "3:8"])
def test_the_model_comes_closer_to_the_dense_one_and_keeps_its_zeros(dense, items, mode, options):
    plain, trained = (compressed(dense, items, mode, epochs, **options) for epochs in (0, 6))
    assert error(trained, dense, items) < 0.9 * error(plain, dense, items)
    assert nncf_ext.compression_report(trained).sparsity >= 0.62
    if "quantization" not in options:
        # Later blocks see other inputs, and may have their zeros elsewhere.
        for name, one in plain.model.layers[0].named_parameters():
            assert torch.equal(one == 0, trained.model.layers[0].get_parameter(name) == 0), name


def test_only_weights_of_the_treated_layers_change(dense, items):
    model = copy.deepcopy(dense)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = nncf_ext.compress(
        model,
        CompressMode.SPARSE_GPT,
        ratio=0.5,
        dataset=nncf.Dataset(items),
        ignored_scope=nncf.IgnoredScope(patterns=[r".*o_proj"]),
        advanced_parameters=AdvancedSparseWeightsParameters(reconstruction_epochs=1),
    )
    changed = {name for name, parameter in trained.named_parameters() if not torch.equal(parameter, before[name])}
    kinds = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in before if name.split(".")[-2] in kinds}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.parameters())


def test_codes_are_those_nearest_to_what_was_learned(dense, items):
    model = compressed(dense, items, epochs=2, keep_prerounding=True, **INT4)
    packed = decompressors(model)
    assert len(packed) == 21
    for path, decompressor in packed.items():
        codes, scales = codes_and_scales(model.get_parameter(path), decompressor)
        learned = record_of(model.get_submodule(path.removesuffix(".weight"))).prerounding
        assert torch.equal(round_to_grid(learned, scales), codes)


def test_half_precision_learns_in_float32(dense, items):
    plain, trained = (compressed(dense, items, epochs=epochs, dtype=torch.bfloat16) for epochs in (0, 6))
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.bfloat16}
    assert error(trained, dense, items) < 0.9 * error(plain, dense, items)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(dense, items, tmp_path, monkeypatch):
    whole = compressed(dense, items, epochs=2, **INT4)
    from nncf_ext.algorithms.sparse_weights import algorithm

    calls, original = [], algorithm.reconstruct

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # on the grid, in the second block
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="7 of 21"):
        patch.setattr(algorithm, "reconstruct", interrupted)
        compressed(dense, items, epochs=2, resume=tmp_path / "journal", **INT4)
    resumed = compressed(dense, items, epochs=2, resume=tmp_path / "journal", **INT4)
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("options", [{}, INT4], ids=["floating", "int4"])
def test_a_model_that_is_compressed_in_part_cannot_resume(dense, items, tmp_path, options):
    settings = AdvancedSparseWeightsParameters(reconstruction_epochs=1, **options)
    arguments = {"ratio": 0.5, "dataset": nncf.Dataset(items), "advanced_parameters": settings}
    model = copy.deepcopy(dense)
    nncf_ext.compress(model, CompressMode.SPARSE_GPT, resume=tmp_path / "journal", **arguments)
    with pytest.raises(nncf.ValidationError, match="original model|same model"):
        nncf_ext.compress(model, CompressMode.SPARSE_GPT, resume=tmp_path / "journal", **arguments)


def test_blocks_that_share_weights_are_not_trained(dense, items, caplog):
    model = copy.deepcopy(dense)
    model.model.layers[2] = model.model.layers[1]
    wanted = nncf_ext.compress(copy.deepcopy(model), CompressMode.SPARSE_GPT, ratio=0.5, dataset=nncf.Dataset(items))
    with caplog.at_level("WARNING", "nncf_ext"):
        found = nncf_ext.compress(
            model,
            CompressMode.SPARSE_GPT,
            ratio=0.5,
            dataset=nncf.Dataset(items),
            advanced_parameters=AdvancedSparseWeightsParameters(reconstruction_epochs=2),
        )
    assert "cannot be trained by itself" in caplog.text
    for (name, one), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(one, other), name


class Experts(torch.nn.Module):
    """Each sample goes to one of two linear layers."""

    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, hidden):
        return hidden + (self.one if float(hidden[0, 0, 0]) > 0 else self.other)(hidden)


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Experts() for _ in range(3))

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_layers_that_some_samples_do_not_reach_and_tokens_of_zeros():
    torch.manual_seed(0)
    model = Mixture().eval()
    items = [torch.randn(1, 40, 16) for _ in range(8)]
    for item in items:
        item[0, 5] = 0.0
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.bias)  # so that tokens of zeros stay zeros
    dense = copy.deepcopy(model)
    plain, trained = (
        nncf_ext.compress(
            copy.deepcopy(model),
            CompressMode.SPARSE_GPT,
            ratio=0.5,
            dataset=nncf.Dataset(items),
            advanced_parameters=AdvancedSparseWeightsParameters(
                reconstruction_epochs=epochs, reconstruction_learning_rate=3e-3
            ),
        )
        for epochs in (0, 6)
    )
    with torch.no_grad():
        before, after = (sum(float((each(x) - dense(x)).square().sum()) for x in items) for each in (plain, trained))
    assert after < before


def test_training_that_diverges_keeps_what_was_there(dense, items):
    plain, wild = (compressed(dense, items, epochs=epochs, reconstruction_learning_rate=0.99) for epochs in (0, 1))
    for (name, one), (_, other) in zip(plain.named_parameters(), wild.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_magnitude_needs_data_for_it(dense):
    with pytest.raises(nncf.ValidationError, match="reconstruction looks at the inputs"):
        nncf_ext.compress(
            copy.deepcopy(dense),
            CompressMode.SPARSE_MAGNITUDE,
            ratio=0.5,
            advanced_parameters=AdvancedSparseWeightsParameters(reconstruction_epochs=1),
        )


@pytest.mark.parametrize(
    "options", [{"reconstruction_epochs": -1}, {"reconstruction_learning_rate": 0.0}, {"least_squares_steps": -2}]
)
def test_numbers_out_of_range_are_refused(dense, items, options):
    with pytest.raises(nncf.ValidationError, match=next(iter(options))):
        nncf_ext.compress(
            copy.deepcopy(dense),
            CompressMode.SPARSE_GPT,
            ratio=0.5,
            dataset=nncf.Dataset(items),
            advanced_parameters=AdvancedSparseWeightsParameters(**options),
        )
