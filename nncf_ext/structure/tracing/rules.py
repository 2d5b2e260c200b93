"""
What does each torch operation say about labels? One short rule for each kind of operation.

Rules see operations as torch's dispatcher does, where few kinds are left: a linear layer has become a product of
matrices, a reshape a view. What only moves numbers (views, permutations, selections, rolls) is asked where each number
went, by moving labels in place of numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nncf_ext.structure.tracing.labels import Axis, Labels, carried


class Follower(Protocol):
    """What rules need to know of the run that they follow."""

    labels: Labels

    def axes(self, tensor: Tensor) -> list[Axis]:
        """:return: The labels along each axis."""

    def choose(self, options: Sequence[int], shape: Sequence[int]) -> int:
        """:return: One of several axes that could get smaller after a split into `shape`."""

    def chosen(self, labels: Axis) -> None:
        """Notes what went together by the last choice."""

    def placed(self, one: Axis, shape: Sequence[int]) -> None:
        """Notes that these labels were reshaped to or from a `shape` with several axes."""

    def multiplied(self, weight: Tensor, positions: int, gives: Axis) -> None:
        """Notes that every number of a weight took part in so many products, which `gives` these labels."""


Bound = dict[str, Any]
Rule = Callable[[Follower, str, Bound, list[Tensor]], Sequence[Sequence[Axis]]]
"""From the run, the operation's name, its arguments by name, and its results, to the labels of the results. Among the
arguments ``"move"`` is the operation itself, for another first argument."""


def bind(func: Any, args: Sequence[Any], kwargs: Bound) -> Bound:
    """
    :param func: An operation of the dispatcher.
    :param args: Its arguments.
    :param kwargs: Its named arguments.
    :return: All of them by the names of its schema; ``self`` is the first tensor of most.
    """
    declared = func._schema.arguments
    bound = {each.name: each.default_value for each in declared if each.has_default_value()}
    bound |= {each.name: value for each, value in zip(declared, args, strict=False)}
    return bound | kwargs


def tensors_of(value: Any) -> list[Tensor]:
    """
    :param value: A tensor, or something that holds tensors.
    :return: The tensors in it.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple | set | frozenset):
        return []
    return [tensor for each in value for tensor in tensors_of(each)]


def outputs_of(result: Any) -> list[Tensor]:
    """
    :param result: What a model gave.
    :return: The tensors in it: in containers, dataclasses, and the attributes of objects of any other kind. Caches, by
        the name of their class, are the model's own: what they keep shrinks with the model.
    """
    return _inside(result, set())


def _inside(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    elif not isinstance(value, torch.nn.Module | type) and not any(
        "Cache" in each.__name__ for each in type(value).mro()
    ):
        slots = (name for each in type(value).mro() for name in _names(each.__dict__.get("__slots__", ())))
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    if not parts or id(value) in seen:
        return []
    seen.add(id(value))
    return [tensor for each in parts for tensor in _inside(each, seen)]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def rule_of(func: Any) -> tuple[str, Rule]:
    """
    :param func: An operation of the dispatcher.
    :return: Its name without overload, and its rule.
    """
    name = func.overloadpacket.__name__
    plain = name.rstrip("_") if not name.endswith("__") else name
    if plain in _RULES:
        return name, _RULES[plain]
    if torch.Tag.pointwise in func.tags:
        return name, _pointwise
    if "pool" in plain or "upsample" in plain:
        return name, _pooling
    return name, _unknown


def keeps_numbers(rule: Rule) -> bool:
    """
    :param rule: A rule.
    :return: Whether its results hold numbers of their first input, and nothing else.
    """
    return rule in (_move, _same)


def _pointwise(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    shape = results[0].shape
    inputs = [(each, run.axes(each)) for each in tensors_of(list(bound.values()))]
    found: list[Axis] = []
    for place in range(-len(shape), 0):
        meeting = [axes[place] for each, axes in inputs if each.ndim >= -place and each.shape[place] == shape[place]]
        united = run.labels.unite(meeting, f"meets something of fixed size ({name})") if shape[place] > 1 else None
        found.append(united)
    return [found] * len(results)


def _same(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    source = next(iter(tensors_of(list(bound.values()))))
    fits = results[0].shape == source.shape
    return [run.axes(source) if fits else [None] * results[0].ndim]


def _move(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    source = bound["self"]
    found: list[list[Axis]] = [[None] * each.ndim for each in results]
    for place, axis in enumerate(run.axes(source)):
        if axis is None or not carried(axis):
            continue
        if "channel_shuffle" in name and axis.all():
            run.labels.tie(axis.reshape(bound["groups"], -1).T)
        shape = [-1 if own == place else 1 for own in range(source.ndim)]
        numbers = torch.from_numpy(axis).double().to(source.device).view(shape).expand(source.shape).contiguous()
        shadows = [each.cpu().numpy().astype(np.int64) for each in tensors_of(bound["move"](numbers))]
        _part_taken(run, name, axis, shadows)
        for result, shadow in zip(found, shadows, strict=True):
            where, labels = _along(run, shadow)
            if where is None:
                continue
            if carried(result[where]):
                run.labels.fix(result[where], "is merged with another axis that could change")
                run.labels.fix(labels, "is merged with another axis that could change")
            else:
                result[where] = labels
            if len(shadow) and source.ndim != shadow.ndim:
                run.placed(labels, (*source.shape, *shadow.shape))
    return found


def _along(run: Follower, shadow: Any) -> tuple[int | None, Axis]:
    """Along which axis do labels differ? Where they do along several, one is chosen, and the others go together."""
    varying = [
        place for place, size in enumerate(shadow.shape) if size > 1 and (shadow != shadow.take([0], place)).any()
    ]
    if not varying:
        if shadow.size:
            run.labels.fix(np.unique(shadow), "one place of it is taken")
        return None, None
    at = varying[0] if len(varying) == 1 else run.choose(varying, shadow.shape)
    rows = np.moveaxis(shadow, at, 0).reshape(shadow.shape[at], -1)
    if len(varying) > 1:
        if not rows.all():
            run.labels.fix(rows, "meets something of fixed size")
        run.labels.tie(rows)
        run.chosen(np.unique(rows))
    return at, rows[:, 0].copy()


def _part_taken(run: Follower, name: str, axis: Any, shadows: Sequence[Any]) -> None:
    """Halves, thirds and so on of an axis shrink alike; any other part stands at a fixed place."""
    parts = [np.unique(each[each != 0]) for each in shadows]
    every = np.unique(axis[axis != 0])
    if not parts or all(len(part) == len(every) for part in parts):
        return
    taken = parts[0]
    at = np.flatnonzero(np.isin(axis, taken))
    length = len(at)
    even = length > 1 and len(axis) % length == 0 and at[0] % length == 0 and at[-1] - at[0] == length - 1
    if name in ("split", "split_with_sizes", "slice", "narrow", "chunk") and even and len({*map(len, parts)}) == 1:
        run.labels.tie(axis.reshape(-1, length).T)
    else:
        run.labels.fix(axis, f"a part of it is taken at a fixed place ({name})")


def _cat(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    parts = [each for each in bound["tensors"] if each.ndim == results[0].ndim]
    dim = bound["dim"] % results[0].ndim
    found = _together(run, name, parts, [place for place in range(results[0].ndim) if place != dim])
    pieces = [_filled(run.axes(each)[dim], each.shape[dim]) for each in parts]
    found.insert(dim, np.concatenate(pieces))
    return [found]


def _stack(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    parts = bound["tensors"]
    found = _together(run, name, parts, range(parts[0].ndim))
    found.insert(bound["dim"] % results[0].ndim, None)
    return [found]


def _together(run: Follower, name: str, parts: Sequence[Tensor], places: Sequence[int]) -> list[Axis]:
    axes = [run.axes(each) for each in parts]
    reason = f"meets something of fixed size ({name})"
    return [run.labels.unite([each[place] for each in axes], reason) for place in places]


def _filled(axis: Axis, length: int) -> Any:
    return np.zeros(length, np.int64) if axis is None else axis


def _pad(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    found = run.axes(bound["self"])
    # The list of a padding begins with the last axis, two entries for each.
    for place, (before, after) in enumerate(zip(bound["pad"][::2], bound["pad"][1::2], strict=True), 1):
        axis = found[-place]
        if axis is not None and (before or after):
            if min(before, after) < 0:
                run.labels.fix(axis, f"a part of it is taken at a fixed place ({name})")
                found[-place] = None
            else:
                found[-place] = np.pad(axis, (before, after))
    return [found]


def _spatial_pad(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    axes = run.axes(bound["self"])
    count = len(bound["padding"]) // 2
    for axis in axes[len(axes) - count :]:
        run.labels.fix(axis, f"is padded ({name})")
    return [axes[: len(axes) - count] + [None] * count]


def _matmul(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    one: Tensor = next(bound[name] for name in ("batch1", "mat1", "self") if name in bound)
    two: Tensor = bound["batch2"] if "batch2" in bound else bound["mat2"]
    left, right = run.axes(one), run.axes(two)
    run.multiplied(one, two.shape[-1], left[-2])
    run.multiplied(two, one.shape[-2], right[-1])
    run.labels.unite([left[-1], right[-2]], "is multiplied with something of fixed size")
    pairs = zip(left[:-2], right[:-2], strict=True)
    batch = [run.labels.unite(pair, f"meets something of fixed size ({name})") for pair in pairs]
    found = [*batch, left[-2], right[-1]]
    if name.startswith(("addmm", "baddbmm")):
        added = bound["self"]
        for place, axis in enumerate(run.axes(added), results[0].ndim - added.ndim):
            if added.shape[place - results[0].ndim] == results[0].shape[place] > 1:
                found[place] = run.labels.unite([found[place], axis], f"meets something of fixed size ({name})")
    return [found]


def _mv(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    matrix, vector = run.axes(bound["self"]), run.axes(bound["vec"])
    run.labels.unite([matrix[1], vector[0]], "is multiplied with something of fixed size")
    return [[matrix[0]]]


def _convolution(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    groups, weight = bound["groups"], bound["weight"]
    inputs, axes = run.axes(bound["input"]), run.axes(weight)
    positions = math.prod((bound["input"] if bound["transposed"] else results[0]).shape) // weight.shape[0]
    run.multiplied(weight, positions, axes[1 if bound["transposed"] else 0])
    for axis in (*inputs[2:], *axes[2:]):
        run.labels.fix(axis, "is the window of a convolution")
    first, second = axes[:2]
    if groups == 1:
        reader, writer = (first, second) if bound["transposed"] else (second, first)
        run.labels.unite([inputs[1], reader], "is read by a convolution of fixed size")
    else:
        run.labels.fix(second, "is read in groups")
        if bound["transposed"]:
            run.labels.fix(first, "is read in groups")
        writer = None if bound["transposed"] else first
        read, written = inputs[1], writer
        if read is not None and written is not None and read.all():
            # A group goes with all of its inputs and outputs.
            run.labels.tie(np.concatenate([read.reshape(groups, -1), written.reshape(groups, -1)], 1))
        else:
            run.labels.fix(read, "is read by a convolution in groups of fixed size")
            run.labels.fix(written, "is read by a convolution in groups of fixed size")
    if bound.get("bias") is not None:
        writer = run.labels.unite([writer, *run.axes(bound["bias"])], "has a bias of fixed size")
    return [[inputs[0], writer, *[None] * (results[0].ndim - 2)]]


def _batch_norm(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    axes = run.axes(bound["input"])
    vectors = [value for key, value in bound.items() if key != "input" and isinstance(value, Tensor)]
    both = [axes[1], *(run.axes(each)[0] for each in vectors if each.numel())]
    axes[1] = run.labels.unite(both, "is normalized with something of fixed size")
    return [axes, *_nothing(results[1:])]


def _layer_norm(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    axes = run.axes(bound["input"])
    affine = [bound[key] for key in ("weight", "bias") if bound.get(key) is not None]
    for place in range(-len(bound["normalized_shape"]), 0):
        both = [axes[place], *(run.axes(each)[place] for each in affine)]
        axes[place] = run.labels.unite(both, "is normalized with something of fixed size")
    return [axes, *_nothing(results[1:])]


def _group_norm(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    axes = run.axes(bound["input"])
    affine = [bound[key] for key in ("weight", "bias") if bound.get(key) is not None]
    channels = run.labels.unite([axes[1], *(run.axes(each)[0] for each in affine)], "is normalized at a fixed size")
    if channels is not None and bound["group"] > 1:
        if channels.all():
            run.labels.tie(channels.reshape(bound["group"], -1))
        else:
            run.labels.fix(channels, "is normalized in groups of fixed size")
    return [[axes[0], channels, *axes[2:]], *_nothing(results[1:])]


def _softmax(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    axes = run.axes(bound["self"])
    run.labels.fix(axes[bound["dim"]], f"all of it counts in {name}")
    return [axes] * len(results)


def reduced_axes(func: Any, bound: Bound) -> list[int]:
    """
    :param func: An operation of the dispatcher.
    :param bound: Its arguments by name.
    :return: The axes of its first tensor along which it takes means, sums, norms or extremes.
    """
    _, rule = rule_of(func)
    if rule is _layer_norm:
        ndim = bound["input"].ndim
        return list(range(ndim - len(bound["normalized_shape"]), ndim))
    if rule is _group_norm:
        return [1] if bound["group"] == 1 else []
    if rule is _batch_norm:
        return [axis for axis in range(bound["input"].ndim) if axis != 1] if bound.get("training") else []
    return _dims(bound) if rule is _reduce else []


def _dims(bound: Bound) -> list[int]:
    ndim, dims = bound["self"].ndim, bound.get("dim")
    places = list(range(ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    return [place % max(ndim, 1) for place in places]


def _reduce(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    axes, gone = run.axes(bound["self"]), _dims(bound)
    if name in ("argmax", "argmin") or (name in ("max", "min") and len(results) > 1):
        for place in gone:
            run.labels.fix(axes[place], f"places along it are numbered ({name})")
    if results[0].ndim == len(axes):
        return [[None if place in gone else axis for place, axis in enumerate(axes)]] * len(results)
    return [[axis for place, axis in enumerate(axes) if place not in gone]] * len(results)


def _pooling(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    source: Tensor = bound["self"] if "self" in bound else bound["input"]
    axes, spatial = run.axes(source), next((int(each) for each in "123" if f"{each}d" in name), 2)
    for axis in axes[len(axes) - spatial :]:
        run.labels.fix(axis, f"positions along it are pooled ({name})")
    return [axes[: len(axes) - spatial] + [None] * spatial] * len(results)


def _embedding(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    rows, columns = run.axes(bound["weight"])
    run.labels.fix(rows, "is a vocabulary")
    run.multiplied(bound["weight"], 0, columns)
    return [[*run.axes(bound["indices"]), columns]]


def _attention(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    query, key, value = (run.axes(bound[each]) for each in ("query", "key", "value"))
    fixed = "meets something of fixed size"
    batch = [run.labels.unite([query[0], key[0], value[0]], fixed)]
    heads = run.labels.unite([key[1], value[1]], fixed) if len(query) > 3 else None
    if len(query) > 3:
        times = bound["query"].shape[1] // bound["key"].shape[1]
        # Several query heads read one head of keys and values: they go with it.
        batch.append(run.labels.unite([query[1], None if heads is None else np.repeat(heads, times)], fixed))
    run.labels.unite([query[-1], key[-1]], "is multiplied with something of fixed size")
    run.labels.fix(query[-1], "the scale of attention is computed from it")
    run.labels.unite([key[-2], value[-2]], "is multiplied with something of fixed size")
    run.labels.fix(key[-2], "all of it counts in softmax")
    mask: Tensor | None = bound.get("attn_mask", bound.get("attn_bias"))
    if mask is not None and mask.ndim == len(query):
        for place, axis in enumerate(run.axes(mask)[:-2]):
            if mask.shape[place] > 1:
                batch[place] = run.labels.unite([batch[place], axis], "meets a mask of fixed size")
    found = [*batch, query[-2], value[-1]]
    return [found, *_nothing(results[1:])]


def _glu(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    axes, dim = run.axes(bound["self"]), bound["dim"]
    if (axis := axes[dim]) is not None:
        run.labels.tie(axis.reshape(2, -1).T)
        axes[dim] = axis[: len(axis) // 2]
    return [axes]


def _forget(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    return _nothing(results)


def _nothing(results: Sequence[Tensor]) -> list[list[Axis]]:
    return [[None] * each.ndim for each in results]


def _unknown(run: Follower, name: str, bound: Bound, results: list[Tensor]) -> list[list[Axis]]:
    for tensor in tensors_of(list(bound.values())):
        for axis in run.axes(tensor):
            run.labels.fix(axis, f"goes through torch's {name}, for which there is no rule")
    return _forget(run, name, bound, results)


_NAMES: dict[Rule, str] = {
    _pointwise: "copy native_dropout dropout lerp _prelu_kernel _fused_dropout masked_fill hardswish hardsigmoid "
    "hardtanh leaky_relu elu celu selu mish softplus log_sigmoid_forward",
    _same: "_to_copy clone detach alias contiguous lift_fresh zeros_like ones_like full_like empty_like rand_like "
    "randn_like",
    _move: "view _unsafe_view reshape _reshape_alias permute transpose t numpy_T expand unsqueeze squeeze slice select "
    "split split_with_sizes unbind roll flip repeat index index_select gather unfold as_strided diagonal "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unsafe_split unsafe_chunk movedim",
    _cat: "cat",
    _stack: "stack",
    _pad: "constant_pad_nd",
    _spatial_pad: "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d",
    _matmul: "mm bmm addmm baddbmm",
    _mv: "mv",
    _convolution: "convolution _convolution",
    _batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_with_update _batch_norm_no_update",
    _layer_norm: "native_layer_norm _fused_rms_norm",
    _group_norm: "native_group_norm",
    _softmax: "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod sort",
    _reduce: "sum mean amax amin var std var_mean std_mean prod logsumexp linalg_vector_norm norm any all max min "
    "argmax argmin",
    _embedding: "embedding",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
    _glu: "glu",
    _forget: "new_zeros new_ones new_empty new_full _local_scalar_dense sym_size _assert_async",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
