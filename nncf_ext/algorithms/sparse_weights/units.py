"""Finished units of a running compression, as entries of its journal: one safetensors file for each unit."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import nncf
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nncf_ext.files import digest
from nncf_ext.journal import Journal
from nncf_ext.weights.int4 import dequantize
from nncf_ext.weights.records import LayerRecord


@dataclass(frozen=True)
class LayerResult:
    """
    What compression made of one layer.

    :param weight: The weight the forward sees ``[out_features, in_features]``, in the model's floating type.
    :param codes: INT4 codes, int8, same shape; None for a floating weight.
    :param scales: Group scales ``[out_features, groups]``, float16; None for a floating weight.
    :param record: What the report will say.
    """

    weight: Tensor
    codes: Tensor | None
    scales: Tensor | None
    record: LayerRecord


_Entry = tuple[dict[str, LayerResult], dict[str, str]]


class FinishedUnits:
    """
    :param journal: The run's journal.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._seen: dict[str, _Entry] = {}  # memory-mapped; to make sure of a file takes reading all of it

    def layers(self) -> set[str]:
        """
        :return: Paths of all finished layers.
        :raises nncf.ValidationError: A file cannot be read.
        """
        entries = {name: self._journal.read(name, _read) for name in self._journal.names("unit-*.safetensors")}
        self._seen = {name: entry for name, entry in entries.items() if entry is not None}
        return {layer for results, _ in self._seen.values() for layer in results}

    def load(self, unit: str, weights: Mapping[str, Tensor], *, original: bool) -> dict[str, LayerResult] | None:
        """
        :param unit: Name of a unit.
        :param weights: The present weights of its layers by path: the original ones, or those found here.
        :param original: Refuse those found here.
        :return: Its finished layers by path, or None if the unit is not finished.
        :raises nncf.ValidationError: The file cannot be read, or is about other weights.
        """
        entry = self._seen.pop(_file(unit), None) or self._journal.read(_file(unit), _read)
        if entry is None:
            return None
        results, before = entry
        for name, weight in weights.items():
            result = results.get(name)
            known = {before.get(name)} if original or result is None else {before.get(name), digest([result.weight])}
            if result is None or digest([weight]) not in known:
                msg = (
                    f"The journal's {_file(unit)} was made from another weight of {name}. Resume with the same model, "
                    "or name a new folder."
                )
                raise nncf.ValidationError(msg)
            if wrong := _misfit(result, weight):
                msg = f"The journal's {_file(unit)} does not fit {name}: {wrong}. Delete it: it will be done again."
                raise nncf.ValidationError(msg)
        return {name: results[name] for name in weights}

    def store(self, unit: str, results: Mapping[str, LayerResult], weights: Mapping[str, Tensor]) -> None:
        """
        :param unit: Name of a unit.
        :param results: Its finished layers by path.
        :param weights: The original weights of these layers.
        """
        tensors: dict[str, Tensor] = {}
        for name, result in results.items():
            parts = {
                "weight": result.weight,
                "codes": result.codes,
                "scales": result.scales,
                "prerounding": result.record.prerounding,
            }
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in parts.items() if value is not None}
        names = [field.name for field in fields(LayerRecord) if field.name != "prerounding"]
        records = {name: {key: getattr(result.record, key) for key in names} for name, result in results.items()}
        before = {name: digest([weight]) for name, weight in weights.items()}
        metadata = {"records": json.dumps(records), "before": json.dumps(before)}
        self._seen.pop(_file(unit), None)
        self._journal.write(_file(unit), lambda aside: save_file(tensors, aside, metadata=metadata))


def _file(unit: str) -> str:
    return f"unit-{hashlib.sha256(unit.encode()).hexdigest()[:16]}.safetensors"


def _read(path: Path) -> _Entry:
    """Results (memory-mapped) and digests of the original weights, by layer."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    results = {
        name: LayerResult(
            tensors[f"{name}.weight"],
            tensors.get(f"{name}.codes"),
            tensors.get(f"{name}.scales"),
            LayerRecord(**record, prerounding=tensors.get(f"{name}.prerounding")),
        )
        for name, record in json.loads(metadata["records"]).items()
    }
    return results, json.loads(metadata["before"])


def _misfit(result: LayerResult, weight: Tensor) -> str | None:
    """What of a result cannot be of a layer with this weight, or None."""
    rows, columns = weight.shape
    wanted = {
        "weight": (result.weight, weight.dtype, (rows, columns)),
        "codes": (result.codes, torch.int8, (rows, columns)),
        "prerounding": (result.record.prerounding, torch.float32, (rows, columns)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            return f"{name} is {list(tensor.shape)} {tensor.dtype} where {list(shape)} {dtype} belongs"
    codes, scales = result.codes, result.scales
    if (codes is None) != (scales is None):
        return f"there are {'scales without codes' if codes is None else 'codes without scales'}"
    if codes is None or scales is None:
        return None
    groups = scales.shape[1] if scales.ndim == 2 else 0
    if scales.dtype != torch.float16 or len(scales) != rows or not groups or columns % groups:
        return f"scales are {list(scales.shape)} {scales.dtype} where [{rows}, groups] float16 belongs"
    if not torch.equal(dequantize(codes, scales).to(weight.dtype), result.weight):
        return "codes and scales do not give its weight"
    return None
