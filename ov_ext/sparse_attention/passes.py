"""The pass that lets a model's attention keep pruned keys and values, and its inverse."""

from __future__ import annotations

import json
import logging
from typing import Any

import openvino as ov
from openvino import Node, Output
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from ov_ext import runtime
from ov_ext.extension import extension_path, package_version
from ov_ext.graphs import RecordError, detach, redirect
from ov_ext.sparse_attention.costs import AttentionCosts, known_costs
from ov_ext.sparse_attention.pattern import Attention, NotReplaceable, Past, find
from ov_ext.sparse_attention.policy import MOST_DENSE, SparseAttentionPolicy
from ov_ext.sparse_attention.report import AttentionLayer, AttentionReport

logger = logging.getLogger("ov_ext")

OPERATION = "SparseKVAttention"
RT_INFO = ["ov_ext", "attention"]
_OF_WEIGHTS = ("format", "format_version", "version", "target", "activation_group")  # entries of pack_sparse_weights
_HANDLE_WORDS, _TOKENS_WORD = 16, 5  # see cpu_plugin/sparse_attention/format.md
# Of the nodes that say how long the past is, and how long it will be: restoring finds them by these endings.
_PAST_SHAPE, _ALL_SHAPE = "/ov_ext_past_shape", "/ov_ext_all_shape"


def sparsify_attention(
    model: ov.Model, policy: SparseAttentionPolicy | None = None
) -> tuple[ov.Model, AttentionReport]:
    """Replace stateful attention by SparseKVAttention, which prunes and packs keys and values of older tokens.

    The model is changed in place: pass ``model.clone()`` to keep it. All layers are read before the first one is
    replaced. It works before and after ``pack_sparse_weights``, in Optimum-Intel and in GenAI's SDPA back end; a
    pipeline with continuous batching (``ATTENTION_BACKEND="PA"``) needs stock attention.

    :param model: A stateful language model, as Optimum-Intel exports it.
    :param policy: Levels of pruning; by default half of each key and value, the rest in 8 bits.
    :return: The same model, and what became of each layer.
    :raises ValueError: The model has no stateful attention, has paged attention, or was treated before.
    :raises ExtensionUnavailableError: The compiled extension is missing or was built for another OpenVINO.
    """
    policy = policy or SparseAttentionPolicy()
    library = extension_path()
    kinds = {node.get_type_name() for node in model.get_ops()}
    if OPERATION in kinds:
        raise ValueError("The model's attention keeps pruned keys and values already: ov_ext.restore_attention(model).")
    if any(kind.startswith("PagedAttention") for kind in kinds):
        raise ValueError(
            "The model has paged attention, which keeps keys and values itself. Sparse attention needs the stateful "
            'model: ov_ext.genai.pipeline(FOLDER, ATTENTION_BACKEND="SDPA").'
        )
    layers = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    if not layers:
        raise ValueError(
            "The model has no ScaledDotProductAttention: export it with Optimum-Intel, as text generation."
        )
    if unknown := [number for number in policy.layers if not 0 <= number < len(layers)]:
        raise ValueError(f"The policy names layers {unknown}, the model has {len(layers)}, from 0.")
    costs = known_costs() if policy.pack_from is None else None
    found: list[Attention | None] = []
    reports = []
    for number, sdpa in enumerate(layers):
        name, levels = sdpa.get_friendly_name(), policy.levels(number)
        try:
            if levels is None:
                raise NotReplaceable("the policy says so")
            layer = find(sdpa, model)
            pack_from = _pack_from(policy, layer, costs)
        except NotReplaceable as reason:
            found.append(None)
            reports.append(AttentionLayer(name, False, str(reason)))
        else:
            found.append(layer)
            reports.append(
                AttentionLayer(name, True, "", layer.heads, layer.head_dim, *levels, policy.values, pack_from)
            )
        logger.debug("%s: %s", name, reports[-1])
    if any(found) and runtime.this_cpu() == "reference":
        logger.warning(
            "Sparse attention has kernels for AVX2 and AVX-512. This CPU would run the reference kernel, far slower "
            "than stock attention: run the model elsewhere, or restore it by ov_ext.restore_attention(model)."
        )
    factory = NodeFactory()
    factory.add_extension(library)
    prompts: dict[tuple[str, int], _Prompt] = {}
    for each, report in zip(found, reports, strict=True):
        if each is not None:
            _replace(model, each, report, policy, factory, prompts)
    if any(found):
        model.validate_nodes_and_infer_types()
        model.set_rt_info("SKV1", RT_INFO)
        model.set_rt_info(package_version(), ["ov_ext", "version"])
    return model, AttentionReport(tuple(reports))


def is_sparse(model: ov.Model) -> bool:
    """:return: Whether the model's attention keeps pruned keys and values."""
    return bool(model.has_rt_info(RT_INFO))


def _pack_from(policy: SparseAttentionPolicy, layer: Attention, costs: AttentionCosts | None) -> int:
    if policy.pack_from is not None or costs is None:
        return policy.pack_from or 0
    tokens = costs.break_even(layer.heads * layer.head_dim)
    if tokens is None:
        raise NotReplaceable(
            f"stock's cache of 8 bits was faster on this CPU up to {costs.tokens[-1]} tokens; pack_from=0 replaces it"
        )
    return min(tokens, MOST_DENSE)


def _replace(
    model: ov.Model,
    layer: Attention,
    report: AttentionLayer,
    policy: SparseAttentionPolicy,
    factory: NodeFactory,
    prompts: dict[tuple[str, int], _Prompt],
) -> None:
    sdpa, name = layer.sdpa, layer.sdpa.get_friendly_name()
    q, mask = sdpa.input_value(0), layer.mask
    variable = layer.k.read.get_attributes()["variable_id"] + ".pruned"
    kept = _variable(variable, ov.Type.i32, ov.PartialShape([_HANDLE_WORDS]))
    state = ops.read_value(ops.constant([0] * _HANDLE_WORDS, ov.Type.i32), kept)
    state.set_friendly_name(f"{name}/ov_ext_state")
    _replace_shapes(layer, name, state)
    # Tokens of a prompt attend to each other by the stock operation, which is made for that. Behind a past these are no
    # tokens, and OpenVINO skips what it would do with them.
    key = (mask.get_node().get_name(), mask.get_index())
    if key not in prompts:
        prompts[key] = _Prompt(q, state, mask)
    prompt = prompts[key]
    new = [_repeated(prompt.of(past.new, 2), layer.q_heads, layer.heads) for past in (layer.k, layer.v)]
    rest = [sdpa.input_value(4)] if sdpa.get_input_size() > 4 else []
    alone = ops.scaled_dot_product_attention(prompt.of(q, 2), *new, prompt.mask, *rest)
    alone.set_friendly_name(f"{name}/ov_ext_new_tokens")
    attributes = {
        **{"k_level": report.k, "v_level": report.v, "values": policy.values, "causal": False},
        **{"sink": policy.sink, "recent": policy.recent, "pack_from": report.pack_from, "scale": layer.scale},
        **{"heads": layer.heads, "head_dim": layer.head_dim, "source": json.dumps(_record(layer))},
    }
    inputs = [q, layer.k.new, layer.v.new, layer.k.beams, state.output(0), alone.output(0), mask]
    ours = factory.create(OPERATION, inputs, attributes)
    ours.set_friendly_name(name)
    redirect(sdpa.output(0), ours.output(0))
    keep = _assign(ours.output(1), kept)
    keep.set_friendly_name(f"{name}/ov_ext_assign")
    for past in (layer.k, layer.v):
        old = past.assign.get_attributes()["variable_id"]
        model.remove_sink(past.assign)
        model.remove_variable(model.get_variable_by_id(old))
        detach(past.assign)
    detach(sdpa)
    for past in (layer.k, layer.v):
        for node in (*reversed(past.repeat), past.concat, past.gather, past.read):
            detach(node)
    model.add_sinks([keep])
    model.add_variables([kept])


class _Prompt:
    """What layers with one mask share: how many new tokens make a prompt, all of them or none.

    :param q: Queries of a layer, ``[sequences, heads, tokens, head_dim]``.
    :param state: The state of that layer: all have tokens of the past, or none.
    :param mask: The mask.
    """

    def __init__(self, q: Output, state: Node, mask: Output) -> None:
        zero = ops.constant(0, ov.Type.i64)
        count = ops.gather(ops.shape_of(q, "i64"), ops.constant([2], ov.Type.i64), zero)
        past = ops.gather(state, ops.constant([_TOKENS_WORD], ov.Type.i64), zero)
        first = ops.convert(ops.equal(past, ops.constant(0, ov.Type.i32)), ov.Type.i64)
        self._count = ops.multiply(count, first)
        self.mask = self.of(mask, 2, 3)

    def of(self, x: Output, *axes: int) -> Output:
        """:return: The first elements of axes that count tokens."""
        begin, step = (ops.constant([value] * len(axes), ov.Type.i64) for value in (0, 1))
        end = self._count if len(axes) == 1 else ops.concat([self._count] * len(axes), 0)
        return ops.slice(x, begin, end, step, ops.constant([*axes], ov.Type.i64)).output(0)


def _variable(name: str, element: ov.Type, shape: ov.PartialShape) -> Any:
    info = ov.op.util.VariableInfo()
    info.variable_id, info.data_type, info.data_shape = name, element, shape
    return ov.op.util.Variable(info)


def _assign(value: Output, variable: Any) -> Node:
    """An Assign of any output: its constructor in Python takes the first one of a node."""
    stand_in = ov.op.Parameter(value.get_element_type(), value.get_partial_shape())
    assign: Node = ops.assign(stand_in, variable)
    assign.input(0).replace_source_output(value)
    return assign


def _repeated(x: Output, q_heads: int, heads: int) -> Output:
    """``[sequences, heads, tokens, head_dim]`` with each head for all of its query heads."""
    if q_heads == heads:
        return x
    head_dim = x.get_partial_shape()[3].get_length()
    grouped = ops.unsqueeze(x, ops.constant(2, ov.Type.i64))
    target = ops.constant([1, 1, q_heads // heads, 1, 1], ov.Type.i64)
    many = ops.broadcast(grouped, target, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(many, ops.constant([0, q_heads, -1, head_dim], ov.Type.i64), True).output(0)


def _replace_shapes(layer: Attention, name: str, state: Node) -> None:
    """Give what asks for the shape of the past, such as positions and masks, the answer from our state."""
    zero = ops.constant(0, ov.Type.i64)
    for past, which in ((layer.k, "/k"), (layer.v, "/v")):
        asking = {
            _PAST_SHAPE: [past.read.output(0), past.gather.output(0)],
            _ALL_SHAPE: [past.concat.output(0)],
        }
        for ending, outputs in asking.items():
            shapes = [
                consumer.get_node()
                for output in outputs
                for consumer in output.get_target_inputs()
                if consumer.get_node().get_type_name() == "ShapeOf"
            ]
            if not shapes:
                continue
            tokens = ops.convert(ops.gather(state, ops.constant([_TOKENS_WORD], ov.Type.i64), zero), ov.Type.i64)
            if ending == _ALL_SHAPE:
                new = ops.gather(ops.shape_of(past.new, "i64"), ops.constant([2], ov.Type.i64), zero)
                tokens = ops.add(tokens, new)
            sequences = ops.shape_of(past.beams, "i64")
            heads, head_dim = (ops.constant([size], ov.Type.i64) for size in (layer.heads, layer.head_dim))
            shape = ops.concat([sequences, heads, tokens, head_dim], 0)
            shape.set_friendly_name(name + which + ending)
            for node in shapes:
                wanted = node.get_output_element_type(0)
                answer = shape if wanted == ov.Type.i64 else ops.convert(shape, wanted)
                redirect(node.output(0), answer.output(0))
                detach(node)


def _record(layer: Attention) -> dict[str, Any]:
    """What restoring needs and the graph does not say any more."""

    def past(of: Past) -> dict[str, Any]:
        names = {kind: getattr(of, kind).get_friendly_name() for kind in ("read", "gather", "concat", "assign")}
        return {
            **names,
            "variable": of.read.get_attributes()["variable_id"],
            "repeat": [node.get_friendly_name() for node in of.repeat],
            "batch": of.batch.get_friendly_name(),
        }

    return {"v": 1, "k": past(layer.k), "v_": past(layer.v), "q_heads": layer.q_heads}


def restore_attention(model: ov.Model) -> ov.Model:
    """Restore stock attention: the inverse of :func:`sparsify_attention`, in place.

    States, their names, the names of operations and all results are those of the stock model. What computes shapes of
    the states is built anew, in one form.

    :param model: Any model; one with stock attention is returned as it is.
    :return: The same model.
    :raises RecordError: An operation carries no usable record of its stock form; the model is then as it was.
    """
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == OPERATION]
    records = [_read_record(node, model) for node in nodes]
    for node, record in zip(nodes, records, strict=True):
        _restore(model, node, record)
    if nodes:
        model.validate_nodes_and_infer_types()
        weights = [["ov_ext", key] for key in _OF_WEIGHTS] if model.has_rt_info(["ov_ext", "format"]) else []
        kept = [(path, model.get_rt_info(path).value) for path in weights if model.has_rt_info(path)]
        del model.get_rt_info()["ov_ext"]
        for path, value in kept:
            model.set_rt_info(value, path)
    return model


_PAST_KEYS = {"read", "gather", "concat", "assign", "variable", "batch"}


def _read_record(node: Node, model: ov.Model) -> dict[str, Any]:
    name = node.get_friendly_name()
    try:
        record = json.loads(node.get_attributes()["source"])
        if record["v"] != 1:
            raise RecordError(f"{name}: its record is of version {record['v']}, this release reads 1.")
        parameters = {each.get_friendly_name() for each in model.get_parameters()}
        for past in (record["k"], record["v_"]):
            texts = [*(past[key] for key in _PAST_KEYS), *past["repeat"]]
            if not all(isinstance(text, str) for text in texts) or len(past["repeat"]) not in (0, 3):
                raise TypeError("names are missing")
            if past["batch"] not in parameters:
                raise LookupError(f"the model has no input {past['batch']!r}")
    except (LookupError, ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"{name}: its record of the stock form is damaged ({error}).") from error
    return dict(record)


def _restore(model: ov.Model, node: Node, record: dict[str, Any]) -> None:
    name, attributes = node.get_friendly_name(), node.get_attributes()
    q, k, v, beams, state, alone, mask = node.input_values()
    heads, head_dim = attributes["heads"], attributes["head_dim"]
    inputs = []
    for new, past, which in ((k, record["k"], "/k"), (v, record["v_"], "/v")):
        zero = ops.constant(0, ov.Type.i64)
        batch = next(each for each in model.get_parameters() if each.get_friendly_name() == past["batch"])
        sequences = ops.gather(ops.shape_of(batch, "i64"), ops.constant([0], ov.Type.i64), zero)
        shape = ops.concat([sequences, *(ops.constant([size], ov.Type.i64) for size in (heads, 0, head_dim))], 0)
        empty = ops.broadcast(ops.constant(0.0, ov.Type.f32), shape)
        variable = _variable(past["variable"], ov.Type.f32, ov.PartialShape([-1, heads, -1, head_dim]))
        read = ops.read_value(empty, variable)
        gather = ops.gather(read, beams, zero)
        concat = ops.concat([gather, new], 2)
        assign = _assign(concat.output(0), variable)
        for made, kind in ((read, "read"), (gather, "gather"), (concat, "concat"), (assign, "assign")):
            made.set_friendly_name(past[kind])
        whole = concat.output(0)
        if past["repeat"]:
            whole = _repeated(whole, record["q_heads"], heads)
            made = whole.get_node()
            for friendly in reversed(past["repeat"]):
                made.set_friendly_name(friendly)
                made = made.input_value(0).get_node()
        inputs.append(whole)
        model.add_sinks([assign])
        model.add_variables([variable])
        for ending, source in ((_PAST_SHAPE, gather), (_ALL_SHAPE, concat)):
            for asking in [each for each in model.get_ops() if each.get_friendly_name() == name + which + ending]:
                redirect(asking.output(0), ops.shape_of(source, "i64").output(0))
                detach(asking)
    rest = alone.get_node().input_values()[4:]
    sdpa = ops.scaled_dot_product_attention(q, *inputs, mask, *rest)
    sdpa.set_friendly_name(name)
    redirect(node.output(0), sdpa.output(0))
    handle = state.get_node().get_attributes()["variable_id"]
    keep = next(sink for sink in model.get_sinks() if sink.get_attributes().get("variable_id") == handle)
    model.remove_sink(keep)
    model.remove_variable(model.get_variable_by_id(handle))
    for old in (keep, node, state.get_node(), alone.get_node()):
        detach(old)
