"""Thresholds for the inputs of layers: against numpy on inputs that the test records itself."""

import copy
import json
from functools import partial

import nncf
import numpy as np
import openvino as ov
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nncf.experimental.torch.sparsify_activations import TargetScope
from scipy.stats import gaussian_kde
from torch import nn

import nncf_ext
import ov_ext
from nncf_ext import ActivationCentering, CompressMode
from nncf_ext.algorithms.activation_sparsity.order_statistics import density_peak, quantiles
from nncf_ext.weights.activation_sparsity import (
    ActivationSparsity,
    activation_sparsity_of,
    set_activation_sparsity,
)
from tests.properties.cases import Logits, llama

RATIO = 0.4


class Gelu(nn.Module):
    """Blocks without a gate, whose inner activations pile up below zero."""

    def __init__(self, blocks=2, width=16):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(blocks)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def gelu():
    torch.manual_seed(3)
    return Gelu().eval()


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 7, 16, generator=generator) for _ in range(6)]


def sparse(model, items, ratio=RATIO, **advanced):
    return nncf_ext.compress(
        model,
        CompressMode.ACTIVATION_SPARSITY,
        ratio=ratio,
        dataset=nncf.Dataset(items),
        do_copy=True,
        advanced_parameters=nncf_ext.AdvancedActivationSparsityParameters(**advanced),
    )


def recorded(model, items, wanted):
    """What layers read, as float64 ``[tokens, in_features]``: before their own threshold, behind those of others."""
    found = {name: [] for name in wanted}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach().flatten(0, -2)), prepend=True
        )
        for name in wanted
    ]
    with torch.no_grad():
        for item in items:
            model(item)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(pieces).double().numpy() for name, pieces in found.items()}


finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=1, max_size=60), st.lists(st.floats(0, 1), min_size=1, max_size=3), st.integers(1, 5))
def test_quantiles_are_those_of_numpy(values, fractions, pieces):
    parts = [torch.from_numpy(part) for part in np.array_split(np.array(values, np.float32), pieces)]
    found = quantiles(lambda see: [see(part) for part in parts], fractions)
    largest = float(np.abs(values).max())
    np.testing.assert_allclose(found, np.quantile(np.array(values, np.float64), fractions), atol=1e-9 * largest)


def test_quantiles_need_finite_values():
    for bad in (torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(nncf.ValidationError):
            quantiles(lambda see, bad=bad: see(bad), [0.5])


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_the_peak_is_that_of_the_published_density(shift):
    generator = np.random.default_rng(1)
    x = generator.normal(0.3, 1.0, 40_000)
    values = (0.5 * x * (1 + np.tanh(0.7979 * (x + 0.0447 * x**3))) + shift).astype(np.float32)
    found = density_peak(lambda see: [see(torch.from_numpy(part)) for part in np.array_split(values, 7)])
    density = gaussian_kde(values, bw_method=lambda kde: 0.5 * kde.scotts_factor())
    grid = np.linspace(values.min(), values.min() + 1.0, 1000)
    assert found == pytest.approx(grid[density(grid).argmax()], abs=0.02)


@pytest.mark.parametrize("centering", [*ActivationCentering])
@pytest.mark.parametrize("sequential", [True, False])
def test_thresholds_are_quantiles_of_what_layers_read(gelu, items, centering, sequential):
    result = sparse(gelu, items, centering=centering, sequential=sequential)
    names = [name for name, module in gelu.named_modules() if isinstance(module, nn.Linear)]
    inputs = recorded(result if sequential else gelu, items, names)
    for name in names:
        found = activation_sparsity_of(result.get_submodule(name))
        if centering is ActivationCentering.ZERO:
            assert found.centre == 0.0
        elif centering is ActivationCentering.MEDIAN:
            assert found.centre == pytest.approx(np.median(inputs[name]), rel=1e-5, abs=1e-7)
        assert found.replacement == found.centre
        distances = np.abs(inputs[name] - found.centre)
        assert found.threshold == pytest.approx(np.quantile(distances, RATIO), rel=1e-5)
        assert (distances <= found.threshold).mean() == pytest.approx(RATIO, abs=1.5 / distances.size)


def test_a_layer_multiplies_by_replaced_inputs_and_nan_passes():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.tensor([[0.1, -0.6, float("nan"), 0.35, 2.0]])
    threshold, replacement = torch.tensor([0.25, 0.2, 0.2, 0.0, 9.0]), torch.tensor([7.0, 8.0, 9.0, 10.0, 11.0])
    set_activation_sparsity(layer, ActivationSparsity(threshold, 0.3, replacement))
    wanted = np.array([7.0, -0.6, np.nan, 0.35, 11.0])  # |x - 0.3| = 0.2, 0.9, nan, 0.05, 1.7
    with torch.no_grad():
        assert layer(x).isnan().all()
        x[0, 2], wanted[2] = 3.0, 3.0
        expected = wanted @ layer.weight.double().numpy().T + layer.bias.double().numpy()
        np.testing.assert_allclose(layer(input=x)[0], expected, rtol=1e-5)
        twin = copy.deepcopy(layer)
        set_activation_sparsity(layer, None)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        np.testing.assert_allclose(twin(x)[0], expected, rtol=1e-5)


def test_means_of_what_is_replaced_and_norms_of_columns(gelu, items):
    name = "blocks.0.2"
    means = activation_sparsity_of(sparse(gelu, items, mean_replacement=True, sequential=False).get_submodule(name))
    inputs = recorded(gelu, items, [name])[name]
    kept = np.abs(inputs) <= means.threshold
    wanted = np.divide((inputs * kept).sum(0), kept.sum(0), out=np.zeros(64), where=kept.any(0))
    np.testing.assert_allclose(means.replacement, wanted, rtol=1e-4, atol=1e-6)
    normed = activation_sparsity_of(sparse(gelu, items, weight_norms=True).get_submodule("blocks.0.0"))
    norms = np.linalg.norm(gelu.get_submodule("blocks.0.0").weight.detach().double().numpy(), axis=0)
    products = normed.threshold.double().numpy() * norms
    np.testing.assert_allclose(products, products[0], rtol=1e-5)
    inputs = recorded(gelu, items, ["blocks.0.0"])["blocks.0.0"]
    assert (np.abs(inputs) * norms <= products[0] * (1 + 1e-6)).mean() == pytest.approx(RATIO, abs=0.01)


def output_error(model, other, items):
    with torch.no_grad():
        pairs = [(model(item), other(item)) for item in items]
    return float(sum((a - b).square().sum() for a, b in pairs))


def test_centering_and_means_lower_the_error_behind_gelu():
    torch.manual_seed(7)
    model = Gelu(blocks=1, width=32).eval()
    with torch.no_grad():
        model.blocks[0][0].bias.sub_(1.0)  # most of what GELU gives lies just below zero
    generator = torch.Generator().manual_seed(8)
    items = [torch.randn(4, 9, 32, generator=generator) for _ in range(8)]
    only = {"targets": {r"blocks\.0\.2": 0.5}}
    error = {
        name: output_error(model, sparse(model, items, ratio=0.0, **only, **options), items)
        for name, options in {
            "zero": {},
            "mode": {"centering": "mode"},
            "mean": {"mean_replacement": True},
        }.items()
    }
    assert error["mode"] < 0.8 * error["zero"] and error["mean"] < error["zero"]


def test_gate_and_up_share_thresholds_and_do_not_touch_each_other_s_input():
    torch.manual_seed(1)
    model, ids = llama(), torch.randint(3, 90, (2, 11))
    targets = {r".*gate_proj": 0.5, r".*up_proj": 0.5, r".*down_proj": 0.7}
    result = sparse(model, [{"input_ids": ids}], ratio=0.0, targets=targets)
    for layer in result.model.layers:
        gate, up, down = (activation_sparsity_of(getattr(layer.mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
        assert gate.threshold == up.threshold and down.target == 0.7
        assert activation_sparsity_of(layer.self_attn.q_proj) is None
        x = torch.randn(3, 64)
        before = x.clone()
        layer.mlp(x)
        assert torch.equal(x, before)


def test_a_model_on_the_grid_keeps_its_codes_and_both_stand_in_the_report(tmp_path):
    torch.manual_seed(2)
    ids = torch.randint(3, 90, (2, 11))
    data = nncf.Dataset([{"input_ids": ids}])
    grid = nncf_ext.compress(
        llama(),
        CompressMode.SPARSE_WANDA,
        ratio=0.5,
        dataset=data,
        advanced_parameters=nncf_ext.AdvancedSparseWeightsParameters(
            quantization=nncf.CompressWeightsMode.INT4_SYM, group_size=64
        ),
    )
    state = {name: value.clone() for name, value in grid.state_dict().items()}
    result = nncf_ext.compress(grid, CompressMode.ACTIVATION_SPARSITY, ratio=RATIO, dataset=data)
    assert all(torch.equal(value, state[name]) for name, value in result.state_dict().items())
    rows = nncf_ext.compression_report(result).compressed
    assert {row.mode for row in rows} == {"sparse_wanda"} and {row.precision for row in rows} == {"int4"}
    assert all(row.input_sparsity == pytest.approx(RATIO, abs=0.02) for row in rows)
    nncf_ext.save_pretrained(result, tmp_path / "model")
    loaded = nncf_ext.load_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, result(input_ids=ids).logits)
    assert str(nncf_ext.compression_report(loaded)) == str(nncf_ext.compression_report(result))
    nncf_ext.save_pretrained(llama(), tmp_path / "model")  # thresholds of the model before do not stay
    assert not (tmp_path / "model" / "calibrated_thresholds.json").exists()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_exported_model_has_the_pattern_and_gives_the_same():
    torch.manual_seed(4)
    ids = torch.randint(3, 90, (1, 10))  # no threshold is a value that occurs
    result = sparse(llama(), [{"input_ids": ids}], targets={r".*(q|k|v|o)_proj": 0.0})
    ir = ov_ext.convert_model(Logits(result), example_input=(ids,), method="trace")
    selects = [node for node in ir.get_ops() if node.get_type_name() == "Select"]
    patterns = [
        node
        for node in selects
        if node.input_value(0).get_node().get_type_name() == "LessEqual"
        and node.input_value(0).get_node().input_value(0).get_node().get_type_name() == "Abs"
    ]
    assert len(patterns) in (2 * 2, 2 * 3)  # of two blocks; equal ones of gate and up may be one
    found = ov.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([ids.numpy()])[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, Logits(result)(ids), rtol=1e-4, atol=1e-4)


def test_published_thresholds_are_read(gelu, items, tmp_path):
    """A row of SCAP's own file: its centre is `mode`, whatever its label."""
    row = {"module_name": "blocks.0.2", "demode_method": "kde", "mode": -0.05, "threshold": 0.1}
    row |= {"target_sparsity": 0.5, "hook_type": "pre_hook"}
    file = tmp_path / "published.json"
    file.write_text(json.dumps({"blocks.0.2": row}))
    nncf_ext.load_thresholds(gelu, file)
    found = activation_sparsity_of(gelu.blocks[0][2])
    assert (found.threshold, found.centre, found.replacement) == (0.1, -0.05, -0.05)
    nncf_ext.save_thresholds(gelu, tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert len(again["blocks.0.2"].pop("weights_digest")) == 16 and again == {"blocks.0.2": row}
    everything = sparse(gelu, items, mean_replacement=True, weight_norms=True, targets={r"blocks\.0\.2": 0.0})
    nncf_ext.save_thresholds(everything, tmp_path / "vectors.json")
    other = Gelu().eval()
    other.load_state_dict(gelu.state_dict())
    nncf_ext.load_thresholds(other, tmp_path / "vectors.json")
    assert output_error(everything, other, items) == 0.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda rows: rows.update(other=rows["blocks.0.2"]), "other, which is no linear layer"),
        (lambda rows: rows["blocks.0.2"].pop("threshold"), "KeyError"),
        (lambda rows: rows["blocks.0.2"].update(threshold=-1.0), "not negative"),
        (lambda rows: rows["blocks.0.2"].update(threshold=[0.1] * 3), "64 channels"),
        (lambda rows: rows["blocks.0.2"].update(mode=float("nan")), "not finite"),
        (lambda rows: rows["blocks.0.2"].update(threshold=10**400), "OverflowError"),
        (lambda rows: rows["blocks.0.2"].update(mode=True), "is no number"),
        (lambda rows: rows["blocks.0.2"].update(target_sparsity=7), "a fraction"),
        (lambda rows: rows.clear(), "holds no thresholds"),
        (lambda rows: rows.update({"blocks.0.2": 3}), "holds no thresholds"),
    ],
)
def test_a_bad_file_changes_nothing(gelu, items, tmp_path, change, text):
    file = tmp_path / "thresholds.json"
    nncf_ext.save_thresholds(sparse(gelu, items), file)
    rows = json.loads(file.read_text())
    change(rows)
    file.write_text(json.dumps(rows))
    with pytest.raises(nncf.ValidationError, match=text):
        nncf_ext.load_thresholds(gelu, file)
    assert all(activation_sparsity_of(module) is None for module in gelu.modules())


def test_scopes_of_nncf(gelu, items):
    scope = {TargetScope(patterns=[r"blocks\.\d\.0"]): 0.2, TargetScope(names=["blocks.1.2"]): 0.6}
    nncf_ext.sparsify_activations(gelu, nncf.Dataset(items), scope)
    found = {name: activation_sparsity_of(module) for name, module in gelu.named_modules()}
    targets = {name: sparsity.target for name, sparsity in found.items() if sparsity is not None}
    assert targets == {"blocks.0.0": 0.2, "blocks.1.0": 0.2, "blocks.1.2": 0.6}


def test_what_cannot_be_is_refused(gelu, items):
    data = nncf.Dataset(items)
    sparsify = partial(nncf_ext.sparsify_activations, gelu, data)
    for scopes, text in (
        ({TargetScope(patterns=[".*0"]): 0.2, TargetScope(names=["blocks.1.0"]): 0.6}, "in two scopes"),
        ({TargetScope(names=["other"]): 0.2}, "match no layer"),
        ({TargetScope(names=["blocks.1.0"]): 1.5}, "from 0 to 0.99; got 1.5"),
        ({}, "name no linear layer"),
        ({TargetScope(types=["GELU"], validate=False): 0.1}, "names no linear layer"),
        ({"blocks.1.0": 0.1}, "Scopes are nncf.IgnoredScope"),
    ):
        with pytest.raises(nncf.ValidationError, match=text):
            sparsify(scopes)
    for advanced, error, text in (
        ({"targets": {"blocks": 0.1}}, nncf.ValidationError, "match no layer"),
        ({"targets": {".*": "0.3"}}, nncf.ValidationError, "got '0.3' for"),
        ({"targets": [0.3]}, nncf.ValidationError, "a mapping; got list"),
        ({"targets": {"(": 0.1}}, nncf.ValidationError, "no regular expression"),
        ({"targets": {".*0": 0.1, "blocks.0.*": 0.2}}, nncf.ValidationError, "One target for each layer"),
        ({"targets": {".*": 0.0}}, nncf.ValidationError, "No layer of Gelu would get"),
        ({"centering": "middle"}, nncf.ParameterNotSupportedError, "Unknown centering 'middle'"),
    ):
        with pytest.raises(error, match=text):
            sparse(gelu, items, **advanced)
    with pytest.raises(nncf.ValidationError, match="has a threshold for its inputs already"):
        sparse(sparse(gelu, items), items)
    with pytest.raises(nncf.ValidationError, match="not finite"):
        sparse(gelu, [items[0] * float("inf")])
    assert all(activation_sparsity_of(module) is None for module in gelu.modules())


class Experts(nn.Module):
    """Two of three experts are called; the second for one item only."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        y = self.experts[0](x)
        return self.experts[1](y) + self.experts[1](-y) if x.mean() > 0 else y


def test_layers_that_no_token_reaches_are_left_alone(caplog):
    torch.manual_seed(6)
    model, items = Experts().eval(), [torch.randn(9, 16) - 0.2, torch.randn(9, 16) + 0.2]
    with caplog.at_level("WARNING", "nncf_ext"):
        result = sparse(model, items)
    assert "experts.2 saw no calibration token" in caplog.text
    first, second, third = (activation_sparsity_of(expert) for expert in result.experts)
    assert third is None and first is not None
    with torch.no_grad():
        y = result.experts[0](items[1])
    both = torch.cat([y, -y]).abs().double().numpy()  # both calls count
    assert second.threshold == pytest.approx(np.quantile(both, RATIO), rel=1e-5)
    targets = {r"experts\.2": 0.5}
    with pytest.raises(nncf.ValidationError, match="No calibration token reached"):
        sparse(model, items, ratio=0.0, targets=targets)


def test_hooks_of_nncf_act_in_the_calibration():
    """With a quantizer of activations, blocks are not run by themselves."""
    torch.manual_seed(9)
    model, items = Gelu().eval(), [torch.randn(2, 7, 16) for _ in range(4)]
    quantized = nncf.quantize(model, nncf.Dataset(items), subset_size=4)
    result = sparse(quantized, items)
    name = "blocks.1.2"
    inputs = recorded(result, items, [name])[name]
    assert activation_sparsity_of(result.get_submodule(name)).threshold == pytest.approx(
        np.quantile(np.abs(inputs), RATIO), rel=1e-5
    )


def test_what_does_not_know_thresholds_refuses_them(gelu, items):
    result = sparse(gelu, items)
    with pytest.raises(nncf.UnsupportedModelError, match="Asked to make elastic a model whose layers replace"):
        nncf_ext.make_elastic(result, nncf_ext.ElasticMode.WIDTH, example_input=items[0])
    decoder = sparse(llama(), [{"input_ids": torch.randint(3, 90, (1, 9))}])
    with pytest.raises(nncf.UnsupportedModelError, match="Asked to cut a model whose layers replace"):
        nncf_ext.extract(decoder, nncf_ext.StructurePlan.dense(llama()))
    adapted = peft.get_peft_model(decoder, peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(nncf.UnsupportedModelError, match="Asked to put an adapter on"):
        nncf_ext.make_mergeable(adapted, nncf_ext.MergeMode.SPARSE)


def test_wrapped_models_and_inputs_without_a_batch(gelu):
    items = [torch.randn(16) for _ in range(30)]
    scope = {TargetScope(patterns=[".*2$"]): RATIO}
    nncf_ext.sparsify_activations(nn.DataParallel(gelu), nncf.Dataset(items), scope)
    found = activation_sparsity_of(gelu.blocks[0][2])
    inputs = recorded(gelu, [item[None] for item in items], ["blocks.0.2"])["blocks.0.2"]
    assert found.threshold == pytest.approx(np.quantile(np.abs(inputs), RATIO), rel=1e-5)


def test_loading_takes_away_what_was_there(gelu, items, tmp_path):
    nncf_ext.save_thresholds(sparse(gelu, items, ratio=0.0, targets={r"blocks\.0\.0": 0.5}), tmp_path / "one.json")
    result = sparse(gelu, items)
    nncf_ext.load_thresholds(result, tmp_path / "one.json")
    found = {name for name, module in result.named_modules() if activation_sparsity_of(module) is not None}
    assert found == {"blocks.0.0"}
    rows = {row.name: row.input_sparsity for row in nncf_ext.compression_report(result).weights}
    assert rows.pop("blocks.0.0.weight") == pytest.approx(0.5, abs=0.01) and set(rows.values()) == {None}


def test_many_equal_inputs_are_said(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    items = [torch.randn(9, 8)]
    with caplog.at_level("WARNING", "nncf_ext"):
        result = sparse(model, items, ratio=0.3)
    assert "2: " in caplog.text and "where 30 % were asked for" in caplog.text
    with torch.no_grad():
        hidden = torch.relu(model[0](items[0]))
    assert activation_sparsity_of(result[2]).threshold == 0.0 and float((hidden == 0).float().mean()) > 0.4
