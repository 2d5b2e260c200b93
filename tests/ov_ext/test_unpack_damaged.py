"""Packed models that are used wrongly or damaged: a clear error, and nothing changed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset1

import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from tests.ov_ext.ir_forms import ALL, INT4, Form, build, constant, operations, signature


def test_an_already_packed_model_is_refused() -> None:
    model, _ = ov_ext.pack_sparse_weights(build(INT4).model, ALL)
    with pytest.raises(ov_ext.AlreadyPackedError, match="1 packed weights already.*unpack"):
        ov_ext.pack_sparse_weights(model, ALL)


def test_a_newer_format_is_refused() -> None:
    model, _ = ov_ext.pack_sparse_weights(build(INT4).model, ALL)
    model.set_rt_info(99, ["ov_ext", "format_version"])
    for operation in (ov_ext.unpack_sparse_weights, ov_ext.pack_sparse_weights):
        with pytest.raises(ValueError, match="version 99.*update nncf-ext"):
            operation(model)


def test_an_operation_without_record_is_named(core: ov.Core) -> None:
    from openvino.utils.node_factory import NodeFactory

    model, _ = ov_ext.pack_sparse_weights(build(INT4).model, ALL)
    node = next(node for node in model.get_ops() if node.get_type_name() == "SparseMatMul")
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    record = json.loads(node.get_attributes()["source"])
    for source, message in (
        ("", "layer: it carries no record"),
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"v": 7}), "version 7"),
        (json.dumps(record | {"nodes": [{"type": "Loop", "name": "x"}]}), "names Loop"),
        (
            json.dumps(record).replace("[70, 2, 128]", "[7000, 2, 128]"),
            "asks for 896000 bytes of values, the blob gives 8960",
        ),
        (json.dumps(record).replace('"shape": [2]', '"shape": [3]'), "asks for 24 bytes of data, the blob gives 16"),
    ):
        bare = factory.create("SparseMatMul", node.input_values(), node.get_attributes() | {"source": source})
        bare.set_friendly_name("layer")
        parameter = node.input_value(0).get_node()
        with pytest.raises(ov_ext.RecordError, match=message):
            ov_ext.unpack_sparse_weights(ov.Model([bare], [parameter], "m"))


def two_layers() -> ov.Model:
    """Group scales, zero points and a bias in the second: a record with every kind of entry."""
    first = constant(np.eye(256), "f32", "v")
    form = build(Form("u4", 128, "varied", bias="f16"))
    layer = next(node for node in form.model.get_ops() if node.get_friendly_name() == "layer")
    x = form.model.get_parameters()[0]
    layer.input(0).replace_source_output(opset1.matmul(x, first, False, True, name="first").output(0))
    return ov_ext.pack_sparse_weights(form.model, ALL)[0]


def with_other(model: ov.Model, source: str | None = None, blob: np.ndarray | None = None) -> None:
    """Give the last packed layer of a model another record or blob, as a damaged file would."""
    from openvino.utils.node_factory import NodeFactory

    node = [node for node in model.get_ordered_ops() if node.get_type_name() == "SparseMatMul"][-1]
    factory = NodeFactory()
    factory.add_extension(ov_ext.extension_path())
    attributes = node.get_attributes() | ({} if source is None else {"source": source})
    weight = node.input_value(1) if blob is None else ov.op.Constant(blob).output(0)
    other = factory.create("SparseMatMul", [node.input_value(0), weight], attributes)
    other.set_friendly_name(node.get_friendly_name())
    for port in list(node.output(0).get_target_inputs()):
        port.replace_source_output(other.output(0))


TEXTS = {
    "garbage": "gar\x7fbage",
    "only a version": '{"v": 1}',
    "no version": "{}",
    "null": "null",
    "text": '"text"',
    "endless": '{"v":' + "1" * 9999 + "}",
    "nested": "[" * 99999,
    "no version number": '{"v": [1]}',
    "a list of numbers": '{"v": 1, "nodes": [1, 2]}',
}
# Entry of the record (None: the record itself) and what changes there; KeyError takes a key away, a slice cuts.
CHANGES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "no operations": (None, dict(nodes=[])),
    "cut off": (None, dict(nodes=slice(-2))),
    "only constants": (None, dict(nodes=slice(1))),
    "axes": (None, dict(axes=7)),
    "other axes": (None, dict(axes=2)),
    "no orientation": (None, dict(outputs_first=KeyError)),
    "other orientation": (None, dict(outputs_first=False)),
    "no name": ("weight", dict(name=KeyError)),
    "names that are numbers": ("weight", dict(tensors=[1])),
    "no shape": ("weight", dict(shape=KeyError)),
    "shape of text": ("weight", dict(shape=["a"])),
    "negative shape": ("weight", dict(shape=[-70, -2, 128])),
    "enormous shape": ("weight", dict(shape=[2**40, 2**40])),
    "larger than memory": ("weight/zero_point", dict(shape=[2**62])),
    "element": ("weight", dict(element="get_size")),
    "wrong element": ("weight/scale", dict(element="i64")),
    "role": ("weight", dict(role="magic")),
    "no role": ("weight", dict(role=KeyError)),
    "roles swapped": ("weight/scale", dict(role="bias")),
    "no bytes": ("weight/zero_point", dict(zlib=KeyError)),
    "no base64": ("weight/zero_point", dict(zlib="!")),
    "no zlib": ("weight/zero_point", dict(zlib="AAAA")),
    "empty zero points": ("weight/zero_point", dict(shape=[70, 0, 1], zlib="eJwDAAAAAAE=")),
    "index beyond the end": ("layer", dict(inputs=[-1, 99])),
    "negative index": ("layer", dict(inputs=[-1, -2])),
    "inputs of text": ("layer", dict(inputs=["a", "b"])),
    "no inputs": ("layer", dict(inputs=[])),
    "one input": ("layer", dict(inputs=[-1])),
    "activation twice": ("layer", dict(inputs=[-1, -1])),
    "activation elsewhere": ("weight/multiply", dict(inputs=[-1, 0])),
    "no attributes": ("weight/reshape", dict(attributes=KeyError)),
    "attributes of text": ("weight/codes", dict(attributes={"destination_type": "no such type"})),
    "another product": ("layer", dict(attributes={"transpose_a": False, "transpose_b": False})),
    "a mark without type": ("weight/codes", dict(attributes={}, keep=True)),
    "another mark": ("weight/codes", dict(keep=True)),
}


@pytest.mark.parametrize("damage", [*TEXTS, *CHANGES])
def test_a_damaged_record_changes_nothing(damage: str) -> None:
    model = two_layers()
    node = [node for node in model.get_ordered_ops() if node.get_type_name() == "SparseMatMul"][-1]
    record = json.loads(node.get_attributes()["source"])
    name, changes = CHANGES.get(damage, (None, {}))
    target = record if name is None else next(entry for entry in record["nodes"] if entry["name"] == name)
    for key, value in changes.items():
        if value is KeyError:
            del target[key]
        else:
            target[key] = target[key][value] if isinstance(value, slice) else value
    with_other(model, source=TEXTS.get(damage) or json.dumps(record))
    before = signature(model)
    with pytest.raises(ov_ext.RecordError, match="^layer: "):
        ov_ext.unpack_sparse_weights(model)
    assert signature(model) == before  # the first layer, whose record is good, was not restored either


def test_a_damaged_blob_changes_nothing() -> None:
    """One bit of a bias: nothing but the checksum can tell."""
    model = two_layers()
    node = [node for node in model.get_ordered_ops() if node.get_type_name() == "SparseMatMul"][-1]
    blob = node.input_value(1).get_node().get_data().copy()
    bias = int(blob[96:104].view(np.uint64)[0])
    blob[bias + 5] ^= 4
    native.validate(blob)
    with_other(model, blob=blob)
    before = signature(model)
    with pytest.raises(ValueError, match="layer: its blob is damaged: the checksum"):
        ov_ext.unpack_sparse_weights(model)
    assert signature(model) == before
    mended = blob.copy()
    mended[112:120].view(np.uint64)[0] = zlib.crc32(blob[128:])
    with_other(model, blob=mended)
    assert "SparseMatMul" not in operations(ov_ext.unpack_sparse_weights(model))


def test_unpacking_a_stock_model_changes_nothing() -> None:
    model = build(INT4).model
    stock = signature(model.clone())
    assert signature(ov_ext.unpack_sparse_weights(model)) == stock


def with_false_shape(folder: Path, model: ov.Model, before: str, after: str) -> Path:
    """Save a model and give a dimension in its file another size."""
    path = folder / "m.xml"
    ov_ext.save_model(model, path)
    text = path.read_text()
    for form in ('shape="{}"', 'shape="{}, ', "<dim>{}</dim>"):
        text = text.replace(form.format(before), form.format(after))
    assert after in text
    path.write_text(text)
    return path


@pytest.mark.parametrize("size", [2**61, 2**62])
def test_a_blob_whose_size_overflows_is_not_read(core: ov.Core, tmp_path: Path, size: int) -> None:
    model, _ = ov_ext.pack_sparse_weights(build(INT4).model, ALL)
    blob = next(node for node in model.get_ops() if node.get_friendly_name() == "layer/blob")
    path = with_false_shape(tmp_path, model, str(blob.get_byte_size()), str(size))
    with pytest.raises(RuntimeError, match=f"holds {blob.get_byte_size()} bytes, its shape says {size}"):
        core.read_model(path)


# n weights of 256 inputs: the bits of n outputs, modulo 2^64, are those of 70.
OVERFLOWS = {"f32": 70 + 2**51, "bf16": 70 + 2**52, "i8": 70 + 2**53, "i4": 70 + 2**54}


@pytest.mark.parametrize("element", OVERFLOWS)
def test_a_stock_constant_whose_size_overflows_is_not_read(core: ov.Core, tmp_path: Path, element: str) -> None:
    form = Form(element) if element in ("f32", "bf16") else Form(element, scale_shape="scalar")
    path = with_false_shape(tmp_path, build(form).model, "70", str(OVERFLOWS[element]))
    model = core.read_model(path)
    held = build(form).weight.size * {"f32": 32, "bf16": 16, "i8": 8, "i4": 4}[element] // 8
    for change in (ov_ext.pack_sparse_weights, ov_ext.unpack_sparse_weights):
        with pytest.raises(ValueError, match=f"constant 'weight' claims .* but holds {held}. The file is damaged"):
            change(model)
