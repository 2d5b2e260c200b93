"""Random weights have the promised zeros, and lie in a stock graph as NNCF writes it."""

from __future__ import annotations

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from benchmarks.llama import linear_model
from benchmarks.weights import KINDS, random_weight
from ov_ext.cpu_plugin.support.weight import Weight


def dense(weight: Weight) -> np.ndarray:
    """The oracle: float32 [N, K] from values and scales, element by element of the definition."""
    if weight.kind == "bf16":
        return (weight.values.astype(np.uint32) << 16).view(np.float32)
    n, k = weight.values.shape
    assert weight.scales is not None
    group = weight.group or k
    return np.stack(
        [weight.values[:, i].astype(np.float32) * weight.scales[:, i // group].astype(np.float32) for i in range(k)],
        axis=1,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_share_of_zeros_and_scale_of_products(kind: str, sparsity: float) -> None:
    n, k = 300, 640
    weight = random_weight(kind, n, k, sparsity, np.random.default_rng(3), gain=0.5)
    matrix = dense(weight)
    zeros = float((matrix == 0).mean())
    assert abs(zeros - sparsity) <= 5 * np.sqrt(sparsity * (1 - sparsity) / (n * k))
    x = np.random.default_rng(4).standard_normal((50, k)).astype(np.float32)
    assert 0.3 < (x @ matrix.T).std() < 0.7
    if weight.scales is not None:
        assert weight.scales.shape == (n, 5 if kind == "int4" else 1)
        assert len(np.unique(weight.scales)) > n / 2  # scales that all agree would hide an error in their order


def test_one_seed_gives_one_weight() -> None:
    first, again, other = (random_weight("int4", 8, 128, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.values == again.values).all() and not (first.values == other.values).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stock_graph_multiplies_with_the_weight(kind: str) -> None:
    weight = random_weight(kind, 96, 384, 0.5, np.random.default_rng(5))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(linear_model(weight, "layer"), "CPU", settings)
    x = np.random.default_rng(6).standard_normal((1, 3, 384)).astype(np.float32)
    exact = x[0] @ dense(weight).T
    # Decompressed weights are rounded to f16 once (2^-11); sums of 384 products in f32.
    bound = (2.0**-11 + 384 * 2.0**-24) * (np.abs(x[0]) @ np.abs(dense(weight)).T)
    assert (np.abs(compiled(x)[0][0] - exact) <= bound).all()


def chain(matmul: ov.Node) -> list[tuple[str, str, list[int]]]:
    """Type, element type and shape of what lies between the weight's constant and its MatMul."""
    found, node = [], matmul.input_value(1).get_node()
    while True:
        element = node.get_output_element_type(0).get_type_name()
        found.append((node.get_type_name(), element, list(node.get_output_partial_shape(0).to_shape())))
        if node.get_type_name() == "Multiply":
            scale = node.input_value(1).get_node()
            element = scale.get_output_element_type(0).get_type_name()
            found.append(("scale", element, list(scale.get_output_partial_shape(0).to_shape())))
        if not node.input_values():
            return found
        node = node.input_value(0).get_node()


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("int8", nncf.CompressWeightsMode.INT8_SYM, {}),
        ("int4", nncf.CompressWeightsMode.INT4_SYM, {"group_size": 128, "all_layers": True}),
    ],
)
def test_stock_graph_has_the_form_nncf_writes(kind: str, mode: nncf.CompressWeightsMode, options: dict) -> None:
    n, k = 192, 256
    x = ops.parameter([1, -1, k], np.float32, name="x")
    plain = np.random.default_rng(7).standard_normal((n, k)).astype(np.float32)
    model = ov.Model([ops.result(ops.matmul(x, ov.op.Constant(plain), False, True))], [x], "plain")
    theirs = nncf.compress_weights(model, mode=mode, **options)
    ours = linear_model(random_weight(kind, n, k, 0.5, np.random.default_rng(8)), "layer")
    expected, found = (
        chain(next(node for node in graph.get_ops() if node.get_type_name() == "MatMul")) for graph in (theirs, ours)
    )
    assert found == expected
