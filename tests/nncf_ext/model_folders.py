"""Folders of a small model in every kind that is written, and folders that something is wrong with."""

import json
from pathlib import Path

import nncf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nncf_ext
from nncf_ext.structure.plan import StructurePlan
from nncf_ext.structure.surgery import extract_structure
from nncf_ext.weights.int4 import pack

WEIGHTS = {
    **{"plain": "model.safetensors", "cut": "nncf_model.safetensors"},
    **{"int4": "model.safetensors", "int4 of version 0.1": "nncf_model.safetensors"},
}
UP = "model.layers.1.mlp.up_proj.weight"


def on_grid(model: nn.Module) -> nn.Module:
    """With its last up projection on the INT4 grid: random codes, scales of one 64th."""
    rows, columns = model.get_parameter(UP).shape
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    pack(model, UP, codes, torch.full((rows, columns // 64), 2**-6, dtype=torch.float16))
    return model


def saved(kind: str, model: nn.Module, folder: Path) -> nn.Module:
    """A model of two layers in one of three kinds of folder."""
    if kind == "cut":
        model = extract_structure(model, StructurePlan.dense(model).keep("layers.0.mlp", range(64)))
    elif "int4" in kind:
        model = on_grid(model)
    nncf_ext.save_pretrained(model, folder)
    if kind.endswith("0.1"):
        as_before(folder)
    return model


def as_before(folder: Path) -> None:
    """A folder on the grid as version 0.1 wrote it: the grid is a file of its own."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        state = {name.removeprefix("~"): opened.get_tensor(name) for name in opened.keys()}
        save_file(state, folder / "nncf_model.safetensors", opened.metadata())
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    grid = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "nncf_config.json").write_text(json.dumps({"compression_state": grid["compression_state"]}))


def rewrite(file: Path, **changed: torch.Tensor | None) -> None:
    """Other tensors under some names; None takes one away. Names have underscores for dots."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    for name, tensor in changed.items():
        del state[name]
        if tensor is not None:
            state[name] = tensor
    save_file(state, file, metadata)


def edit(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(nncf.ValidationError) as caught:
        nncf_ext.load_pretrained(folder)
    assert all(word in str(caught.value) for word in words), (str(caught.value), words)
