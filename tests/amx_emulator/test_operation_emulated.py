"""A packed model in OpenVINO on the AMX kernels, under the emulator."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.amx_emulator.emulated import Emulator

pytestmark = pytest.mark.slow

KINDS = ("bf16", "int8", "int4")
# oneDNN would use the unit too, and be counted.
ENVIRONMENT = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


def check_model() -> None:
    """Three weights of different kinds, packed, in one model; run in a process of its own."""
    import openvino as ov

    import ov_ext
    from tests.cpu_plugin.test_kernels import bf16, quantized
    from tests.ov_ext.ir_forms import INT4, INT8, Form, build

    forms = {"bf16": Form("f32", bias="f32"), "int8": INT8, "int4": INT4.but(bias="f16")}
    built = {kind: build(form, n=150, k=640, seed=seed) for seed, (kind, form) in enumerate(forms.items())}
    results, parameters = [], []
    for kind, part in built.items():
        for node in part.model.get_ops():
            node.set_friendly_name(f"{kind}/{node.get_friendly_name()}")
        (x,), (y,) = part.model.inputs, part.model.outputs
        x.get_tensor().set_names({f"{kind}/x"})
        y.get_tensor().set_names({f"{kind}/y"})
        results += part.model.get_results()
        parameters += part.model.get_parameters()
    policy = ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=0, max_growth=999, activation_group=128)
    model, report = ov_ext.pack_sparse_weights(ov.Model(results, parameters, "model"), policy)
    assert [layer.replaced for layer in report.layers] == [True] * 3
    compiled = ov_ext.add_extension(ov.Core()).compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 2}
    )

    def infer(rows: int) -> None:
        rng = np.random.default_rng(rows)
        x = {kind: rng.standard_normal((rows, 640)).astype(np.float32) for kind in KINDS}
        outputs = compiled.create_infer_request().infer({f"{kind}/x": x[kind] for kind in KINDS})
        for kind, part in built.items():
            if kind == "bf16":
                used, roundings = bf16(x[kind]).astype(np.float64), 640 + 8
            else:
                codes, factors = quantized(x[kind], 128)
                used, roundings = codes * factors.astype(np.float64), 3 * 10 + 12
            expected = used @ part.weight.T + part.bias
            bound = roundings * 2.0**-23 * (np.abs(used) @ np.abs(part.weight).T + np.abs(part.bias)) + 1e-30
            assert (np.abs(outputs[f"{kind}/y"] - expected) <= bound).all(), (kind, rows)

    for rows in (1, 17, 40):
        infer(rows)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(infer, [33, 5, 64, 16]))


@pytest.mark.parametrize("fast", [False, True])
def test_model_on_amx(emulator: Emulator, fast: bool) -> None:
    environment = ENVIRONMENT | {"OV_EXT_ISA": "amx"}
    emulator.run_python(check_model, uses=("tdpbf16ps", "tdpbssd"), fast=fast, environment=environment)


def test_the_traps_are_those_of_our_kernels(emulator: Emulator) -> None:
    emulator.run_python(check_model, uses=(), environment=ENVIRONMENT | {"OV_EXT_ISA": "avx512"})
