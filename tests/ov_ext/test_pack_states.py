"""Layers that compute the first value of a state, as the cross-attention of encoder-decoder models does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset

import ov_ext
from tests.ov_ext.ir_forms import ALL, constant

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
X = np.arange(128, dtype=np.float32).reshape(2, 64)


def stateful(kept: list[float], plain: list[float], between: Any = None) -> ov.Model:
    """One layer (a factor) on one input for each state that it initializes, and layers beside them."""
    x = opset.parameter([2, 64], np.float32, name="x")
    results, sinks = [], []
    for i, factor in enumerate([*kept, *plain]):
        y = opset.matmul(x, constant(factor * np.eye(64), "f32", f"w{i}"), False, True, name=f"layer{i}")
        if i < len(kept):
            y = y if between is None else between(y)
            y = opset.read_value(y, f"state{i}", ov.Type.f32, ov.PartialShape([2, 64]))
            sinks.append(opset.assign(y, f"state{i}"))
        results.append(opset.result(y))
    return ov.Model(results, sinks, [x], "m")


@pytest.mark.parametrize(
    "kept, plain, outputs",
    [
        ([2, 3], [], [1, 1]),
        ([2, 3], [5, 7], [1, 1, 2]),
        ([2], [5], [1, 1]),
    ],
)
@pytest.mark.parametrize("between", [None, lambda y: opset.multiply(y, np.float32(4))])
def test_layers_before_a_state_are_not_grouped(
    core: ov.Core, kept: list[float], plain: list[float], outputs: list[int], between: Any
) -> None:
    model, report = ov_ext.pack_sparse_weights(stateful(kept, plain, between), ALL)
    assert len(report.replaced) == len(kept) + len(plain)
    operations = [node for node in model.get_ops() if node.get_type_name() == "SparseMatMul"]
    assert sorted(node.get_output_size() for node in operations) == outputs
    request = core.compile_model(model, "CPU", F32).create_infer_request()
    after = 1 if between is None else 4
    for factor in (1, -1):  # a state keeps its first value
        found = [y.copy() for y in request.infer([factor * X]).values()]
        expected = [after * each * X for each in kept] + [factor * each * X for each in plain]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_encoder_decoder_model_compiles(core: ov.Core, tmp_path: Path) -> None:
    import torch
    from optimum.exporters.openvino import export_from_model
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    export_from_model(model, tmp_path, task="text2text-generation-with-past", stateful=True)
    path = tmp_path / "openvino_decoder_model.xml"
    stock = core.compile_model(core.read_model(path), "CPU", F32)
    packed, report = ov_ext.pack_sparse_weights(
        core.read_model(path), ov_ext.SparsePolicy(0, min_weights=0, max_growth=999)
    )
    assert len(report.replaced) > 10
    rng = np.random.default_rng(0)
    inputs = {"input_ids": np.arange(1, 4)[None], "encoder_hidden_states": rng.standard_normal((1, 5, 64), np.float32)}
    inputs |= {"encoder_attention_mask": np.ones((1, 5), np.int64), "beam_idx": np.zeros(1, np.int32)}
    expected, found = (m(inputs)["logits"] for m in (stock, core.compile_model(packed, "CPU", F32)))
    assert np.abs(found - expected).max() <= 2.0**-6 * np.abs(expected).max()  # weights and activations in bf16
