"""
Finished units of a running compression, on disk, so that an interrupted run continues where it stopped.

A folder with ``journal.json`` (what was asked for, and digests of the data and of the weights that stay) and one
safetensors file for each finished unit. Files are written aside and renamed, so a file that exists is whole.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import nncf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nncf_ext.files import digest, write_whole
from nncf_ext.weights.records import LayerRecord

_VERSION = 1


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


class Journal:
    """
    :param folder: Where finished units are kept; made if it does not exist.
    :param header: What this run was asked for; must equal what the folder was begun with.
    :raises nncf.ValidationError: The folder belongs to another run, or is no journal.
    """

    def __init__(self, folder: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        header = {"version": _VERSION, **header}
        path = self._folder / "journal.json"
        if path.is_file():
            found = json.loads(path.read_text())
            differing = sorted(key for key in {*found, *header} if found.get(key) != header.get(key))
            if differing:
                msg = (
                    f"{self._folder} was begun by another compression; it differs in {', '.join(differing)}. Resume "
                    "with the same model, data and settings, or name a new folder."
                )
                raise nncf.ValidationError(msg)
            return
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            msg = f"resume={str(self._folder)!r} is neither a journal of an earlier run nor an empty or new folder."
            raise nncf.ValidationError(msg)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda aside: aside.write_text(json.dumps(header, indent=1)))

    def layers(self) -> set[str]:
        """
        :return: Paths of all finished layers.
        :raises nncf.ValidationError: A file cannot be read.
        """
        return {name for path in self._folder.glob("unit-*.safetensors") for name in _read(path)[1]}

    def load(self, unit: str, weights: Mapping[str, Tensor]) -> dict[str, LayerResult] | None:
        """
        :param unit: Name of a unit.
        :param weights: The present weights of its layers by path: the original ones, or those found here.
        :return: Its finished layers by path, or None if the unit is not finished.
        :raises nncf.ValidationError: The file cannot be read, or is about other weights.
        """
        path = self._path(unit)
        if not path.is_file():
            return None
        tensors, records, before = _read(path)
        results = {
            name: LayerResult(
                tensors[f"{name}.weight"],
                tensors.get(f"{name}.codes"),
                tensors.get(f"{name}.scales"),
                LayerRecord(**record, prerounding=tensors.get(f"{name}.prerounding")),
            )
            for name, record in records.items()
        }
        for name, weight in weights.items():
            if digest([weight]) not in (before.get(name), digest([results[name].weight])):
                msg = (
                    f"{path} was made from another weight of {name}. Resume with the same model, or name a new folder."
                )
                raise nncf.ValidationError(msg)
        return results

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
        write_whole(self._path(unit), lambda aside: save_file(tensors, aside, metadata=metadata))

    def _path(self, unit: str) -> Path:
        return self._folder / f"unit-{hashlib.sha256(unit.encode()).hexdigest()[:16]}.safetensors"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors (memory-mapped), records by layer, and digests of the original weights by layer."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(metadata["records"]), json.loads(metadata["before"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        msg = f"{path} is damaged ({error}). Delete it: the unit will be compressed again."
        raise nncf.ValidationError(msg) from error
