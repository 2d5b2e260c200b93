"""From a super-network to OpenVINO: the IR of a sub-network computes, costs and weighs what its plan says."""

import math
from typing import Any

import nncf
import numpy as np
import openvino
import pytest
import torch

import nncf_ext
from nncf_ext import ElasticMode
from nncf_ext.algorithms.bootstrap_nas.parameters import AdvancedBootstrapNasParameters
from tests.networks import network

IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ALL = ElasticMode.WIDTH | ElasticMode.DEPTH | ElasticMode.KERNEL
FINE = AdvancedBootstrapNasParameters(min_width=2, width_step=3)


def constant_of(node: Any) -> Any:
    """The constant behind a converted or dequantized weight."""
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return node


def cost(model: Any) -> tuple[int, int]:
    """Multiplications with weights of an IR, and how many numbers these weights are."""
    macs = numbers = 0
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind in ("Convolution", "GroupConvolution", "MatMul"):
            weight = constant_of(node.input_value(1).get_node())
            size = math.prod(weight.get_output_shape(0))
            shape = node.get_output_shape(0)
            macs += size * (math.prod(shape[2:]) if "Convolution" in kind else math.prod(shape[:-1]))
            numbers += size
    return macs, numbers


def run(model: Any, images: torch.Tensor = IMAGES) -> np.ndarray:
    return openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())[0]


@pytest.mark.parametrize("name", ["basic", "squeeze", "convnext"])
def test_the_ir_of_a_sub_network(name, tmp_path) -> None:
    net = nncf_ext.make_elastic(network(name), ALL, example_input=IMAGES[:1], advanced_parameters=FINE)
    for point in (net.maximal(), net.random(4), net.minimal()):
        small = net.extract(point)
        net.activate(point)
        ir = openvino.convert_model(small, example_input=IMAGES)
        np.testing.assert_allclose(run(ir), net.model(IMAGES).detach().numpy(), rtol=1e-3, atol=1e-4)
        ir.reshape([1, 3, 32, 32])
        macs, numbers = cost(ir)
        layers = [each for each in small.modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)]
        assert macs == net.macs(point)
        assert numbers == sum(each.weight.numel() for each in layers)
        openvino.save_model(ir, tmp_path / "small.xml", compress_to_fp16=False)
        least = 4 * numbers
        assert least <= (tmp_path / "small.bin").stat().st_size <= 4 * net.parameter_count(point) + 4096


@pytest.mark.slow
def test_int8_and_onnx(tmp_path) -> None:
    net = nncf_ext.make_elastic(network("basic"), ALL, example_input=IMAGES[:1], advanced_parameters=FINE)
    point = net.random(2)
    small = net.extract(point)
    wanted = small(IMAGES).detach().numpy()
    ir = openvino.convert_model(small, example_input=IMAGES)
    quantized = nncf.quantize(ir, nncf.Dataset([IMAGES.numpy()]), subset_size=1)
    kinds = {node.get_type_name() for node in quantized.get_ops()}
    assert "FakeQuantize" in kinds
    assert np.abs(run(quantized) - wanted).max() < 0.1 * np.abs(wanted).max()
    openvino.save_model(quantized, tmp_path / "int8.xml")
    openvino.save_model(ir, tmp_path / "float.xml", compress_to_fp16=False)
    assert 2.5 * (tmp_path / "int8.bin").stat().st_size < (tmp_path / "float.bin").stat().st_size
    torch.onnx.export(small, (IMAGES,), str(tmp_path / "small.onnx"), dynamo=True, verbose=False)
    np.testing.assert_allclose(run(openvino.convert_model(tmp_path / "small.onnx")), wanted, rtol=1e-3, atol=1e-4)
