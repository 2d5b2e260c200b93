"""Finds stateful attention: what OpenVINO makes of ``past_key_values``, as Optimum-Intel exports it.

::

    ReadValue -> Gather (beam_idx) -> Concat (with the new keys) -> [Unsqueeze -> Broadcast -> Reshape] -> SDPA
                                        \\-> Assign                    one head for a group of queries
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import openvino as ov
from openvino import Node, Output

_WINDOW_COMPARISONS = ("Greater", "GreaterEqual")  # position of a key against that of the query, less the window


class NotReplaceable(Exception):
    """Why a layer stays stock: a clause."""


@dataclass(frozen=True)
class Past:
    """Keys, or values, of one layer.

    :param read: The ReadValue.
    :param gather: Its reordering by ``beam_idx``.
    :param concat: Past and new tokens.
    :param assign: The Assign of what the Concat gives.
    :param repeat: The nodes that repeat each head for its group of query heads, in order: none or three.
    :param batch: The model input whose first axis the empty state gets as its first one.
    """

    read: Node
    gather: Node
    concat: Node
    assign: Node
    repeat: tuple[Node, ...]
    batch: Node

    @property
    def new(self) -> Output:
        """New tokens, ``[sequences, heads, tokens, head_dim]`` f32."""
        return self.concat.input_value(1)

    @property
    def beams(self) -> Output:
        """``beam_idx``, ``[sequences]`` i32."""
        return self.gather.input_value(1)


@dataclass(frozen=True)
class Attention:
    """One layer that can be replaced.

    :param sdpa: The ScaledDotProductAttention.
    :param k: Its keys.
    :param v: Its values.
    :param q_heads: Heads of queries.
    :param heads: Heads of keys and values.
    :param head_dim: Elements of each.
    :param scale: Factor of the products.
    """

    sdpa: Node
    k: Past
    v: Past
    q_heads: int
    heads: int
    head_dim: int
    scale: float

    @property
    def mask(self) -> Output:
        """What says which tokens attend to which."""
        return self.sdpa.input_value(3)


def find(sdpa: Node, graph: ov.Model) -> Attention:
    """Read one layer of attention.

    :param sdpa: A ScaledDotProductAttention.
    :param graph: The graph that it is in.
    :return: The layer.
    :raises NotReplaceable: It has another form.
    """
    if sdpa.get_input_size() < 4 or sdpa.get_attributes()["causal"]:
        raise NotReplaceable("no mask says which tokens attend to which")
    if sdpa.get_input_size() > 5:
        raise NotReplaceable("attention sinks as an input of their own are not known to the operation")
    if sdpa.get_input_element_type(0) != ov.Type.f32:
        raise NotReplaceable(f"f32 queries needed, these are {sdpa.get_input_element_type(0).get_type_name()}")
    q, mask = sdpa.get_input_partial_shape(0), sdpa.get_input_partial_shape(3)
    k, v = _past(sdpa, 1, graph), _past(sdpa, 2, graph)
    key, value = k.new.get_partial_shape(), v.new.get_partial_shape()
    if not all(shape.rank.is_static and len(shape) == 4 for shape in (q, key, value, mask)):
        raise NotReplaceable("queries, keys, values and the mask need four axes")
    if not all(shape[axis].is_static for shape in (q, key, value) for axis in (1, 3)):
        raise NotReplaceable("heads or their size are not fixed")
    q_heads, heads, head_dim = q[1].get_length(), key[1].get_length(), q[3].get_length()
    if (key[3].get_length(), value[3].get_length(), value[1].get_length()) != (head_dim, head_dim, heads):
        raise NotReplaceable("keys and values differ in heads or size")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise NotReplaceable(f"heads of a multiple of 16 up to 256 elements needed, these have {head_dim}")
    if q_heads % heads:
        raise NotReplaceable(f"{q_heads} query heads are no multiple of {heads}")
    if mask[1].is_dynamic or mask[1].get_length() != 1:
        raise NotReplaceable("the mask differs between heads")
    if _has_window(sdpa.input_value(3).get_node()):
        raise NotReplaceable("a sliding window: its cache is short, packing it gains nothing")
    return Attention(sdpa, k, v, q_heads, heads, head_dim, _scale(sdpa, head_dim))


def _scale(sdpa: Node, head_dim: int) -> float:
    if sdpa.get_input_size() < 5:
        return head_dim**-0.5
    constant = sdpa.input_value(4).get_node()
    while constant.get_type_name() in ("Convert", "Reshape"):
        constant = constant.input_value(0).get_node()
    if constant.get_type_name() != "Constant":
        raise NotReplaceable("the scale is no constant")
    return float(constant.get_data().reshape(-1)[0])


def _past(sdpa: Node, port: int, graph: ov.Model) -> Past:
    node = sdpa.input_value(port).get_node()
    repeat: list[Node] = []
    if node.get_type_name() == "Reshape":
        for kind in ("Reshape", "Broadcast", "Unsqueeze"):
            if node.get_type_name() != kind:
                raise NotReplaceable(f"{node.get_type_name()} where keys or values are repeated for their group")
            repeat.insert(0, node)
            node = node.input_value(0).get_node()
    concat = node
    if (
        concat.get_type_name() != "Concat"
        or concat.get_input_size() != 2
        or concat.get_attributes()["axis"] not in (2, -2)
    ):
        raise NotReplaceable("no state of past keys and values")
    gather = concat.input_value(0).get_node()
    read = gather.input_value(0).get_node() if gather.get_input_size() else gather
    if gather.get_type_name() != "Gather" or read.get_type_name() != "ReadValue":
        raise NotReplaceable("no state that beam_idx reorders")
    name = read.get_attributes()["variable_id"]
    assigns = [sink for sink in graph.get_sinks() if sink.get_attributes().get("variable_id") == name]
    if len(assigns) != 1 or assigns[0].input_value(0).get_node().get_name() != concat.get_name():
        raise NotReplaceable("its state keeps something else than past and new tokens")
    if gather.get_input_element_type(1) != ov.Type.i32:
        raise NotReplaceable("beam_idx is not i32")
    for output in (read.output(0), gather.output(0), concat.output(0)):
        for consumer in output.get_target_inputs():
            known = (gather, concat, assigns[0], sdpa, *repeat)
            if not any(consumer.get_node().get_name() == each.get_name() for each in known) and (
                consumer.get_node().get_type_name() != "ShapeOf"
            ):
                raise NotReplaceable(f"{consumer.get_node().get_friendly_name()} reads its past, too")
    return Past(read, gather, concat, assigns[0], tuple(repeat), _batch(read))


def _batch(read: Node) -> Node:
    """:return: The model input from which the state's first value takes the number of sequences."""
    if read.get_input_size() == 1 and read.get_output_partial_shape(0).rank.is_static:
        inputs = {node.get_name(): node for node in _ancestors(read) if node.get_type_name() == "Parameter"}
        if len(inputs) == 1:
            return next(iter(inputs.values()))
    raise NotReplaceable("its state is not empty at first")


def _ancestors(node: Node, beyond: str = "") -> Iterator[Node]:
    """What a node depends on, but for what lies beyond operations of one type."""
    pending, seen = [node], set[str]()
    while pending:
        node = pending.pop()
        for port in node.input_values() if node.get_type_name() != beyond else ():
            source = port.get_node()
            if source.get_name() not in seen:
                seen.add(source.get_name())
                pending.append(source)
                yield source


def _has_window(mask: Node) -> bool:
    """:return: Whether positions are compared with a window: key > query - window, or the other way round."""
    return any(node.get_type_name() in _WINDOW_COMPARISONS for node in (mask, *_ancestors(mask, "ShapeOf")))
