"""The embedding and the head beside compressed layers, and values that fit into 16 bits."""

from __future__ import annotations

import logging

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as opset

from ov_ext.leftovers import narrow_constants, quantize_rest

TOKENS, WIDTH = 128, 64
rng = np.random.default_rng(0)
IDS = rng.integers(0, TOKENS, (2, 5))


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def half_zero(weight: np.ndarray) -> np.ndarray:
    return np.where(np.abs(weight) < np.median(np.abs(weight)), 0, weight).astype(np.float32)


def language_model(layer: np.ndarray, table: np.ndarray, head: np.ndarray | None = None) -> ov.Model:
    """ids -> table -> x + layer(x) -> head: the table itself where it is None."""
    ids = opset.parameter([-1, -1], np.int64, name="ids")
    rows = opset.constant(table, name="table")
    x = opset.gather(rows, ids, opset.constant(0), name="embedding")
    x = opset.add(x, opset.matmul(x, opset.constant(layer), False, True, name="layer"))
    last = rows if head is None else opset.constant(head, name="head_weight")
    logits = opset.matmul(x, last, False, True, name="head")
    return ov.Model([opset.result(opset.multiply(logits, opset.constant(np.float32(0.5))))], [ids], "lm")


def run(model: ov.Model) -> np.ndarray:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    return ov.Core().compile_model(model, "CPU", exact)(IDS)[0].copy()


def logits(layer: np.ndarray, table: np.ndarray, head: np.ndarray) -> np.ndarray:
    x = table[IDS].astype(np.float64)
    return 0.5 * (x + x @ layer.T) @ head.T


def on_int8(model: ov.Model, name: str, weight: np.ndarray) -> np.ndarray:
    """The values that the codes and scales of a model stand for: each within half a step of the weight."""
    data = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    codes, scales = data[name].get_data(), data[f"{name}/scale"].get_data().astype(np.float32)
    assert codes.dtype == np.int8 and scales.shape == (len(weight), 1)
    steps = np.abs(weight).max(axis=1, keepdims=True) / 128
    # Half a step, 128/2048 for the scale in f16, and half a step more where the code 128 does not exist.
    allowed = np.where(np.abs(weight) < 126.5 * steps, 0.57, 1.07) * steps
    assert (np.abs(codes * scales - weight) <= allowed).all()
    return codes * scales


def constants(model: ov.Model, least: int = 4096) -> dict[str, str]:
    found = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    large = [node for node in found if np.prod(node.shape) >= least]
    return {node.get_friendly_name(): node.get_element_type().get_type_name() for node in large}


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_of_a_compressed_model_go_to_int8(tied: bool) -> None:
    layer, table, head = half_zero(normal(WIDTH, WIDTH)), normal(TOKENS, WIDTH), normal(TOKENS, WIDTH)
    head = table if tied else head
    model = language_model(layer, table, None if tied else head)
    assert quantize_rest(model) == ("embedding", "head")
    expected = {"table": "i8"} if tied else {"table": "i8", "head_weight": "i8"}
    assert {name: kind for name, kind in constants(model).items() if kind == "i8"} == expected
    rows = on_int8(model, "table", table)
    last = rows if tied else on_int8(model, "head_weight", head)
    np.testing.assert_allclose(run(model), logits(layer, rows, last), rtol=1e-4, atol=1e-3)
    assert quantize_rest(model) == ()


def unpacked(constant: ov.Node) -> np.ndarray:
    """Codes of an i4 constant: two to a byte, the lower bits first."""
    data = np.frombuffer(constant.get_data().tobytes(), np.uint8)
    codes = np.stack([data & 15, data >> 4], axis=-1).astype(np.int64)
    return np.where(codes > 7, codes - 16, codes).reshape(constant.shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("width", "group"), [(64, 64), (96, 32), (256, 128)])
def test_embedding_and_head_may_go_to_int4(tied: bool, width: int, group: int) -> None:
    layer, table = half_zero(normal(width, width)), normal(TOKENS, width)
    head = table if tied else normal(TOKENS, width)
    model = language_model(layer, table, None if tied else head)
    assert quantize_rest(model, "int4") == ("embedding", "head")
    data = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    values = {}
    for name, weight in ({"table": table} | ({} if tied else {"head_weight": head})).items():
        assert data[name].get_element_type() == ov.Type.i4
        codes, scales = unpacked(data[name]), data[f"{name}/scale"].get_data().astype(np.float32)
        assert codes.shape == (TOKENS, width // group, group) and scales.shape == (TOKENS, width // group, 1)
        values[name] = (codes * scales).reshape(TOKENS, width)
        steps = np.abs(scales).repeat(group, axis=2).reshape(TOKENS, width)
        assert (np.abs(values[name] - weight) <= 1.07 * steps).all()
    assert sum(kind == "i4" for kind in constants(model).values()) == len(values)
    wanted = logits(layer, values["table"], values.get("head_weight", values["table"]))
    np.testing.assert_allclose(run(model), wanted, rtol=1e-4, atol=1e-3)


def test_where_no_group_fits_int4_becomes_int8(caplog: pytest.LogCaptureFixture) -> None:
    model = language_model(half_zero(normal(72, 72)), normal(TOKENS, 72))
    with caplog.at_level(logging.WARNING, "ov_ext"):
        assert quantize_rest(model, "int4") == ("embedding", "head")
    assert constants(model)["table"] == "i8" and "72 columns" in caplog.text


def test_a_model_without_compression_stays() -> None:
    model = language_model(normal(WIDTH, WIDTH), normal(TOKENS, WIDTH))
    before = run(model)
    assert quantize_rest(model) == () and set(constants(model).values()) == {"f32"}
    assert np.array_equal(run(model), before)


def test_a_sparse_head_stays() -> None:
    model = language_model(half_zero(normal(WIDTH, WIDTH)), normal(TOKENS, WIDTH), half_zero(normal(TOKENS, WIDTH)))
    assert quantize_rest(model) == ("embedding",)
    assert constants(model)["head_weight"] == "f32"


def test_the_last_layer_of_an_encoder_is_no_head() -> None:
    """Its result is a residual sum, behind which every layer lies."""
    x = opset.parameter([-1, WIDTH], np.float32)
    y = opset.add(x, opset.matmul(x, opset.constant(half_zero(normal(WIDTH, WIDTH))), False, True))
    y = opset.add(y, opset.matmul(y, opset.constant(normal(WIDTH, WIDTH)), False, True))
    model = ov.Model([opset.result(y)], [x], "encoder")
    assert quantize_rest(model) == () and set(constants(model).values()) == {"f32"}


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize(
    "table, element",
    [
        (bf16(normal(TOKENS, WIDTH)), "bf16"),
        (normal(TOKENS, WIDTH).astype(np.float16).astype(np.float32), "f16"),
        (bf16(normal(TOKENS, WIDTH) * np.float32(1e30)), "bf16"),
        (normal(TOKENS, WIDTH), "f32"),
        (np.where(np.eye(TOKENS, WIDTH), np.float32(1e-9), np.float32(1 / 3)), "f32"),
    ],
    ids=["bf16", "f16", "bf16 beyond f16", "f32", "one value"],
)
def test_only_what_fits_is_narrowed(table: np.ndarray, element: str) -> None:
    layer = normal(WIDTH, WIDTH)
    model = language_model(layer, table)
    before = run(model)
    saved = narrow_constants(model)
    assert constants(model)["table"] == element and saved == (0 if element == "f32" else table.nbytes // 2)
    assert np.array_equal(run(model), before)
