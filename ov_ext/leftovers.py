"""What compression left alone in an IR: embedding and head on INT8 or INT4, other 16-bit values in 16 bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset15 as opset

from ov_ext.sparse_weights.weights import FLOATS, constant_behind, element_name, elements, find, sparsity

SPARSE = 0.2  # a trained weight has hardly any zeros; one that was pruned for a gain has more than this share
MIN_WEIGHTS = 1 << 12  # smaller constants are not worth an operation more
REST = ("int8", "int4")
"""What the embedding and the head can be put on."""
GROUPS = (128, 64, 32)

logger = logging.getLogger("ov_ext")


def quantize_rest(model: ov.Model, kind: str = "int8") -> tuple[str, ...]:
    """Put the token embedding and the head on INT8 or INT4, where everything else is compressed and they are not.

    INT8 is what ``nncf.compress_weights`` does with them in its 4-bit modes: one scale for each token, symmetric. INT4
    has one for each 128 columns, or 64, or 32: the most that divide them; where none does, it is INT8. A weight that
    the embedding and the head share stays one constant. A model without any sparse or quantized weight stays as it is,
    and so does an embedding or a head that is sparse.

    :param model: The model of a language model or an encoder. Changed in place.
    :param kind: One of :data:`REST`.
    :return: Friendly names of the operations whose weights are quantized now.
    """
    weighted = {node.get_friendly_name(): node for node in model.get_ops() if _weight(node) is not None}
    if not any(_is_compressed(node) for node in weighted.values()):
        return ()
    chosen = {node.get_friendly_name() for node in _embeddings_and_head(model) if _is_dense(node)}
    if not chosen:
        return ()
    import nncf

    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_SYM}
    columns = {weight.shape[-1] for name in chosen if (weight := _weight(weighted[name])) is not None}
    if kind == "int4":
        group = next((size for size in GROUPS if all(width % size == 0 for width in columns)), None)
        if group is None:
            widths = ", ".join(map(str, sorted(columns)))
            logger.warning("Embedding and head go on INT8: no group of %s divides their %s columns.", GROUPS, widths)
        else:
            mode = nncf.CompressWeightsMode.INT4_SYM
            options = {"mode": mode, "group_size": group, "ratio": 1.0, "all_layers": True}
    ignored = nncf.IgnoredScope(names=[name for name in weighted if name not in chosen], validate=False)
    nncf.compress_weights(model, ignored_scope=ignored, **options)
    return tuple(sorted(chosen))


def narrow_constants(model: ov.Model) -> int:
    """Store f32 constants whose values all fit bf16 or f16 exactly in that type. Nothing is rounded.

    A model that was trained in 16 bits and computed with in 32 becomes as small as it was.

    :param model: Changed in place: ``Constant(f32)`` becomes ``Constant(bf16) -> Convert(f32)``, as for a 16-bit model.
    :return: Bytes saved.
    """
    saved = 0
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or element_name(node) != "f32" or np.prod(node.shape) < MIN_WEIGHTS:
            continue
        tensor = _narrowed(node)
        if tensor is None:
            continue
        narrow = ov.op.Constant(tensor, shared_memory=False)
        narrow.set_friendly_name(node.get_friendly_name())
        convert = opset.convert(narrow, "f32")
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(convert.output(0))
        saved += node.get_byte_size() - narrow.get_byte_size()
    return saved


def _narrowed(constant: Node) -> ov.Tensor | None:
    """:return: The values of an f32 constant in 16 bits; None where that would round one."""
    values = np.ascontiguousarray(constant.get_data())
    bits = values.view(np.uint32)
    if not (bits & 0xFFFF).any():
        high = (bits >> 16).astype(np.uint16)
        return ov.Tensor(high, ov.Shape(list(constant.shape)), ov.Type.bf16)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return ov.Tensor(half) if np.array_equal(half.astype(np.float32).view(np.uint32), bits) else None


def _weight(node: Node) -> Node | None:
    """:return: The constant weight of a MatMul, or the constant table of a Gather."""
    if node.get_type_name() == "MatMul":
        found = find(node)
        return None if found is None else found.constant
    if node.get_type_name() == "Gather" and len(node.get_input_partial_shape(0)) == 2:
        return constant_behind(node.input_value(0))
    return None


def _is_compressed(node: Node) -> bool:
    found = find(node) if node.get_type_name() == "MatMul" else None
    return found is not None and (found.element not in FLOATS or (sparsity(found) or 0.0) >= SPARSE)


def _is_dense(node: Node) -> bool:
    weight = _weight(node)
    if weight is None or element_name(weight) not in FLOATS or np.prod(weight.shape) < MIN_WEIGHTS:
        return False
    values = elements(weight)
    return bool(1.0 - np.count_nonzero(values) / values.size < SPARSE)


def _embeddings_and_head(model: ov.Model) -> Iterator[Node]:
    """Yield the Gathers that look up rows of a table, and the one MatMul from which a result comes without another.

    Behind a residual sum there are many such MatMuls; then the result is no head's.
    """
    yield from (node for node in model.get_ops() if node.get_type_name() == "Gather" and _weight(node) is not None)
    for result in model.get_results():
        pending, seen, heads = [result.input_value(0).get_node()], set(), []
        while pending:
            node = pending.pop()
            if node.get_name() in seen:
                continue
            seen.add(node.get_name())
            if node.get_type_name() == "MatMul" and _weight(node) is not None:
                heads.append(node)
            else:
                pending += [port.get_node() for port in node.input_values()]
        if len(heads) == 1:
            yield heads[0]
