"""What every pass needs: the graphs of a model, bodies included; whole constants; a node in place of another."""

from __future__ import annotations

import math

import openvino as ov
from openvino import Node, Output

_BRANCHES = 2  # of an If


class RecordError(RuntimeError):
    """One of our operations has no usable record of its stock form."""


def graphs_of(model: ov.Model) -> list[ov.Model]:
    """:return: The model and the bodies of its If, Loop and TensorIterator operations, at any depth."""
    graphs = [model]
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "If":
            bodies = [node.get_function(i) for i in range(_BRANCHES)]
        else:
            bodies = [node.get_function()] if kind in ("Loop", "TensorIterator") else []
        for body in bodies:
            graphs += graphs_of(body)
    return graphs


def element_count(node: Node) -> int:
    """:return: Number of elements of a Constant. It does not overflow, whatever shape a file claims."""
    return math.prod(node.get_output_shape(0))


def refuse_short_constants(graphs: list[ov.Model]) -> None:
    """Compare the shape of every constant with its memory. OpenVINO computes sizes modulo 2^64 when it reads a file.

    :param graphs: What :func:`graphs_of` gives.
    :raises ValueError: A constant has fewer bytes than its shape and element type need: reading it would leave its
        memory.
    """
    for graph in graphs:
        for node in graph.get_ops():
            if node.get_type_name() != "Constant":
                continue
            needed, held = -(-element_count(node) * node.get_element_type().bitwidth // 8), node.get_byte_size()
            if needed > held:
                form = f"{node.get_element_type().get_type_name()} of shape {list(node.get_output_shape(0))}"
                raise ValueError(
                    f"The constant {node.get_friendly_name()!r} claims to be {form}, {needed} bytes, but holds {held}. "
                    "The file is damaged: copy the model again."
                )


def redirect(old: Output, new: Output) -> None:
    """Give all consumers and tensor names of an output to another one."""
    new.set_names(old.get_names())
    for port in list(old.get_target_inputs()):
        port.replace_source_output(new)


def detach(node: Node) -> None:
    """Cut a replaced node off from its inputs: while a reference to it exists, it would count as their consumer."""
    for port in node.inputs():
        source = port.get_source_output()
        stand_in = ov.op.Parameter(source.get_element_type(), source.get_partial_shape())
        port.replace_source_output(stand_in.output(0))
