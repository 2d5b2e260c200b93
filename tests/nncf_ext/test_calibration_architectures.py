"""Architectures that hand masks, position embeddings and more to their blocks, each in its own way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from nncf_ext.calibration.statistics import observe_inputs
from nncf_ext.calibration.stream import CalibrationStream, evaluation
from nncf_ext.structure.blocks import survey

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 128, (2, 20))}


def padded_text() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 12:] = 0
    return {**text(), "attention_mask": mask}


def two_texts() -> dict[str, torch.Tensor]:
    return {**text(), "decoder_input_ids": torch.randint(0, 128, (2, 7))}


def text_and_image() -> dict[str, torch.Tensor]:
    return {**text(), "pixel_values": torch.randn(2, 3, 16, 16)}


@dataclass(frozen=True)
class Architecture:
    """
    :param lists: Number of block lists that must be found.
    :param units: Number of units in all.
    :param layers: Number of linear layers that must be visited.
    :param chained: Whether blocks can be run one by one.
    """

    name: str
    make: Callable[[], nn.Module]
    item: Callable[[], dict[str, Any]]
    lists: int
    units: int
    layers: int
    chained: bool = True

    def __str__(self):
        return self.name


def clip() -> nn.Module:
    part = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {**part, "vocab_size": 128, "eos_token_id": 1, "bos_token_id": 0}
    picture = {**part, "image_size": 16, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=words, vision_config=picture))


def gemma3() -> nn.Module:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**GROUPED, head_dim=32, sliding_window=8, layer_types=layer_types)
    return transformers.Gemma3ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=64, d_ff=96, d_kv=32, num_layers=2, num_heads=2, vocab_size=128)
    return transformers.T5ForConditionalGeneration(config)


ARCHITECTURES = [
    Architecture(
        "llama", lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), padded_text, 1, 3, 21
    ),
    Architecture("gemma3, a mask and rope for each kind of layer", gemma3, padded_text, 1, 3, 21),
    Architecture(
        "bloom, tuples and alibi",
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(hidden_size=64, n_layer=3, n_head=2, vocab_size=128)
        ),
        padded_text, 1, 3, 12,
    ),
    Architecture(
        "bert", lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), padded_text, 1, 3, 18
    ),
    Architecture("clip, two towers", clip, text_and_image, 2, 4, 24),
    Architecture("t5, position bias from the first block", t5, two_texts, 2, 4, 32, chained=False),
]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_layers_see_what_the_whole_model_gives_them(architecture, caplog):
    torch.manual_seed(0)
    model = architecture.make().eval()
    items = [architecture.item() for _ in range(2)]
    found = survey(model)
    assert len(found.block_lists) == architecture.lists
    units, visited = 0, 0
    with evaluation(model):
        for unit in CalibrationStream(model, items, found.block_lists, found.targets).units():
            statistics = observe_inputs(unit, full=True)
            expected = hessians(model, items, unit.layers)
            for name in unit.layers:
                torch.testing.assert_close(statistics[name]._products, expected[name], rtol=1e-4, atol=1e-4)
                visited += 1
            for layer in unit.layers.values():
                layer.weight.data *= 0.7  # so that the next blocks must see a changed predecessor
            unit.advance()
            units += 1
    assert (units, visited) == (architecture.units, architecture.layers)
    assert ("the whole model is run for each" in caplog.text) is not architecture.chained


def hessians(model, items, layers):
    """Oracle: sums of x x^T over ordinary runs of the whole model."""
    sums = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def add(name):
        def hook(module, args, kwargs):
            rows = (args[0] if args else kwargs["input"]).reshape(-1, module.in_features)
            sums[name] += rows.T @ rows

        return hook

    handles = [layer.register_forward_pre_hook(add(name), with_kwargs=True) for name, layer in layers.items()]
    for item in items:
        model(**item)
    for handle in handles:
        handle.remove()
    return sums
