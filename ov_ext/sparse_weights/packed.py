"""The packed operation in a graph: recognise it, read its records, put it in place of MatMuls, merge several."""

from __future__ import annotations

import json

import openvino as ov
from openvino import Node
from openvino.utils.node_factory import NodeFactory

from ov_ext.cpu_plugin.sparse_matmul.pack import HEADER
from ov_ext.graphs import RecordError, detach, redirect

OPERATION = "SparseMatMul"


def is_packed(node: Node) -> bool:
    """:return: Whether a node is our operation."""
    return node.get_type_name() == OPERATION and node.get_type_info().version_id == "ov_ext"


def records(node: Node) -> list[str]:
    """Read the ``source`` attribute: one record of the stock form for each weight.

    :return: Texts for :func:`ov_ext.sparse_weights.subgraph.read_record`.
    :raises RecordError: An operation with several weights does not have a record of each.
    """
    source: str = node.get_attributes()["source"]
    count = node.get_output_size()
    if count == 1:
        return [source]
    try:
        found = json.loads(source)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) != count or not all(isinstance(record, str) for record in found):
        raise RecordError(f"it does not carry a record of each of its {count} weights; go back to the first IR")
    return found


def group(graph: ov.Model, factory: NodeFactory) -> None:
    """Merge operations that read the same activations in the same form, such as q, k and v of attention.

    A merged operation quantizes the activations once and starts its threads once. It keeps one blob for each weight.
    Operations that a ReadValue depends on stay alone: the CPU plug-in moves what computes the first value of a state
    into a graph of its own, and expects one output of each.

    :param graph: Graph with packed operations of one weight each.
    :param factory: Knows the packed operation.
    """
    alike: dict[tuple[object, ...], list[Node]] = {}
    alone = _before_states(graph)
    for node in graph.get_ordered_ops():
        if is_packed(node) and node.get_output_size() == 1 and node.get_name() not in alone:
            x, attributes = node.input_value(0), node.get_attributes()
            weight_group = HEADER.unpack_from(node.input_value(1).get_node().get_data())[12]
            form = (attributes["kind"], attributes["k"], attributes["activation_group"], weight_group or 128)
            alike.setdefault((x.get_node().get_name(), x.get_index(), *form), []).append(node)
    for nodes in alike.values():
        if len(nodes) > 1:
            _merge(nodes, factory)


def _before_states(graph: ov.Model) -> set[str]:
    """:return: Unique names of the nodes that a ReadValue depends on, directly or through others."""
    pending = [node for node in graph.get_ops() if node.get_type_name() == "ReadValue"]
    found: set[str] = set()
    while pending:
        for port in pending.pop().input_values():
            if (name := port.get_node().get_name()) not in found:
                found.add(name)
                pending.append(port.get_node())
    return found


def _merge(nodes: list[Node], factory: NodeFactory) -> None:
    widths = [node.get_attributes()["n"] for node in nodes]
    attributes = nodes[0].get_attributes() | {
        "n": sum(widths),
        "outputs": widths,
        "source": json.dumps([record for node in nodes for record in records(node)]),
    }
    merged = factory.create(OPERATION, [nodes[0].input_value(0), *(node.input_value(1) for node in nodes)], attributes)
    merged.set_friendly_name(" + ".join(node.get_friendly_name() for node in nodes))
    for i, node in enumerate(nodes):
        redirect(node.output(0), merged.output(i))
        detach(node)
