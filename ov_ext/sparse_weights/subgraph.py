"""Writes the stock subgraph of a weight down as a JSON record, and builds it again: this makes packing reversible.

A blob holds integer codes (or bf16 values), scales and bias. Everything else of the subgraph (operation types,
attributes, names, element types, shapes, zero points) goes into the ``source`` attribute of our operation. Kernels
ignore it. It is an attribute because OpenVINO does not save the rt_info of an operation.

Record: ``{"v": 1, "outputs_first": bool, "axes": 2 | 3, "nodes": [...]}``. The nodes are in evaluation order; their
inputs are positions in that list, and -1 is the activation.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from typing import Any

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino.utils.node_factory import NodeFactory

from ov_ext.cpu_plugin.support.weight import Weight
from ov_ext.graphs import RecordError
from ov_ext.sparse_weights.weights import (
    FLOATS,
    SYMMETRIC,
    ConstantWeight,
    Unpackable,
    by_output_and_group,
    constant_behind,
    element_name,
    elements,
)

RECORD_VERSION = 1
_OF_INPUTS = {"Abs", "LessEqual", "Select"}  # and Subtract, Add: what a layer does with its inputs
_OPERATIONS = {"Constant", "Convert", "Subtract", "Multiply", "Reshape", "Transpose", "MatMul", "Add", *_OF_INPUTS}
_STORED = ("data", "zero")  # roles of constants whose bytes are in the record; the others are in the blob
_ROLES = ("values", "scale", "bias", *_STORED)
_ELEMENTS = (*FLOATS, *SYMMETRIC, "i16", "u16", "i32", "u32", "i64", "u64")
# What Python, numpy, zlib and OpenVINO raise for a record that is valid JSON but has a wrong content.
_NONSENSE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, zlib.error, Unpackable)
_KEEP = "decompression_0"  # rt_info that keeps OpenVINO from folding the Convert of an f16 weight


def describe(found: ConstantWeight, bias: Node | None, scales: str = "", x: Output | None = None) -> str:
    """Write down what a blob does not hold.

    :param found: The weight, still in its graph.
    :param bias: The Add behind the MatMul whose constant goes into the blob, or None.
    :param scales: "" for a weight that is packed losslessly. For a requantized weight: the element type of its new
        scales. Then the record has no zero points; and f32 arithmetic if the scales were f16 and need f32 now.
    :param x: The activation, where the packed operation reads one before the MatMul's own; what lies between belongs to
        the record.
    :return: JSON for :func:`restore`.
    """
    widened = scales == "f32" and found.scale is not None and element_name(found.scale) == "f16"
    nodes: list[dict[str, Any]] = []
    position: dict[str, int] = {}  # by unique node name: two Python wrappers of one node are different objects
    parts = {"values": found.constant, "scale": found.scale, "zero": found.zero, "bias": bias and bias_constant(bias)}
    roles = {node.get_name(): role for role, node in parts.items() if node is not None}
    activation = _place(found.matmul.input_value(0) if x is None else x)

    def add(node: Node) -> int:
        key, kind = node.get_name(), node.get_type_name()
        # Zero points; not a centre, which is taken from the activation.
        if scales and kind == "Subtract" and _place(node.input_value(0)) != activation:
            return add(node.input_value(0).get_node())
        if key not in position:
            entry: dict[str, Any] = {"type": kind, "name": node.get_friendly_name()}
            if names := sorted(node.output(0).get_names()):
                entry["tensors"] = names
            if kind == "Constant":
                entry |= _constant_entry(node, roles.get(key, "data"), found, scales)
            else:
                ports = node.input_values()
                entry["inputs"] = [-1 if _place(port) == activation else add(port.get_node()) for port in ports]
                entry["attributes"] = node.get_attributes()
                if widened and entry["attributes"].get("destination_type") == "f16":
                    entry["attributes"]["destination_type"] = "f32"
                if _KEEP in node.get_rt_info():
                    entry["keep"] = True
            position[key] = len(nodes)
            nodes.append(entry)
        return position[key]

    add(found.matmul if bias is None else bias)
    record = {"v": RECORD_VERSION, "outputs_first": found.rows_are_outputs, "axes": found.axes, "nodes": nodes}
    return json.dumps(record, separators=(",", ":"))


def read_record(source: str) -> dict[str, Any]:
    """Parse the record of an operation.

    :param source: What :func:`describe` wrote.
    :return: The record.
    :raises RecordError: There is none, it is damaged, or it has a newer version.
    """
    if not source:
        raise RecordError("it carries no record of its stock subgraph; go back to the IR it was packed from")
    try:
        record: dict[str, Any] = json.loads(source)
        version = int(record["v"])
    except _NONSENSE as error:
        raise _damaged(error) from None
    if version != RECORD_VERSION:
        raise RecordError(f"its record has version {version}, this release reads {RECORD_VERSION}: update nncf-ext")
    if problem := _problem(record):
        raise _damaged(problem)
    return record


def restore(record: dict[str, Any], weight: Weight, x: Output, known: dict[str, Node]) -> Node:
    """Build the stock subgraph.

    :param record: What :func:`read_record` gave.
    :param weight: The unpacked blob.
    :param x: The activation.
    :param known: Nodes of the model by friendly name. Nodes that do not depend on the activation are taken from here if
        the same ones are still in the model, or were restored before. New nodes are added.
    :return: The last node: the MatMul, or the Add of its bias.
    :raises RecordError: The record does not fit the blob, or describes operations that cannot be built.
    """
    try:
        return _build(record, weight, x, known)
    except RecordError:
        raise
    except _NONSENSE as error:
        raise _damaged(error) from error


def _build(record: dict[str, Any], weight: Weight, x: Output, known: dict[str, Node]) -> Node:
    factory = NodeFactory("opset1")
    built: list[Node] = []
    arrays = _arrays(record, weight)
    for entry in record["nodes"]:
        inputs = [x if i < 0 else built[i].output(0) for i in entry.get("inputs", ())]
        if entry["type"] == "Constant":
            node: Node = _constant(entry, arrays)
        elif entry.get("keep"):
            node = _kept_convert(inputs[0], entry["attributes"]["destination_type"])
        else:
            node = factory.create(entry["type"], inputs, entry["attributes"])
        existing = known.get(entry["name"])
        if existing is not None and entry["type"] != "MatMul" and _same(existing, node):
            built.append(existing)
            continue
        node.set_friendly_name(entry["name"])
        node.output(0).set_names(set(entry.get("tensors", ())))
        known.setdefault(entry["name"], node)
        built.append(node)
    return built[-1]


def bias_constant(add: Node) -> Node | None:
    """:return: The constant operand of an Add, or None."""
    constants = [constant_behind(port) for port in add.input_values()]
    return next((constant for constant in constants if constant is not None), None)


def _damaged(why: object) -> RecordError:
    text = (str(why).strip() or type(why).__name__).splitlines()[0]
    return RecordError(f"its record of the stock subgraph is damaged ({text})")


def _problem(record: dict[str, Any]) -> str:
    """:return: What is wrong with the form of a record, which may come from a damaged file; "" if nothing is."""
    nodes = record.get("nodes")
    if not isinstance(nodes, list) or not nodes or not all(isinstance(entry, dict) for entry in nodes):
        return "it lists no operations"
    if unknown := {str(entry.get("type")) for entry in nodes} - _OPERATIONS:
        return f"it names {', '.join(sorted(unknown))}, which no stock form of a weight contains"
    if not isinstance(record.get("outputs_first"), bool) or record.get("axes") not in (2, 3):
        return "it lacks the orientation of the weight"
    rule = _OF_INPUTS & {entry["type"] for entry in nodes}
    readers = {"MatMul", *({"Add", "Subtract", *_OF_INPUTS} if rule else ())}
    for position, entry in enumerate(nodes):
        kind = entry["type"]
        if not isinstance(entry.get("name"), str) or not _all(str, entry.get("tensors", [])):
            return f"operation {position} lacks its name"
        if entry["type"] == "Constant":
            stored = entry.get("role") not in _STORED or isinstance(entry.get("zlib"), str)
            sizes = _all(int, entry.get("shape")) and all(size >= 0 for size in entry["shape"])
            if entry.get("role") not in _ROLES or entry.get("element") not in _ELEMENTS or not sizes or not stored:
                return f"{entry['name']} is no constant that a weight has"
            continue
        inputs = entry.get("inputs")
        if not _all(int, inputs) or not inputs or not all(-1 <= i < position for i in inputs):
            return f"{entry['name']} reads operations that are not there"
        if not isinstance(entry.get("attributes"), dict):
            return f"{entry['name']} lacks its attributes"
        if (-1 in inputs and kind not in readers) or (kind == "MatMul" and not _reads_activation(inputs, nodes)):
            return f"{entry['name']} reads the activation in an unusual place"
    products = [position for position, entry in enumerate(nodes) if entry["type"] == "MatMul"]
    last = nodes[-1]
    if len(products) != 1 or not (last["type"] == "MatMul" or last["type"] == "Add" and products[0] in last["inputs"]):
        return "it does not end in a MatMul or its bias"
    return ""


def _reads_activation(inputs: list[int], nodes: list[dict[str, Any]]) -> bool:
    """:return: Whether the first operand of a MatMul is the activation, or what a layer makes of it, and only that."""
    return (inputs[0] == -1 or nodes[inputs[0]]["type"] == "Select") and -1 not in inputs[1:]


def _all(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _constant_entry(node: Node, role: str, found: ConstantWeight, scales: str) -> dict[str, Any]:
    element, shape = element_name(node), list(node.shape)
    if scales and role == "values":
        element = SYMMETRIC[element]
    if scales and role == "scale":  # requantizing gives every output and group its own scale
        element = scales
        outer, inner = (found.shape[0], found.groups) if found.rows_are_outputs else (found.groups, found.shape[0])
        shape = (
            [outer, inner] if found.axes == 2 else [outer, inner, 1] if found.rows_are_outputs else [outer, 1, inner]
        )
    entry: dict[str, Any] = {"role": role, "element": element, "shape": shape}
    if role in _STORED:
        entry["zlib"] = base64.b64encode(zlib.compress(node.get_data().tobytes(), 9)).decode()
    return entry


def _arrays(record: dict[str, Any], weight: Weight) -> dict[str, np.ndarray]:
    """:return: By role, what the blob holds, turned as in the stock constants. Scales have all their axes."""
    outputs_first = record["outputs_first"]
    values = weight.values
    zero = next((entry for entry in record["nodes"] if entry.get("role") == "zero"), None)
    if zero is not None:
        zeros = by_output_and_group(_constant(zero, {}), record["axes"], outputs_first).astype(np.int16)
        values = values + np.repeat(zeros, values.shape[1] // zeros.shape[1], axis=1)
    arrays = {"values": values if outputs_first else values.T}
    if weight.scales is not None:
        scales = weight.scales if outputs_first else weight.scales.T
        arrays["scale"] = scales if record["axes"] == 2 else scales[:, :, None] if outputs_first else scales[:, None, :]
    if weight.bias is not None:
        arrays["bias"] = weight.bias
    return arrays


def _constant(entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> Node:
    element, shape, role = getattr(ov.Type, entry["element"]), entry["shape"], entry["role"]
    nbytes = -(-element.bitwidth * math.prod(shape) // 8)
    if role in _STORED:
        packed = base64.b64decode(entry["zlib"])
        raw = np.frombuffer(
            zlib.decompressobj().decompress(packed, nbytes + 1), np.uint8
        )  # never more than it should be
    else:
        if role not in arrays:
            raise RecordError(f"its record asks for {role}, the blob holds none")
        values = arrays[role]
        if role == "scale":  # an axis that was broadcast keeps its first entry
            padded = [1] * (values.ndim - len(shape)) + shape
            values = values[tuple(slice(0, size) for size in padded)]
        raw = _encode(values, entry["element"])
    if raw.size != nbytes:  # a tensor over too few bytes would read past them
        raise RecordError(f"its record asks for {nbytes} bytes of {role}, the blob gives {raw.size}")
    return ov.op.Constant(ov.Tensor(raw, ov.Shape(shape), element), shared_memory=False)


def _encode(values: np.ndarray, element: str) -> np.ndarray:
    """:return: The bytes of a constant, ``[bytes]`` uint8. uint16 values are bf16 bits."""
    if element in ("i4", "u4"):
        nibbles = np.zeros(values.size + values.size % 2, np.uint8)
        nibbles[: values.size] = values.reshape(-1).astype(np.int8).view(np.uint8) & 15
        return nibbles[0::2] | nibbles[1::2] << 4
    if element == "bf16":
        bits = values if values.dtype == np.uint16 else values.astype(np.float32).view(np.uint32) >> 16
        return np.ascontiguousarray(bits, np.uint16).view(np.uint8).reshape(-1)
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    dtype = {"f32": np.float32, "f16": np.float16, "i8": np.int8, "u8": np.uint8}[element]
    return np.ascontiguousarray(values.astype(dtype)).reshape(-1).view(np.uint8)


def _kept_convert(port: Output, destination: str) -> Node:
    """Make a Convert with the rt_info of OpenVINO's f16 compression. Python cannot set it, so it is read from an IR."""
    source = port.get_element_type().get_type_name()
    precision = {"f16": "FP16", "bf16": "BF16", "f32": "FP32", "f64": "FP64"}
    before, after = f'precision="{precision[source]}"', f'precision="{precision[destination]}"'
    ir = (
        '<?xml version="1.0"?><net name="convert" version="11"><layers>'
        f'<layer id="0" name="x" type="Parameter" version="opset1"><data shape="" element_type="{source}"/>'
        f'<output><port id="0" {before}/></output></layer>'
        f'<layer id="1" name="c" type="Convert" version="opset1"><data destination_type="{destination}"/>'
        '<rt_info><attribute name="decompression" version="0"/></rt_info>'
        f'<input><port id="0" {before}/></input><output><port id="1" {after}/></output></layer>'
        f'<layer id="2" name="y" type="Result" version="opset1"><input><port id="0" {after}/></input></layer>'
        '</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>'
        '<edge from-layer="1" from-port="1" to-layer="2" to-port="0"/></edges></net>'
    )
    model = ov.Core().read_model(ir, ov.Tensor(np.zeros(0, np.uint8)))
    convert = model.get_results()[0].input_value(0).get_node()
    convert.input(0).replace_source_output(port)
    convert.validate_and_infer_types()
    return convert


def _place(port: Output) -> tuple[str, int]:
    """:return: What two Python wrappers of one output have in common."""
    return port.get_node().get_name(), port.get_index()


def _same(existing: Node, node: Node) -> bool:
    """:return: True when two nodes compute the same tensor from the same inputs."""
    if existing.get_type_name() != node.get_type_name() or existing.get_output_size() != 1:
        return False
    if node.get_type_name() == "Constant":
        same_form = (element_name(existing), list(existing.shape)) == (element_name(node), list(node.shape))
        return same_form and np.array_equal(elements(existing).view(np.uint8), elements(node).view(np.uint8))
    sources = [[_place(port) for port in each.input_values()] for each in (existing, node)]
    return sources[0] == sources[1] and existing.get_attributes() == node.get_attributes()
