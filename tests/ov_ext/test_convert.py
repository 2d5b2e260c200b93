"""Torch and ONNX models become IRs on the very grid that they had."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import ov_ext
from tests.ov_ext.grids import grid, torch_grid
from tests.ov_ext.ir_forms import operations

pytestmark = pytest.mark.slow

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
POLICY = ov_ext.SparsePolicy(min_sparsity=0.4, min_weights=0, max_growth=999, activation_group=0)


class Network(nn.Module):
    """An embedding, and three linear layers of which two are sparse; weights are bf16 values, so packing is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 256)
        self.up = nn.Linear(256, 384)
        self.down = nn.Linear(384, 256, bias=False)
        self.head = nn.Linear(256, 50)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.1).bfloat16())
            for layer in (self.up, self.down):
                layer.weight[torch.rand(layer.weight.shape, generator=generator) < 0.6] = 0.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.relu(self.up(self.embed(ids))))))


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
OTHER_IDS = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(2))


def infer(core: ov.Core, model: ov.Model, ids: torch.Tensor) -> np.ndarray:
    return core.compile_model(model, "CPU", EXACT)(ids.numpy())[0]


@pytest.mark.parametrize(
    "mode, element, group",
    [("INT4_SYM", "i4", 128), ("INT4_SYM", "i4", 64), ("INT4_SYM", "i4", -1), ("INT4_ASYM", "u4", 128)],
)
def test_nncf_int4_lands_on_the_same_grid(core: ov.Core, mode: str, element: str, group: int) -> None:
    model = nncf.compress_weights(
        Network().eval(),
        mode=nncf.CompressWeightsMode[mode],
        group_size=group,
        all_layers=True,
        dataset=nncf.Dataset([IDS]),
    )
    expected = torch_grid(model)
    with torch.no_grad():
        outputs = model(OTHER_IDS)
    for method in ("trace", "export"):
        ir = ov_ext.convert_model(model, example_input=IDS, method=method)
        assert {name for name in expected if name != "embed"} == {"up", "down", "head"} == set(grid(ir))
        for name, (found, codes, scales) in grid(ir).items():
            assert found == element and scales.dtype == np.float16
            assert np.array_equal(codes, expected[name][0]) and np.array_equal(scales, expected[name][1])
        np.testing.assert_allclose(infer(core, ir, OTHER_IDS), outputs, rtol=2e-3, atol=2e-3)
        if mode == "INT4_SYM":
            _, report = ov_ext.pack_sparse_weights(ir, POLICY)
            assert [layer.kind for layer in report.layers if layer.form == "sparse"] == ["int4_sym"] * 2


@pytest.mark.parametrize("method", ["trace", "export"])
def test_names_and_shapes(core: ov.Core, method: Any) -> None:
    model = Network().eval()
    ir = ov_ext.convert_model(model, example_input={"ids": IDS}, method=method)
    assert [port.get_any_name() for port in ir.inputs] == ["ids"]
    assert ir.inputs[0].get_partial_shape() == ov.PartialShape([-1, -1])
    names = {node.get_friendly_name().split("/")[0] for node in ir.get_ops() if node.get_type_name() == "MatMul"}
    assert names == {"__module.up", "__module.down", "__module.head"}
    with torch.no_grad():
        np.testing.assert_allclose(infer(core, ir, OTHER_IDS), model(OTHER_IDS), rtol=1e-4, atol=1e-4)


def test_exported_programs_keep_their_fixed_axes() -> None:
    model = Network().eval()
    batch = torch.export.Dim("batch", min=2, max=8)
    ir = ov_ext.convert_model(model, example_input=(IDS,), dynamic_shapes=({0: batch},))
    assert ir.inputs[0].get_partial_shape() == ov.PartialShape([-1, 7])
    assert ov_ext.convert_model(torch.export.export(model, (IDS,))).inputs[0].get_partial_shape() == ov.PartialShape(
        [2, 7]
    )


class Untraceable(nn.Module):
    """jit.trace cannot return what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            raise IndexError("tuple index out of range")
        return self.linear(x)


def test_what_cannot_be_traced_is_exported(core: ov.Core, caplog: pytest.LogCaptureFixture) -> None:
    x, model = torch.randn(3, 8), Untraceable().eval()
    with caplog.at_level(logging.INFO, "ov_ext"):
        ir = ov_ext.convert_model(model, example_input=x)
    assert "Tracing failed" in caplog.text and "MatMul" in operations(ir)
    with pytest.raises(Exception, match="tuple index out of range"):
        ov_ext.convert_model(model, example_input=x, method="trace")


@pytest.fixture(scope="module")
def onnx_program() -> Any:
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    return torch.onnx.export(Network().eval(), (IDS,), dynamo=True, dynamic_shapes=dynamic, verbose=False)


@pytest.mark.parametrize("source", ["file", "proto"])
def test_onnx_gives_the_same_packed_weights_and_results(
    core: ov.Core, source: str, onnx_program: Any, tmp_path: Path
) -> None:
    """ONNX stores [K, N], torch [N, K]; the blobs are the same bytes, and so the results are."""
    onnx_program.save(tmp_path / "m.onnx")
    models = (
        ov_ext.convert_model(Network().eval(), example_input=IDS),
        ov_ext.convert_model(tmp_path / "m.onnx" if source == "file" else onnx_program.model_proto),
    )
    blobs, results = [], []
    for model in models:
        model, report = ov_ext.pack_sparse_weights(model, POLICY)
        assert len(report.replaced) == 2
        sparse = [node for node in model.get_ordered_ops() if node.get_type_name() == "SparseMatMul"]
        blobs.append([node.input_value(1).get_node().get_data() for node in sparse])
        results.append(infer(core, model, OTHER_IDS))
    assert all(np.array_equal(a, b) for a, b in zip(*blobs, strict=True))
    # The dense head and tanh run in stock kernels, which may differ by layout: a few roundings of f32.
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_packed_equals_stock_and_returns(core: ov.Core) -> None:
    ir = ov_ext.convert_model(Network().eval(), example_input=IDS)
    expected = infer(core, ir, OTHER_IDS)
    packed, _ = ov_ext.pack_sparse_weights(ir.clone(), POLICY)
    np.testing.assert_allclose(infer(core, packed, OTHER_IDS), expected, rtol=2e-5, atol=2e-5)
    assert np.array_equal(infer(core, ov_ext.unpack_sparse_weights(packed), OTHER_IDS), expected)


def test_nncf_compresses_what_stays(core: ov.Core) -> None:
    """nncf.compress_weights on a partially packed model: the packed layers are left alone, the rest becomes INT8."""
    ir = ov_ext.convert_model(Network().eval(), example_input=IDS)
    before = infer(core, ir, OTHER_IDS)
    policy = ov_ext.SparsePolicy(
        min_sparsity=0.4, min_weights=0, max_growth=999, activation_group=0, ignored_patterns=("*up*",)
    )
    packed, report = ov_ext.pack_sparse_weights(ir, policy)
    assert [layer.replaced for layer in report.layers] == [False, True, False]
    both = nncf.compress_weights(packed, mode=nncf.CompressWeightsMode.INT8_ASYM)
    elements = [
        node.get_output_element_type(0).get_type_name() for node in both.get_ops() if node.get_type_name() == "Constant"
    ]
    sparse = [node for node in both.get_ops() if node.get_type_name() == "SparseMatMul"]
    # up, head and the embedding became u8 with u8 zero points; the blob is the seventh u8 constant
    assert len(sparse) == 1 and elements.count("u8") == 7
    np.testing.assert_allclose(infer(core, both, OTHER_IDS), before, atol=0.05)


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("no_such.onnx", {}, "no file no_such.onnx"),
        (3.14, {}, "Cannot convert float"),
        (nn.Linear(2, 2), {}, "needs example_input"),
    ],
    ids=["path", "type", "example"],
)
def test_bad_input(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ov_ext.convert_model(model, **options)
