"""The pass that packs sparse weights, and its exact inverse."""

from __future__ import annotations

import logging
import zlib
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino.utils.node_factory import NodeFactory

from ov_ext import runtime
from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.cpu_plugin.sparse_matmul.pack import HEADER, VERSION
from ov_ext.extension import extension_path, package_version
from ov_ext.graphs import RecordError, detach, graphs_of, redirect, refuse_short_constants
from ov_ext.sparse_weights import tables
from ov_ext.sparse_weights.cost import CostTable
from ov_ext.sparse_weights.packed import OPERATION, group, is_packed, records
from ov_ext.sparse_weights.plan import Decision, decide
from ov_ext.sparse_weights.policy import SparsePolicy
from ov_ext.sparse_weights.report import LayerReport, PackReport
from ov_ext.sparse_weights.subgraph import describe, read_record, restore
from ov_ext.sparse_weights.survey import Key, Survey, foldable_bias, key_of, read_weight, survey, with_bias
from ov_ext.sparse_weights.weights import ConstantWeight, element_name, find
from ov_ext.sparse_weights.workload import Expected

logger = logging.getLogger("ov_ext")


class AlreadyPackedError(ValueError):
    """The model holds packed weights already."""


def pack_sparse_weights(model: ov.Model, policy: SparsePolicy | None = None) -> tuple[ov.Model, PackReport]:
    """Replace MatMul operations that have sparse constant weights by SparseMatMul.

    The model is changed in place: pass ``model.clone()`` to keep it. Weights are packed one at a time, so that the peak
    memory is the model plus a few copies of its largest weight. MatMuls that are not packed stay as they were, so other
    tools, such as nncf.compress_weights, can still be applied to them.

    :param model: A model with constant weights: plain (f32, f16, bf16), INT8 or INT4.
    :param policy: Which weights to pack. By default those for which our operation is expected to be faster.
    :return: The same model, and a report with the form of every MatMul that has a constant operand, and why.
    :raises AlreadyPackedError: The model has been packed before.
    :raises ValueError: A constant is shorter than its shape says: the file is damaged.
    :raises ExtensionUnavailableError: The compiled extension is missing or was built for another OpenVINO.
    """
    policy = policy or SparsePolicy()
    library = extension_path()
    runtime.check_format(model)
    graphs = graphs_of(model)
    refuse_short_constants(graphs)
    if packed := sum(node.get_output_size() for graph in graphs for node in graph.get_ops() if is_packed(node)):
        msg = (
            f"The model holds {packed} packed weights already. To pack it with another policy, restore it first: "
            "ov_ext.unpack_sparse_weights(model), or `ov-ext unpack IN OUT`."
        )
        raise AlreadyPackedError(msg)
    surveyed, size = survey(graphs, policy), _constant_bytes(graphs)
    table, origin = tables.costs(policy, {each.kind for each in surveyed.candidates.values()})
    if policy.target == "this-cpu":
        policy = replace(policy, target=runtime.this_cpu())
    plan = _Plan(policy, surveyed, decide(surveyed.candidates, policy, table, size), table)
    factory = NodeFactory()
    factory.add_extension(library)
    layers = []
    for graph in graphs:
        layers += _pack_graph(graph, plan, factory)
        group(graph, factory)
    after = _constant_bytes(graphs)
    report = PackReport(tuple(layers), policy.target, policy.activation_group, policy.workload, origin, size, after)
    if report.replaced:
        model.validate_nodes_and_infer_types()
        entries = {
            "format": "SPW1",
            "format_version": VERSION,
            "version": package_version(),
            "target": policy.target,
            "activation_group": policy.activation_group,
        }
        for key, value in entries.items():
            model.set_rt_info(value, ["ov_ext", key])
    return model, report


def _constant_bytes(graphs: list[ov.Model]) -> int:
    return sum(
        node.get_byte_size() for graph in graphs for node in graph.get_ops() if node.get_type_name() == "Constant"
    )


def unpack_sparse_weights(model: ov.Model) -> ov.Model:
    """Restore the stock subgraphs: the inverse of :func:`pack_sparse_weights`, in place.

    Constants come back bit for bit, with their types, shapes, names, scales and zero points. There are two exceptions:
    -0.0 in plain weights becomes +0.0, and f32 or f16 weights keep the bf16 values to which packing rounded them.

    All operations are checked before the first one is replaced, so an error leaves the model as it was.

    :param model: A packed model; one without packed weights is returned as it is.
    :return: The same model.
    :raises NewerFormatError: It was packed by a newer release.
    :raises RecordError: An operation carries no usable record of its stock form.
    :raises ValueError: A blob is damaged, or a constant shorter than its shape says.
    :raises ExtensionUnavailableError: The compiled extension is missing or was built for another OpenVINO.
    """
    runtime.check_format(model)
    graphs = graphs_of(model)
    refuse_short_constants(graphs)
    for graph in graphs:
        for node in graph.get_ordered_ops():
            if is_packed(node):
                _rehearse(node)
    for graph in graphs:
        _unpack(graph)
    model.validate_nodes_and_infer_types()
    rt_info = model.get_rt_info()
    if "ov_ext" in rt_info:
        del rt_info["ov_ext"]
    return model


def _rehearse(node: Node) -> None:
    """Check one packed operation, which may come from a damaged file: build its stock form, outside the graph.

    :raises RecordError: It has no usable record.
    :raises ValueError: Its blob is damaged.
    """
    name = node.get_friendly_name()
    x = ov.op.Parameter(node.get_input_element_type(0), node.get_input_partial_shape(0))
    try:
        for i, record in enumerate(records(node)):
            constant = node.input_value(1 + i).get_node()
            if constant.get_type_name() != "Constant":
                raise RecordError("its blob is no constant of this graph")
            blob = constant.get_data()
            *_, crc, _ = HEADER.unpack_from(blob)
            if zlib.crc32(blob[HEADER.size :]) != crc:
                raise ValueError("its blob is damaged: the checksum does not match. Copy the model again")
            stock, packed = _stock_form(record, blob, x.output(0), {}), node.output(i)
            found, asked = stock.get_output_partial_shape(0), packed.get_partial_shape()
            if not found.compatible(asked) or stock.get_output_element_type(0) != packed.get_element_type():
                element = packed.get_element_type().get_type_name()
                raise RecordError(f"its record gives {element_name(stock)} {found}, not {element} {asked}")
    except RecordError as error:
        raise RecordError(f"{name}: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).rstrip('.')}.") from error


def _unpack(graph: ov.Model) -> None:
    pending = deque(node for node in graph.get_ordered_ops() if is_packed(node))
    blobs = {port.get_node().get_name() for node in pending for port in node.input_values()[1:]}
    others = (node for node in graph.get_ops() if not is_packed(node) and node.get_name() not in blobs)
    known = {node.get_friendly_name(): node for node in others}
    while pending:  # pop, not iterate: a list would hold the replaced operations, and so their blobs, in memory
        node = pending.popleft()
        for i, record in enumerate(records(node)):
            blob = node.input_value(1 + i).get_node().get_data()
            redirect(node.output(i), _stock_form(record, blob, node.input_value(0), known).output(0))
        detach(node)


def _stock_form(record: str, blob: np.ndarray, x: Output, known: dict[str, Node]) -> Node:
    """:return: The last node of the stock subgraph of one packed weight, computed from ``x``; see :func:`restore`."""
    return restore(read_record(record), native.unpack(blob), x, known)


@dataclass(frozen=True)
class _Plan:
    """What to do with a model's weights."""

    policy: SparsePolicy
    survey: Survey
    decisions: dict[str, Decision]  # by unique name of the constant
    table: CostTable

    def decision(self, found: ConstantWeight) -> Decision | None:
        """:return: What was decided about a weight; None where it cannot be packed."""
        stays = found.matmul.get_name() in self.survey.stays
        return None if stays else self.decisions[found.constant.get_name()]

    def stock_time(self, found: ConstantWeight) -> Expected | None:
        """:return: The time of a layer that cannot be packed, where it is known."""
        if len(found.shape) != 2:
            return None
        weights, group = found.shape[0] * found.shape[1], 0 if found.problem else found.group
        return self.table.expected(found.blob_kind, 0.0, group, weights, self.policy.workload).get("stock")


@dataclass(frozen=True)
class _Blob:
    """A packed weight, kept for the other MatMuls that share it."""

    constant: Node
    kind: str
    group: int
    new_scales: str  # element type of the scales when the weight was requantized (then without zero points), else ""


def _pack_graph(graph: ov.Model, plan: _Plan, factory: NodeFactory) -> list[LayerReport]:
    """Pack the weights of one graph.

    :return: One entry for each MatMul. A stock constant is counted once, at the first MatMul that reads it. Whether a
        constant is still needed is known only at the end, so the sizes after packing are filled in then.
    """
    blobs: dict[Key, _Blob] = {}
    counted: set[str] = set()
    entries = []
    pending = deque(node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul")
    while pending:  # pop, not iterate: a list would hold the replaced MatMuls, and so their weights, in memory
        found = find(pending.popleft())
        if found is None:
            continue
        layer = _pack(found, plan, factory, blobs)
        logger.debug("%s: %s", layer.name, _joined(layer.form, layer.note))
        entries.append((layer, found.constant.get_name(), {k: v for k, v in found.nbytes.items() if k not in counted}))
        counted |= found.nbytes.keys()
    needed = {node.get_name() for node in graph.get_ops()}
    layers = []
    for layer, constant, first in entries:
        kept = sum(size for name, size in first.items() if name in needed)
        if layer.replaced and layer.bytes_after and constant in needed:
            layer = replace(layer, note=_joined(layer.note, "its stock constant stays for another use"))
        layers.append(replace(layer, bytes_before=sum(first.values()), bytes_after=layer.bytes_after + kept))
    return layers


def _joined(*notes: str) -> str:
    return ", ".join(filter(None, notes))


def _pack(found: ConstantWeight, plan: _Plan, factory: NodeFactory, blobs: dict[Key, _Blob]) -> LayerReport:
    """Replace one MatMul if that was decided.

    :param blobs: The weights that were packed before. A new one is added.
    :return: Its report. Of the bytes after packing it has those of a new blob only.
    """
    name, decision = found.matmul.get_friendly_name(), plan.decision(found)
    report = LayerReport(name, found.shape, found.kind, None, 0, 0, "stock")
    if decision is None:
        note, zeros = plan.survey.stays[found.matmul.get_name()]
        time = plan.stock_time(found)
        return replace(report, sparsity=zeros, note=note, before=time, after=time)
    report = replace(
        report,
        sparsity=plan.survey.candidates[found.constant.get_name()].zeros,
        form=decision.form,
        note=decision.reason,
        speedup=decision.speedup,
        before=decision.times.get("stock"),
        after=decision.times.get(decision.form),
    )
    if decision.form == "stock":
        return report
    bias = foldable_bias(found)
    key = key_of(found, bias)
    if key in blobs:
        report = replace(report, note="shares the blob of an earlier layer")
    else:
        weight, remark, new_scales = read_weight(found, plan.policy.requantize)
        constant = ov.op.Constant(native.pack(with_bias(weight, bias), decision.form == "dense"))
        constant.set_friendly_name(f"{name}/blob")
        blobs[key] = _Blob(constant, weight.kind, weight.group, new_scales)
        note = _joined(remark, "bias inside the blob" if bias else "")
        report = replace(report, bytes_after=constant.get_byte_size(), note=note)
    _replace(found, bias, blobs[key], plan.policy.activation_group, factory)
    return report


def _replace(found: ConstantWeight, bias: Node | None, blob: _Blob, group: int, factory: NodeFactory) -> None:
    """Put the packed operation in the place of a MatMul and its bias."""
    segment = blob.group or 128  # the kernel scales activations by groups of at least this size
    attributes = {
        **{"n": found.shape[0], "outputs": [], "k": found.shape[1], "kind": blob.kind, "epilogue": ""},
        "activation_group": segment if 0 < group < segment else group,
        "source": describe(found, bias, blob.new_scales),
    }
    sparse = factory.create(OPERATION, [found.matmul.input_value(0), blob.constant.output(0)], attributes)
    sparse.set_friendly_name(found.matmul.get_friendly_name())
    redirect((found.matmul if bias is None else bias).output(0), sparse.output(0))
    for node in (bias, found.matmul):
        if node is not None:
            detach(node)
