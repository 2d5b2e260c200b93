"""What is a layer that replaces small inputs, and by which rule?

``Select(|x - centre| <= threshold, replacement, x) -> MatMul``, as NNCF's sparsifier of activations and
``CompressMode.ACTIVATION_SPARSITY`` export it: ``[Subtract or Add] -> Abs -> LessEqual -> Select``. Threshold and
replacement are one number, or one for each input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from openvino import Node, Output

from ov_ext.cpu_plugin.sparse_activation.pack import Rule
from ov_ext.sparse_weights.weights import FLOATS, constant_behind, element_name, elements


@dataclass(frozen=True)
class Replacing:
    """
    :param x: The inputs as they were, ``[.., K]``.
    :param rule: Which of them are replaced.
    """

    x: Output
    rule: Rule


def find(matmul: Node) -> Replacing | None:
    """
    Recognises the pattern in front of a MatMul.

    :param matmul: A MatMul.
    :return: What it does with its inputs; None where it takes them as they are, or by another rule.
    """
    select = matmul.input_value(0).get_node()
    if select.get_type_name() != "Select":
        return None
    near, replacement, x = select.input_values()
    compare = near.get_node()
    if compare.get_type_name() != "LessEqual" or compare.input_value(0).get_node().get_type_name() != "Abs":
        return None
    shape = x.get_partial_shape()
    if select.get_output_partial_shape(0) != shape or shape.rank.is_dynamic or shape[len(shape) - 1].is_dynamic:
        return None
    inputs = shape[len(shape) - 1].get_length()
    rest = compare.input_value(0).get_node().input_value(0)
    centre = 0.0
    if not _same(rest, x):
        found = _centre(rest.get_node(), x)
        if found is None:
            return None
        centre = found
    thresholds, replacements = (_numbers(port, inputs) for port in (compare.input_value(1), replacement))
    if thresholds is None or replacements is None:
        return None
    if np.isnan(thresholds).any() or not np.isfinite(replacements).all() or not np.isfinite(centre):
        return None
    return Replacing(x, Rule(thresholds, centre, replacements))


def _same(one: Output, other: Output) -> bool:
    return one.get_node().get_name() == other.get_node().get_name() and one.get_index() == other.get_index()


def _centre(node: Node, x: Output) -> float | None:
    """:return: c of ``x - c``, also written as ``x + -c``; None where the node is anything else."""
    sign = {"Subtract": 1.0, "Add": -1.0}.get(node.get_type_name())
    if sign is None:
        return None
    left, right = node.input_values()
    if sign < 0 and _same(right, x):
        left, right = right, left
    numbers = _numbers(right, 1) if _same(left, x) else None
    return None if numbers is None else sign * float(numbers[0])


def _numbers(port: Output, inputs: int) -> np.ndarray | None:
    """:return: ``[1]`` or ``[inputs]`` float32 of a constant that changes along the last axis only, else None."""
    constant = constant_behind(port)
    if constant is None or element_name(constant) not in FLOATS:
        return None
    shape = list(constant.shape)
    values = elements(constant).astype(np.float32)
    if values.size not in (1, inputs) or (values.size > 1 and shape[-1] != inputs):
        return None
    return values[:1] if (values == values[:1]).all() else values
