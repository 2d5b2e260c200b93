"""Options are checked where they are given, and the report tells every layer's story."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset1

import ov_ext
from tests.ov_ext.ir_forms import Form, bf16_values, build, constant


def layers(*sparsity: float) -> ov.Model:
    """A chain of [128, 128] f32 layers, named by position."""
    rng = np.random.default_rng(0)
    x = node = opset1.parameter([-1, 128], ov.Type.f32)
    for i, zeros in enumerate(sparsity):
        keep = np.arange(128 * 128).reshape(128, 128) >= round(zeros * 128 * 128)
        weight = constant(np.where(keep, bf16_values(rng, 128, 128), np.float32(0)), "f32", f"w{i}")
        node = opset1.matmul(node, weight, False, True, name=f"layer{i}")
    return ov.Model([node], [x], "m")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_sparsity": 1.5}, "between 0 and 1, got 1.5"),
        ({"min_sparsity": -0.1}, "between 0 and 1"),
        ({"activation_group": 32}, "0, 64, 128 or -1"),
        ({"target": "neon"}, "amx, avx512, avx512_core_vnni, avx512_core, avx2_vnni, avx2, reference; got 'neon'"),
        ({"min_weights": -1}, "number of elements"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ov_ext.SparsePolicy(**options)


def test_report() -> None:
    model, report = ov_ext.pack_sparse_weights(layers(0.5, 0.1, 0.9), ov_ext.SparsePolicy(target="avx512"))
    assert [layer.name for layer in report.layers] == ["layer0", "layer1", "layer2"]
    assert [layer.replaced for layer in report.layers] == [True, False, True]
    assert [layer.sparsity for layer in report.layers] == pytest.approx([0.5, 0.1, 0.9], abs=1e-3)
    assert all(layer.kind == "f32" and layer.shape == (128, 128) for layer in report.layers)
    blobs = [n.input_value(1).get_node() for n in model.get_ordered_ops() if n.get_type_name() == "SparseMatMul"]
    sizes = [blob.get_byte_size() for blob in blobs]
    assert [layer.bytes_after for layer in report.layers] == [sizes[0], 128 * 128 * 4, sizes[1]]
    assert report.bytes_before == 3 * 128 * 128 * 4 and report.bytes_after == sum(sizes) + 128 * 128 * 4
    assert report.replaced == (report.layers[0], report.layers[2])
    text = str(report)
    for part in ("layer0", "128x128", "50.0%", "10% zeros would give", "2 of 3 weights packed", "target avx512"):
        assert part in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["target"] == "avx512" and plain["layers"][1]["note"] == report.layers[1].note


@pytest.mark.parametrize("group, told", [(128, True), (-1, True), (0, False)])
def test_the_report_tells_what_openvino_settings_do_not_reach(group: int, told: bool) -> None:
    policy = ov_ext.SparsePolicy(min_sparsity=0, activation_group=group)
    report = ov_ext.pack_sparse_weights(layers(0.5), policy)[1]
    assert ("EXECUTION_MODE_HINT=ACCURACY" in str(report)) == told
    assert report.to_dict()["activation_group"] == group
    stays = ov_ext.SparsePolicy(min_sparsity=1, activation_group=group)
    assert "EXECUTION_MODE_HINT" not in str(ov_ext.pack_sparse_weights(layers(0.5), stays)[1])


def test_accuracy_is_chosen_when_packing(core: ov.Core) -> None:
    """An outlier takes the 8 bits of its group for itself, whatever OpenVINO is told; activation_group=0 is exact."""
    accurate = {"EXECUTION_MODE_HINT": "ACCURACY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    x = np.ones((1, 256), np.float32)
    x[0, 0] = 1000  # half a step is 3.9: the others become 0

    def infer(group: int, config: dict[str, str]) -> np.ndarray:
        built = build(Form("i8", bias=None), n=128)
        model, report = ov_ext.pack_sparse_weights(built.model, ov_ext.SparsePolicy(0, activation_group=group))
        assert report.replaced
        return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"} | config)(x)[0] - x @ built.weight.T

    assert np.array_equal(infer(128, {}), infer(128, accurate))
    size = np.abs(build(Form("i8"), n=128).weight).sum(axis=1)  # of the part without the outlier
    assert (np.abs(infer(128, accurate)) > 0.01 * size).mean() > 0.5
    assert (np.abs(infer(0, {})) <= 1000 * 256 * 2.0**-23 * np.abs(build(Form("i8"), n=128).weight).max()).all()


def test_long_notes_are_listed_once() -> None:
    x = opset1.parameter([1, 4, 64], ov.Type.f32)
    rows = opset1.matmul(x, constant(np.ones((1, 64, 64)), "f32", "a"), False, True)
    model = ov.Model([opset1.matmul(rows, constant(np.ones((1, 64, 64)), "f32", "b"), False, True)], [x], "m")
    report = ov_ext.pack_sparse_weights(model)[1]
    assert str(report).count(report.layers[0].note) == 1 and str(report).count("[1]") == 3


def test_what_the_model_says_about_itself() -> None:
    model, _ = ov_ext.pack_sparse_weights(layers(0.5), ov_ext.SparsePolicy(activation_group=-1))
    said = {
        key: str(model.get_rt_info(["ov_ext", key]).value) for key in ("format", "format_version", "version", "target")
    }
    assert said["format"] == "SPW1" and said["format_version"] == "1" and said["version"]
    assert said["target"] in (
        "reference",
        "avx2",
        "avx2_vnni",
        "avx512",
        "amx",
    )  # this-cpu is resolved: another CPU reads it
    assert int(model.get_rt_info(["ov_ext", "activation_group"]).value) == -1


@pytest.mark.parametrize(
    "asked, weight_group, given", [(128, 128, 128), (64, 128, 128), (64, 64, 64), (0, 128, 0), (-1, 64, -1)]
)
def test_activation_groups_are_not_finer_than_weight_groups(asked: int, weight_group: int, given: int) -> None:
    from tests.ov_ext.ir_forms import Form, build

    policy = ov_ext.SparsePolicy(activation_group=asked, min_weights=0, max_growth=999)
    model, _ = ov_ext.pack_sparse_weights(build(Form("i4", weight_group)).model, policy)
    sparse = next(node for node in model.get_ops() if node.get_type_name() == "SparseMatMul")
    assert sparse.get_attributes()["activation_group"] == given


def test_dense_weights_need_no_mask() -> None:
    """min_sparsity=0 packs everything; a weight without zeros is stored without a bitmap."""
    model, report = ov_ext.pack_sparse_weights(layers(0.0, 0.5), ov_ext.SparsePolicy(min_sparsity=0.0))
    assert report.layers[0].bytes_after < 128 * 128 * 2 + 1024  # values, directory, header
    assert report.layers[1].bytes_after > 128 * 128 * (1 + 0.125)  # half of the values, and the mask
