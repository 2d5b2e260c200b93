"""Calibration items that differ in kind: what holds for the first item need not hold for the next."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import nncf
import pytest
import torch
import transformers
from torch import nn

import nncf_ext
from nncf_ext.algorithms.sparse_weights.algorithm import MODES
from nncf_ext.calibration.statistics import observe_inputs
from nncf_ext.calibration.stream import CalibrationStream, evaluation
from nncf_ext.structure.blocks import survey

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
WINDOWED = {**GROUPED, "head_dim": 32, "sliding_window": 8}


def text(tokens: int, rows: int = 1, **more: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 128, (rows, tokens)), **more}


def mask(tokens: int, padded: int, rows: int = 1) -> torch.Tensor:
    kept = torch.ones(rows, tokens, dtype=torch.long)
    kept[:, tokens - padded :] = 0
    return kept


def gemma2(attention: str) -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**WINDOWED, attn_implementation=attention))


def bart() -> nn.Module:
    config = transformers.BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=64, d_ff=96, d_kv=32, num_layers=2, num_heads=2, vocab_size=128)
    return transformers.T5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Mixture:
    """A model, and two items of different kinds."""

    name: str
    make: Callable[[], nn.Module]
    one: Callable[[], dict[str, Any]]
    other: Callable[[], dict[str, Any]]


MIXTURES = [
    Mixture("shorter than the window", partial(gemma2, "sdpa"), lambda: text(6), lambda: text(40)),
    Mixture("shorter than the window, eager", partial(gemma2, "eager"), lambda: text(6), lambda: text(40)),
    Mixture(
        "some layers with a window",
        lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=2)
        ),
        lambda: text(6),
        lambda: text(20, rows=2),
    ),
    Mixture(
        "with a mask and without",
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
        lambda: text(10),
        lambda: text(12, rows=2, attention_mask=mask(12, 5, rows=2)),
    ),
    Mixture(
        "own positions",
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
        lambda: text(10),
        lambda: text(10, position_ids=torch.arange(3, 13)[None]),
    ),
    Mixture(
        "token types and a mask",
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
        lambda: text(10),
        lambda: text(9, token_type_ids=torch.ones(1, 9, dtype=torch.long), attention_mask=mask(9, 2)),
    ),
    Mixture(
        "encoder and decoder with masks",
        bart,
        lambda: text(10, decoder_input_ids=torch.randint(0, 128, (1, 4))),
        lambda: text(
            8, decoder_input_ids=torch.randint(0, 128, (1, 6)), attention_mask=mask(8, 3),
            decoder_attention_mask=mask(6, 2),
        ),
    ),
    Mixture(
        "position bias",
        t5,
        lambda: text(10, decoder_input_ids=torch.randint(0, 128, (1, 4))),
        lambda: text(8, decoder_input_ids=torch.randint(0, 128, (1, 6)), attention_mask=mask(8, 3)),
    ),
]  # fmt: skip


def linear_inputs(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[torch.Tensor]]:
    """What every linear layer reads while something runs."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name, module, args, kwargs):
        seen.setdefault(name, []).append((args[0] if args else kwargs["input"]).clone())

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_pre_hook(partial(keep, name), with_kwargs=True) for name, layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("swapped", [False, True], ids=["one first", "other first"])
@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: mixture.name)
def test_layers_read_what_a_plain_forward_gives_them_bit_for_bit(mixture, swapped):
    torch.manual_seed(0)
    model = mixture.make().eval()
    items = [mixture.one(), mixture.other(), mixture.one()]
    if swapped:
        items = [items[1], items[0], items[1]]
    found = survey(model)
    visited = 0
    with evaluation(model):
        for unit in CalibrationStream(model, items, found.block_lists, found.targets).units():
            plain = linear_inputs(model, lambda: [model(**item) for item in items])
            walked = linear_inputs(model, unit.run)
            for name, layer in unit.layers.items():
                assert len(walked[name]) == len(plain[name]), name
                assert all(map(torch.equal, walked[name], plain[name])), name
                layer.weight.data *= 0.7
                visited += 1
            unit.advance()
    assert visited == len(found.targets)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_items_does_not_matter(mode):
    """Two sums of two terms are the same in both orders, so not even rounding differs."""
    torch.manual_seed(1)
    short, long = text(6), text(64)
    weights = []
    for items in ([short, long], [long, short]):
        torch.manual_seed(0)
        model = nncf_ext.compress(gemma2("sdpa").eval(), mode, ratio=0.5, dataset=nncf.Dataset(items))
        weights.append({name: value == 0 for name, value in model.named_parameters() if value.dim() == 2})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Forked(nn.Module):
    """Two layers that read one tensor, or (in a long item) two; or the same one with other numbers in it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.kind = kind
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if self.kind == "no right" and x.shape[0] > 3:
            return self.left(x)
        left = self.left(x)
        if self.kind == "other" and x.shape[0] > 3:
            return left + self.right(x * 2)
        if self.kind == "in place":
            x = x.mul_(2)
        return left + self.right(x)


class ForkedBlocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Forked(kind) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.clone())
        return x


@pytest.mark.parametrize("make", [Forked, ForkedBlocks])
@pytest.mark.parametrize("kind", ["other", "no right", "in place"])
def test_layers_that_share_an_input_on_some_items_only(kind, make):
    torch.manual_seed(3)
    items = [torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8)]
    model = make(kind).eval()
    found = survey(model)
    with evaluation(model):
        for unit in CalibrationStream(model, items, found.block_lists, found.targets).units():
            statistics = observe_inputs(unit, full=False)
            plain = linear_inputs(model, lambda: [model(item.clone()) for item in items])
            for name in unit.layers:
                expected = sum(each.square().sum(dim=0) for each in plain[name])
                torch.testing.assert_close(statistics[name]._products, expected)
            unit.advance()


LLAMA = partial(transformers.LlamaConfig, **GROUPED)


@dataclass(frozen=True)
class Planning:
    """A model, items, and how often planning may run its last block."""

    name: str
    make: Callable[[], nn.Module]
    items: Callable[[], list[dict[str, Any]]]
    forwards: int


PLANNINGS = [
    Planning("one length", lambda: transformers.LlamaForCausalLM(LLAMA()), lambda: [text(9) for _ in range(6)], 1),
    Planning(
        "three lengths",
        lambda: transformers.LlamaForCausalLM(LLAMA()),
        lambda: [text(9 + index % 3) for index in range(6)],
        3,
    ),
    Planning(
        "padded and not",
        lambda: transformers.LlamaForCausalLM(LLAMA()),
        lambda: [text(9, attention_mask=mask(9, padded)) for padded in (0, 2, 0, 3, 4, 0)],
        2,
    ),
    Planning("masks of two kinds", partial(gemma2, "sdpa"), lambda: [text(20) for _ in range(6)], 2),
    Planning(
        "masks of two kinds, any length", partial(gemma2, "sdpa"), lambda: [text(20 + index) for index in range(6)], 7
    ),
]


@pytest.mark.parametrize("planning", PLANNINGS, ids=lambda planning: planning.name)
def test_planning_runs_one_item_of_a_kind(planning):
    """The items hold no token 0, so that all texts are of a kind."""
    torch.manual_seed(0)
    model, items = planning.make().eval(), planning.items()
    items = [{**item, "input_ids": item["input_ids"].clamp_min(1)} for item in items]
    found, runs = survey(model), []
    list(found.block_lists[0].blocks.values())[-1].register_forward_hook(lambda *_: runs.append(1))
    with evaluation(model):
        CalibrationStream(model, items, found.block_lists, found.targets)
    assert len(runs) == planning.forwards


class LateMask(nn.Module):
    """Only the last block is given a mask, and only where something is masked, or where positions begin anew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layers = nn.ModuleList(LateMasked() for _ in range(3))

    def forward(self, x, attention_mask, position_ids):
        late = None
        if not attention_mask.all() or (position_ids.diff() != 1).any():
            late = (attention_mask * position_ids)[..., None]
        for index, layer in enumerate(self.layers):
            x = layer(x, late if index == 2 else None)
        return x


class LateMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mask):
        x = torch.tanh(self.inner(x))
        return self.outer(x if mask is None else x * mask)


@pytest.mark.parametrize("other", ["masked", "packed"])
def test_numbers_in_masks_and_positions_decide_what_later_blocks_are_given(other):
    torch.manual_seed(7)
    ones, counted = torch.ones(1, 6, dtype=torch.long), torch.arange(6)[None]
    masks = [ones, mask(6, 2) if other == "masked" else ones, ones]
    positions = [counted, counted % 3 if other == "packed" else counted, counted]
    items = [
        {"x": torch.randn(1, 6, 8), "attention_mask": one, "position_ids": place}
        for one, place in zip(masks, positions, strict=True)
    ]
    model = LateMask().eval()
    found = survey(model)
    with evaluation(model):
        for unit in CalibrationStream(model, items, found.block_lists, found.targets).units():
            plain = linear_inputs(model, lambda: [model(**item) for item in items])
            walked = linear_inputs(model, unit.run)
            for name in unit.layers:
                assert all(map(torch.equal, walked[name], plain[name])), name
            unit.advance()


class Chained(nn.Module):
    """Blocks in a row, between which something may happen in place; later items may skip the last block."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.kind = kind
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            if self.kind == "skips" and x.shape[0] > 3 and index == 2:
                break
            x = layer(x)
            if self.kind == "in place":
                x.mul_(0.5)
        return x


@pytest.mark.parametrize("kind", ["skips", "in place"])
def test_what_is_no_chain_on_some_item_is_run_whole(kind):
    torch.manual_seed(5)
    items = [torch.randn(3, 8), torch.randn(5, 8)]
    model = Chained(kind).eval()
    found = survey(model)
    with evaluation(model):
        for unit in CalibrationStream(model, items, found.block_lists, found.targets).units():
            plain = linear_inputs(model, lambda: [model(item) for item in items])
            walked = linear_inputs(model, unit.run)
            for name in unit.layers:
                assert all(map(torch.equal, walked[name], plain[name])), name
                assert len(walked[name]) == len(plain[name])
            unit.advance()


def test_bad_item_is_named_before_any_change(tiny_llama):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    items = [text(8), text(8), {"pixels": torch.zeros(1)}]
    with pytest.raises(nncf.ValidationError, match="cannot be run on item 2 of the calibration dataset.*input_ids"):
        nncf_ext.compress(model, "sparse_wanda", ratio=0.5, dataset=nncf.Dataset(items))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
