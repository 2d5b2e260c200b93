"""Fixtures: a Core that knows the operations, and the committed language model in every form that the tests need."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openvino as ov
import pytest

import ov_ext

TINY_LM = Path(__file__).parents[2] / "samples" / "assets" / "tiny_lm"


@pytest.fixture(scope="session")
def core() -> ov.Core:
    return ov_ext.add_extension(ov.Core())


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small models: torch's spinning threads would only slow OpenVINO's down."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_LM)


def load_sparse_lm() -> Any:
    """The committed model in f32; the smaller half of every row of its linear layers (lm_head too) is zero."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                smallest = module.weight.abs().argsort(dim=1)[:, : module.in_features // 2]
                module.weight.scatter_(1, smallest, 0.0)
    return model


@pytest.fixture(scope="session")
def int4_lm() -> Any:
    """The sparse model in NNCF's torch form: packed INT4 parameters and decompressor hooks."""
    import nncf
    import torch

    ids = torch.arange(1, 17)[None]
    return nncf.compress_weights(
        load_sparse_lm(),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=128,
        all_layers=True,
        dataset=nncf.Dataset([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]),
    )


@pytest.fixture(scope="session")
def folders(int4_lm: Any, tokenizer: Any, core: ov.Core, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """
    Model folders: plain and int4 as exported, each also -packed and -packed-exact (activation_group 0). All that is
    sparse is packed as such, whether that pays on this CPU or not.
    """
    import ov_ext.optimum

    root = tmp_path_factory.mktemp("models")
    made = {"plain": root / "plain", "int4": root / "int4"}
    ov_ext.optimum.export(load_sparse_lm(), tokenizer, made["plain"], rest=None)  # no weight is rounded
    ov_ext.optimum.export(int4_lm, tokenizer, made["int4"])
    for name in ("plain", "int4"):
        for suffix, group in (("packed", 128), ("packed-exact", 0)):
            folder = made[f"{name}-{suffix}"] = root / f"{name}-{suffix}"
            shutil.copytree(made[name], folder, ignore=shutil.ignore_patterns("openvino_model.*"))
            model = core.read_model(made[name] / "openvino_model.xml")
            ov_ext.pack_sparse_weights(model, ov_ext.SparsePolicy(min_sparsity=0.25, activation_group=group))
            ov_ext.save_model(model, folder / "openvino_model.xml")
    gc.collect()
    return made
