"""Which weights stay and why, and what requantization may do on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset1

import ov_ext
from ov_ext import runtime
from ov_ext.cpu_plugin.sparse_matmul import native
from tests.ov_ext.ir_forms import ALL, INT4, INT8, Form, build, constant, infer, operations, signature


def for_target(target: runtime.InstructionSet) -> ov_ext.SparsePolicy:
    return ov_ext.SparsePolicy(target=target, min_weights=0, max_growth=999)


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
    Refusal(
        "INT8 without AVX-512",
        lambda: build(INT8, sparsity=0.3).model,
        "zeros on ours is faster on avx2_vnni",
        for_target("avx2_vnni"),
    ),
    Refusal("dense int8", lambda: build(INT8, sparsity=0.2).model, "would give 0.94x stock", for_target("avx512")),
    Refusal("dense bf16", lambda: build(Form("f32"), sparsity=0.1).model, "would give 1.09x", for_target("avx512")),
    Refusal("no fast kernel", lambda: build(INT4).model, "no fast kernels on reference", for_target("reference")),
    Refusal(
        "threshold",
        lambda: build(INT4).model,
        "too few zeros: 70%",
        ov_ext.SparsePolicy(min_sparsity=0.7, min_weights=0, max_growth=999),
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
    policy = ov_ext.SparsePolicy(min_weights=0, max_growth=999, activation_group=0, requantize=True)
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
    policy = ov_ext.SparsePolicy(min_sparsity=0, min_weights=0, max_growth=999, requantize=True)
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
    policy = ov_ext.SparsePolicy(min_weights=0, max_growth=999, requantize=True)
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
    policy = ov_ext.SparsePolicy(min_weights=0, max_growth=999, activation_group=0, requantize=True)
    model, report = ov_ext.pack_sparse_weights(model, policy)
    assert report.layers[0].replaced
    identity = infer(core, model, np.eye(64, dtype=np.float32)).T
    peak = np.abs(weight).max(axis=1, keepdims=True)
    assert (np.abs(identity - weight) <= 0.502 * peak / 128).all()  # half a step, and the rounding of its scale
    ov_ext.save_model(model, tmp_path / "m.xml")
    restored = ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "m.xml"))
    assert restored_scales(restored)[0] == "f32"
    np.testing.assert_allclose(infer(core, restored, np.eye(64, dtype=np.float32)).T, identity, rtol=1e-6)
