"""Which weights of a model can be packed, and how large would each be? Nothing is changed here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import openvino as ov
from openvino import Node

from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.cpu_plugin.support.weight import Weight
from ov_ext.graphs import element_count
from ov_ext.sparse_weights.cost import OURS, Form
from ov_ext.sparse_weights.policy import SparsePolicy
from ov_ext.sparse_weights.subgraph import bias_constant
from ov_ext.sparse_weights.weights import (
    FLOATS,
    ConstantWeight,
    Unpackable,
    element_name,
    elements,
    find,
    load,
    requantize,
    sparsity,
)

Key = tuple[str, bool, str | None]  # of a blob: weight constant, whether its rows are outputs, bias constant


@dataclass
class Candidate:
    """A constant that can be packed. All MatMuls that read it get the same form.

    :param kind: Value kind of its blobs.
    :param zeros: Fraction of zeros, 0..1.
    :param group: Inputs that share a scale; 0 for one scale per output.
    :param weights: Number of elements.
    :param freed: Bytes of stock constants that packing removes.
    :param reader: An operation that needs the stock constant besides, so that nothing is freed; "" where there is none.
    :param uses: MatMuls that read it.
    :param sizes: Bytes of its blobs in each of our forms.
    """

    kind: str
    zeros: float
    group: int
    weights: int
    freed: int
    reader: str
    uses: int = 0
    sizes: dict[Form, int] = field(default_factory=lambda: dict.fromkeys(OURS, 0))

    def growth(self, form: Form) -> int:
        """:return: Bytes by which the model grows in a form."""
        return 0 if form == "stock" else self.sizes[form] - self.freed


@dataclass
class Survey:
    """What is in a model.

    :param candidates: By unique name of the constant.
    :param stays: Why a MatMul stays, and its fraction of zeros where that is known, by unique name of the MatMul.
    """

    candidates: dict[str, Candidate] = field(default_factory=dict)
    stays: dict[str, tuple[str, float | None]] = field(default_factory=dict)


def survey(graphs: list[ov.Model], policy: SparsePolicy) -> Survey:
    """Look at all MatMuls. One weight at a time is held in memory.

    :param graphs: A model and the bodies in it.
    :param policy: Which weights it leaves alone.
    """
    result = Survey()
    keys: set[Key] = set()
    for graph in graphs:
        pending = deque(node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul")
        while pending:  # pop, not iterate: a list would hold the MatMuls, and so their weights, in memory
            found = find(pending.popleft())
            if found is not None:
                try:
                    _add(result, keys, found, policy)
                except Unpackable as problem:
                    result.stays[found.matmul.get_name()] = (str(problem), sparsity(found))
    return result


def _add(result: Survey, keys: set[Key], found: ConstantWeight, policy: SparsePolicy) -> None:
    name = found.constant.get_name()
    if policy.ignores(found.matmul.get_friendly_name(), found.constant.get_friendly_name()):
        result.stays[found.matmul.get_name()] = ("ignored by the policy", None)
        return
    problem = found.problem
    if not problem and found.shape[0] * found.shape[1] < policy.min_weights:
        problem = f"{found.shape[0] * found.shape[1]} weights, min_weights is {policy.min_weights}"
    if problem:
        raise Unpackable(problem)
    bias = foldable_bias(found)
    if (key := key_of(found, bias)) not in keys:
        weight = with_bias(read_weight(found, policy.requantize)[0], bias)
        keys.add(key)
        if name not in result.candidates:
            reader = other_reader(found, policy)
            freed = 0 if reader else sum(found.nbytes.values())
            result.candidates[name] = Candidate(
                weight.kind, float(weight.sparsity), weight.group, weight.values.size, freed, reader
            )
        for form in OURS:
            result.candidates[name].sizes[form] += native.packed_bytes(weight, form == "dense")
    result.candidates[name].uses += 1


def key_of(found: ConstantWeight, bias: Node | None) -> Key:
    """:return: What the MatMuls that share a blob have in common."""
    weight_path = found.matmul.input_value(1).get_node().get_name()
    constant = bias and bias_constant(bias)
    return weight_path, found.rows_are_outputs, constant.get_name() if constant else None


def read_weight(found: ConstantWeight, requantizing: bool) -> tuple[Weight, str, str]:
    """:return: The weight, a remark for the report, and the element type of its scales if they are new, else "".

    :raises Unpackable: The values do not fit the packed form.
    """
    try:
        return *load(found), ""
    except Unpackable:
        if not requantizing or found.scale is None:
            raise
        return requantize(found)


def with_bias(weight: Weight, bias: Node | None) -> Weight:
    """:return: The weight with the constant of an Add, see :func:`foldable_bias`."""
    constant = bias and bias_constant(bias)
    return weight if constant is None else replace(weight, bias=elements(constant).astype(np.float32))


def foldable_bias(found: ConstantWeight) -> Node | None:
    """:return: The Add behind a MatMul when it adds one constant per output and nothing else reads the product."""
    users = list(found.matmul.output(0).get_target_inputs())
    rank = found.matmul.get_output_partial_shape(0).rank
    if len(users) != 1 or users[0].get_node().get_type_name() != "Add" or rank.is_dynamic:
        return None
    add = users[0].get_node()
    constant = bias_constant(add)
    if constant is None or element_name(constant) not in FLOATS or len(constant.shape) > rank.get_length():
        return None
    return add if [*constant.shape][-1:] == [found.shape[0]] and element_count(constant) == found.shape[0] else None


def other_reader(found: ConstantWeight, policy: SparsePolicy) -> str:
    """:return: Name of an operation that keeps a weight's constant alive when its MatMuls are packed; "" if none does.

    Such as the Gather of an embedding whose table is also the head.
    """
    pending = [found.constant]
    while pending:
        for port in pending.pop().output(0).get_target_inputs():
            user = port.get_node()
            if user.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
                pending.append(user)
                continue
            name = str(user.get_friendly_name())
            other = find(user) if user.get_type_name() == "MatMul" else None
            if other is None or other.problem or policy.ignores(name, found.constant.get_friendly_name()):
                return name
    return ""
