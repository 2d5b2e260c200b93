"""Stock IR forms of a weight, built operation by operation, with the matrix they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset1

import ov_ext


@dataclass(frozen=True)
class Form:
    """One way to store a weight [N, K] in an IR.

    :param element: Element type of the constant.
    :param group: Inputs per scale; 0 = one scale per output.
    :param zero: None, the value of all zero points, "varied" (code minus zero point fits the signed range) or "wide"
        (it does not).
    :param outputs_first: The constant is [N, K] (transpose_b), else [K, N].
    :param swap: A Transpose between constant and MatMul undoes the other orientation.
    :param scale: Element type of the scales.
    :param math: Element type in which codes and scales meet.
    :param scale_shape: "full", or "scalar" for one scale for everything.
    :param bias: Element type of a bias behind the MatMul, or None.
    :param bias_first: The bias is the first operand of its Add.
    """

    element: str
    group: int = 0
    zero: int | str | None = None
    outputs_first: bool = True
    swap: bool = False
    scale: str = "f16"
    math: str = "f16"
    scale_shape: str = "full"
    bias: str | None = None
    bias_first: bool = False

    def __str__(self) -> str:
        default = Form(self.element)
        changed = [f"{k}={v}" for k, v in vars(self).items() if k != "element" and v != getattr(default, k)]
        return "-".join([self.element, *changed])

    def but(self, **changes: Any) -> Form:
        return replace(self, **changes)


@dataclass(frozen=True)
class Built:
    model: ov.Model
    weight: np.ndarray  # [N, K] float64, without bias
    bias: np.ndarray  # [N] float64


def constant(values: np.ndarray, element: str, name: str) -> ov.Node:
    """A Constant of any element type; 4-bit values are written nibble by nibble, bf16 values are truncated."""
    shape = list(values.shape)
    if element in ("i4", "u4"):
        flat = [int(v) & 15 for v in values.reshape(-1)] + [0] * (values.size % 2)
        raw = np.array([low | high << 4 for low, high in zip(flat[0::2], flat[1::2], strict=True)], np.uint8)
    elif element == "bf16":
        raw = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        raw = np.ascontiguousarray(
            values, {"f32": np.float32, "f16": np.float16, "i8": np.int8, "u8": np.uint8}[element]
        )
    node = ov.op.Constant(ov.Tensor(raw, ov.Shape(shape), getattr(ov.Type, element)), shared_memory=False)
    node.set_friendly_name(name)
    return node


def bf16_values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal values that bf16 holds exactly."""
    bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32)


def sparse_mask(rng: np.random.Generator, shape: tuple[int, ...], sparsity: float) -> np.ndarray:
    return rng.random(shape) >= sparsity


def build(form: Form, n: int = 70, k: int = 256, sparsity: float = 0.6, x_shape: Any = None, seed: int = 0) -> Built:
    """Parameter -> MatMul (named "layer") -> [Add] -> Result (named "y")."""
    rng = np.random.default_rng(seed)
    keep = sparse_mask(rng, (n, k), sparsity)
    x = opset1.parameter(ov.PartialShape([-1, k] if x_shape is None else x_shape), ov.Type.f32, name="x")
    x.output(0).set_names({"x"})
    rows = form.outputs_first
    if form.element in ("f32", "f16", "bf16"):
        dense = np.where(keep, bf16_values(rng, n, k), np.float32(0))  # no -0.0
        node = constant(dense if rows else dense.T, form.element, "weight")
        if form.element != "f32":
            node = opset1.convert(node, "f32", name="weight/convert")
        weight = dense.astype(np.float64)
    else:
        node, weight = _decompression(form, rng, keep)
    transpose_b = rows
    if form.swap:
        node, transpose_b = (
            opset1.transpose(node, opset1.constant(np.array([1, 0]), name="order"), name="weight/transpose"),
            not rows,
        )
    y = opset1.matmul(x, node, False, transpose_b, name="layer")
    bias = np.zeros(n)
    if form.bias:
        values = bf16_values(rng, 1, n)[0]
        bias = values.astype(np.float64)
        addend = constant(values[None] if len(x.get_output_partial_shape(0)) > 1 else values, form.bias, "bias")
        if form.bias != "f32":
            addend = opset1.convert(addend, "f32", name="bias/convert")
        y = opset1.add(addend, y, name="sum") if form.bias_first else opset1.add(y, addend, name="sum")
    y.output(0).set_names({"y", "logits"})
    return Built(ov.Model([opset1.result(y, name="result")], [x], "form"), weight, bias)


def _decompression(form: Form, rng: np.random.Generator, keep: np.ndarray) -> tuple[ov.Node, np.ndarray]:
    (n, k), rows = keep.shape, form.outputs_first
    groups = k // form.group if form.group else 1
    four = form.element in ("i4", "u4")
    unsigned = form.element.startswith("u")
    zeros = np.zeros((n, groups), np.int64)
    if form.zero in ("varied", "wide"):
        zeros = rng.integers(6, 10, (n, groups)) if four else rng.integers(120, 136, (n, groups))
    elif form.zero is not None:
        zeros += int(form.zero)
    wide = np.repeat(zeros, k // groups, axis=1)
    low, high = (-8, 7) if four else (-128, 127)
    lowest, highest = (0, 2 * high + 1) if unsigned else (low, high)
    codes = rng.integers(2 * low, 2 * high, (n, k)) if form.zero == "wide" else rng.integers(low, high + 1, (n, k))
    codes = np.clip(codes, lowest - wide, highest - wide) * keep
    scales = (rng.standard_normal((n, groups)) * 0.02).astype(np.float16)  # both signs, as NNCF writes them
    if form.scale_shape == "scalar":
        scales = np.broadcast_to(scales[:1, :1], scales.shape)
    if form.scale == "f32":
        scales = scales.astype(np.float32) * np.float32(1.0001)
    elif form.scale == "bf16":
        scales = (scales.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    weight = codes * np.repeat(scales.astype(np.float64), k // groups, axis=1)

    def laid_out(table: np.ndarray, last: int) -> np.ndarray:
        if not form.group:
            return table if rows else table.T
        split = table.reshape(n, groups, last)
        return split if rows else split.transpose(1, 2, 0)

    node = constant(laid_out(codes + wide, k // groups), form.element, "weight")
    node = opset1.convert(node, form.math, name="weight/codes")
    if form.zero is not None:
        zero: ov.Node = constant(laid_out(zeros, 1), form.element, "weight/zero_point")
        zero = opset1.convert(zero, form.math, name="weight/zero_point/convert")
        node = opset1.subtract(node, zero, name="weight/subtract")
    table = np.array(scales[0, 0]) if form.scale_shape == "scalar" else laid_out(scales, 1)
    scale: ov.Node = constant(table, form.scale, "weight/scale")
    if form.scale != form.math:
        scale = opset1.convert(scale, form.math, name="weight/scale/convert")
    node = opset1.multiply(node, scale, name="weight/multiply")
    if form.group:
        shape = opset1.constant(np.array([n, k] if rows else [k, n], np.int64), name="weight/shape")
        node = opset1.reshape(node, shape, False, name="weight/reshape")
    if form.math != "f32":
        node = opset1.convert(node, "f32", name="weight/convert")
    return node, weight


def signature(model: ov.Model) -> list[tuple[Any, ...]]:
    """All that a model says about its operations: types, names, attributes, constant bytes, tensor names, edges."""
    entries = []
    for node in model.get_ops():
        data = None
        if node.get_type_name() == "Constant":
            element = node.get_output_element_type(0).get_type_name()
            data = (element, tuple(node.shape), node.get_data().tobytes())
        entries.append(
            (
                node.get_friendly_name(),
                node.get_type_name(),
                node.get_type_info().version_id,
                str(node.get_attributes()),
                data,
                "decompression_0" in node.get_rt_info(),
                [port.get_node().get_friendly_name() for port in node.input_values()],
                [sorted(output.get_names()) for output in node.outputs()],
            )
        )
    return sorted(entries, key=lambda entry: entry[:2])


def operations(model: ov.Model) -> list[str]:
    return sorted(node.get_type_name() for node in model.get_ops())


ALL = ov_ext.SparsePolicy(min_weights=0, max_growth=999, activation_group=0)
INT4, INT8 = Form("i4", 128), Form("i8")


def infer(core: ov.Core, model: ov.Model, x: np.ndarray) -> np.ndarray:
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return core.compile_model(model, "CPU", config)(x)[0]
