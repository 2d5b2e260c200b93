"""
Plans in the files of the published results: counts of what was removed, by layer.

Source: file formats of Munoz et al., MultiPruner (arXiv 2501.09949) and Mamba-Shedder (arXiv 2501.17088).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import nncf
from torch import nn

from nncf_ext.structure.checks import check_plan
from nncf_ext.structure.dimensions import Dimension
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.order import Score, units_by_score
from nncf_ext.structure.plan import Step, StructurePlan
from nncf_ext.structure.wrappers import without_shells

_MAMBA_SHEDDER = {"pruned_mamba_block_idx": ("mamba", 0), "pruned_ssm_idx": ("mamba", 1)}
_HYBRID = {**_MAMBA_SHEDDER, "pruned_mha_idx": ("attention", 0), "pruned_mlp_idx": ("mlp", 0)}


def plan_from_reference(content: Mapping[str, Any], model: nn.Module, score: Score | None = None) -> StructurePlan:
    """
    Reads the ``pruning_config.json`` of MultiPruner's or Mamba-Shedder's published results.

    :param content: The parsed file. MultiPruner: ``pruned_attn_idx``, ``pruned_mlp_idx``, ``pruned_attn_width`` (query
        channels that stay, by layer) and ``pruned_mlp_width`` (channels that stay, by layer). Mamba-Shedder:
        ``pruned_mamba_block_idx``, ``pruned_ssm_idx``, and for Zamba2 ``pruned_mha_idx`` and ``pruned_mlp_idx``.
    :param model: The dense model.
    :param score: The least important units of a layer go, by the weights that
        :meth:`nncf_ext.structure.dimensions.Dimensions.unit_weights` gives. Files made with weight reordering have the
        order of :func:`nncf_ext.importance.blocks.l1_norm`. None: the last units go.
    :return: The plan.
    :raises nncf.ValidationError: A number does not fit the model.
    """
    model = without_shells(model)
    dimensions = dimensions_of(model)
    plan, blocks = StructurePlan.dense(model, dimensions), range(len(dimensions.by_block))
    steps: list[Step] = []
    if dimensions.of_part("mamba"):
        if any((content.get("pruned_mlp_channels") or {}).values()):
            msg = (
                "pruned_mlp_channels counts channels of each use of a shared MLP by itself. Here the uses share their "
                "weights: keep the same channels in all of them with StructurePlan.keep()."
            )
            raise nncf.ValidationError(msg)
        # States first: a block that is removed later takes what is left.
        for key, (name, kept) in sorted(_HYBRID.items(), key=lambda item: -item[1][1]):
            gone = _layers(content, key, [each.block for each in dimensions.of_part(name)])
            for layer in gone:
                plan = plan.keep(f"layers.{layer}.{name}", range(kept))
            steps += [Step(f"layers.{layer}.{name}", kept) for layer in gone]
        return replace(plan, steps=tuple(steps))
    for name, removed, widths in (
        ("attention", "pruned_attn_idx", "pruned_attn_width"),
        ("mlp", "pruned_mlp_idx", "pruned_mlp_width"),
    ):
        for layer, width in _by_layer(content.get(widths) or {}, len(blocks), widths).items():
            dimension = dimensions[f"layers.{layer}.{name}"]
            count, channels = width // dimension.granularity, dimension.granularity
            if width % channels or not 0 < count <= dimension.size:
                msg = (
                    f"{widths} keeps {width} channels in layer {layer}. {dimension.unit}, and the layer "
                    f"has {dimension.size * channels}: a multiple from {channels} up to that works."
                )
                raise nncf.ValidationError(msg)
            if count < dimension.size:
                order = units_by_score(model, dimensions, dimension.name, score)
                plan = plan.at({dimension.name: count}, {dimension.name: order})
                steps.append(Step(dimension.name, count))
        gone = _layers(content, removed, blocks)
        for layer in gone:
            plan = plan.keep(f"layers.{layer}.{name}", ())
        steps = [*(Step(f"layers.{layer}.{name}", 0) for layer in gone), *steps]
    return replace(plan, steps=tuple(steps))


def plan_to_reference(plan: StructurePlan, model: nn.Module, score: Score | None = None) -> dict[str, Any]:
    """
    Writes a plan as a ``pruning_config.json``, which holds counts only.

    :param plan: The plan.
    :param model: The dense model.
    :param score: Order within a layer that the reader of the file will use; see :func:`plan_from_reference`.
    :return: Plain data for ``json.dump``.
    :raises nncf.ValidationError: The plan keeps other units than the reader would.
    """
    model = without_shells(model)
    dimensions = dimensions_of(model)
    check_plan(model, plan, dimensions)
    content: dict[str, Any] = {}
    if dimensions.of_part("mamba"):
        for key, (name, count) in (_HYBRID if dimensions.of_part("attention") else _MAMBA_SHEDDER).items():
            content[key] = _in_order(plan, dimensions.of_part(name), count)
        return content
    for name, short in (("attention", "attn"), ("mlp", "mlp")):
        content[f"pruned_{short}_idx"] = _in_order(plan, dimensions.of_part(name), 0)
        widths = content[f"pruned_{short}_width"] = {}
        for each in dimensions.of_part(name):
            kept = plan.kept[each.name]
            count = len(kept)
            widths[str(each.block)] = (count or each.size) * each.granularity
            if 0 < count and set(kept) != set(units_by_score(model, dimensions, each.name, score)[:count]):
                msg = (
                    f"The plan keeps {count} units of {each.name} that are not the first by the given score. The "
                    "reference format holds counts only: keep such a plan in our own format."
                )
                raise nncf.ValidationError(msg)
    return content


def _in_order(plan: StructurePlan, dimensions: Sequence[Dimension], count: int) -> list[int]:
    """Layers that keep so many units of one part, in the order of the plan's steps where it tells them all."""
    blocks = {each.name: each.block for each in dimensions}
    layers = [block for name, block in blocks.items() if len(plan.kept[name]) == count]
    ordered = [blocks[step.dimension] for step in plan.steps if step.dimension in blocks and step.kept == count]
    return ordered if sorted(ordered) == layers else layers


def _layers(content: Mapping[str, Any], key: str, possible: Collection[int]) -> list[int]:
    listed = content.get(key) or []
    if not isinstance(listed, list | tuple):
        raise nncf.ValidationError(f"{key} is {listed!r}; a list of layers belongs there.")
    layers = [_whole(layer, key) for layer in listed]
    if any(layer not in possible for layer in layers):
        where = f"layers {min(possible)} to {max(possible)}" if possible else "no such layer"
        msg = f"{key} names layers {layers}; the model has {where}."
        raise nncf.ValidationError(msg)
    return layers


def _by_layer(widths: Mapping[Any, int], layers: int, name: str) -> dict[int, int]:
    if not isinstance(widths, Mapping):
        raise nncf.ValidationError(f"{name} is {widths!r}; widths by layer belong there.")
    keys = {_whole(key, name): _whole(width, name) for key, width in widths.items()}
    # One published file counts its MLP layers after the attention layers: 32..63 in a model of 32 layers.
    if keys and min(keys) >= layers:
        keys = {key - layers: width for key, width in keys.items()}
    if any(not 0 <= key < layers for key in keys):
        msg = f"{name} names layers {sorted(keys)}; the model has layers 0 to {layers - 1}."
        raise nncf.ValidationError(msg)
    return keys


def _whole(value: Any, name: str) -> int:
    """A whole number, or the text of one: keys in JSON are texts."""
    if type(value) is int or (isinstance(value, str) and value.isdecimal() and len(value) < 10):
        return int(value)
    raise nncf.ValidationError(f"{name} holds {value!r} where a whole number belongs.")
