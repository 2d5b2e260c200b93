"""Finds the weight of a MatMul in a stock IR, and reads it as the arrays that a blob holds.

A stock IR holds a weight in one of these forms, read from the constant towards the MatMul:

* plain: ``Constant(f32 | f16 | bf16) -> [Convert] -> MatMul``
* decompression: ``Constant(i8 | u8 | i4 | u4) -> Convert -> [Subtract(zero)] -> Multiply(scale) -> [Reshape] ->
  [Convert] -> MatMul``

A weight with scale groups has the shape ``[N, G, group]`` (``[G, group, N]`` where transpose_b is false) until the
Reshape merges the groups. There may be a Transpose, too. :func:`find` recognises the form without reading data;
:func:`load` and :func:`requantize` read it. Codes are the integers that stand for quantized values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from openvino import Node, Output

from ov_ext.cpu_plugin.support.weight import Weight
from ov_ext.graphs import element_count

FLOATS = ("f32", "f16", "bf16")
SYMMETRIC = {"i8": "i8", "u8": "i8", "i4": "i4", "u4": "i4"}  # integer element type -> its signed form
CODE_RANGE = {"i8": (-128, 127), "i4": (-8, 7)}
GROUPS = (64, 128)
SYMMETRIC_EXPORT = {
    "i8": "nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)",
    "i4": "nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=128) or "
    "`optimum-cli export openvino --weight-format int4 --sym --group-size 128`",
}


class Unpackable(Exception):
    """A weight that cannot be packed. The report shows the text of the error as the reason."""


@dataclass(frozen=True)
class ConstantWeight:
    """A MatMul with a constant operand.

    :param matmul: The MatMul.
    :param constant: The constant with the values or codes.
    :param shape: (N, K), outputs and inputs, for a matrix; else the shape as it is.
    :param problem: Why it cannot be packed, or "". The fields below hold only when it is empty.
    :param scale: Constant with the scales, or None for a plain weight.
    :param zero: Constant with the zero points, or None.
    :param rows_are_outputs: The constant holds [N, K], else [K, N].
    :param axes: Number of axes where scales apply: 2, or 3 with groups.
    :param groups: Scale groups along K; 1 when each output has one scale.
    """

    matmul: Node
    constant: Node
    shape: tuple[int, ...]
    problem: str = ""
    scale: Node | None = None
    zero: Node | None = None
    rows_are_outputs: bool = True
    axes: int = 2
    groups: int = 1

    @property
    def element(self) -> str:
        """Element type of the constant, such as ``i4``."""
        return element_name(self.constant)

    @property
    def kind(self) -> str:
        """How the weight is stored, as the report shows it: ``f32``, ``int8_asym``, ``int4_sym``, ..."""
        if self.scale is None or self.element not in SYMMETRIC:
            return self.element
        return f"int{self.element[1:]}_{'sym' if self.zero is None else 'asym'}"

    @property
    def blob_kind(self) -> str:
        """Value kind of the blob."""
        return {"i8": "int8", "i4": "int4"}.get(SYMMETRIC.get(self.element, ""), "bf16")

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of values, scales and zero points, by the unique names of their constants."""
        parts = [node for node in (self.constant, self.scale, self.zero) if node is not None]
        return {node.get_name(): -(-node.get_element_type().bitwidth * element_count(node) // 8) for node in parts}

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 for one scale per output."""
        return self.shape[1] // self.groups if self.groups > 1 else 0


def find(matmul: Node) -> ConstantWeight | None:
    """Recognise the form of a MatMul's weight.

    :param matmul: A MatMul.
    :return: What was found, perhaps with a problem; None when no operand is constant.
    """
    left = constant_behind(matmul.input_value(0))
    if left is not None:
        shape = tuple(matmul.get_input_partial_shape(0).to_shape())
        return ConstantWeight(matmul, left, shape, "the constant is the left operand")
    problem, swaps, reshaped = "", 0, False
    scale = zero = scaled = None
    node = matmul.input_value(1).get_node()
    while node.get_type_name() != "Constant":
        kind, weight_port = node.get_type_name(), 0
        if kind == "Multiply" and scaled is None:
            weight_port = 0 if _is_coded(node.input_value(0)) else 1
            scale, scaled = constant_behind(node.input_value(1 - weight_port)), node
            if scale is None or not _is_coded(node.input_value(weight_port)):
                return _computed(matmul, node)
        elif kind == "Subtract" and scaled is not None and zero is None:
            zero = constant_behind(node.input_value(1))
            if zero is None:
                return _computed(matmul, node)
            if node.get_output_partial_shape(0) != scaled.get_output_partial_shape(0):
                problem = problem or "its zero points and scales apply to different shapes"
        elif kind in ("Transpose", "Reshape"):
            order = constant_behind(node.input_value(1))
            if order is None:
                return None
            if kind == "Reshape":
                reshaped = True
            else:  # before the Reshape that merges groups, a Transpose would not swap the axes of the matrix
                swaps += 1
                if scaled is not None or reshaped or order.get_data().tolist() != [1, 0]:
                    problem = problem or "its axes are permuted in an unusual order"
        elif kind != "Convert":
            return _computed(matmul, node)
        node = node.input_value(weight_port).get_node()

    transpose_b = bool(matmul.get_attributes()["transpose_b"])
    shape = tuple(matmul.get_input_partial_shape(1).to_shape())
    found = ConstantWeight(matmul, node, shape, problem, scale, zero, transpose_b ^ bool(swaps % 2))
    if len(shape) != 2:
        return replace(found, problem=f"it has {len(shape)} axes; only matrices are packed (3-D expert weights stay)")
    found = replace(found, shape=shape if transpose_b else shape[::-1])
    if not found.problem and element_count(node) != math.prod(shape):
        found = replace(found, problem="its values are repeated by broadcasting")
    if not found.problem:
        found = replace(found, problem=_type_problem(found))
    return found if found.problem or scaled is None else _with_groups(found, scaled)


def load(found: ConstantWeight) -> tuple[Weight, str]:
    """Read a weight losslessly (f32 and f16 are rounded once, to bf16).

    :param found: A weight without problem.
    :return: The arrays, without bias, and a remark for the report ("" for an exact copy).
    :raises Unpackable: The values do not fit the packed form.
    """
    if found.scale is None:
        bits, exact = _as_bf16(found.constant)
        return Weight("bf16", _oriented(bits, found)), "" if exact else f"{found.element} rounded to bf16"
    codes, signed = _codes(found), SYMMETRIC[found.element]
    low, high = CODE_RANGE[signed]
    if codes.min() < low or codes.max() > high:
        msg = (
            f"its codes minus their zero points leave {low}..{high} (asymmetric). Compress it symmetrically: "
            f"{SYMMETRIC_EXPORT[signed]}; or allow SparsePolicy(requantize=True)"
        )
        raise Unpackable(msg)
    return Weight(found.blob_kind, codes.astype(np.int8, copy=False), _scales(found), found.group), ""


def requantize(found: ConstantWeight) -> tuple[Weight, str, str]:
    """Round an asymmetric weight to a symmetric grid with the same groups. Zeros stay zeros.

    The scale of a group is its value of largest magnitude divided by the lowest code (-8 or -128). So this value gets
    the lowest code, whatever its sign, as in NNCF's symmetric modes. The scales are rounded to the element type of the
    stock scales before the codes are chosen, so that a restored weight has the same values as the packed one. They are
    f32 where f16 cannot hold them.

    :param found: A quantized weight without problem.
    :return: The arrays, a remark with the relative error (Frobenius norm of the change over that of the weight), and
        the element type of the new scales.
    :raises Unpackable: Scales or zero points are not usable numbers.
    """
    assert found.scale is not None
    n, k = found.shape
    low, high = CODE_RANGE[SYMMETRIC[found.element]]
    with np.errstate(over="ignore"):
        values = _codes(found).reshape(n, found.groups, -1) * _scales(found).astype(np.float32)[..., None]
    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=2)[..., None], axis=2)
    if not np.isfinite(extreme).all():
        raise Unpackable("its codes times scales leave the range of float32")
    scales, element = _rounded_scales(extreme / np.float32(low), element_name(found.scale))
    step = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    codes = np.clip(np.rint(values / step), low, high).astype(np.int8)
    error = float(np.linalg.norm(codes * step - values)) / (float(np.linalg.norm(values)) or 1.0)
    weight = Weight(found.blob_kind, codes.reshape(n, k), scales.reshape(n, found.groups), found.group)
    return weight, f"rounded to a symmetric grid, relative error {error:.2%}", element


def sparsity(found: ConstantWeight) -> float | None:
    """:return: Fraction 0..1 of zeros of a weight that stays; None where the form is not understood."""
    if found.scale is None:
        values = elements(found.constant) if found.element in FLOATS else None
    else:
        try:
            values = _codes(found) if found.element in SYMMETRIC and len(found.shape) == 2 else None
        except (Unpackable, ValueError):  # an unusual form: its zeros are unknown
            values = None
    return None if values is None else 1.0 - np.count_nonzero(values) / values.size


def constant_behind(port: Output) -> Node | None:
    """:return: The Constant that feeds a port, directly or through Convert, else None."""
    node = port.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def element_name(node: Node) -> str:
    """:return: Short name of a node's output element type, such as ``f16``."""
    return str(node.get_output_element_type(0).get_type_name())


def elements(constant: Node) -> np.ndarray:
    """Read a constant.

    :param constant: A Constant of a floating point, 8-bit or 4-bit integer type.
    :return: ``[elements]``, in row-major order: i4 as int8, u4 as uint8, bf16 as float32, others as they are.
    """
    data, element = constant.get_data().reshape(-1), element_name(constant)
    if element == "bf16":  # numpy has no bf16: OpenVINO hands out the bits
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if element not in ("i4", "u4"):
        return data
    packed = data.view(np.uint8)
    nibbles = np.empty(2 * packed.size, np.uint8)  # the first element lies in the low half of a byte
    np.bitwise_and(packed, 15, out=nibbles[0::2])
    np.right_shift(packed, 4, out=nibbles[1::2])
    nibbles = nibbles[: element_count(constant)]
    return nibbles if element == "u4" else (nibbles ^ 8).view(np.int8) - np.int8(8)


def _computed(matmul: Node, node: Node) -> ConstantWeight | None:
    """:return: The weight, with its problem: ``node`` computes it from constants. None if it is no weight at all."""
    constants = [constant_behind(port) for port in node.input_values()]
    if not constants or any(constant is None for constant in constants):
        return None
    largest = max((c for c in constants if c is not None), key=element_count)
    shape = tuple(matmul.get_input_partial_shape(1).to_shape())
    return ConstantWeight(
        matmul, largest, shape, f"it is computed by {node.get_type_name()}, not by a known decompression"
    )


def _is_coded(port: Output) -> bool:
    """:return: True when a port carries codes (of a type that is no float), perhaps minus zero points."""
    node = port.get_node()
    while node.get_type_name() in ("Subtract", "Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and element_name(node) not in FLOATS


def _type_problem(found: ConstantWeight) -> str:
    """:return: Why element types or attributes do not fit, or ""."""
    activation = found.matmul.get_input_element_type(0).get_type_name()
    if found.matmul.get_attributes()["transpose_a"]:
        return "its activations are transposed (transpose_a)"
    if activation not in ("f32", "bf16"):
        return f"its activations are {activation}; f32 or bf16 is needed"
    if found.scale is None:
        return "" if found.element in FLOATS else f"{found.element} without scales has no packed form"
    if found.element not in SYMMETRIC:
        return f"{found.element} has no packed form. Compress it to INT4: {SYMMETRIC_EXPORT['i4']}"
    return "" if element_name(found.scale) in FLOATS else f"scales of {element_name(found.scale)} have no packed form"


def _with_groups(found: ConstantWeight, scaled: Node) -> ConstantWeight:
    """Work out along which axes the scales change; ``scaled`` is the Multiply that applies them."""
    (n, k), axes = found.shape, tuple(scaled.get_output_partial_shape(0).to_shape())
    merged = (
        axes
        if len(axes) == 2
        else (axes[0], axes[1] * axes[2])
        if found.rows_are_outputs
        else (axes[0] * axes[1], axes[2])
    )
    if len(axes) not in (2, 3) or merged != ((n, k) if found.rows_are_outputs else (k, n)):
        return replace(found, problem="its axes are merged in an unusual order")
    found = replace(found, axes=len(axes))
    try:
        assert found.scale is not None
        groups = by_output_and_group(found.scale, len(axes), found.rows_are_outputs).shape[1]
        if found.zero is not None:
            by_output_and_group(found.zero, len(axes), found.rows_are_outputs)
    except Unpackable as reason:
        return replace(found, problem=str(reason))
    if groups > 1 and k // groups not in GROUPS:
        size = f"its scale groups have {k // groups} inputs; 64, 128 or one scale per output are possible: "
        return replace(found, problem=size + SYMMETRIC_EXPORT[SYMMETRIC[found.element]])
    return replace(found, groups=groups)


def by_output_and_group(constant: Node, axes: int, rows_are_outputs: bool) -> np.ndarray:
    """Read scales or zero points in one orientation, whatever the form of their weight.

    :param constant: Constant that broadcasts over a weight of ``axes`` axes.
    :param axes: 2 ([N, K] or [K, N]) or 3 ([N, G, group] or [G, group, N]).
    :param rows_are_outputs: The outputs are the first of these axes, else the last.
    :return: ``[N or 1, G or 1]``, a view where possible.
    :raises Unpackable: They change inside a group.
    """
    values: np.ndarray = elements(constant).reshape((1,) * (axes - len(constant.shape)) + tuple(constant.shape))
    if not rows_are_outputs:
        values = values.T if axes == 2 else values.transpose(2, 0, 1)
    if values.shape[-1] != 1:
        raise Unpackable("its scales or zero points change along the inputs of one group")
    return values.reshape(values.shape[0], -1)


def _scales(found: ConstantWeight) -> np.ndarray:
    """:return: ``[N, G]`` float16 or float32."""
    assert found.scale is not None
    table = by_output_and_group(found.scale, found.axes, found.rows_are_outputs)
    if not np.isfinite(table).all():
        raise Unpackable("its scales are not finite")
    return np.ascontiguousarray(np.broadcast_to(table, (found.shape[0], found.groups)))


def _codes(found: ConstantWeight) -> np.ndarray:
    """:return: Code minus zero point, ``[N, K]``, int8 where there are no zero points, else int16.

    :raises Unpackable: Zero points are not whole numbers.
    """
    codes = _oriented(elements(found.constant), found)
    if found.zero is None:
        return codes if codes.dtype == np.int8 else codes.astype(np.int16)
    zeros = by_output_and_group(found.zero, found.axes, found.rows_are_outputs)
    wide = zeros.astype(np.float64)
    if not ((wide == np.rint(wide)) & (np.abs(wide) <= 255)).all():  # nor NaN, nor infinite
        raise Unpackable("its zero points are not whole numbers of 8 bits")
    repeats = found.shape[1] // zeros.shape[1]
    return codes.astype(np.int16) - np.repeat(zeros.astype(np.int16), repeats, axis=1)


def _rounded_scales(scales: np.ndarray, element: str) -> tuple[np.ndarray, str]:
    """Round float32 scales to the element type of the stock scales.

    :return: float16, or float32 for bf16 and f32 and where f16 loses more than its usual rounding (overflow,
        denormals); and the element type that holds them.
    """
    if element == "bf16":
        return (_bf16_bits(scales).astype(np.uint32) << 16).view(np.float32), element
    if element == "f16":
        with np.errstate(over="ignore"):
            half = scales.astype(np.float16)
        if (np.abs(half.astype(np.float32) - scales) <= np.abs(scales) * 2.0**-10).all():
            return half, element
    return scales, "f32"


def _oriented(flat: np.ndarray, found: ConstantWeight) -> np.ndarray:
    """:return: Elements of the constant as contiguous ``[N, K]``."""
    n, k = found.shape
    return flat.reshape(n, k) if found.rows_are_outputs else np.ascontiguousarray(flat.reshape(k, n).T)


def _as_bf16(constant: Node) -> tuple[np.ndarray, bool]:
    """Round to bf16, to nearest and ties to even.

    :return: ``[elements]`` uint16 bits, and whether nothing was rounded.
    :raises Unpackable: A finite value would leave the range of bf16, or of its own type when it is restored.
    """
    if element_name(constant) == "bf16":
        return constant.get_data().reshape(-1).view(np.uint16), True
    source, exact = constant.get_data().reshape(-1), True
    bits = np.empty(source.size, np.uint16)
    for start in range(0, source.size, 1 << 22):  # bounded scratch memory
        part = source[start : start + (1 << 22)]
        wide = part.astype(np.float32, copy=False)
        rounded = _bf16_bits(wide)
        bits[start : start + part.size] = rounded
        with np.errstate(over="ignore"):
            again = (rounded.astype(np.uint32) << 16).view(np.float32).astype(source.dtype)
        if (np.isinf(again) & ~np.isinf(part)).any():
            raise Unpackable(f"rounding to bf16 would take values out of the range of {element_name(constant)}")
        exact = exact and bool(((wide.view(np.uint32) & 0xFFFF) == 0).all())
    return bits, exact


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """:return: float32 values rounded to bf16, to nearest and ties to even, as uint16 bits. NaN stays NaN."""
    word = np.ascontiguousarray(values).view(np.uint32)
    rounded = np.where(np.isnan(values), word | 0x400000, word + 0x7FFF + ((word >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)
