"""Every stock form of a weight: recognised, computed right, restored bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset1, opset13
from openvino.utils.node_factory import NodeFactory

import ov_ext
from tests.ov_ext.ir_forms import ALL, INT4, INT8, Form, bf16_values, build, constant, infer, operations, signature

FORMS = [
    Form("f32"),
    Form("f16"),
    Form("bf16"),
    Form("f32", outputs_first=False),
    Form("f32", swap=True),
    Form("bf16", outputs_first=False, swap=True, bias="bf16"),
    Form("f32", bias="f32"),
    Form("f16", bias="f16", bias_first=True),
    INT8,
    INT8.but(group=64),
    INT8.but(group=128, outputs_first=False),
    INT8.but(outputs_first=False, math="f32", scale="f32", bias="f32"),
    INT8.but(scale="f16", math="f32"),
    INT8.but(scale="bf16", math="f32"),
    INT8.but(scale_shape="scalar"),
    INT8.but(zero=0),
    Form("u8", zero=128),
    Form("u8", zero="varied"),
    Form("u8", group=64, zero="varied", outputs_first=False),
    INT4,
    INT4.but(group=64),
    INT4.but(group=0),
    INT4.but(outputs_first=False),
    INT4.but(group=0, outputs_first=False, swap=True),
    INT4.but(swap=True, bias="f16"),
    INT4.but(scale="f32", math="f32"),
    INT4.but(scale_shape="scalar"),
    Form("u4", group=128, zero=8),
    Form("u4", group=128, zero="varied"),
    Form("u4", group=64, zero=8, outputs_first=False, bias="f32"),
    Form("u4", zero=8),
]
KIND = {"f32": "bf16", "f16": "bf16", "bf16": "bf16", "i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4"}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed_product(core: ov.Core, form: Form) -> None:
    """Against float64; the bound is that of a float32 sum of K products and a bias, in any order."""
    built = build(form)
    model, report = ov_ext.pack_sparse_weights(built.model, ALL)
    (layer,) = report.layers
    assert layer.replaced and "MatMul" not in operations(model), layer.note
    sparse = next(node for node in model.get_ops() if node.get_type_name() == "SparseMatMul")
    assert sparse.get_attributes()["kind"] == KIND[form.element] and sparse.get_friendly_name() == "layer"
    assert "Add" not in operations(model) and model.outputs[0].get_names() == {"y", "logits"}
    x = np.random.default_rng(1).standard_normal((3, built.weight.shape[1])).astype(np.float32)
    expected = x @ built.weight.T + built.bias
    bound = (x.shape[1] + 8) * 2.0**-23 * (np.abs(x) @ np.abs(built.weight).T + np.abs(built.bias)) + 1e-30
    assert (np.abs(infer(core, model, x) - expected) <= bound).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unpack_restores_the_stock_subgraph(core: ov.Core, form: Form, tmp_path: Path) -> None:
    stock = signature(build(form).model)
    model, _ = ov_ext.pack_sparse_weights(build(form).model, ALL)
    ov_ext.save_model(model, tmp_path / "packed.xml")  # through a file: what counts must survive there
    restored = ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "packed.xml"))
    assert signature(restored) == stock
    assert not restored.has_rt_info(["ov_ext", "format"])


def test_unpack_keeps_the_mark_of_compressed_f16(core: ov.Core, tmp_path: Path) -> None:
    """openvino.save_model's own f16 compression marks its Convert, or OpenVINO would fold the weight back to f32."""
    ov.save_model(build(Form("f32")).model, tmp_path / "f16.xml")
    stock = core.read_model(tmp_path / "f16.xml")
    expected = signature(stock)
    assert any(entry[1] == "Convert" and entry[5] for entry in expected)
    ov_ext.save_model(ov_ext.pack_sparse_weights(stock, ALL)[0], tmp_path / "packed.xml")
    restored = ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "packed.xml"))
    ov_ext.save_model(restored, tmp_path / "again.xml")
    assert signature(core.read_model(tmp_path / "again.xml")) == expected


@pytest.mark.parametrize("element, remark", [("f32", "f32 rounded to bf16"), ("f16", "f16 rounded to bf16")])
def test_plain_weights_are_rounded_once_and_the_report_says_so(element: str, remark: str) -> None:
    values = np.array(
        [[1.0, 1.00390625, 1.01171875, 0.0, -1.00390625, 0.0]], np.float32
    )  # two ties: to even, both ways
    x = opset1.parameter([1, 6], ov.Type.f32)
    node = constant(values, element, "w")
    node = opset1.convert(node, "f32") if element != "f32" else node
    model = ov.Model([opset1.matmul(x, node, False, True)], [x], "m")
    model, report = ov_ext.pack_sparse_weights(model, ALL)
    assert report.layers[0].note == remark
    restored = ov_ext.unpack_sparse_weights(model)
    found = next(node for node in restored.get_ops() if node.get_friendly_name() == "w").get_data()
    assert found.tolist() == [[1.0, 1.0, 1.015625, 0.0, -1.0, 0.0]]


def test_negative_zero_is_the_documented_exception() -> None:
    x = opset1.parameter([1, 4], ov.Type.f32)
    weight = constant(np.array([[-0.0, 1.0, 0.0, -2.0]], np.float32), "f32", "w")
    model, _ = ov_ext.pack_sparse_weights(ov.Model([opset1.matmul(x, weight, False, True)], [x], "m"), ALL)
    restored = ov_ext.unpack_sparse_weights(model)
    found = next(node for node in restored.get_ops() if node.get_friendly_name() == "w").get_data()
    assert found.tolist() == [[0.0, 1.0, 0.0, -2.0]] and not np.signbit(found[0, 0])


@pytest.mark.parametrize("code", [-128, -127, 127])
def test_int8_keeps_the_whole_range(core: ov.Core, code: int) -> None:
    x = opset1.parameter([1, 64], ov.Type.f32)
    codes = np.zeros((3, 64), np.int8)
    codes[1, 5] = code
    node = opset1.multiply(opset1.convert(constant(codes, "i8", "w"), "f32"), constant(np.ones((3, 1)), "f32", "s"))
    model, report = ov_ext.pack_sparse_weights(ov.Model([opset1.matmul(x, node, False, True)], [x], "m"), ALL)
    assert report.layers[0].replaced
    assert infer(core, model, np.ones((1, 64), np.float32)).tolist() == [[0.0, float(code), 0.0]]
    quantized, _ = ov_ext.pack_sparse_weights(
        ov_ext.unpack_sparse_weights(model), ov_ext.SparsePolicy(min_weights=0, max_growth=999)
    )
    assert infer(core, quantized, np.ones((1, 64), np.float32))[0, 1] == pytest.approx(code, rel=1e-6)


@pytest.mark.parametrize("shape", [[256], [-1, 256], [2, -1, 256], [-1, -1, -1, 256], [2, 3, 256]], ids=str)
def test_activations_of_any_rank(core: ov.Core, shape: list[int]) -> None:
    built = build(INT4.but(bias="f32"), x_shape=shape)
    model, report = ov_ext.pack_sparse_weights(built.model, ALL)
    assert report.layers[0].replaced
    assert model.outputs[0].get_partial_shape() == ov.PartialShape([*shape[:-1], 70])
    x = np.random.default_rng(2).standard_normal([abs(d) for d in shape]).astype(np.float32)
    expected = x @ built.weight.T + built.bias
    np.testing.assert_allclose(infer(core, model, x), expected, rtol=1e-4, atol=1e-4)


def test_a_product_that_others_read_keeps_its_bias_outside(core: ov.Core) -> None:
    x = opset1.parameter([-1, 64], ov.Type.f32)
    weight = bf16_values(np.random.default_rng(0), 8, 64)
    product = opset1.matmul(x, constant(weight, "f32", "w"), False, True)
    sums = [opset1.add(product, constant(np.full((1, 8), value), "f32", f"b{value}")) for value in (1, 2)]
    model = ov.Model([opset1.result(each) for each in sums], [x], "m")
    policy = ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=0, max_growth=999, activation_group=0)
    model, report = ov_ext.pack_sparse_weights(model, policy)
    assert report.layers[0].replaced and operations(model).count("Add") == 2
    results = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(np.zeros((1, 64), np.float32))
    assert [results[i][0, 0] for i in (0, 1)] == [1.0, 2.0]


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8), (1, 8)], ids=str)
def test_bias_shapes(core: ov.Core, shape: tuple[int, ...]) -> None:
    """Folded when the sum keeps the product's rank, and restored with the very shape."""
    x = opset1.parameter([-1, 64], ov.Type.f32)
    weight = constant(bf16_values(np.random.default_rng(0), 8, 64), "f32", "w")
    total = opset1.add(opset1.matmul(x, weight, False, True), constant(np.arange(8).reshape(shape), "f32", "b"))
    model = ov.Model([opset1.result(total)], [x], "m")
    stock = signature(model.clone())
    model, _ = ov_ext.pack_sparse_weights(model, ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=0, max_growth=999))
    assert ("Add" in operations(model)) == (len(shape) > 2)
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock


def shared_model(kind: str) -> ov.Model:
    """A weight that is read twice: by two MatMuls, or by a Gather (embedding) and a MatMul (tied lm_head)."""
    rng = np.random.default_rng(0)
    weight = opset1.convert(
        constant(np.where(rng.random((64, 64)) > 0.5, bf16_values(rng, 64, 64), 0), "bf16", "w"), "f32", name="c"
    )
    if kind == "layers":
        x = opset1.parameter([-1, 64], ov.Type.f32, name="x")
        first = opset1.matmul(x, weight, False, True, name="first")
        last = opset1.matmul(opset1.relu(first, name="relu"), weight, False, True, name="second")
    else:
        x = opset1.parameter([-1], ov.Type.i64, name="x")
        embedded = opset1.gather(weight, x, opset1.constant(np.int64(0), name="axis"), name="embedded")
        last = opset1.matmul(embedded, weight, False, True, name="head")
    last.output(0).set_names({"y"})
    return ov.Model([opset1.result(last, name="result")], [x], "m")


@pytest.mark.parametrize("kind", ["layers", "tied"])
def test_shared_weights(core: ov.Core, kind: str, tmp_path: Path) -> None:
    x = np.arange(5) if kind == "tied" else np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    stock, expected = signature(shared_model(kind)), infer(core, shared_model(kind), x)
    policy = ALL
    model, report = ov_ext.pack_sparse_weights(shared_model(kind), policy)
    notes = [layer.note for layer in report.replaced]
    blobs = {node.input_value(1).get_node().get_name() for node in model.get_ops() if "Sparse" in node.get_type_name()}
    assert len(blobs) == 1  # two readers, one blob
    if kind == "tied":
        assert notes == ["its stock constant stays for another use"] and report.bytes_after > report.bytes_before
    else:
        assert notes == ["", "shares the blob of an earlier layer"] and report.bytes_after < report.bytes_before
    np.testing.assert_allclose(infer(core, model, x), expected, rtol=2e-5, atol=2e-5)
    ov_ext.save_model(model, tmp_path / "m.xml")
    assert signature(ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "m.xml"))) == stock  # one constant again


def test_a_weight_that_stays_for_another_use_is_not_packed() -> None:
    """An embedding that is also the head: the model would grow by the packed head."""
    stock = signature(shared_model("tied"))
    policy = ov_ext.SparsePolicy(min_weights=0, activation_group=0)
    model, report = ov_ext.pack_sparse_weights(shared_model("tied"), policy)
    assert signature(model) == stock and report.bytes_after == report.bytes_before == 64 * 64 * 2
    (layer,) = report.layers
    assert layer.note.startswith("embedded reads it too") and layer.sparsity == pytest.approx(0.5, abs=0.05)


def square_model(*transposed: bool) -> ov.Model:
    """A chain of layers "0", "1", ... that read one [64, 64] constant, each as it is or transposed."""
    rng = np.random.default_rng(0)
    weight = constant(np.where(rng.random((64, 64)) > 0.5, bf16_values(rng, 64, 64), np.float32(0)), "f32", "w")
    x = node = opset1.parameter([-1, 64], ov.Type.f32, name="x")
    for i, transpose_b in enumerate(transposed):
        node = opset1.matmul(node, weight, False, transpose_b, name=str(i))
    return ov.Model([opset1.result(node, name="result")], [x], "m")


def blob_bytes(model: ov.Model) -> list[int]:
    blobs = [n.input_value(1).get_node() for n in model.get_ordered_ops() if n.get_type_name() == "SparseMatMul"]
    return list({blob.get_name(): blob.get_byte_size() for blob in blobs}.values())


def test_a_constant_read_in_both_orientations(core: ov.Core) -> None:
    """The same constant means two matrices: two blobs. (OpenVINO 2026.4 itself mixes them up, so it is no oracle.)"""
    expected = x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    reads = (True, False, True)
    model = square_model(*reads)
    stock = signature(model.clone())
    weight = next(n for n in model.get_ops() if n.get_friendly_name() == "w").get_data().astype(np.float64)
    for transpose_b in reads:
        expected = expected @ (weight.T if transpose_b else weight)
    model, report = ov_ext.pack_sparse_weights(model, ALL)
    assert [layer.note for layer in report.layers] == ["", "", "shares the blob of an earlier layer"]
    np.testing.assert_allclose(infer(core, model, x), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert [layer.bytes_before for layer in report.layers] == [64 * 64 * 4, 0, 0]  # the constant is counted once
    assert [layer.bytes_after for layer in report.layers] == [*blob_bytes(model), 0]
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock


@pytest.mark.parametrize("ignored", ["0", "1"])
def test_a_sharer_that_stays_keeps_the_stock_constant(ignored: str) -> None:
    """Whichever comes first: before, one constant; after, the constant and a blob."""
    policy = ov_ext.SparsePolicy(min_weights=0, max_growth=999, ignored_names=(ignored,))
    stock = signature(square_model(True, True))
    model, report = ov_ext.pack_sparse_weights(square_model(True, True), policy)
    (blob,) = blob_bytes(model)
    assert [layer.replaced for layer in report.layers] == [ignored == "1", ignored == "0"]
    assert [layer.bytes_before for layer in report.layers] == [64 * 64 * 4, 0]
    assert report.bytes_after == 64 * 64 * 4 + blob
    assert report.replaced[0].note == "its stock constant stays for another use"
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock  # and it is used again


def branching_model() -> ov.Model:
    """An If with a layer in each branch; names are the same in both."""

    def branch(sign: float) -> tuple[ov.Model, ov.Node]:
        y = opset1.parameter([2, 64], ov.Type.f32, name="y")
        layer = opset1.matmul(y, constant(sign * np.eye(64), "f32", "w"), False, True, name="layer")
        return ov.Model([opset1.result(layer, name="r")], [y], "branch"), y

    x, condition = opset1.parameter([2, 64], ov.Type.f32, name="x"), opset1.parameter([], ov.Type.boolean, name="c")
    (yes, yes_input), (no, no_input) = branch(1.0), branch(2.0)
    choice = opset13.if_op(condition)
    choice.set_then_body(yes)
    choice.set_else_body(no)
    choice.set_input(x.output(0), yes_input, no_input)
    output = choice.set_output(yes.results[0], no.results[0])
    return ov.Model([output], [x, condition], "m")


def test_layers_inside_branches(core: ov.Core, tmp_path: Path) -> None:
    model, report = ov_ext.pack_sparse_weights(
        branching_model(), ov_ext.SparsePolicy(min_weights=0, max_growth=999, activation_group=0)
    )
    assert [layer.replaced for layer in report.layers] == [True, True]
    ov_ext.save_model(model, tmp_path / "m.xml")
    for variant in (
        core.read_model(tmp_path / "m.xml"),
        ov_ext.unpack_sparse_weights(core.read_model(tmp_path / "m.xml")),
    ):
        compiled = core.compile_model(variant, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for condition, factor in ((True, 1.0), (False, 2.0)):
            assert (compiled([np.ones((2, 64), np.float32), np.array(condition)])[0] == factor).all()
    with pytest.raises(ov_ext.AlreadyPackedError, match="2 packed"):
        ov_ext.pack_sparse_weights(model)


def test_stateful_models_keep_their_state(core: ov.Core) -> None:
    """ReadValue and Assign around a packed layer."""
    x = opset1.parameter([1, 64], ov.Type.f32)
    variable = opset13.read_value(
        opset1.constant(np.zeros((1, 64), np.float32)), "memory", ov.Type.f32, ov.PartialShape([1, 64])
    )
    weight = constant(np.eye(64), "f32", "w")
    total = opset1.add(variable, opset1.matmul(x, weight, False, True))
    model = ov.Model([opset1.result(total)], [opset13.assign(total, "memory")], [x], "m")
    model, report = ov_ext.pack_sparse_weights(model, ALL)
    assert report.layers[0].replaced
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    for turn in (1.0, 2.0, 3.0):
        assert request.infer([np.ones((1, 64), np.float32)])[0].tolist() == [[turn] * 64]


def test_a_replaced_layer_that_somebody_holds_is_no_consumer_any_more() -> None:
    """Tools such as NNCF walk from outputs to consumers: a stock MatMul that Python still holds must not be found."""
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    weight[:, ::2] = 0
    x = opset13.parameter([2, 128], np.float32, name="x")
    relu = opset13.relu(x)
    held = opset13.matmul(relu, opset13.constant(weight), False, True)
    biased = opset13.add(held, opset13.constant(np.ones(128, np.float32)))
    model = ov.Model([opset13.result(biased)], [x], "m")
    packed, report = ov_ext.pack_sparse_weights(model)
    assert len(report.replaced) == 1

    def consumers() -> list[str]:
        return [port.get_node().get_type_name() for port in relu.output(0).get_target_inputs()]

    assert consumers() == ["SparseMatMul"] and held.get_type_name() == "MatMul"
    sparse = next(node for node in packed.get_ops() if node.get_type_name() == "SparseMatMul")
    ov_ext.unpack_sparse_weights(packed)
    assert consumers() == ["MatMul"] and sparse.get_type_name() == "SparseMatMul"


def attention_model() -> ov.Model:
    """q, k (with a bias), v and an output head on one activation; a layer behind q; v's group of scales differs."""
    rng = np.random.default_rng(0)

    def weight(name: str, inputs: int, group: int = 128) -> ov.Node:
        return int4_weight(np.where(rng.random((70, inputs)) > 0.5, rng.integers(1, 8, (70, inputs)), 0), group, name)

    x = opset1.parameter([-1, 256], ov.Type.f32, name="x")
    q, k, v, head = (
        opset1.matmul(x, weight(name, 256, 64 if name == "v" else 128), False, True, name=name)
        for name in ("q", "k", "v", "head")
    )
    biased = opset1.add(k, constant(np.ones(70), "f32", "bias"), name="k_bias")
    behind = opset1.matmul(q, constant(bf16_values(rng, 70, 70), "f32", "w"), False, True, name="behind")
    return ov.Model([opset1.result(node) for node in (behind, biased, v, head)], [x], "m")


def int4_weight(codes: np.ndarray, group: int, name: str) -> ov.Node:
    """Codes [N, K] in the form that NNCF writes, all scales 2^-4."""
    n, k = codes.shape
    packed = (codes.reshape(-1)[0::2] | codes.reshape(-1)[1::2] << 4).astype(np.uint8)
    values = ov.op.Constant(ov.Tensor(packed, ov.Shape([n, k // group, group]), ov.Type.i4), shared_memory=False)
    scaled = opset1.multiply(
        opset1.convert(values, "f16"), opset1.constant(np.full((n, k // group, 1), 2.0**-4, np.float16))
    )
    flat = opset1.reshape(scaled, np.array([n, k], np.int64), False)
    return opset1.convert(flat, "f32", name=f"{name}/weight")


def test_layers_on_the_same_activations_become_one_operation(core: ov.Core, tmp_path: Path) -> None:
    model = attention_model()
    stock = model.clone()
    x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    exact = ov_ext.SparsePolicy(min_sparsity=0, min_weights=0, max_growth=999, activation_group=0)
    model, report = ov_ext.pack_sparse_weights(model, exact)
    assert {layer.name for layer in report.replaced} == {"q", "k", "v", "head", "behind"}
    ov_ext.save_model(model, tmp_path / "m.xml")
    read = core.read_model(tmp_path / "m.xml")
    for packed in (model, read):
        together = {frozenset(n.get_friendly_name().split(" + ")) for n in packed.get_ops() if operation_of(n)}
        assert together == {
            frozenset({"q", "k", "head"}),
            frozenset({"v"}),
            frozenset({"behind"}),
        }  # v has other groups
        for i in range(4):
            y, expected = infer_all(core, packed, x)[i], infer_all(core, stock, x)[i]
            np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        with pytest.raises(ov_ext.AlreadyPackedError, match="5 packed"):
            ov_ext.pack_sparse_weights(packed)
        assert signature(ov_ext.unpack_sparse_weights(packed)) == signature(stock)


def operation_of(node: ov.Node) -> bool:
    return node.get_type_name() == "SparseMatMul"


def infer_all(core: ov.Core, model: ov.Model, x: np.ndarray) -> list[np.ndarray]:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    results = core.compile_model(model, "CPU", exact)([x])
    return [results[i] for i in range(len(model.outputs))]


@pytest.mark.parametrize("source", ["", "{", "[]", '["{}"]', "[1, 2, 3]", "[" * 99999])
def test_records_of_several_weights_that_are_damaged(source: str) -> None:
    model, _ = ov_ext.pack_sparse_weights(attention_model(), ALL)
    node = next(node for node in model.get_ops() if node.get_output_size() == 3 and operation_of(node))
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    other = factory.create("SparseMatMul", node.input_values(), node.get_attributes() | {"source": source})
    for i in range(3):
        for port in list(node.output(i).get_target_inputs()):
            port.replace_source_output(other.output(i))
    before = sorted(node.get_type_name() for node in model.get_ops())
    with pytest.raises(ov_ext.RecordError, match="record of each of its 3 weights"):
        ov_ext.unpack_sparse_weights(model)
    assert sorted(node.get_type_name() for node in model.get_ops()) == before
