"""
The one description of a smaller model: which units of which dimension stay.

A plan is data. It is made by a search or by hand, tried with :func:`nncf_ext.masked`, and carried out by
:func:`nncf_ext.extract`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import nncf
import torch
from torch import nn

from nncf_ext.files import write_whole
from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.lookup import dimensions_of
from nncf_ext.structure.order import units_at
from nncf_ext.structure.wrappers import without_shells

VERSION = 2
_SAMPLE = 4096
_MOST_UNITS = 2**24


@dataclass(frozen=True)
class Step:
    """
    One decision of the search that made a plan.

    :param dimension: Name of the dimension; where several share what was cut, the first of them.
    :param kept: How many of its units stay after this step; 0: it is gone.
    :param score: Score of the whole model after the step, or None.
    :param margin: Distance to the second best candidate in the same unit, or None.
    """

    dimension: str
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
    :param kept: For each dimension, by name, the units that stay, in the order in which they shall stand: key/value
        heads of ``"layers.3.attention"``, channels of ``"layers.3.mlp"``, ``(0,)`` for a ``"layers.3.mamba"`` without
        its state space. Nothing kept: the branch is removed, its normalization too.
    :param steps: How a search came to it, in order; optional.
    :param calibration: What it was scored on, as plain data; optional.
    :param costs_before: Of the dense model; optional.
    :param costs_after: Of the planned one; optional.
    """

    model: Fingerprint
    kept: Mapping[str, tuple[int, ...]]
    steps: tuple[Step, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    costs_before: Costs | None = None
    costs_after: Costs | None = None

    @classmethod
    def dense(cls, model: nn.Module, dimensions: Dimensions | None = None) -> "StructurePlan":
        """
        :param model: A model of a known architecture.
        :param dimensions: Its dimensions; None: find them.
        :return: The plan that keeps everything.
        :raises nncf.UnsupportedModelError: See :func:`nncf_ext.structure.lookup.dimensions_of`.
        """
        model = without_shells(model)
        dimensions = dimensions_of(model) if dimensions is None else dimensions
        return cls(fingerprint(model), dimensions.all_units())

    @property
    def point(self) -> dict[str, int]:
        """:return: The sizes alone: how many units of each dimension stay."""
        return {name: len(units) for name, units in self.kept.items()}

    def keep(self, dimension: str, kept: Sequence[int]) -> "StructurePlan":
        """
        :param dimension: Name of a dimension.
        :param kept: The units of it that stay; none removes it.
        :return: The plan with this one dimension changed.
        """
        return replace(self, kept={**self.kept, dimension: tuple(kept)})

    def at(self, point: Mapping[str, int], order: Mapping[str, Sequence[int]] | None = None) -> "StructurePlan":
        """
        From sizes to units: of every dimension the most important ones stay, in the places they have in this plan.

        :param point: For some dimensions, how many units stay.
        :param order: For some dimensions, all units that this plan keeps, the most important first; for the others,
            and with None, importance falls with their place.
        :return: The plan of that point: ``plan.at(point, order).point`` gives the sizes back.
        :raises nncf.ValidationError: A dimension is unknown, a size out of range, or an order is no permutation.
        """
        return replace(self, kept=units_at(self.kept, point, order))

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Writes the plan as JSON, whole or not at all. Kept units are written as runs ``[first, last + 1]``.

        :param path: The file.
        """
        content = {"version": VERSION, **asdict(self)}
        content["kept"] = {name: _runs(units) for name, units in self.kept.items()}
        write_whole(Path(path), lambda aside: aside.write_text(json.dumps(content, indent=1)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StructurePlan":
        """
        :param path: A file that :meth:`save` wrote, of this version or an earlier one.
        :return: The plan.
        :raises nncf.ValidationError: The file is no plan, or of a newer version.
        """
        try:
            content = json.loads(Path(path).read_text())
            version = content["version"]
            if type(version) is not int or version < 1:
                msg = f"version {version!r}"
                raise ValueError(msg)
            if version > VERSION:
                msg = (
                    f"{path} is a structure plan of version {version}; this release reads versions up to {VERSION}. "
                    "Upgrade nncf-ext."
                )
                raise nncf.ValidationError(msg)
            content = _from_version_1(content) if version == 1 else content
            _check_runs(content["kept"])
            plan = cls(
                model=Fingerprint(**content["model"]),
                kept={
                    name: tuple(unit for first, end in runs for unit in range(first, end))
                    for name, runs in content["kept"].items()
                },
                steps=tuple(Step(**step) for step in content["steps"]),
                calibration=content["calibration"],
                costs_before=Costs(**content["costs_before"]) if content["costs_before"] else None,
                costs_after=Costs(**content["costs_after"]) if content["costs_after"] else None,
            )
            _check_types(plan)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            msg = f"{path} is no structure plan ({type(error).__name__}: {error})."
            raise nncf.ValidationError(msg) from error


def _from_version_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 kept units by layer and branch."""
    kept = {
        f"layers.{index}.{branch}": runs
        for index, branches in enumerate(content["layers"])
        for branch, runs in branches.items()
    }
    steps = [
        {"dimension": f"layers.{step['layer']}.{step['branch']}"}
        | {key: value for key, value in step.items() if key not in ("layer", "branch")}
        for step in content["steps"]
    ]
    return {**content, "kept": kept, "steps": steps}


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


def _check_runs(kept: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """A file is untrusted: nothing is expanded that no model could have."""
    runs = [run for each in kept.values() for run in each]
    sound = all(type(number) is int for run in runs for number in run) and all(0 <= first < end for first, end in runs)
    if not sound or sum(end - first for first, end in runs) > _MOST_UNITS:
        msg = "it keeps what can be no units of a model's dimensions"
        raise ValueError(msg)


def _check_types(plan: StructurePlan) -> None:
    """What is noted beside the kept units is read by searches and reports; a file can hold anything in its place."""

    def count(value: Any) -> bool:
        return type(value) is int and value >= 0

    model, costs = plan.model, [each for each in (plan.costs_before, plan.costs_after) if each is not None]
    sound = {
        "model": isinstance(model.model_type, str)
        and isinstance(model.shapes, str)
        and isinstance(model.weights, str | None),
        "steps": all(
            isinstance(step.dimension, str)
            and count(step.kept)
            and all(value is None or type(value) in (int, float) for value in (step.score, step.margin))
            for step in plan.steps
        ),
        "calibration": isinstance(plan.calibration, dict),
        "costs": all(count(value) for each in costs for value in asdict(each).values()),
    }
    if wrong := [name for name, is_sound in sound.items() if not is_sound]:
        msg = f"unexpected values in {', '.join(wrong)}"
        raise ValueError(msg)


def _runs(kept: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for unit in kept:
        if runs and runs[-1][1] == unit:
            runs[-1][1] = unit + 1
        else:
            runs.append([unit, unit + 1])
    return runs
