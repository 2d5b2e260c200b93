"""pack_sparse_activations: the pattern in its forms, results, restoring, what stays and why, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset1
from typer.testing import CliRunner

import ov_ext
from ov_ext.cli import app
from ov_ext.sparse_activation.pattern import find
from tests.ov_ext.ir_forms import INT4, INT8, Form, build, infer, operations, signature

ANY = ov_ext.SparseActivationPolicy(min_speedup=0, min_weights=0, activation_group=0)
K = 256
FORMS = [Form("f32"), Form("bf16", outputs_first=False, bias="bf16"), INT8, INT8.but(group=64, bias="f32")]
FORMS += [INT4, INT4.but(group=0), Form("u4", group=128, zero=8, swap=True), Form("u8", zero="varied")]


def number(value: Any, name: str, half: bool = False) -> ov.Node:
    """A constant, as f16 with a Convert if wanted."""
    node = opset1.constant(np.asarray(value, np.float16 if half else np.float32), name=name)
    return opset1.convert(node, "f32", name=f"{name}/convert") if half else node


def with_pattern(
    model: ov.Model, threshold: Any = 0.5, centre: Any = None, replacement: Any = 0.0, **form: Any
) -> ov.Model:
    """Put the pattern in front of every MatMul of a model that reads its input."""
    x = model.get_parameters()[0]
    x.output(0).set_names({"x"})
    shifted: ov.Node = x
    if centre is not None and form.get("add"):
        shifted = opset1.add(number(-centre, "centre"), x, name="shifted")
    elif centre is not None:
        shifted = opset1.subtract(x, number(centre, "centre"), name="shifted")
    near = opset1.less_equal(
        opset1.absolute(shifted, name="abs"), number(threshold, "threshold", form.get("half", False))
    )
    near.set_friendly_name("near")
    chosen = opset1.select(near, number(replacement, "replacement"), x, name="chosen")
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            node.input(0).replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    return model


VECTOR = np.linspace(0.1, 0.9, K, dtype=np.float32)
PATTERNS = [
    {},
    {"threshold": np.float32(0.25), "half": True},
    {"threshold": VECTOR.reshape(1, K), "centre": 0.25, "replacement": 0.25},
    {"threshold": VECTOR, "centre": -0.5, "add": True, "replacement": VECTOR},
]


def expected(built: Any, x: np.ndarray, pattern: dict) -> np.ndarray:
    centre = np.float32(pattern.get("centre") or 0)
    near = np.abs(x - centre) <= np.float32(pattern.get("threshold", 0.5))
    used = np.where(near, np.float32(pattern.get("replacement", 0.0)), x).astype(np.float64)
    return used @ built.weight.T + built.bias


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_product_and_restoring(core: ov.Core, form: Form, pattern: dict, tmp_path: Path) -> None:
    built = build(form)
    stock = signature(with_pattern(build(form).model, **pattern))
    model, report = ov_ext.pack_sparse_activations(with_pattern(built.model, **pattern), ANY)
    assert report.replaced and not {"MatMul", "Select", "Add"} & set(operations(model)), report
    x = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    wanted = expected(built, x, pattern)
    size = np.abs(x) @ np.abs(built.weight).T + np.abs(built.bias) + np.abs(built.weight).sum(axis=1)
    assert (np.abs(infer(core, model, x) - wanted) <= 2 * (K + 8) * 2.0**-23 * size).all()
    ov_ext.save_model(model, tmp_path / "packed.xml")  # through a file: what counts must survive there
    restored = ov_ext.unpack_sparse_activations(core.read_model(tmp_path / "packed.xml"))
    assert signature(restored) == stock and "ov_ext" not in restored.get_rt_info()


def test_8_bit_activations_are_as_near_as_their_rounding(core: ov.Core) -> None:
    built = build(INT4)
    model, _ = ov_ext.pack_sparse_activations(
        with_pattern(built.model), ov_ext.SparseActivationPolicy(min_speedup=0, min_weights=0)
    )
    x = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    wanted = expected(built, x, {})
    bound = np.abs(x).max() / 254 * np.abs(built.weight).sum(axis=1)
    assert (np.abs(infer(core, model, x) - wanted) <= bound).all()


def shared() -> ov.Model:
    """Two layers behind one Select, another one that takes its inputs as they are."""
    rng = np.random.default_rng(0)
    x = opset1.parameter([-1, K], ov.Type.f32, name="x")
    weights = [opset1.constant(rng.standard_normal((64, K)).astype(np.float32), name=f"w{i}") for i in range(3)]
    near = opset1.less_equal(opset1.absolute(x, name="abs"), number(0.5, "threshold"), name="near")
    chosen = opset1.select(near, number(0.0, "zero"), x, name="chosen")
    layers = [opset1.matmul(chosen if i < 2 else x, w, False, True, name=f"layer{i}") for i, w in enumerate(weights)]
    return ov.Model([opset1.result(layer, name=f"r{i}") for i, layer in enumerate(layers)], [x], "m")


def test_layers_behind_one_pattern_share_it_again_when_restored(core: ov.Core) -> None:
    for ignored in ((), ("layer1",)):
        policy = ov_ext.SparseActivationPolicy(min_speedup=0, min_weights=0, ignored_patterns=ignored)
        model, report = ov_ext.pack_sparse_activations(shared(), policy)
        assert sorted(layer.name for layer in report.replaced) == ["layer0", "layer1"][: 2 - len(ignored)]
        assert operations(model).count("MatMul") == 1 + len(ignored)
        restored = ov_ext.unpack_sparse_activations(model)
        assert operations(restored).count("Select") == 1
        for node in restored.get_ops():
            if node.get_type_name() == "Constant" and node.get_friendly_name().startswith("w"):
                bits = node.get_data().view(np.uint32)
                assert not (bits & 0xFFFF).any() or node.get_friendly_name() not in ("w0", "w1")[: 2 - len(ignored)]


def test_a_weight_of_several_layers_is_packed_once(core: ov.Core) -> None:
    rng = np.random.default_rng(0)
    x = opset1.parameter([-1, K], ov.Type.f32, name="x")
    weight = opset1.constant(np.round(rng.standard_normal((64, K))).astype(np.float32), name="w")
    nodes = []
    for i, threshold in enumerate((0.5, 0.5, 0.7)):  # another rule is another blob
        near = opset1.less_equal(opset1.absolute(x), number(threshold, f"t{i}"))
        nodes.append(opset1.matmul(opset1.select(near, number(0.0, f"z{i}"), x), weight, False, True, name=f"l{i}"))
    stock = ov.Model([opset1.result(node) for node in nodes], [x], "m")
    values = rng.standard_normal((2, K)).astype(np.float32)
    expected = core.compile_model(stock, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values)
    expected = [expected[i].copy() for i in range(3)]
    model, report = ov_ext.pack_sparse_activations(stock, ANY)
    assert sorted(layer.bytes_after > 0 for layer in report.replaced) == [False, True, True]
    assert len([node for node in model.get_ops() if node.get_friendly_name().endswith("/blob")]) == 2
    found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values)
    assert all(np.allclose(found[i], each, rtol=1e-4, atol=1e-4) for i, each in enumerate(expected))
    restored = ov_ext.unpack_sparse_activations(model)
    assert [node.get_friendly_name() for node in restored.get_ops()].count("w") == 1


def test_it_composes_with_sparse_weights_in_both_orders() -> None:
    every = ov_ext.SparsePolicy(min_sparsity=0, min_weights=0, calibrate=False)
    model = ov_ext.pack_sparse_activations(shared(), ANY)[0]
    model = ov_ext.pack_sparse_weights(model, every)[0]
    kinds = operations(model)
    assert (kinds.count("SparseActivationMatMul"), kinds.count("SparseMatMul"), kinds.count("MatMul")) == (2, 1, 0)
    restored = ov_ext.unpack_sparse_weights(ov_ext.unpack_sparse_activations(model))
    assert operations(restored).count("MatMul") == 3 and operations(restored).count("Select") == 1
    model = ov_ext.pack_sparse_weights(shared(), every)[0]
    assert not ov_ext.pack_sparse_activations(model, ANY)[1].layers


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["near"].input(1).replace_source_output(m["x"].output(0)),  # a threshold that is no constant
        lambda m: m["near"].input(1).replace_source_output(number(np.ones((3, 1)), "t").output(0)),  # along the rows
        lambda m: m["near"].input(1).replace_source_output(number(np.nan, "t").output(0)),
        lambda m: m["chosen"].input(1).replace_source_output(number(np.inf, "r").output(0)),
        lambda m: m["chosen"].input(2).replace_source_output(m["abs"].output(0)),
        lambda m: m["abs"].input(0).replace_source_output(opset1.multiply(m["x"], number(2.0, "t")).output(0)),
        lambda m: m["abs"].input(0).replace_source_output(opset1.subtract(m["x"], number(VECTOR, "c")).output(0)),
        lambda m: m["abs"].input(0).replace_source_output(opset1.subtract(number(1.0, "c"), m["x"]).output(0)),
    ],
)
def test_what_is_another_rule_stays(change: Any) -> None:
    built = build(Form("f32"), x_shape=[3, K])
    model = with_pattern(built.model)
    change({node.get_friendly_name(): node for node in model.get_ops()})
    model.validate_nodes_and_infer_types()
    stock = signature(model)
    found = next(node for node in model.get_ops() if node.get_type_name() == "MatMul")
    assert find(found) is None
    assert not ov_ext.pack_sparse_activations(model, ANY)[1].layers and signature(model) == stock


def test_what_stays_says_why() -> None:
    def note(form: Form, **policy: Any) -> str:
        options = {"min_speedup": 0, "min_weights": 0} | policy
        model = with_pattern(build(form).model)
        stock = signature(model)
        (layer,) = ov_ext.pack_sparse_activations(model, ov_ext.SparseActivationPolicy(**options))[1].layers
        assert not layer.replaced and signature(model) == stock
        return layer.note

    assert "fewer than 99999 weights" in note(INT4, min_weights=99999)
    assert "not expected to gain at 20% skipped" in note(INT4, min_speedup=1.1, skipped=0.2)
    assert "ignored" in note(INT4, ignored_patterns=("lay*",))
    assert "asymmetric" in note(Form("u4", group=128, zero="wide"))
    model, report = ov_ext.pack_sparse_activations(
        with_pattern(build(Form("u4", group=128, zero="wide")).model, centre=0.25),
        ov_ext.SparseActivationPolicy(min_speedup=0, min_weights=0, requantize=True),
    )
    assert "relative error" in report.layers[0].note and "SparseActivationMatMul" in operations(model)
    restored = operations(ov_ext.unpack_sparse_activations(model.clone()))
    assert restored.count("Subtract") == 1  # the centre; the zero points are gone
    assert "1 of 1 layers" in str(report) and json.loads(json.dumps(report.to_dict()))["activations"][0]["replaced"]


def test_the_expected_gain() -> None:
    """Half of the rows stay, in as many runs as there are jumps: a quarter of the number of rows."""
    policy = ov_ext.SparseActivationPolicy(skipped=0.5)
    assert policy.speedup(7200, "int4") == pytest.approx(1 / (0.5 + 0.25 * 0.125))
    assert policy.speedup(128, "int4") == ov_ext.SparseActivationPolicy(skipped=0.0).speedup(7200, "bf16") == 1
    # Only 8-bit activations fall back to reading all rows.
    exact = ov_ext.SparseActivationPolicy(activation_group=0)
    assert policy.speedup(128, "bf16") == exact.speedup(128, "int4") == pytest.approx(1 / (0.5 + 0.25 * 900 / 128))


@pytest.mark.parametrize("options", [{"skipped": 1.5}, {"activation_group": 64}, {"min_speedup": -1}])
def test_policies_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match="got|negative"):
        ov_ext.SparseActivationPolicy(**options)


def test_damaged_records_and_blobs_leave_the_model_as_it_was(core: ov.Core, tmp_path: Path) -> None:
    path = tmp_path / "m.xml"
    ov_ext.save_model(ov_ext.pack_sparse_activations(with_pattern(build(INT4).model), ANY)[0], path)
    text = path.read_text()
    for old, new, message in (("Select", "Sqrt", "names Sqrt"), ("&quot;v&quot;:1", "&quot;v&quot;:9", "version 9")):
        assert old in text
        path.write_text(text.replace(old, new))
        model = core.read_model(path)
        before = operations(model)
        with pytest.raises(ov_ext.RecordError, match=f"layer.*{message}"):
            ov_ext.unpack_sparse_activations(model)
        assert operations(model) == before
    path.write_text(text)
    binary = bytearray(path.with_suffix(".bin").read_bytes())
    binary[-300] ^= 1
    path.with_suffix(".bin").write_bytes(binary)
    with pytest.raises(ValueError, match="damaged|SAM1"):
        ov_ext.unpack_sparse_activations(core.read_model(path))


def test_the_command_line(core: ov.Core, tmp_path: Path) -> None:
    source, out, back = tmp_path / "in", tmp_path / "out", tmp_path / "back"
    source.mkdir()
    stock = with_pattern(build(INT4, n=3000).model)
    ov_ext.save_model(stock, source / "openvino_model.xml")
    run = CliRunner().invoke
    done = run(app, ["pack", str(source), str(out), "--activations", "--skipped", "0.7", "--no-calibrate"])
    assert done.exit_code == 0 and "1 of 1 layers" in done.output, done.output
    assert "Inputs that are skipped" in (out / "README.md").read_text()
    model = ov_ext.runtime.read_model(out / "openvino_model.xml")
    assert "SparseActivationMatMul" in operations(model)
    done = run(app, ["unpack", str(out), str(back)])
    assert done.exit_code == 0 and "Restored" in done.output, done.output
    assert signature(core.read_model(back / "openvino_model.xml")) == signature(stock)
    assert "Inputs that are skipped" not in (back / "README.md").read_text()
