"""One call from a torch model to what is run."""

from __future__ import annotations

import logging

import numpy as np
import openvino as ov
import pytest
import torch

import ov_ext
from tests.structure_models import make

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


def types(model: ov.Model) -> set[ov.Type]:
    """Those of the constants."""
    return {node.get_element_type() for node in model.get_ops() if node.get_type_name() == "Constant"}


@pytest.mark.slow
def test_a_language_model_is_packed_and_computes_the_same() -> None:
    model = make("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=2, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.3)
    tokens = torch.tensor([[5, 7, 11]])
    expected = model(tokens).logits.detach().numpy()
    level = logging.root.level
    model.train()
    ir = ov_ext.convert_packed(model, {"input_ids": tokens})
    assert logging.root.level == level  # OpenVINO's converter silences the whole process
    assert model.training and model.config.use_cache and ir.inputs[0].get_partial_shape() == ov.PartialShape([1, 3])
    assert "ReadValue" not in [node.get_type_name() for node in ir.get_ops()]
    assert ov.Type.i8 in types(ir)  # embedding and head
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    found = ov_ext.add_extension(ov.Core()).compile_model(ir, "CPU", exact)({0: tokens.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * float(np.abs(expected).max()))
    floating = ov_ext.convert_packed(model, {"input_ids": tokens}, rest=None)
    assert ov.Type.i8 not in types(floating)
