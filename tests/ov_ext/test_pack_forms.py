"""Every stock form of a weight: recognised or refused with a reason, computed right, restored bit for bit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset1, opset13

import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from tests.ov_ext.ir_forms import Form, bf16_values, build, constant, operations, signature

ALL = ov_ext.SparsePolicy(min_weights=0, activation_group=0)
INT4, INT8 = Form("i4", 128), Form("i8")
FORMS = [
    Form("f32"),
    Form("f16"),
    Form("bf16"),
    Form("f32", outputs_first=False),
    Form("f32", swap=True),
    Form("bf16", outputs_first=False, swap=True, bias="bf16"),
    Form("f32", bias="f32"),
    Form("f16", bias="f16", bias_first=True),
    INT8,
    INT8.but(group=64),
    INT8.but(group=128, outputs_first=False),
    INT8.but(outputs_first=False, math="f32", scale="f32", bias="f32"),
    INT8.but(scale="f16", math="f32"),
    INT8.but(scale="bf16", math="f32"),
    INT8.but(scale_shape="scalar"),
    INT8.but(zero=0),
    Form("u8", zero=128),
    Form("u8", zero="varied"),
    Form("u8", group=64, zero="varied", outputs_first=False),
    INT4,
    INT4.but(group=64),
    INT4.but(group=0),
    INT4.but(outputs_first=False),
    INT4.but(group=0, outputs_first=False, swap=True),
    INT4.but(swap=True, bias="f16"),
    INT4.but(scale="f32", math="f32"),
    INT4.but(scale_shape="scalar"),
    Form("u4", group=128, zero=8),
    Form("u4", group=128, zero="varied"),
    Form("u4", group=64, zero=8, outputs_first=False, bias="f32"),
    Form("u4", zero=8),
]
KIND = {"f32": "bf16", "f16": "bf16", "bf16": "bf16", "i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"}


def infer(core: ov.Core, model: ov.Model, x: np.ndarray) -> np.ndarray:
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return core.compile_model(model, "CPU", config)(x)[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_product(core: ov.Core, form: Form) -> None:
    """Against float64; the bound is that of a float32 sum of K products and a bias, in any order."""
    built = build(form)
    model, report = ov_ext.pack_sparse_weights(built.model, ALL)
    (layer,) = report.layers
    assert layer.replaced and "MatMul" not in operations(model), layer.note
    sparse = next(node for node in model.get_ops() if node.get_type_name() == "SparseMatMul")
    assert sparse.get_attributes()["kind"] == KIND[form.element] and sparse.get_friendly_name() == "layer"
    assert "Add" not in operations(model) and model.outputs[0].get_names() == {"y", "logits"}
    x = np.random.default_rng(1).standard_normal((3, built.weight.shape[1])).astype(np.float32)
    expected = x @ built.weight.T + built.bias
    bound = (x.shape[1] + 8) * 2.0**-23 * (np.abs(x) @ np.abs(built.weight).T + np.abs(built.bias)) + 1e-30
    assert (np.abs(infer(core, model, x) - expected) <= bound).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unpack_restores_the_stock_subgraph(core: ov.Core, form: Form, tmp_path: Path) -> None:
    stock = signature(build(form).model)
    model, _ = ov_ext.pack_sparse_weights(build(form).model, ALL)
    ov_ext.save_model(model, tmp_path / "packed.xml")  # through a file: what counts must survive there
    restored = ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "packed.xml"))
    assert signature(restored) == stock
    assert not restored.has_rt_info(["ov_ext", "format"])


def test_unpack_keeps_the_mark_of_compressed_f16(core: ov.Core, tmp_path: Path) -> None:
    """openvino.save_model's own f16 compression marks its Convert, or OpenVINO would fold the weight back to f32."""
    ov.save_model(build(Form("f32")).model, tmp_path / "f16.xml")
    stock = core.read_model(tmp_path / "f16.xml")
    expected = signature(stock)
    assert any(entry[1] == "Convert" and entry[5] for entry in expected)
    ov_ext.save_model(ov_ext.pack_sparse_weights(stock, ALL)[0], tmp_path / "packed.xml")
    restored = ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "packed.xml"))
    ov_ext.save_model(restored, tmp_path / "again.xml")
    assert signature(core.read_model(tmp_path / "again.xml")) == expected


@pytest.mark.parametrize("element, remark", [("f32", "f32 rounded to bf16"), ("f16", "f16 rounded to bf16")])
def test_plain_weights_are_rounded_once_and_the_report_says_so(element: str, remark: str) -> None:
    values = np.array(
        [[1.0, 1.00390625, 1.01171875, 0.0, -1.00390625, 0.0]], np.float32
    )  # two ties: to even, both ways
    x = opset1.parameter([1, 6], ov.Type.f32)
    node = constant(values, element, "w")
    node = opset1.convert(node, "f32") if element != "f32" else node
    model = ov.Model([opset1.matmul(x, node, False, True)], [x], "m")
    model, report = ov_ext.pack_sparse_weights(model, ALL)
    assert report.layers[0].note == remark
    restored = ov_ext.unpack_sparse_weights(model)
    found = next(node for node in restored.get_ops() if node.get_friendly_name() == "w").get_data()
    assert found.tolist() == [[1.0, 1.0, 1.015625, 0.0, -1.0, 0.0]]


def test_negative_zero_is_the_documented_exception() -> None:
    x = opset1.parameter([1, 4], ov.Type.f32)
    weight = constant(np.array([[-0.0, 1.0, 0.0, -2.0]], np.float32), "f32", "w")
    model, _ = ov_ext.pack_sparse_weights(ov.Model([opset1.matmul(x, weight, False, True)], [x], "m"), ALL)
    restored = ov_ext.unpack_sparse_weights(model)
    found = next(node for node in restored.get_ops() if node.get_friendly_name() == "w").get_data()
    assert found.tolist() == [[0.0, 1.0, 0.0, -2.0]] and not np.signbit(found[0, 0])


@pytest.mark.parametrize("code", [-128, -127, 127])
def test_int8_keeps_the_whole_range(core: ov.Core, code: int) -> None:
    x = opset1.parameter([1, 64], ov.Type.f32)
    codes = np.zeros((3, 64), np.int8)
    codes[1, 5] = code
    node = opset1.multiply(opset1.convert(constant(codes, "i8", "w"), "f32"), constant(np.ones((3, 1)), "f32", "s"))
    model, report = ov_ext.pack_sparse_weights(ov.Model([opset1.matmul(x, node, False, True)], [x], "m"), ALL)
    assert report.layers[0].replaced
    assert infer(core, model, np.ones((1, 64), np.float32)).tolist() == [[0.0, float(code), 0.0]]
    quantized, _ = ov_ext.pack_sparse_weights(ov_ext.unpack_sparse_weights(model), ov_ext.SparsePolicy(min_weights=0))
    assert infer(core, quantized, np.ones((1, 64), np.float32))[0, 1] == pytest.approx(code, rel=1e-6)


@pytest.mark.parametrize("shape", [[256], [-1, 256], [2, -1, 256], [-1, -1, -1, 256], [2, 3, 256]], ids=str)
def test_activations_of_any_rank(core: ov.Core, shape: list[int]) -> None:
    built = build(INT4.but(bias="f32"), x_shape=shape)
    model, report = ov_ext.pack_sparse_weights(built.model, ALL)
    assert report.layers[0].replaced
    assert model.outputs[0].get_partial_shape() == ov.PartialShape([*shape[:-1], 70])
    x = np.random.default_rng(2).standard_normal([abs(d) for d in shape]).astype(np.float32)
    expected = x @ built.weight.T + built.bias
    np.testing.assert_allclose(infer(core, model, x), expected, rtol=1e-4, atol=1e-4)


def test_a_product_that_others_read_keeps_its_bias_outside(core: ov.Core) -> None:
    x = opset1.parameter([-1, 64], ov.Type.f32)
    weight = bf16_values(np.random.default_rng(0), 8, 64)
    product = opset1.matmul(x, constant(weight, "f32", "w"), False, True)
    sums = [opset1.add(product, constant(np.full((1, 8), value), "f32", f"b{value}")) for value in (1, 2)]
    model = ov.Model([opset1.result(each) for each in sums], [x], "m")
    policy = ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=0, activation_group=0)
    model, report = ov_ext.pack_sparse_weights(model, policy)
    assert report.layers[0].replaced and operations(model).count("Add") == 2
    results = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(np.zeros((1, 64), np.float32))
    assert [results[i][0, 0] for i in (0, 1)] == [1.0, 2.0]


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (1, 8)], ids=str)
def test_bias_shapes(core: ov.Core, shape: tuple[int, ...]) -> None:
    """Folded when the sum keeps the product's rank, and restored with the very shape."""
    x = opset1.parameter([-1, 64], ov.Type.f32)
    weight = constant(bf16_values(np.random.default_rng(0), 8, 64), "f32", "w")
    total = opset1.add(opset1.matmul(x, weight, False, True), constant(np.arange(8).reshape(shape), "f32", "b"))
    model = ov.Model([opset1.result(total)], [x], "m")
    stock = signature(model.clone())
    model, _ = ov_ext.pack_sparse_weights(model, ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=0))
    assert ("Add" in operations(model)) == (len(shape) > 2)
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock


def shared_model(kind: str) -> ov.Model:
    """A weight that is read twice: by two MatMuls, or by a Gather (embedding) and a MatMul (tied lm_head)."""
    rng = np.random.default_rng(0)
    weight = opset1.convert(
        constant(np.where(rng.random((64, 64)) > 0.5, bf16_values(rng, 64, 64), 0), "bf16", "w"), "f32", name="c"
    )
    if kind == "layers":
        x = opset1.parameter([-1, 64], ov.Type.f32, name="x")
        first = opset1.matmul(x, weight, False, True, name="first")
        last = opset1.matmul(opset1.relu(first, name="relu"), weight, False, True, name="second")
    else:
        x = opset1.parameter([-1], ov.Type.i64, name="x")
        embedded = opset1.gather(weight, x, opset1.constant(np.int64(0), name="axis"), name="embedded")
        last = opset1.matmul(embedded, weight, False, True, name="head")
    last.output(0).set_names({"y"})
    return ov.Model([opset1.result(last, name="result")], [x], "m")


@pytest.mark.parametrize("kind", ["layers", "tied"])
def test_shared_weights(core: ov.Core, kind: str, tmp_path: Path) -> None:
    x = np.arange(5) if kind == "tied" else np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    stock, expected = signature(shared_model(kind)), infer(core, shared_model(kind), x)
    model, report = ov_ext.pack_sparse_weights(shared_model(kind), ALL)
    notes = [layer.note for layer in report.replaced]
    blobs = {node.input_value(1).get_node().get_name() for node in model.get_ops() if "Sparse" in node.get_type_name()}
    assert len(blobs) == 1  # two readers, one blob
    if kind == "tied":
        assert notes == ["its stock constant stays for another use"] and report.bytes_after > report.bytes_before
    else:
        assert notes == ["", "shares the blob of an earlier layer"] and report.bytes_after < report.bytes_before
    np.testing.assert_allclose(infer(core, model, x), expected, rtol=2e-5, atol=2e-5)
    ov_ext.save_model(model, tmp_path / "m.xml")
    assert signature(ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "m.xml"))) == stock  # one constant again


def square_model(*transposed: bool) -> ov.Model:
    """A chain of layers "0", "1", ... that read one [64, 64] constant, each as it is or transposed."""
    rng = np.random.default_rng(0)
    weight = constant(np.where(rng.random((64, 64)) > 0.5, bf16_values(rng, 64, 64), np.float32(0)), "f32", "w")
    x = node = opset1.parameter([-1, 64], ov.Type.f32, name="x")
    for i, transpose_b in enumerate(transposed):
        node = opset1.matmul(node, weight, False, transpose_b, name=str(i))
    return ov.Model([opset1.result(node, name="result")], [x], "m")


def blob_bytes(model: ov.Model) -> list[int]:
    blobs = [n.input_value(1).get_node() for n in model.get_ordered_ops() if n.get_type_name() == "SparseMatMul"]
    return list({blob.get_name(): blob.get_byte_size() for blob in blobs}.values())


def test_a_constant_read_in_both_orientations(core: ov.Core) -> None:
    """The same constant means two matrices: two blobs. (OpenVINO 2026.4 itself mixes them up, so it is no oracle.)"""
    expected = x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    reads = (True, False, True)
    model = square_model(*reads)
    stock = signature(model.clone())
    weight = next(n for n in model.get_ops() if n.get_friendly_name() == "w").get_data().astype(np.float64)
    for transpose_b in reads:
        expected = expected @ (weight.T if transpose_b else weight)
    model, report = ov_ext.pack_sparse_weights(model, ALL)
    assert [layer.note for layer in report.layers] == ["", "", "shares the blob of an earlier layer"]
    np.testing.assert_allclose(infer(core, model, x), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert [layer.bytes_before for layer in report.layers] == [64 * 64 * 4, 0, 0]  # the constant is counted once
    assert [layer.bytes_after for layer in report.layers] == [*blob_bytes(model), 0]
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock


@pytest.mark.parametrize("ignored", ["0", "1"])
def test_a_sharer_that_stays_keeps_the_stock_constant(ignored: str) -> None:
    """Whichever comes first: before, one constant; after, the constant and a blob."""
    policy = ov_ext.SparsePolicy(min_weights=0, ignored_names=(ignored,))
    stock = signature(square_model(True, True))
    model, report = ov_ext.pack_sparse_weights(square_model(True, True), policy)
    (blob,) = blob_bytes(model)
    assert [layer.replaced for layer in report.layers] == [ignored == "1", ignored == "0"]
    assert [layer.bytes_before for layer in report.layers] == [64 * 64 * 4, 0]
    assert report.bytes_after == 64 * 64 * 4 + blob
    assert report.replaced[0].note == "its stock constant stays for another use"
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock  # and it is used again


# --- what stays, and why --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    name: str
    build: Callable[[], ov.Model]
    reason: str
    policy: ov_ext.SparsePolicy = ALL

    def __str__(self) -> str:
        return self.name


def around(weight: ov.Node, x: list[int], **attributes: bool) -> ov.Model:
    parameter = opset1.parameter(x, ov.Type.f32)
    return ov.Model(
        [opset1.matmul(parameter, weight, **{"transpose_a": False, "transpose_b": True} | attributes)], [parameter], "m"
    )


def half_precision() -> ov.Model:
    x = opset1.parameter([1, 64], ov.Type.f16)
    return ov.Model([opset1.matmul(x, constant(np.eye(64), "f16", "w"), False, True)], [x], "m")


def left_operand() -> ov.Model:
    x = opset1.parameter([64, 2], ov.Type.f32)
    return ov.Model([opset1.matmul(constant(np.eye(64), "f32", "w"), x, False, False)], [x], "m")


def fake_quantized() -> ov.Model:
    low, high = constant(np.full((1, 1), -1), "f32", "low"), constant(np.full((1, 1), 1), "f32", "high")
    weight = opset1.fake_quantize(constant(np.eye(64), "f32", "w"), low, high, low, high, 256)
    return around(weight, [1, 64])


def fine_scales() -> ov.Model:
    codes = opset1.convert(constant(np.eye(64), "i8", "w"), "f32")
    return around(opset1.multiply(codes, constant(np.ones((64, 64)), "f32", "s")), [1, 64])


def infinite_scale() -> ov.Model:
    codes = opset1.convert(constant(np.eye(64), "i8", "w"), "f32")
    return around(opset1.multiply(codes, constant(np.full((64, 1), np.inf), "f32", "s")), [1, 64])


def nf4() -> ov.Model:
    raw = np.zeros(64 * 32, np.uint8)
    weight = ov.op.Constant(ov.Tensor(raw, ov.Shape([64, 64]), ov.Type.nf4), shared_memory=False)
    return around(opset1.multiply(opset1.convert(weight, "f32"), constant(np.ones((64, 1)), "f32", "s")), [1, 64])


def fractional_zero_points() -> ov.Model:
    codes = opset1.convert(constant(np.eye(64), "u8", "w"), "f32")
    shifted = opset1.subtract(codes, constant(np.full((64, 1), 0.5), "f32", "z"))
    return around(opset1.multiply(shifted, constant(np.ones((64, 1)), "f32", "s")), [1, 64])


def transposed_then_reshaped() -> ov.Model:
    """Not the [64, 64] matrix that the constant's bytes would be: rows and columns mix."""
    swapped = opset1.transpose(constant(np.arange(32 * 128).reshape(32, 128), "f32", "w"), np.array([1, 0]))
    return around(opset1.reshape(swapped, np.array([64, 64]), False), [1, 64])


def zero_points_of_another_shape() -> ov.Model:
    """Zero points for [64, 128], scales for [64, 1, 128]."""
    codes = opset1.convert(constant(np.eye(64, 128), "u8", "w"), "f32")
    shifted = opset1.subtract(codes, opset1.convert(constant(np.arange(64)[:, None], "u8", "z"), "f32"))
    split = opset1.reshape(shifted, np.array([64, 1, 128]), False)
    scaled = opset1.multiply(split, constant(np.ones((64, 1, 1)), "f32", "s"))
    return around(opset1.reshape(scaled, np.array([64, 128]), False), [1, 128])


def broadcast_codes() -> ov.Model:
    codes = opset1.convert(constant(np.ones((1, 64)), "i8", "w"), "f32")
    return around(opset1.multiply(codes, constant(np.ones((64, 1)), "f32", "s")), [1, 64])


REFUSALS = [
    Refusal("experts", lambda: around(constant(np.ones((4, 8, 64)), "f32", "w"), [4, 1, 64]), "3 axes"),
    Refusal("transposed", lambda: around(constant(np.eye(64), "f32", "w"), [64, 2], transpose_a=True), "transpose_a"),
    Refusal("f16", half_precision, "activations are f16"),
    Refusal("left", left_operand, "left operand"),
    Refusal("computed", fake_quantized, "computed by FakeQuantize"),
    Refusal("fine", fine_scales, "change along the inputs"),
    Refusal("swapped", transposed_then_reshaped, "permuted in an unusual order"),
    Refusal("two shapes", zero_points_of_another_shape, "zero points and scales apply to different shapes"),
    Refusal("broadcast", broadcast_codes, "repeated by broadcasting"),
    Refusal("infinite", infinite_scale, "not finite"),
    Refusal("nf4", nf4, "nf4 has no packed form"),
    Refusal("fraction", fractional_zero_points, "not whole numbers"),
    Refusal("group 32", lambda: build(INT4.but(group=32)).model, "groups have 32 inputs"),
    Refusal("INT4_ASYM", lambda: build(Form("u4", 128, "wide")).model, "CompressWeightsMode.INT4_SYM"),
    Refusal("INT8_ASYM", lambda: build(Form("u8", 0, "wide")).model, "CompressWeightsMode.INT8_SYM"),
    Refusal("dense", lambda: build(INT4, sparsity=0.3).model, "too few zeros: 42%"),
    Refusal("dense int8", lambda: build(INT8, sparsity=0.2).model, "too few zeros: 30%"),
    Refusal("dense bf16", lambda: build(Form("f32"), sparsity=0.1).model, "too few zeros: 20%"),
    Refusal(
        "threshold",
        lambda: build(INT4).model,
        "too few zeros: 70%",
        ov_ext.SparsePolicy(min_sparsity=0.7, min_weights=0),
    ),
    Refusal("small", lambda: build(INT4, n=63).model, "min_weights is 16384", ov_ext.SparsePolicy()),
    Refusal("name", lambda: build(INT4).model, "ignored", ov_ext.SparsePolicy(ignored_names=("layer",))),
    Refusal("pattern", lambda: build(INT4).model, "ignored", ov_ext.SparsePolicy(ignored_patterns=("w*ght",))),
]


@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_what_stays_and_why(case: Refusal) -> None:
    model = case.build()
    stock = signature(model.clone())
    model, report = ov_ext.pack_sparse_weights(model, case.policy)
    (layer,) = report.layers
    assert not layer.replaced and case.reason in layer.note and layer.bytes_before == layer.bytes_after > 0
    assert signature(model) == stock and not model.has_rt_info(["ov_ext", "format"])


@pytest.mark.parametrize("element, value", [("f16", 65504.0), ("f32", 3.4e38)])
def test_rounding_out_of_range_is_refused(element: str, value: float) -> None:
    node = constant(np.diag(np.full(64, value)), element, "w")
    model = around(node if element == "f32" else opset1.convert(node, "f32"), [1, 64])
    report = ov_ext.pack_sparse_weights(model, ALL)[1]
    assert "out of the range" in report.layers[0].note


def test_activation_by_activation_is_no_weight() -> None:
    x, y = opset1.parameter([2, 64], ov.Type.f32), opset1.parameter([3, 64], ov.Type.f32)
    scaled = opset1.multiply(y, constant(np.ones((1, 64)), "f32", "s"))
    keys = opset1.transpose(opset1.reshape(scaled, np.array([3, 64]), False), np.array([1, 0]))
    model = ov.Model([opset1.matmul(x, keys, False, False)], [x, y], "m")
    assert ov_ext.pack_sparse_weights(model, ALL)[1].layers == ()


@pytest.mark.parametrize(
    "form", [Form("u4", 128, "wide"), Form("u4", 64, "wide", outputs_first=False), Form("u8", 0, "wide")], ids=str
)
def test_requantize_is_on_request_and_reports_its_error(core: ov.Core, form: Form) -> None:
    policy = ov_ext.SparsePolicy(min_weights=0, activation_group=0, requantize=True)
    built = build(form)
    model, report = ov_ext.pack_sparse_weights(built.model, policy)
    (layer,) = report.layers
    assert layer.replaced and layer.sparsity is not None and layer.sparsity >= 0.58  # zeros stay zeros
    stated = float(layer.note.split("relative error ")[1].rstrip("%")) / 100
    identity = infer(core, model, np.eye(256, dtype=np.float32)).T
    error = np.linalg.norm(identity - built.weight) / np.linalg.norm(built.weight)
    assert 0 < stated < 0.12 and error == pytest.approx(stated, abs=1e-4)
    assert (identity[built.weight == 0] == 0).all()
    blocks = built.weight.reshape(
        70, -1, form.group or 256
    )  # the largest value of a group lies on the grid, either sign
    largest = np.abs(blocks).argmax(axis=2)[..., None]
    kept = np.take_along_axis(identity.reshape(blocks.shape), largest, axis=2)
    np.testing.assert_allclose(kept, np.take_along_axis(blocks, largest, axis=2), rtol=1e-3)
    # What is restored is the symmetric weight, in the plain form of its kind.
    restored = ov_ext.unpack_sparse_weights(model)
    assert "Subtract" not in operations(restored) and "MatMul" in operations(restored)
    again = infer(core, restored, np.eye(256, dtype=np.float32)).T
    np.testing.assert_allclose(again, identity, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("build_one, reason", [(infinite_scale, "not finite"), (fractional_zero_points, "not whole")])
def test_requantize_leaves_what_it_cannot_read(build_one: Callable[[], ov.Model], reason: str) -> None:
    policy = ov_ext.SparsePolicy(min_sparsity=0, min_weights=0, requantize=True)
    first = build_one()
    product = first.results[0].input_value(0)
    packable = opset1.matmul(product, constant(np.eye(64), "f32", "v"), False, True, name="packable")
    model = ov.Model([packable], first.get_parameters(), "m")
    report = ov_ext.pack_sparse_weights(model, policy)[1]
    assert [layer.replaced for layer in report.layers] == [False, True] and reason in report.layers[0].note


def restored_scales(model: ov.Model) -> tuple[str, np.ndarray]:
    node = next(node for node in model.get_ops() if node.get_friendly_name() == "weight/scale")
    data, element = node.get_data(), node.get_output_element_type(0).get_type_name()
    return element, (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if element == "bf16" else data


@pytest.mark.parametrize("scale", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("form", [Form("u8", 0, "wide"), Form("u4", 128, "wide", outputs_first=False)], ids=str)
def test_requantized_scales_have_the_stock_type(form: Form, scale: str) -> None:
    """What was packed is what unpacking writes: no scale is rounded a second time."""
    policy = ov_ext.SparsePolicy(min_weights=0, requantize=True)
    model, _ = ov_ext.pack_sparse_weights(build(form.but(scale=scale, math="f32")).model, policy)
    sparse = next(node for node in model.get_ops() if node.get_type_name() == "SparseMatMul")
    packed = native.unpack(sparse.input_value(1).get_node().get_data().copy()).scales
    assert packed is not None and packed.dtype == (np.float16 if scale == "f16" else np.float32)
    element, found = restored_scales(ov_ext.unpack_sparse_weights(model))
    found = found.reshape(packed.shape) if form.outputs_first else found[:, 0].T
    assert element == scale and np.array_equal(found.astype(np.float32), packed.astype(np.float32))


@pytest.mark.parametrize("math", ["f32", "f16"])
@pytest.mark.parametrize("scale", [6e-8, 1e-5, 6e4], ids=["denormal", "small", "large"])
def test_scales_that_float16_does_not_hold(core: ov.Core, scale: float, math: str, tmp_path: Path) -> None:
    """Row 0 has ordinary scales; row 1 codes so small, or scales so large, that dividing leaves f16."""
    codes, zeros = np.zeros((2, 64), np.int64), np.full((2, 1), 20)
    codes[0, :3], codes[1, :3] = (200, -20, 7), ((235, -20, 100) if scale > 1 else (3, -2, 1))
    codes[0, 3] = 235  # beyond 127: not lossless
    scales = np.array([[0.01], [scale]]).astype(np.float16)
    weight = codes * scales.astype(np.float64)
    node = opset1.convert(constant(codes + zeros, "u8", "weight"), math)
    node = opset1.subtract(node, opset1.convert(constant(zeros, "u8", "zero"), math))
    factor: ov.Node = constant(scales, "f16", "weight/scale")
    node = opset1.multiply(node, factor if math == "f16" else opset1.convert(factor, math))
    model = around(node if math == "f32" else opset1.convert(node, "f32"), [64, 64])
    policy = ov_ext.SparsePolicy(min_weights=0, activation_group=0, requantize=True)
    model, report = ov_ext.pack_sparse_weights(model, policy)
    assert report.layers[0].replaced
    identity = infer(core, model, np.eye(64, dtype=np.float32)).T
    peak = np.abs(weight).max(axis=1, keepdims=True)
    assert (np.abs(identity - weight) <= 0.502 * peak / 128).all()  # half a step, and the rounding of its scale
    ov_ext.save_model(model, tmp_path / "m.xml")
    restored = ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "m.xml"))
    assert restored_scales(restored)[0] == "f32"
    np.testing.assert_allclose(infer(core, restored, np.eye(64, dtype=np.float32)).T, identity, rtol=1e-6)


# --- misuse ---------------------------------------------------------------------------------------------------------


def test_an_already_packed_model_is_refused() -> None:
    model, _ = ov_ext.pack_sparse_weights(build(INT4).model, ALL)
    with pytest.raises(ov_ext.AlreadyPackedError, match="1 packed weights already.*unpack"):
        ov_ext.pack_sparse_weights(model, ALL)


def test_a_newer_format_is_refused() -> None:
    model, _ = ov_ext.pack_sparse_weights(build(INT4).model, ALL)
    model.set_rt_info(99, ["ov_ext", "format_version"])
    for operation in (ov_ext.unpack_sparse_weights, ov_ext.pack_sparse_weights):
        with pytest.raises(ValueError, match="version 99.*update nncf-ext"):
            operation(model)


def test_an_operation_without_record_is_named(core: ov.Core) -> None:
    from openvino.utils.node_factory import NodeFactory

    model, _ = ov_ext.pack_sparse_weights(build(INT4).model, ALL)
    node = next(node for node in model.get_ops() if node.get_type_name() == "SparseMatMul")
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    record = json.loads(node.get_attributes()["source"])
    for source, message in (
        ("", "layer: it carries no record"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"v": 7}), "version 7"),
        (json.dumps(record | {"nodes": [{"type": "Loop", "name": "x"}]}), "names Loop"),
        (
            json.dumps(record).replace("[70, 2, 128]", "[7000, 2, 128]"),
            "asks for 896000 bytes of values, the blob gives 8960",
        ),
        (json.dumps(record).replace('"shape": [2]', '"shape": [3]'), "asks for 24 bytes of data, the blob gives 16"),
    ):
        bare = factory.create("SparseMatMul", node.input_values(), node.get_attributes() | {"source": source})
        bare.set_friendly_name("layer")
        parameter = node.input_value(0).get_node()
        with pytest.raises(ov_ext.RecordError, match=message):
            ov_ext.unpack_sparse_weights(ov.Model([bare], [parameter], "m"))


def two_layers() -> ov.Model:
    """Group scales, zero points and a bias in the second: a record with every kind of entry."""
    first = constant(np.eye(256), "f32", "v")
    form = build(Form("u4", 128, "varied", bias="f16"))
    layer = next(node for node in form.model.get_ops() if node.get_friendly_name() == "layer")
    x = form.model.get_parameters()[0]
    layer.input(0).replace_source_output(opset1.matmul(x, first, False, True, name="first").output(0))
    return ov_ext.pack_sparse_weights(form.model, ALL)[0]


def with_other(model: ov.Model, source: str | None = None, blob: np.ndarray | None = None) -> None:
    """Give the last packed layer of a model another record or blob, as a damaged file would."""
    from openvino.utils.node_factory import NodeFactory

    node = [node for node in model.get_ordered_ops() if node.get_type_name() == "SparseMatMul"][-1]
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    attributes = node.get_attributes() | ({} if source is None else {"source": source})
    weight = node.input_value(1) if blob is None else ov.op.Constant(blob).output(0)
    other = factory.create("SparseMatMul", [node.input_value(0), weight], attributes)
    other.set_friendly_name(node.get_friendly_name())
    for port in list(node.output(0).get_target_inputs()):
        port.replace_source_output(other.output(0))


TEXTS = {
    "garbage": "gar\x7fbage",
    "only a version": '{"v": 1}',
    "no version": "{}",
    "null": "null",
    "text": '"text"',
    "endless": '{"v":' + "1" * 9999 + "}",
    "nested": "[" * 99999,
    "no version number": '{"v": [1]}',
    "a list of numbers": '{"v": 1, "nodes": [1, 2]}',
}
# Entry of the record (None: the record itself) and what changes there; KeyError takes a key away, a slice cuts.
CHANGES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "no operations": (None, dict(nodes=[])),
    "cut off": (None, dict(nodes=slice(-2))),
    "only constants": (None, dict(nodes=slice(1))),
    "axes": (None, dict(axes=7)),
    "other axes": (None, dict(axes=2)),
    "no orientation": (None, dict(outputs_first=KeyError)),
    "other orientation": (None, dict(outputs_first=False)),
    "no name": ("weight", dict(name=KeyError)),
    "names that are numbers": ("weight", dict(tensors=[1])),
    "no shape": ("weight", dict(shape=KeyError)),
    "shape of text": ("weight", dict(shape=["a"])),
    "negative shape": ("weight", dict(shape=[-70, -2, 128])),
    "enormous shape": ("weight", dict(shape=[2**40, 2**40])),
    "larger than memory": ("weight/zero_point", dict(shape=[2**62])),
    "element": ("weight", dict(element="get_size")),
    "wrong element": ("weight/scale", dict(element="i64")),
    "role": ("weight", dict(role="magic")),
    "no role": ("weight", dict(role=KeyError)),
    "roles swapped": ("weight/scale", dict(role="bias")),
    "no bytes": ("weight/zero_point", dict(zlib=KeyError)),
    "no base64": ("weight/zero_point", dict(zlib="!")),
    "no zlib": ("weight/zero_point", dict(zlib="AAAA")),
    "empty zero points": ("weight/zero_point", dict(shape=[70, 0, 1], zlib="eJwDAAAAAAE=")),
    "index beyond the end": ("layer", dict(inputs=[-1, 99])),
    "negative index": ("layer", dict(inputs=[-1, -2])),
    "inputs of text": ("layer", dict(inputs=["a", "b"])),
    "no inputs": ("layer", dict(inputs=[])),
    "one input": ("layer", dict(inputs=[-1])),
    "activation twice": ("layer", dict(inputs=[-1, -1])),
    "activation elsewhere": ("weight/multiply", dict(inputs=[-1, 0])),
    "no attributes": ("weight/reshape", dict(attributes=KeyError)),
    "attributes of text": ("weight/codes", dict(attributes={"destination_type": "no such type"})),
    "another product": ("layer", dict(attributes={"transpose_a": False, "transpose_b": False})),
    "a mark without type": ("weight/codes", dict(attributes={}, keep=True)),
    "another mark": ("weight/codes", dict(keep=True)),
}


@pytest.mark.parametrize("damage", [*TEXTS, *CHANGES])
def test_a_damaged_record_changes_nothing(damage: str) -> None:
    model = two_layers()
    node = [node for node in model.get_ordered_ops() if node.get_type_name() == "SparseMatMul"][-1]
    record = json.loads(node.get_attributes()["source"])
    name, changes = CHANGES.get(damage, (None, {}))
    target = record if name is None else next(entry for entry in record["nodes"] if entry["name"] == name)
    for key, value in changes.items():
        if value is KeyError:
            del target[key]
        else:
            target[key] = target[key][value] if isinstance(value, slice) else value
    with_other(model, source=TEXTS.get(damage) or json.dumps(record))
    before = signature(model)
    with pytest.raises(ov_ext.RecordError, match="^layer: "):
        ov_ext.unpack_sparse_weights(model)
    assert signature(model) == before  # the first layer, whose record is good, was not restored either


def test_a_damaged_blob_changes_nothing() -> None:
    """One bit of a bias: nothing but the checksum can tell."""
    model = two_layers()
    node = [node for node in model.get_ordered_ops() if node.get_type_name() == "SparseMatMul"][-1]
    blob = node.input_value(1).get_node().get_data().copy()
    bias = int(blob[96:104].view(np.uint64)[0])
    blob[bias + 5] ^= 4
    native.validate(blob)
    with_other(model, blob=blob)
    before = signature(model)
    with pytest.raises(ValueError, match="layer: its blob is damaged: the checksum"):
        ov_ext.unpack_sparse_weights(model)
    assert signature(model) == before
    mended = blob.copy()
    mended[112:120].view(np.uint64)[0] = zlib.crc32(blob[128:])
    with_other(model, blob=mended)
    assert "SparseMatMul" not in operations(ov_ext.unpack_sparse_weights(model))


def test_unpacking_a_stock_model_changes_nothing() -> None:
    model = build(INT4).model
    stock = signature(model.clone())
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock


def branching_model() -> ov.Model:
    """An If with a layer in each branch; names are the same in both."""

    def branch(sign: float) -> tuple[ov.Model, ov.Node]:
        y = opset1.parameter([2, 64], ov.Type.f32, name="y")
        layer = opset1.matmul(y, constant(sign * np.eye(64), "f32", "w"), False, True, name="layer")
        return ov.Model([opset1.result(layer, name="r")], [y], "branch"), y

    x, condition = opset1.parameter([2, 64], ov.Type.f32, name="x"), opset1.parameter([], ov.Type.boolean, name="c")
    (yes, yes_input), (no, no_input) = branch(1.0), branch(2.0)
    choice = opset13.if_op(condition)
    choice.set_then_body(yes)
    choice.set_else_body(no)
    choice.set_input(x.output(0), yes_input, no_input)
    output = choice.set_output(yes.results[0], no.results[0])
    return ov.Model([output], [x, condition], "m")


def test_layers_inside_branches(core: ov.Core, tmp_path: Path) -> None:
    model, report = ov_ext.pack_sparse_weights(
        branching_model(), ov_ext.SparsePolicy(min_weights=0, activation_group=0)
    )
    assert [layer.replaced for layer in report.layers] == [True, True]
    ov_ext.save_model(model, tmp_path / "m.xml")
    for variant in (
        core.read_model(tmp_path / "m.xml"),
        ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "m.xml")),
    ):
        compiled = core.compile_model(variant, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for condition, factor in ((True, 1.0), (False, 2.0)):
            assert (compiled([np.ones((2, 64), np.float32), np.array(condition)])[0] == factor).all()
    with pytest.raises(ov_ext.AlreadyPackedError, match="2 packed"):
        ov_ext.pack_sparse_weights(model)


def test_stateful_models_keep_their_state(core: ov.Core) -> None:
    """ReadValue and Assign around a packed layer."""
    x = opset1.parameter([1, 64], ov.Type.f32)
    variable = opset13.read_value(
        opset1.constant(np.zeros((1, 64), np.float32)), "memory", ov.Type.f32, ov.PartialShape([1, 64])
    )
    weight = constant(np.eye(64), "f32", "w")
    total = opset1.add(variable, opset1.matmul(x, weight, False, True))
    model = ov.Model([opset1.result(total)], [opset13.assign(total, "memory")], [x], "m")
    model, report = ov_ext.pack_sparse_weights(model, ALL)
    assert report.layers[0].replaced
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    for turn in (1.0, 2.0, 3.0):
        assert request.infer([np.ones((1, 64), np.float32)])[0].tolist() == [[turn] * 64]


def test_a_replaced_layer_that_somebody_holds_is_no_consumer_any_more() -> None:
    """Tools such as NNCF walk from outputs to consumers: a stock MatMul that Python still holds must not be found."""
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    weight[:, ::2] = 0
    x = opset13.parameter([2, 128], np.float32, name="x")
    relu = opset13.relu(x)
    held = opset13.matmul(relu, opset13.constant(weight), False, True)
    biased = opset13.add(held, opset13.constant(np.ones(128, np.float32)))
    model = ov.Model([opset13.result(biased)], [x], "m")
    packed, report = ov_ext.pack_sparse_weights(model)
    assert len(report.replaced) == 1

    def consumers() -> list[str]:
        return [port.get_node().get_type_name() for port in relu.output(0).get_target_inputs()]

    assert consumers() == ["SparseMatMul"] and held.get_type_name() == "MatMul"
    sparse = next(node for node in packed.get_ops() if node.get_type_name() == "SparseMatMul")
    ov_ext.unpack_sparse_weights(packed)
    assert consumers() == ["MatMul"] and sparse.get_type_name() == "SparseMatMul"
