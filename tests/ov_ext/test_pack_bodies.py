"""Layers inside If, Loop and TensorIterator, at any depth: packed, run and restored, from memory and from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

import ov_ext
from tests.ov_ext.ir_forms import ALL, constant, infer, signature

X = 1 + np.arange(5 * 64, dtype=np.float32).reshape(5, 64)


def times(factor: float, rows: int) -> ov.Model:
    """y = factor * x, as a layer. Names are the same in all of them."""
    x = opset.parameter([rows, 64], np.float32, name="x")
    y = opset.matmul(x, constant(factor * np.eye(64), "f32", "w"), False, True, name="layer")
    return ov.Model([opset.result(y)], [x], "body")


def in_if(body: ov.Model, other: ov.Model) -> ov.Model:
    """``body`` where x[0, 0] is at least 0, else ``other``."""
    x = opset.parameter(body.inputs[0].partial_shape, np.float32, name="x")
    corner = opset.reduce_sum(opset.slice(x, [0, 0], [1, 1], [1, 1], [0, 1]), [0, 1], False)
    choice = opset.if_op(opset.greater_equal(corner, np.float32(0)).output(0))
    choice.set_then_body(body)
    choice.set_else_body(other)
    choice.set_input(x.output(0), body.get_parameters()[0], other.get_parameters()[0])
    return ov.Model([opset.result(choice.set_output(body.results[0], other.results[0]))], [x], "if")


def in_loop(body: ov.Model, times: int) -> ov.Model:
    """``body`` of its own output, several times."""
    x = opset.parameter(body.inputs[0].partial_shape, np.float32, name="x")
    again = opset.result(opset.constant(True, dtype=np.bool_))
    body = ov.Model([body.results[0], again], body.get_parameters(), "body")
    loop = opset.loop(opset.constant(times, dtype=np.int32), opset.constant(True, dtype=np.bool_))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 1])
    loop.set_merged_input(body.get_parameters()[0], x.output(0), body.results[0].output(0))
    return ov.Model([opset.result(loop.get_iter_value(body.results[0].output(0), -1))], [x], "loop")


def in_iterator(body: ov.Model) -> ov.Model:
    """``body`` of every row."""
    x = opset.parameter(X.shape, np.float32, name="x")
    iterator = opset.tensor_iterator()
    iterator.set_function(body)
    iterator.set_sliced_input(body.get_parameters()[0], x.output(0), 0, 1, 1, -1, 0)
    rows = iterator.get_concatenated_slices(body.results[0].output(0), 0, 1, 1, -1, 0)
    return ov.Model([opset.result(rows)], [x], "iterator")


MODELS: dict[str, tuple[Callable[[], ov.Model], int, float, float]] = {  # layers; factor of x, and of -x
    "if": (lambda: in_if(times(2, 5), times(3, 5)), 2, 2, 3),
    "loop": (lambda: in_loop(times(2, 5), 3), 1, 8, 8),
    "iterator": (lambda: in_iterator(times(2, 1)), 1, 2, 2),
    "all three": (lambda: in_iterator(in_loop(in_if(times(2, 1), times(3, 1)), 2)), 2, 4, 9),
    "a loop in each branch": (lambda: in_if(in_loop(times(2, 5), 2), in_loop(times(3, 5), 3)), 2, 4, 27),
}


def signatures(model: ov.Model) -> list[object]:
    """Of the model and all bodies in it."""
    found: list[object] = [signature(model)]
    for node in model.get_ordered_ops():
        if node.get_type_name() == "If":
            found += signatures(node.get_function(0)) + signatures(node.get_function(1))
        elif node.get_type_name() in ("Loop", "TensorIterator"):
            found += signatures(node.get_function())
    return found


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_layers_in_bodies(core: ov.Core, tmp_path: Path, name: str, from_file: bool) -> None:
    make, layers, factor, negative = MODELS[name]

    def again(model: ov.Model) -> ov.Model:
        if not from_file:
            return model
        ov_ext.save_model(model, tmp_path / "m.xml")
        return core.read_model(tmp_path / "m.xml")

    model = again(make())
    stock = signatures(model)
    model, report = ov_ext.pack_sparse_weights(model, ALL)
    assert [layer.replaced for layer in report.layers] == [True] * layers
    model = again(model)
    assert str(signatures(model)).count("'SparseMatMul', 'ov_ext'") == layers
    assert np.array_equal(infer(core, model, X), factor * X) and np.array_equal(infer(core, model, -X), -negative * X)
    with pytest.raises(ov_ext.AlreadyPackedError, match=f"{layers} packed"):
        ov_ext.pack_sparse_weights(model)
    restored = ov_ext.unpack_sparse_weights(model)
    assert signatures(restored) == stock
    assert np.array_equal(infer(core, restored, X), factor * X)


@pytest.mark.slow
@pytest.mark.parametrize("from_file", [False, True])
def test_the_loop_of_a_state_space(core: ov.Core, tmp_path: Path, from_file: bool) -> None:
    from ov_ext.state_space import convert_state_space_model
    from tests.structure_models import make

    path = tmp_path / "m.xml"
    ov_ext.save_model(convert_state_space_model(make("mamba")), path)
    model = core.read_model(path) if from_file else convert_state_space_model(make("mamba"))
    kinds = {node.get_type_name() for node in model.get_ops()}
    assert "Loop" in kinds or "TensorIterator" in kinds
    model, report = ov_ext.pack_sparse_weights(
        model, ov_ext.SparsePolicy(min_sparsity=0, min_weights=0, max_growth=999)
    )
    assert report.replaced
    ids = np.arange(1, 9)[None]
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, np.int32)}
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    expected = core.compile_model(core.read_model(path), "CPU", config)(inputs)["logits"]
    found = core.compile_model(model, "CPU", config)(inputs)["logits"]
    assert np.abs(found - expected).max() <= 2.0**-6 * np.abs(expected).max()  # weights and activations in bf16
    ov_ext.unpack_sparse_weights(model)
    assert "SparseMatMul" not in {node.get_type_name() for node in model.get_ops()}
