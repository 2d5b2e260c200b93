"""GenAI's LoRA adapters: they work on stock weights, and are refused where weights are packed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import openvino as ov
import openvino_genai
import pytest
import torch
from safetensors.torch import save_file

import ov_ext
import ov_ext.genai
import ov_ext.optimum
from tests.structure_models import make

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]

PROMPT, OPTIONS = "def f(x):", {"max_new_tokens": 8, "do_sample": False, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    model = make("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
    made = {"stock": ov_ext.optimum.export(model, tokenizer, root / "stock"), "packed": root / "packed"}
    shutil.copytree(made["stock"], made["packed"])
    core = ov_ext.add_extension(ov.Core())
    policy = ov_ext.SparsePolicy(min_sparsity=0.0, min_weights=0, max_growth=999)
    packed, report = ov_ext.pack_sparse_weights(core.read_model(made["stock"] / "openvino_model.xml"), policy)
    assert report.replaced
    ov_ext.save_model(packed, made["packed"] / "openvino_model.xml")
    return made


@pytest.fixture(scope="module")
def adapter(folders: dict[str, Path]) -> openvino_genai.AdapterConfig:
    """Changes the MLP of both layers much."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 40, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    path = folders["stock"].parent / "adapter.safetensors"
    save_file(tensors, path)
    return openvino_genai.AdapterConfig(openvino_genai.Adapter(path), 1.0)


def text(pipe: Any, **options: Any) -> Any:
    return pipe.generate(PROMPT, **OPTIONS, **options)


def test_stock_weights_take_adapters(folders: dict[str, Path], adapter: openvino_genai.AdapterConfig) -> None:
    pipe = ov_ext.genai.pipeline(folders["stock"], adapters=adapter)
    assert text(pipe) != text(pipe, adapters=openvino_genai.AdapterConfig())


def test_packed_weights_refuse_them_however_they_come(
    folders: dict[str, Path], adapter: openvino_genai.AdapterConfig
) -> None:
    config = openvino_genai.GenerationConfig(max_new_tokens=4)
    config.adapters = adapter
    refused = pytest.raises(ov_ext.genai.PackedAdapterError, match="nncf_ext.merge")
    for properties in ({"adapters": adapter}, {"config": {"adapters": adapter}}):
        with refused:
            ov_ext.genai.pipeline(folders["packed"], **properties)
    pipe = ov_ext.genai.pipeline(folders["packed"])
    plainly = text(pipe)
    for call in (
        lambda: pipe.generate(PROMPT, config),
        lambda: pipe.generate(PROMPT, generation_config=config),
        lambda: pipe.generate(PROMPT, adapters=adapter),
        lambda: pipe(PROMPT, config),
        lambda: pipe(PROMPT, adapters=adapter),
        lambda: pipe.set_generation_config(config),
    ):
        with refused:
            call()
    # Everything else goes through: positional and named arguments, streamers, chats, no adapters.
    heard: list[str] = []
    settings = openvino_genai.GenerationConfig(**OPTIONS)
    assert pipe.generate(PROMPT, settings, lambda word: heard.append(word)) == plainly and "".join(heard) == plainly
    assert text(pipe, adapters=openvino_genai.AdapterConfig()) == plainly == pipe(inputs=PROMPT, **OPTIONS)
    pipe.set_generation_config(settings)
    assert pipe.generate(PROMPT) == plainly and isinstance(pipe, openvino_genai.LLMPipeline)
