"""
The one description of a smaller model: which units of which layer stay.

A plan is data. It is made by a search or by hand, tried with :func:`nncf_ext.structure.masking.masked`, and carried out
by :func:`nncf_ext.structure.surgery.extract_structure`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_ext.files import write_whole
from nncf_ext.structure.coupling import Layout, layout_of, unit_weights
from nncf_ext.weights.sharing import names_of_parameters

VERSION = 1
_SAMPLE = 4096


@dataclass(frozen=True)
class Step:
    """
    One decision of the search that made a plan.

    :param branch: ``"attention"``, ``"mlp"`` or ``"mamba"``.
    :param layer: Index of the layer; where layers share what was cut, the first of them.
    :param kept: How many units of the branch stay after this step; 0: the branch is gone.
    :param score: Score of the whole model after the step, or None.
    :param margin: Distance to the second best candidate in the same unit, or None.
    """

    branch: str
    layer: int
    kept: int
    score: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Costs:
    """
    :param parameters: All parameters, tied ones once.
    :param parameters_without_embeddings: Without token and position embeddings and the output head.
    :param bytes: Size of all parameters in their present types, bytes.
    :param kv_bytes_per_token: What the cache of keys and values grows by, bytes a token; 0 for encoders.
    :param state_bytes: What Mamba mixers keep from token to token, bytes a sequence, however long it is.
    """

    parameters: int
    parameters_without_embeddings: int
    bytes: int
    kv_bytes_per_token: int
    state_bytes: int = 0


@dataclass(frozen=True)
class Fingerprint:
    """
    Says which dense model a plan was made for, in whatever floating type it was loaded.

    :param model_type: The configuration's ``model_type``.
    :param shapes: Hash of names and shapes of all parameters.
    :param weights: Hash of a sample of the values, or None if there were none (meta device).
    """

    model_type: str
    shapes: str
    weights: str | None


@dataclass(frozen=True)
class StructurePlan:
    """
    :param model: The dense model the plan is for.
    :param layers: For each layer the kept units of each branch in the order in which they shall stand: key/value heads
        of ``"attention"``, channels of ``"mlp"``, ``(0,)`` for a ``"mamba"`` without its state space. Nothing kept: the
        branch is removed, its normalization too.
    :param steps: How a search came to it, in order; optional.
    :param calibration: What it was scored on, as plain data; optional.
    :param costs_before: Of the dense model; optional.
    :param costs_after: Of the planned one; optional.
    """

    model: Fingerprint
    layers: tuple[Mapping[str, tuple[int, ...]], ...]
    steps: tuple[Step, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    costs_before: Costs | None = None
    costs_after: Costs | None = None

    @classmethod
    def dense(cls, model: nn.Module) -> "StructurePlan":
        """
        :param model: A model of a known family.
        :return: The plan that keeps everything.
        :raises nncf.UnsupportedModelError: See :func:`nncf_ext.structure.coupling.layout_of`.
        """
        layers = tuple(
            {name: tuple(range(coupling.units)) for name, coupling in couplings.items()}
            for couplings in layout_of(model).couplings
        )
        return cls(fingerprint(model), layers)

    def keep(self, layer: int, branch: str, kept: Sequence[int]) -> "StructurePlan":
        """
        :param layer: Index of the layer.
        :param branch: ``"attention"``, ``"mlp"`` or ``"mamba"``.
        :param kept: The units that stay; none removes the branch.
        :return: The plan with this one branch changed.
        """
        layers = list(self.layers)
        layers[layer] = {**layers[layer], branch: tuple(kept)}
        return replace(self, layers=tuple(layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Writes the plan as JSON, whole or not at all. Kept units are written as runs ``[first, last + 1]``.

        :param path: The file.
        """
        content = {"version": VERSION, **asdict(self)}
        content["layers"] = [{name: _runs(kept) for name, kept in layer.items()} for layer in self.layers]
        write_whole(Path(path), lambda aside: aside.write_text(json.dumps(content, indent=1)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StructurePlan":
        """
        :param path: A file that :meth:`save` wrote.
        :return: The plan.
        :raises nncf.ValidationError: The file is no plan, or of a newer version.
        """
        try:
            content = json.loads(Path(path).read_text())
            version = content["version"]
            if not isinstance(version, int) or version > VERSION:
                msg = (
                    f"{path} is a structure plan of version {version}; this release reads versions up to {VERSION}. "
                    "Upgrade nncf-ext."
                )
                raise nncf.ValidationError(msg)
            return cls(
                model=Fingerprint(**content["model"]),
                layers=tuple(
                    {
                        name: tuple(unit for first, end in runs for unit in range(first, end))
                        for name, runs in each.items()
                    }
                    for each in content["layers"]
                ),
                steps=tuple(Step(**step) for step in content["steps"]),
                calibration=content["calibration"],
                costs_before=Costs(**content["costs_before"]) if content["costs_before"] else None,
                costs_after=Costs(**content["costs_after"]) if content["costs_after"] else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"{path} is no structure plan ({type(error).__name__}: {error})."
            raise nncf.ValidationError(msg) from error


@dataclass(frozen=True)
class Removal:
    """
    One candidate.

    :param layer: Index of the layer.
    :param branch: Name of the branch.
    :param kept: Units of it that would stay, ascending; none removes the branch.
    :param others: Later layers that share the weights and lose the same.
    """

    layer: int
    branch: str
    kept: tuple[int, ...]
    others: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """:return: All layers that lose something, in order."""
        return (self.layer, *self.others)

    def on(self, plan: StructurePlan) -> StructurePlan:
        """
        :param plan: Any plan of the model.
        :return: The plan with this removal carried out.
        """
        for layer in self.layers:
            plan = plan.keep(layer, self.branch, self.kept)
        return plan

    def as_step(self, score: float | None = None, margin: float | None = None) -> Step:
        """:return: The removal as a decision that was taken."""
        return Step(self.branch, self.layer, len(self.kept), score, margin)


def fingerprint(model: nn.Module) -> Fingerprint:
    """
    :param model: Any Hugging Face model.
    :return: What identifies it: names, shapes, and up to 4096 values of each parameter rounded to bfloat16.
    """
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    meta = False
    for name, parameter in model.named_parameters():
        shapes.update(f"{name}:{tuple(parameter.shape)};".encode())
        meta |= parameter.is_meta
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            values = flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.bfloat16).view(torch.int16)
            weights.update(values.cpu().numpy().tobytes())
    config: Any = getattr(model, "config", None)
    return Fingerprint(
        str(getattr(config, "model_type", "")), shapes.hexdigest(), None if meta else weights.hexdigest()
    )


def check_plan(model: nn.Module, plan: StructurePlan, layout: Layout) -> None:
    """
    :param model: The dense model.
    :param plan: A plan.
    :param layout: The model's layout.
    :raises nncf.ValidationError: The plan is for another model, names units that are not there, or leaves no attention
        by which a cache can tell positions.
    :raises nncf.UnsupportedModelError: A weight to be cut is shared.
    """
    own = fingerprint(model)
    if (own.model_type, own.shapes) != (plan.model.model_type, plan.model.shapes):
        msg = (
            f"The plan was made for a {plan.model.model_type!r} model of other shapes than this {own.model_type!r}. "
            "Load the dense model that was searched."
        )
        raise nncf.ValidationError(msg)
    if None not in (own.weights, plan.model.weights) and own.weights != plan.model.weights:
        msg = (
            "The plan was made for a model of the same shapes with other weights, so its kept units mean nothing here. "
            "Load the dense model that was searched."
        )
        raise nncf.ValidationError(msg)
    if len(plan.layers) != len(layout.blocks):
        msg = f"The plan has {len(plan.layers)} layers, the model {len(layout.blocks)}."
        raise nncf.ValidationError(msg)
    for index, (kept_units, couplings) in enumerate(zip(plan.layers, layout.couplings, strict=True)):
        if set(kept_units) != set(couplings):
            msg = f"The plan names {sorted(kept_units)} in layer {index}; the model has {sorted(couplings)} there."
            raise nncf.ValidationError(msg)
        for name, kept in kept_units.items():
            units = couplings[name].units
            if len(set(kept)) < len(kept) or any(not 0 <= unit < units for unit in kept):
                msg = (
                    f"The plan keeps units {list(kept)[:8]} of the {name} of layer {index}. Each must be one of "
                    f"0..{units - 1}, once. {unit_in_words(name, layout)}."
                )
                raise nncf.ValidationError(msg)
            if couplings[name].branch.without_ssm and kept == (1,):
                msg = f"The plan keeps the state space of layer {index} without the mixer that it stands in. Keep both."
                raise nncf.ValidationError(msg)
    check_cache(model, plan, layout)
    check_sharing(model, plan, layout)


def check_cache(model: nn.Module, plan: StructurePlan, layout: Layout) -> None:
    """
    :param model: The dense model.
    :param plan: A plan for it.
    :param layout: The model's layout.
    :raises nncf.ValidationError: No attention is left by which a cache can tell positions.
    """
    if not layout.decodes:
        return
    config: Any = model.config
    if "mamba" in layout.family.branches:
        if not any(kept["mamba"] for kept in plan.layers):
            msg = "The plan removes the Mamba mixer of every layer: no state would be left. Keep one."
            raise nncf.ValidationError(msg)
        attending = [index for index, kept in enumerate(plan.layers) if "attention" in kept]
        if attending and not plan.layers[attending[0]]["attention"]:
            msg = (
                f"The plan removes the attention of layer {attending[0]}, the first that has some: the cache tells "
                "positions by it. Keep it."
            )
            raise nncf.ValidationError(msg)
        return
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layout.blocks)
    staying = [index for index, kept in enumerate(plan.layers) if any(kept.values())]
    if not any(plan.layers[index]["attention"] and kinds[index] == kinds[staying[0]] for index in staying):
        kind = f" of kind {kinds[staying[0]]}" if staying and len(set(kinds)) > 1 else ""
        msg = f"The plan removes the attention{kind} of every layer: the cache could not tell positions. Keep one."
        raise nncf.ValidationError(msg)


def check_sharing(model: nn.Module, plan: StructurePlan, layout: Layout) -> None:
    """
    :param model: The dense model.
    :param plan: A plan for it.
    :param layout: The model's layout.
    :raises nncf.ValidationError: Layers that share weights would keep other units of them.
    :raises nncf.UnsupportedModelError: A weight to be cut is used elsewhere, too.
    """
    names = names_of_parameters(model)
    for index, kept_units in enumerate(plan.layers):
        for name, kept in kept_units.items():
            coupling = layout.couplings[index][name]
            if not kept or kept == tuple(range(coupling.units)):
                continue
            users = layout.users(index, name)
            others = {each: plan.layers[each][name] for each in users if plan.layers[each][name]}
            if len({*others.values()}) > 1:
                counts = ", ".join(f"{len(units)} in layer {each}" for each, units in others.items())
                msg = (
                    f"Layers {', '.join(map(str, users))} share the weights of their {name}, and the plan keeps other "
                    f"units in each: {counts}. Keep the same ones, or remove the branch of a layer as a whole."
                )
                raise nncf.ValidationError(msg)
            for path in coupling.stand_ins(kept) or [cut.module for cut in coupling.cuts]:
                for parameter in layout.blocks[index].get_submodule(path).parameters():
                    if len(names[id(parameter)]) > len(users):
                        msg = f"Asked to cut a weight that is shared: {', '.join(names[id(parameter)])}. Untie it."
                        raise nncf.UnsupportedModelError(msg)


def units_by_score(
    layout: Layout, layer: int, name: str, score: Callable[[Sequence[Tensor]], Tensor] | None
) -> list[int]:
    """
    :param layout: Of the dense model.
    :param layer: Index of the layer.
    :param name: Name of the branch.
    :param score: Importance of its units from their weights; None: the first are the most important.
    :return: Units of the branch, the most important first.
    """
    coupling = layout.couplings[layer][name]
    if score is None:
        return list(range(coupling.units))
    scores = score(unit_weights(layout.blocks[layer], coupling))
    return torch.argsort(scores, descending=True, stable=True).tolist()


def unit_in_words(name: str, layout: Layout) -> str:
    """
    :param name: Name of a branch.
    :param layout: Of the model.
    :return: A sentence without its full stop: what a unit of the branch is.
    """
    if name == "mamba":
        return "Unit 0 is the mixer, unit 1 its state space"
    if name != "attention":
        return "A unit is one channel"
    heads = f"{layout.group} query heads" if layout.group > 1 else "query head"
    return f"A unit is a key/value head with its {heads}, {layout.group * layout.head_dim} channels"


def _runs(kept: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for unit in kept:
        if runs and runs[-1][1] == unit:
            runs[-1][1] = unit + 1
        else:
            runs.append([unit, unit + 1])
    return runs
