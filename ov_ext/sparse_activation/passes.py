"""The pass that lets layers skip inputs near their centre, and its exact inverse."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import openvino as ov
from openvino import Node
from openvino.utils.node_factory import NodeFactory

from ov_ext import runtime
from ov_ext.cpu_plugin.sparse_activation import native
from ov_ext.cpu_plugin.sparse_activation.pack import ALIGN, BLOCK, Rule, pack
from ov_ext.extension import extension_path, package_version
from ov_ext.graphs import RecordError, detach, graphs_of, redirect, refuse_short_constants
from ov_ext.sparse_activation.pattern import Replacing, find
from ov_ext.sparse_activation.policy import SparseActivationPolicy
from ov_ext.sparse_activation.report import ActivationLayer, ActivationReport
from ov_ext.sparse_weights.subgraph import describe, read_record, restore
from ov_ext.sparse_weights.survey import foldable_bias, key_of, read_weight, with_bias
from ov_ext.sparse_weights.weights import ConstantWeight, Unpackable, element_name
from ov_ext.sparse_weights.weights import find as find_weight

logger = logging.getLogger("ov_ext")

OPERATION = "SparseActivationMatMul"
RT_INFO = ["ov_ext", "activations"]
# What the other passes write.
_OTHER_ENTRIES = [
    ["ov_ext", key] for key in ("version", "format", "format_version", "target", "activation_group", "attention")
]


def pack_sparse_activations(
    model: ov.Model, policy: SparseActivationPolicy | None = None
) -> tuple[ov.Model, ActivationReport]:
    """Replace layers whose small inputs are replaced (see ``CompressMode.ACTIVATION_SPARSITY``) by
    SparseActivationMatMul, which does not read the weights of those inputs.

    The model is changed in place: pass ``model.clone()`` to keep it. Weights are packed one at a time. Layers that are
    not expected to gain stay as they were, pattern and all; ``pack_sparse_weights``, called after it, can pack them.

    :param model: A model with the pattern ``Select(|x - centre| <= threshold, replacement, x) -> MatMul``.
    :param policy: Which layers, and how.
    :return: The same model, and what became of each layer behind the pattern.
    :raises ValueError: A constant is shorter than its shape says: the file is damaged.
    :raises ExtensionUnavailableError: The compiled extension is missing or was built for another OpenVINO.
    """
    policy = policy or SparseActivationPolicy()
    library = extension_path()
    graphs = graphs_of(model)
    refuse_short_constants(graphs)
    factory = NodeFactory()
    factory.add_extension(library)
    layers = []
    for graph in graphs:
        blobs: dict[Any, _Blob] = {}
        pending = deque(node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul")
        while pending:  # pop, not iterate: a list would hold the replaced MatMuls, and so their weights, in memory
            matmul = pending.popleft()
            replacing, found = find(matmul), find_weight(matmul)
            if replacing is not None and found is not None:
                layers.append(_pack(found, replacing, policy, factory, blobs))
                logger.debug("%s", layers[-1])
    report = ActivationReport(tuple(layers), policy.skipped)
    if report.replaced:
        if runtime.this_cpu() == "reference":
            logger.warning(
                "This CPU would run the reference kernel of layers that skip inputs, far slower than stock OpenVINO: "
                "run the model elsewhere, or restore it by ov_ext.unpack_sparse_activations(model)."
            )
        model.validate_nodes_and_infer_types()
        model.set_rt_info("SAM1", RT_INFO)
        model.set_rt_info(package_version(), ["ov_ext", "version"])
    return model, report


def skips_inputs(model: ov.Model) -> bool:
    """:return: Whether layers of a model skip inputs."""
    return any(_is_ours(node) for graph in graphs_of(model) for node in graph.get_ops())


def _is_ours(node: Node) -> bool:
    return node.get_type_name() == OPERATION and node.get_type_info().version_id == "ov_ext"


@dataclass(frozen=True)
class _Blob:
    """A packed weight, kept for the other MatMuls that share it."""

    constant: Node
    kind: str
    group: int
    new_scales: str  # see describe


def _rule_key(rule: Rule) -> tuple[bytes, float, bytes]:
    return rule.threshold.tobytes(), rule.centre, rule.replacement.tobytes()


def _pack(
    found: ConstantWeight,
    replacing: Replacing,
    policy: SparseActivationPolicy,
    factory: NodeFactory,
    blobs: dict[Any, _Blob],
) -> ActivationLayer:
    """Replace one MatMul if it is expected to gain.

    :param blobs: The weights of this graph that were packed before, by weight, bias and rule. A new one is added.
    """
    name, before = found.matmul.get_friendly_name(), sum(found.nbytes.values())
    speedup = None

    def stays(note: str) -> ActivationLayer:
        return ActivationLayer(name, found.shape, found.kind, False, speedup, before, note=note)

    if policy.ignores(name):
        return stays("ignored by the policy")
    if found.problem:
        return stays(found.problem)
    (n, k), kind = found.shape, found.blob_kind
    if n * k < policy.min_weights:
        return stays(f"fewer than {policy.min_weights} weights")
    speedup = policy.speedup(-(-n // BLOCK[kind]) * ALIGN, kind)
    if speedup < policy.min_speedup:
        return stays(f"not expected to gain at {policy.skipped:.0%} skipped inputs")
    bias = foldable_bias(found)
    key = (key_of(found, bias), _rule_key(replacing.rule))
    if key in blobs:
        before, after, remark = 0, 0, "shares the blob of an earlier layer"
    else:
        try:
            weight, remark, new_scales = read_weight(found, policy.requantize)
        except Unpackable as problem:
            return stays(str(problem))
        constant = ov.op.Constant(pack(with_bias(weight, bias), replacing.rule))
        constant.set_friendly_name(f"{name}/blob")
        after = constant.get_byte_size()
        blobs[key] = _Blob(constant, weight.kind, weight.group, new_scales)
    blob = blobs[key]
    group = 0 if policy.activation_group == 0 or blob.kind == "bf16" else blob.group or policy.activation_group
    attributes = {
        **{"n": n, "k": k, "kind": blob.kind, "activation_group": group},
        "source": describe(found, bias, blob.new_scales, replacing.x),
    }
    ours = factory.create(OPERATION, [replacing.x, blob.constant.output(0)], attributes)
    ours.set_friendly_name(name)
    redirect((found.matmul if bias is None else bias).output(0), ours.output(0))
    for node in (bias, found.matmul):
        if node is not None:
            detach(node)
    return ActivationLayer(name, found.shape, found.kind, True, speedup, before, after, remark)


def unpack_sparse_activations(model: ov.Model) -> ov.Model:
    """Restore the stock layers with their pattern: the inverse of :func:`pack_sparse_activations`, in place.

    Constants come back bit for bit, with their types, shapes, names, scales and zero points, but for f32 and f16
    weights that packing rounded to bf16. All operations are checked before the first one is replaced.

    :param model: Any model; one without such layers is returned as it is.
    :return: The same model.
    :raises RecordError: An operation carries no usable record of its stock form.
    :raises ValueError: A blob is damaged, or a constant shorter than its shape says.
    :raises ExtensionUnavailableError: The compiled extension is missing or was built for another OpenVINO.
    """
    graphs = graphs_of(model)
    refuse_short_constants(graphs)
    ours = [[node for node in graph.get_ordered_ops() if _is_ours(node)] for graph in graphs]
    for node in (node for each in ours for node in each):
        _rehearse(node)
    for graph, nodes in zip(graphs, ours, strict=True):
        names = {node.get_name() for node in nodes} | {node.input_value(1).get_node().get_name() for node in nodes}
        known = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_name() not in names}
        nodes.reverse()
        while nodes:  # pop, not iterate: a list would hold the replaced operations, and so their blobs, in memory
            node = nodes.pop()
            redirect(node.output(0), _stock_form(node, node.input_value(0), known).output(0))
            detach(node)
    model.validate_nodes_and_infer_types()
    if model.has_rt_info(RT_INFO):
        kept = [(path, model.get_rt_info(path).value) for path in _OTHER_ENTRIES if model.has_rt_info(path)]
        del model.get_rt_info()["ov_ext"]
        for path, value in kept if len(kept) > 1 else []:  # the version alone says nothing
            model.set_rt_info(value, path)
    return model


def _rehearse(node: Node) -> None:
    """Check one operation, which may come from a damaged file: build its stock form, outside the graph."""
    name = node.get_friendly_name()
    x = ov.op.Parameter(node.get_input_element_type(0), node.get_input_partial_shape(0))
    try:
        if node.input_value(1).get_node().get_type_name() != "Constant":
            raise RecordError("its blob is no constant of this graph")
        stock = _stock_form(node, x.output(0), {})
        found, asked = stock.get_output_partial_shape(0), node.get_output_partial_shape(0)
        if not found.compatible(asked) or stock.get_output_element_type(0) != node.get_output_element_type(0):
            raise RecordError(f"its record gives {element_name(stock)} {found}, not {element_name(node)} {asked}")
    except RecordError as error:
        raise RecordError(f"{name}: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).rstrip('.')}.") from error


def _stock_form(node: Node, x: ov.Output, known: dict[str, Node]) -> Node:
    blob = node.input_value(1).get_node().get_data()
    return restore(read_record(node.get_attributes()["source"]), native.unpack(blob)[0], x, known)
