"""Levels of pruned keys and values: the rule in torch, and the fewest bytes within a divergence."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import nncf
import numpy as np
import pytest
import torch

import nncf_ext
import ov_ext
from nncf_ext.algorithms.attention_pruning.algorithm import _cheapest
from nncf_ext.exploration.space import SearchSpace

ASSETS = Path(__file__).parents[2] / "samples" / "assets"


def by_the_rule(token: np.ndarray, level: float, values: str) -> np.ndarray:
    """One token of one head, element by element, as ov_ext/cpu_plugin/sparse_attention/format.md says."""
    keep = len(token) - math.floor(len(token) * level)
    size = [int(bits) >> 16 & 0x7FFF for bits in token.view(np.uint32)]
    kept = sorted(range(len(token)), key=lambda i: (-size[i], i))[:keep]
    peak, most = max(map(abs, token)), 127 if values == "int8" else 8
    result = np.zeros_like(token)
    for i in kept if peak >= 2.0**-120 else ():
        code = np.round(token[i] / (peak / most))
        if values == "int4" and code == 0:
            code = -1 if token[i] < 0 else 1
        result[i] = code * (peak / most)
    return result


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.9])
def test_tokens_are_pruned_by_the_rule(values: str, level: float) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 140, 16)).astype(np.float32)
    x[0, 0, 5] = 0
    x[0, 0, 6] = 1  # equals: the lower index stays
    x[0, 0, 7, :8] = 1.0001  # equals, too, when bfloat16 is cut off
    x[0, 0, 7, 8:] = 1.0002
    found = nncf_ext.prune_tokens(torch.from_numpy(x), level, values=values, sink=3, recent=70).numpy()
    expected = x.copy()
    for place in np.ndindex(2, 3):
        for token in range(3, 3 + 64):  # one page of 137 - 70
            expected[place][token] = by_the_rule(x[place][token], level, values)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_short_sequence_stays_and_what_is_not_finite_is_lost() -> None:
    x = torch.randn(1, 1, 100, 16)
    assert torch.equal(nncf_ext.prune_tokens(x, 0.5), x)
    x[0, 0, 10, 3] = math.inf
    found = nncf_ext.prune_tokens(x, 0.5, sink=0, recent=0)
    assert found[0, 0, 10].isnan().all() and found[0, 0, 11].isfinite().all()


@pytest.fixture(scope="module")
def lm() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def items(lm: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(ASSETS / "tiny_lm")((ASSETS / "calibration.txt").read_text()[:6000])[
        "input_ids"
    ]
    return [{"input_ids": torch.tensor(ids[at : at + 260])[None]} for at in (0, 300)]


def divergence(
    lm: torch.nn.Module, items: list[dict[str, torch.Tensor]], levels: dict[int, tuple[float, float]]
) -> float:
    """Anew: 220 tokens read densely, pruned element by element, 40 predicted."""
    from transformers import DynamicCache

    total = 0.0
    with torch.no_grad():
        for item in items:
            cache = DynamicCache(config=lm.config)
            lm(input_ids=item["input_ids"][:, :220], past_key_values=cache)
            dense = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
            sparse = [tuple(x.clone() for x in pair) for pair in dense]
            for layer, pair in enumerate(sparse):
                for x, level in zip(pair, levels[layer], strict=True):
                    for head in range(x.shape[1]):
                        for token in range(4, 4 + 128):
                            x[0, head, token] = torch.from_numpy(by_the_rule(x[0, head, token].numpy(), level, "int8"))
            p, q = (
                lm(input_ids=item["input_ids"][:, 220:], past_key_values=DynamicCache(past)).logits[0].log_softmax(-1)
                for past in (dense, sparse)
            )
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(items)


@pytest.mark.slow
def test_the_fewest_bytes_within_a_divergence(lm: torch.nn.Module, items: list[dict[str, torch.Tensor]]) -> None:
    found = {}
    for most in (0.003, 0.03):
        found[most] = nncf_ext.find_attention_levels(
            lm, nncf.Dataset(items), max_divergence=most, levels=(0.5, 0.9), predicted=40
        )
        assert found[most].unpruned < found[most].divergence <= most
        assert found[most].divergence == pytest.approx(divergence(lm, items, found[most].layers), rel=1e-3, abs=1e-6)
    little, much = found[0.003], found[0.03]
    assert much.token_bytes < little.token_bytes < little.unpruned_bytes
    # One level everywhere that is as good takes more.
    config = lm.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for level in (0.5, 0.9):
        if divergence(lm, items, dict.fromkeys(range(config.num_hidden_layers), (level, level))) <= 0.03:
            kept = 2 * (dim - math.floor(dim * level))
            assert much.token_bytes <= config.num_hidden_layers * heads * (kept + 2 * dim / 8 + 8)
    policy = ov_ext.SparseAttentionPolicy(layers=much.layers)
    assert policy.levels(5) == much.layers[5] and "nats a token" in str(much)
    assert json.loads(json.dumps(much.to_dict()))["layers"]["5"] == list(much.layers[5])


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_choices_are_corrected_where_losses_do_not_add_up(factor: float) -> None:
    """Measured losses are a multiple of the sum: the cheapest of all points that keep the limit is found."""
    space = SearchSpace({"a": (4, 2, 1), "b": (4, 2, 1), "c": (4, 2, 1)})
    alone = {"a": [0.0, 1.0, 3.0], "b": [0.0, 0.5, 5.0], "c": [0.0, 2.0, 2.5]}
    costs = {name: [4.0, 2.0, 1.0] for name in alone}

    def total(table: dict[str, list[float]], point: dict[str, int]) -> float:
        return sum(table[name][space.dimensions[name].index(size)] for name, size in point.items())

    best, lost = _cheapest(space, alone, costs, 4.0, lambda point: factor * total(alone, point))
    fitting = (dict(zip("abc", sizes, strict=True)) for sizes in product((4, 2, 1), repeat=3))
    least = min(total(costs, point) for point in fitting if factor * total(alone, point) <= 4)
    assert total(costs, best) == least and lost == factor * total(alone, best) <= 4


def test_what_cannot_be_asked(lm: torch.nn.Module, items: list[dict[str, torch.Tensor]]) -> None:
    dataset = nncf.Dataset(items)
    for wrong in ({"levels": (0.95,)}, {"max_divergence": 0}, {"values": "u8"}, {"predicted": 1}):
        with pytest.raises(nncf.ValidationError, match="got"):
            nncf_ext.find_attention_levels(lm, dataset, **wrong)
    with pytest.raises(nncf.ValidationError, match="of 332 tokens at least"):
        nncf_ext.find_attention_levels(lm, dataset, predicted=200)
    with pytest.raises(nncf.ValidationError, match="Rounding keys and values to int4 alone costs"):
        nncf_ext.find_attention_levels(lm, dataset, values="int4", max_divergence=1e-9)
    padded = [{**items[0], "attention_mask": torch.zeros(1, 260, dtype=torch.int64)}]
    with pytest.raises(nncf.ValidationError, match="without padding"):
        nncf_ext.find_attention_levels(lm, nncf.Dataset(padded))


def test_a_sliding_window_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(num_hidden_layers=1, vocab_size=50, sliding_window=16, **sizes)).eval()
    dataset = nncf.Dataset([{"input_ids": torch.zeros(1, 200, dtype=torch.int64)}])
    with pytest.raises(nncf.UnsupportedModelError, match="sliding windows"):
        nncf_ext.find_attention_levels(model, dataset)
