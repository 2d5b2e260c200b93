"""compress() as a user calls it: the masks of every mode, what is touched and what is not, types, copies."""

import copy
from dataclasses import dataclass

import nncf
import pytest
import torch
from torch import nn

import nncf_ext
from nncf_ext import AdvancedSparseWeightsParameters, CompressMode
from nncf_ext.algorithms.sparse_weights.algorithm import MODES

LAYERS = [
    f"model.layers.{block}.{name}"
    for block in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
INT4 = nncf.CompressWeightsMode.INT4_SYM


def row_mask(scores, count):
    """Oracle: stable ascending sort of each row, the first `count` are zeroed."""
    order = torch.sort(scores, dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def mean_squares(model, items, names):
    """Oracle: n_j of named layers in one ordinary run of the whole model, in float64."""
    sums = {name: 0.0 for name in names}

    def hook(name):
        def see(module, args):
            sums[name] = sums[name] + args[0].double().square().sum(dim=(0, 1))

        return see

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for item in items:
            model(**item)
    for handle in handles:
        handle.remove()
    return {name: value / len(items) for name, value in sums.items()}


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.97])
def test_magnitude_mask(tiny_llama, ratio):
    model = tiny_llama()
    expected = {}
    for name in LAYERS:
        weight = model.get_submodule(name).weight.detach()
        weight[:, ::3] = weight[:, 1:2]  # ties
        expected[name] = weight.masked_fill(row_mask(weight.abs(), int(weight.shape[1] * ratio)), 0.0)
    nncf_ext.compress(model, CompressMode.SPARSE_MAGNITUDE, ratio=ratio)
    for name in LAYERS:
        assert torch.equal(model.get_submodule(name).weight, expected[name]), name


def test_wanda_masks_come_from_pruned_predecessors(tiny_llama, token_items, token_dataset):
    model = tiny_llama()
    oracle, dense = copy.deepcopy(model), copy.deepcopy(model)
    differs_from_dense_statistics = False
    statistics_of_dense = mean_squares(dense, token_items, LAYERS)
    for block in range(2):
        names = [name for name in LAYERS if f".{block}." in name]
        for name, mean_square in mean_squares(oracle, token_items, names).items():
            weight = oracle.get_submodule(name).weight
            count = int(weight.shape[1] * 0.5)
            mask = row_mask(weight.detach().double().abs() * mean_square.sqrt(), count)
            other = row_mask(weight.detach().double().abs() * statistics_of_dense[name].sqrt(), count)
            differs_from_dense_statistics |= not torch.equal(mask, other)
            weight.data.masked_fill_(mask, 0.0)
    nncf_ext.compress(model, CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)
    for name in LAYERS:
        assert torch.equal(model.get_submodule(name).weight, oracle.get_submodule(name).weight), name
    assert differs_from_dense_statistics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)])
@pytest.mark.parametrize("quantization", [None, INT4])
def test_pattern_holds(tiny_llama, token_dataset, mode, pattern, ratio, quantization):
    model = tiny_llama(layers=1)
    advanced = AdvancedSparseWeightsParameters(pattern=pattern, quantization=quantization)
    nncf_ext.compress(model, mode, ratio=ratio, dataset=token_dataset, advanced_parameters=advanced)
    keep, run = map(int, pattern.split(":"))
    weights = dense_weights(model)
    assert len(weights) == 7
    for name, weight in weights.items():
        kept = (weight.reshape(-1, run) != 0).sum(dim=1)
        assert int(kept.max()) <= keep, name
        if quantization is None:
            assert int(kept.min()) == keep, name


def dense_weights(model):
    """Weights as the forward sees them, of packed layers too."""
    hooks = dict(model.named_modules())
    result = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            hook = hooks.get(f"__nncf_hooks.post_hooks.{name.replace('.', ':')}:weight__0.0")
            result[name] = module.weight.detach() if hook is None else hook(module.weight)
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quantization", [None, INT4])
def test_ratio_is_reached_within_one_weight_a_row(tiny_llama, token_dataset, mode, quantization):
    model = tiny_llama(layers=1)
    advanced = AdvancedSparseWeightsParameters(quantization=quantization)
    nncf_ext.compress(model, mode, ratio=0.63, dataset=token_dataset, advanced_parameters=advanced)
    for name, weight in dense_weights(model).items():
        zeros = int((weight == 0).sum())
        assert zeros >= weight.shape[0] * int(weight.shape[1] * 0.63), name
        if quantization is None:
            assert zeros <= int(weight.numel() * 0.63), name


@pytest.mark.parametrize("mode", MODES)
def test_quantization_of_a_sparse_model_keeps_its_zeros(tiny_llama, token_dataset, mode):
    model = tiny_llama()
    nncf_ext.compress(model, CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)
    zeros = {name: weight == 0 for name, weight in dense_weights(model).items()}
    advanced = AdvancedSparseWeightsParameters(quantization=INT4)
    nncf_ext.compress(model, mode, ratio=0.0, dataset=token_dataset, advanced_parameters=advanced)
    for name, weight in dense_weights(model).items():
        assert bool((weight[zeros[name]] == 0).all()), name
        assert float((weight == 0).float().mean()) < 0.6


@pytest.mark.parametrize("mode", MODES)
def test_only_block_linears_change(tiny_llama, token_dataset, mode):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    nncf_ext.compress(model, mode, ratio=0.5, dataset=token_dataset)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in LAYERS}


def test_better_methods_have_smaller_output_error(tiny_llama, token_dataset, logits_of):
    exact = logits_of(tiny_llama())
    errors = []
    for mode in MODES:
        model = nncf_ext.compress(tiny_llama(), mode, ratio=0.5, dataset=token_dataset)
        errors.append(float(torch.linalg.norm(logits_of(model) - exact)))
    assert errors[2] < min(errors[:2])


@dataclass(frozen=True)
class TypeCase:
    dtype: torch.dtype
    mode: CompressMode
    quantization: nncf.CompressWeightsMode | None

    def __str__(self):
        return f"{self.dtype}-{self.mode}-{self.quantization}"


TYPES = [
    TypeCase(dtype, mode, quantization)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for mode, quantization in ((CompressMode.SPARSE_WANDA, None), (CompressMode.SPARSE_GPT, None))
] + [TypeCase(dtype, CompressMode.SPARSE_GPT, INT4) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("case", TYPES, ids=str)
def test_type_of_the_model_is_kept(tiny_llama, token_dataset, logits_of, case):
    model = tiny_llama().to(case.dtype)
    exact = logits_of(model).float()
    advanced = AdvancedSparseWeightsParameters(quantization=case.quantization)
    nncf_ext.compress(model, case.mode, ratio=0.2, dataset=token_dataset, advanced_parameters=advanced)
    logits = logits_of(model)
    assert logits.dtype is case.dtype
    assert {weight.dtype for weight in dense_weights(model).values()} == {case.dtype}
    assert float(torch.linalg.norm(logits.float() - exact) / torch.linalg.norm(exact)) < 0.5


@pytest.mark.parametrize("quantization", [None, INT4])
def test_in_place_or_on_a_copy(tiny_llama, token_dataset, quantization):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    settings = {
        "ratio": 0.5,
        "dataset": token_dataset,
        "advanced_parameters": AdvancedSparseWeightsParameters(quantization=quantization),
    }
    other = nncf_ext.compress(model, CompressMode.SPARSE_GPT, do_copy=True, **settings)
    assert other is not model
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    same = nncf_ext.compress(model, CompressMode.SPARSE_GPT, **settings)
    assert same is model
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_training_mode_and_cache_setting_are_left_as_they_were(tiny_llama, token_dataset):
    model = tiny_llama()
    model.train()
    model.model.norm.eval()
    nncf_ext.compress(model, CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset)
    assert model.training and model.model.layers[0].training and not model.model.norm.training
    assert model.config.use_cache is True
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ignored_scope_by_path_pattern_and_operator_name(tiny_llama, token_dataset):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    scope = nncf.IgnoredScope(
        names=["model.layers.0.mlp.up_proj", "model/layers/1/mlp/gate_proj/linear/0"], patterns=[r".*\.k_proj$"]
    )
    nncf_ext.compress(model, CompressMode.SPARSE_WANDA, ratio=0.5, dataset=token_dataset, ignored_scope=scope)
    left = {name for name in LAYERS if torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])}
    assert left == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
    }


def test_layer_that_does_not_fit_the_group_is_refused_or_left_floating(tiny_llama, token_dataset):
    odd = {"intermediate_size": 160}
    advanced = AdvancedSparseWeightsParameters(quantization=INT4)
    model = tiny_llama(**odd)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(nncf.InvalidGroupSizeError, match=r"down_proj.*IGNORE"):
        nncf_ext.compress(
            model, CompressMode.SPARSE_GPT, ratio=0.5, dataset=token_dataset, advanced_parameters=advanced
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    advanced.group_size_fallback_mode = nncf.GroupSizeFallbackMode.IGNORE
    nncf_ext.compress(model, CompressMode.SPARSE_GPT, ratio=0.5, dataset=token_dataset, advanced_parameters=advanced)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.dtype is torch.float32 and abs(float((weight == 0).float().mean()) - 0.5) < 0.01
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.uint8
    note = {row.name: row.note for row in nncf_ext.compression_report(model).weights}
    assert "no multiple of group size 128" in note["model.layers.0.mlp.down_proj.weight"]


def test_every_public_name_works_twice():
    """A lazy package may replace a function by a module of the same name at the second use."""
    for _ in range(2):
        for name in nncf_ext.__all__:
            value = getattr(nncf_ext, name)
            assert isinstance(value, tuple) if name == "BOOTSTRAP_NAS_STAGES" else callable(value), name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = nncf_ext.absent
