"""
The table of methods and tiny models, for the properties that every method must have. A new method is a new row.

Apart from the tests, because a fresh process reads it, too.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nncf
import nncf.torch
import torch
from torch import nn

import nncf_ext
from nncf_ext import CompressMode
from nncf_ext.algorithms.sparse_weights.algorithm import MODES
from nncf_ext.compression import import_class
from nncf_ext.saving.thresholds import has_thresholds
from nncf_ext.upstream import is_wrapped
from tests.structure_models import VOCABULARY, make


class Mlp(nn.Module):
    """Three linear layers of awkward sizes, no repeated blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 37), nn.Linear(37, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width)

    def forward(self, hidden, scale):
        return (hidden + scale * self.down(torch.tanh(self.up(hidden))),)


class Blocks(nn.Module):
    """Repeated blocks that return tuples, between a convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(64) for _ in range(3))
        self.classifier = nn.Linear(64, 7)

    def forward(self, x):
        hidden = self.stem(x).transpose(1, 2)
        scale = torch.full((1,), 0.7, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            (hidden,) = block(hidden, scale=scale)
        return self.classifier(hidden.mean(dim=1))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def random_items(make_one: Callable[[torch.Generator], Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(9)
    return [make_one(generator) for _ in range(4)]


@dataclass(frozen=True)
class ModelKind:
    """
    :param make: Makes the model; weights follow torch's seed.
    :param items: Model inputs.
    :param some_layer: A layer that compression changes.
    """

    name: str
    make: Callable[[], nn.Module]
    items: list[Any]
    some_layer: str


TEXT = random_items(lambda g: {"input_ids": torch.randint(3, VOCABULARY, (2, 13), generator=g)})
MLP = ModelKind("mlp", Mlp, random_items(lambda g: torch.randn(6, 24, generator=g)), "second")
BLOCKS = ModelKind("blocks", Blocks, random_items(lambda g: (torch.randn(2, 3, 9, generator=g),)), "blocks.1.up")
LLAMA = ModelKind("llama", llama, TEXT, "model.layers.1.mlp.down_proj")
# Four layers, grouped heads.
DECODER = ModelKind("decoder", lambda: make("llama"), TEXT, "model.layers.1.mlp.down_proj")
MAMBA2 = ModelKind("mamba2", lambda: make("mamba2"), TEXT, "backbone.layers.1.mixer.in_proj")
MODELS = [MLP, BLOCKS, LLAMA]
GRID = {"quantization": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64}
EVERYTHING = {"centering": "mode", "mean_replacement": True, "weight_norms": True, "sequential": False}
TWO_STAGES = (nncf_ext.PruningStage(("ssm",), 1), nncf_ext.PruningStage(("mamba_block",)))


@dataclass(frozen=True)
class Case:
    """
    :param advanced: Advanced parameters.
    :param ratio: What compress() is asked for.
    :param unit: By how much, in weights a row, the number of zeros of a layer may differ from the ratio.
    :param removes: Whether parts go, so that shapes change; otherwise weights become zero and shapes stay.
    :param inputs: Whether inputs of layers are replaced, and weights stay.
    :param needs_data: Whether there must be a dataset.
    """

    mode: CompressMode
    model: ModelKind
    advanced: dict[str, Any] = field(default_factory=dict)
    ratio: float = 0.6
    unit: float = 1
    removes: bool = False
    inputs: bool = False
    needs_data: bool = True

    def __str__(self):
        return "-".join([self.model.name, self.mode.value, *(f"{value}"[:24] for value in self.advanced.values())])

    def fresh(self) -> nn.Module:
        torch.manual_seed(21)
        return self.model.make().eval()

    def compress(self, model: nn.Module, **changes: Any) -> nn.Module:
        settings = {"ratio": self.ratio, "dataset": nncf.Dataset(self.model.items), **changes}
        advanced = import_class(self.mode.method.parameters)(**self.advanced)
        return nncf_ext.compress(model, self.mode, **{"advanced_parameters": advanced, **settings})

    def run(self, model: nn.Module) -> torch.Tensor:
        parameter = next(each for each in model.parameters() if each.is_floating_point())
        item = cast(self.model.items[0], parameter)
        with torch.no_grad():
            if isinstance(item, dict):
                return model(**item, use_cache=False).logits
            return model(*item) if isinstance(item, tuple) else model(item)


def cast(item: Any, like: torch.Tensor) -> Any:
    """An input on the device, and where it is floating of the type, of a tensor."""
    if isinstance(item, dict):
        return {name: cast(value, like) for name, value in item.items()}
    if isinstance(item, tuple):
        return tuple(cast(value, like) for value in item)
    return item.to(like.device, like.dtype if item.is_floating_point() else item.dtype)


CASES = [
    *(Case(mode, model, needs_data=mode is not CompressMode.SPARSE_MAGNITUDE) for mode in MODES for model in MODELS),
    *(
        Case(mode, BLOCKS, {"pattern": "2:4"}, ratio=0.5, needs_data=mode is not CompressMode.SPARSE_MAGNITUDE)
        for mode in MODES
    ),
    *(Case(mode, model, GRID, unit=float("inf")) for mode in MODES for model in MODELS[1:]),
    Case(CompressMode.MULTIPRUNER, DECODER, {"mlp_group": 8}, ratio=0.3, removes=True),
    Case(CompressMode.MAMBA_SHEDDER, MAMBA2, ratio=0.3, removes=True),
    Case(CompressMode.MAMBA_SHEDDER, MAMBA2, {"stages": TWO_STAGES}, ratio=0.2, removes=True),
    *(Case(CompressMode.ACTIVATION_SPARSITY, model, inputs=True) for model in (*MODELS, MAMBA2)),
    Case(CompressMode.ACTIVATION_SPARSITY, LLAMA, EVERYTHING, inputs=True),
]


class Logits(nn.Module):
    """A decoder as a function that can be traced: the mask of its attention is made here."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids):
        length = ids.shape[1]
        later = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        mask = later[None, None].expand(len(ids), 1, length, length)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def save(model: nn.Module, folder: Path) -> None:
    """Keeps a compressed model by the package's own means."""
    if hasattr(model, "save_pretrained"):
        nncf_ext.save_pretrained(model, folder)
        return
    folder.mkdir()
    torch.save(model.state_dict(), folder / "state.pt")
    if has_thresholds(model):
        nncf_ext.save_thresholds(model, folder / "thresholds.json")
    if is_wrapped(model):
        (folder / "config.json").write_text(json.dumps(nncf.torch.get_config(model)))


def load(case: Case, folder: Path) -> nn.Module:
    """The model that :func:`save` kept, from the folder alone."""
    if not (folder / "state.pt").is_file():
        return nncf_ext.load_pretrained(folder)
    torch.manual_seed(99)
    model, state = case.model.make().eval(), torch.load(folder / "state.pt")
    if (folder / "config.json").is_file():
        return nncf_ext.load_compressed(model, json.loads((folder / "config.json").read_text()), state)
    model.load_state_dict(state)
    if (folder / "thresholds.json").is_file():
        nncf_ext.load_thresholds(model, folder / "thresholds.json")
    return model


def reload_all(folder: Path) -> None:
    """For a fresh process: the outputs of all models that were kept below a folder."""
    torch.set_num_threads(1)
    for number, case in enumerate(CASES):
        if (folder / str(number)).is_dir():
            torch.save(case.run(load(case, folder / str(number))), folder / f"{number}.output.pt")


_done: dict[int, nn.Module] = {}


def compressed(case: Case) -> nn.Module:
    """A fresh copy of the compressed model, which is made once."""
    number = CASES.index(case)
    if number not in _done:
        _done[number] = case.compress(case.fresh())
    return copy.deepcopy(_done[number])
