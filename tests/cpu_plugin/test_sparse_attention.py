"""The packed cache and its kernels against float64: format, attention over any boundary, beams, masks."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ov_ext.cpu_plugin.sparse_attention.native import Cache, CacheSettings, block_bytes, pack_block, unpack_block
from ov_ext.cpu_plugin.support.native import cpu_info
from tests.cpu_plugin.test_memory import between_forbidden_pages

KERNELS = [
    name for name in ("avx512", "avx512_core_vnni", "avx512_core", "avx2", "reference") if name in cpu_info()["kernels"]
]


def pruned(x: np.ndarray, level: float, values: str) -> np.ndarray:
    """The rule of format.md: what packing makes of ``[..., head_dim]``."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    keep = x.shape[-1] - int(np.floor(x.shape[-1] * level))
    magnitude = x.reshape(rows.shape).view(np.uint32) >> 16 & 0x7FFF
    result = np.zeros_like(rows)
    for row, one, size in zip(result, rows, magnitude, strict=True):
        kept = np.argsort(-size.astype(int), kind="stable")[:keep]
        peak = np.abs(one).max()
        if not np.isfinite(peak):
            row[kept] = np.nan
        elif peak >= 2.0**-120 and values == "int8":
            scale = peak / 127
            row[kept] = np.round(one[kept] / scale) * scale
        elif peak >= 2.0**-120:
            scale = peak / 8
            level_of = np.clip(np.round(one[kept] / scale), -8, 8)
            level_of = np.where(level_of == 0, np.where(one[kept] < 0, -1, 1), level_of)
            row[kept] = level_of * scale
    return result.reshape(x.shape)


class Oracle:
    """Naive attention in float64 over every token, each stored as format.md says: dense, or pruned on its own."""

    def __init__(self, settings: CacheSettings, sequences: int) -> None:
        self.s = settings
        shape = (sequences, settings.heads, 0, settings.head_dim)
        self.k = self.v = np.zeros(shape, np.float32)

    def packed_range(self) -> slice:
        count = self.k.shape[2]
        pages = max(0, count - self.s.sink - self.s.recent) // 64 if count >= self.s.pack_from else 0
        return slice(self.s.sink, self.s.sink + 64 * pages)

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        self.k, self.v = np.concatenate([self.k, k], 2), np.concatenate([self.v, v], 2)

    def attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray | None, causal: bool
    ) -> np.ndarray:
        keys, values = (x.astype(np.float64) for x in (self.k, self.v))
        packed = self.packed_range()
        keys[:, :, packed] = pruned(self.k[:, :, packed], self.s.k_level, self.s.values)
        values[:, :, packed] = pruned(self.v[:, :, packed], self.s.v_level, self.s.values)
        keys, values = np.concatenate([keys, k], 2), np.concatenate([values, v], 2)
        group, past, count = q.shape[1] // k.shape[1], self.k.shape[2], q.shape[2]
        keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
        scores = np.einsum("bhqd,bhkd->bhqk", q.astype(np.float64), keys) * scale
        if mask is not None:
            scores = scores + mask[:, None]
        if causal:
            scores = np.where(np.arange(past + count) <= past + np.arange(count)[:, None], scores, -np.inf)
        most = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(most), most, 0))
        total = weights.sum(-1, keepdims=True)
        return np.einsum("bhqk,bhkd->bhqd", weights / np.where(total > 0, total, 1), values)


def tokens(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Keys or values as models have them: some dimensions much larger than the others."""
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1]) * 0.7)
    return x.astype(np.float32)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Scores are right to 2^-15 of their terms and weights to 2^-16 of the largest: this is ten times that."""
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize(
    ("head_dim", "k_level", "v_level"), [(16, 0.5, 0.9), (64, 0.0, 0.3), (80, 0.7, 0.5), (256, 0.9, 0.0)]
)
def test_a_block_holds_what_the_rule_keeps(values: str, head_dim: int, k_level: float, v_level: float) -> None:
    rng = np.random.default_rng(head_dim)
    k, v = tokens(rng, 64, head_dim), tokens(rng, 64, head_dim)
    k[3] = 0
    k[4] = 1  # ties: the lower index is kept
    v[5, 7] = np.inf
    s = CacheSettings(head_dim, 1, k_level, v_level, values)
    block = pack_block(s, k, v)
    found_k, found_v = unpack_block(s, block)
    np.testing.assert_allclose(found_k, pruned(k, k_level, values), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(found_v, pruned(v, v_level, values), rtol=1e-6, atol=1e-30)
    kept = [head_dim - int(head_dim * level) for level in (k_level, v_level)]
    bits = 8 if values == "int8" else 4
    exact = 2 * 64 * 4 + 2 * 64 * head_dim // 8 + 64 * sum(kept) * bits // 8
    assert block_bytes(s) == len(block) == -(-exact // 64) * 64


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize(
    ("head_dim", "group", "heads", "values"),
    [
        (64, 4, 2, "int8"),
        (80, 1, 1, "int4"),
        (128, 7, 1, "int8"),
        (96, 3, 2, "int4"),
        (256, 2, 1, "int8"),
        (16, 1, 3, "int8"),
    ],
)
def test_attention_equals_float64_over_every_boundary(
    isa: str, head_dim: int, group: int, heads: int, values: str
) -> None:
    rng = np.random.default_rng(head_dim)
    s = CacheSettings(head_dim, heads, 0.5, 0.7, values, sink=3, recent=32)
    cache, oracle = Cache(s), Oracle(s, 1)
    # Sums are 3, 98, 99 (the first page leaves), 100, 162, 163 (the second one), 227, 900, 901, 908.
    for count in (3, 95, 1, 1, 62, 1, 64, 673, 1, 7):
        k, v = tokens(rng, 1, heads, count, head_dim), tokens(rng, 1, heads, count, head_dim)
        q = tokens(rng, 1, heads * group, count, head_dim)
        if count < 100:
            found = cache.attend(q, k, v, head_dim**-0.5, isa=isa)
            close(found, oracle.attend(q, k, v, head_dim**-0.5, None, causal=True))
            assert np.array_equal(found, cache.attend(q, k, v, head_dim**-0.5, isa="reference"))
        cache.append(k, v)
        oracle.append(k, v)
        assert cache.pages * 64 == oracle.packed_range().stop - 3


@pytest.mark.parametrize("pack_from", [1, 150, 500])
def test_a_short_context_is_attended_to_as_it_is_and_then_packed_at_once(pack_from: int) -> None:
    rng = np.random.default_rng(pack_from)
    s = CacheSettings(32, 2, 0.9, 0.5, sink=4, recent=16, pack_from=pack_from)
    cache, oracle = Cache(s, 2), Oracle(s, 2)
    dense = 2 * 2 * 2 * 32 * 4  # bytes of a token
    for count in (60, 1, 88, 1, 130, 219, 1, 1, 70):
        k, v, q = tokens(rng, 2, 2, count, 32), tokens(rng, 2, 2, count, 32), tokens(rng, 2, 6, count, 32)
        close(cache.attend(q, k, v, 0.2), oracle.attend(q, k, v, 0.2, None, causal=True))
        cache.append(k, v)
        oracle.append(k, v)
        assert cache.pages * 64 == oracle.packed_range().stop - 4
        packed = 2 * 2 * cache.pages * block_bytes(s)
        assert cache.nbytes <= packed + dense * max(4 + 16 + 64, 2 * cache.tokens if not cache.pages else 0)
    assert cache.pages and cache.tokens == 571


@pytest.mark.parametrize("isa", KERNELS)
def test_beams_continue_what_they_name(isa: str) -> None:
    rng = np.random.default_rng(0)
    s = CacheSettings(32, 2, 0.5, 0.5, sink=2, recent=16)
    cache, oracle = Cache(s), Oracle(s, 1)
    k, v = tokens(rng, 1, 2, 150, 32), tokens(rng, 1, 2, 150, 32)
    cache.append(k, v)
    oracle.append(k, v)
    one = cache.nbytes
    for source in ([0, 0, 0], [2, 0, 0], *([[1, 2, 0]] * 70), [1, 1]):
        cache.reorder(np.array(source))
        oracle.k, oracle.v = oracle.k[source], oracle.v[source]
        shape = (len(source), 2, 1, 32)
        k, v, q = tokens(rng, *shape), tokens(rng, *shape), tokens(rng, len(source), 4, 1, 32)
        close(cache.attend(q, k, v, 0.2, isa=isa), oracle.attend(q, k, v, 0.2, None, causal=True))
        cache.append(k, v)
        oracle.append(k, v)
    shared = 2 * block_bytes(s) * 2  # two pages of two heads, which all beams have in common
    assert cache.nbytes < 2 * (one - shared) + shared + 2 * 2 * 2 * block_bytes(s)
    with pytest.raises(ValueError, match="beam_idx names sequence 2, there are 2"):
        cache.reorder(np.array([0, 2]))


@pytest.mark.parametrize("isa", KERNELS)
def test_masks_add_and_an_empty_row_gives_zeros(isa: str) -> None:
    rng = np.random.default_rng(1)
    s = CacheSettings(48, 1, 0.3, 0.3, sink=0, recent=0)
    cache, oracle = Cache(s, 3), Oracle(s, 3)
    k, v = tokens(rng, 3, 1, 200, 48), tokens(rng, 3, 1, 200, 48)
    cache.append(k, v)
    oracle.append(k, v)
    k, v, q = tokens(rng, 3, 1, 2, 48), tokens(rng, 3, 1, 2, 48), tokens(rng, 3, 5, 2, 48)
    mask = rng.standard_normal((3, 2, 202)).astype(np.float32)
    mask[1, :, :130] = -np.inf  # whole blocks, and a part of one: padding on the left
    mask[2, 0] = -np.inf
    found = cache.attend(q, k, v, 0.15, mask, causal=False, isa=isa)
    close(found, oracle.attend(q, k, v, 0.15, mask, causal=False))
    assert (found[2, :, 0] == 0).all()
    mask[2, 0] = np.finfo(np.float16).min  # what exported models have for -inf
    close(cache.attend(q, k, v, 0.15, mask, causal=False, isa=isa), oracle.attend(q, k, v, 0.15, mask, causal=False))
    shared = mask[:1, :1]
    close(cache.attend(q, k, v, 0.15, shared, causal=True, isa=isa), oracle.attend(q, k, v, 0.15, shared, causal=True))


@pytest.mark.parametrize("isa", KERNELS)
def test_nothing_finite_is_made_of_nan_and_infinity(isa: str) -> None:
    rng = np.random.default_rng(2)
    for of_key in (True, False):
        cache = Cache(CacheSettings(32, 2, 0.5, 0.5, sink=0, recent=0))
        k, v = tokens(rng, 1, 2, 128, 32), tokens(rng, 1, 2, 128, 32)
        (k if of_key else v)[0, 1, 70, 5] = np.inf if of_key else np.nan
        cache.append(k, v)
        new = tokens(rng, 1, 2, 1, 32)
        found = cache.attend(new, new, new, 0.2, isa=isa)
        assert np.isfinite(found[0, 0]).all() and np.isnan(found[0, 1]).all()


def test_without_pruning_only_rounding_to_8_bits_is_left() -> None:
    rng = np.random.default_rng(3)
    s, dense = CacheSettings(64, 2, 0.0, 0.0, recent=64), Oracle(CacheSettings(64, 2, recent=10**6), 1)
    cache = Cache(s)
    k, v = tokens(rng, 1, 2, 500, 64), tokens(rng, 1, 2, 500, 64)
    cache.append(k, v)
    dense.append(k, v)
    new, q = tokens(rng, 1, 2, 1, 64), tokens(rng, 1, 8, 1, 64)
    found, expected = cache.attend(q, new, new, 0.125), dense.attend(q, new, new, 0.125, None, causal=True)
    # Half a step of each key moves a score by sum|q| * max|k| / 254 at most, so a weight by that factor, up and down;
    # half a step of the values comes on top.
    moved = np.abs(q).sum(-1).max() * np.abs(k).max() / 254 * 0.125
    bound = (np.exp(2 * moved) - 1) * np.abs(v).max() + np.abs(v).max() / 254
    assert np.abs(found - expected).max() <= bound
    assert np.abs(found - expected).max() <= 0.02 * np.abs(v).max()  # what these numbers give, and not by far


@pytest.mark.parametrize("count", [1, 40])
def test_results_have_the_same_bits_for_any_number_of_threads(count: int) -> None:
    rng = np.random.default_rng(4)
    results = []
    k, v = tokens(rng, 2, 3, 1500, 64), tokens(rng, 2, 3, 1500, 64)
    new, q = tokens(rng, 2, 3, count, 64), tokens(rng, 2, 6, count, 64)
    for threads in (1, 2, 3, 7):
        cache = Cache(CacheSettings(64, 3), 2)
        cache.append(k, v, threads=threads)
        results += [cache.attend(q, new, new, 0.125, isa=isa, threads=threads) for isa in KERNELS]
    assert all((each == results[0]).all() for each in results)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_gives_the_same_bits_on_every_kernel(data: st.DataObject) -> None:
    draw, some = data.draw, st.sampled_from((0.0, 0.25, 0.5, 0.7, 0.9))
    head_dim, heads, group = 16 * draw(st.integers(1, 16)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    windows = {
        "sink": draw(st.integers(0, 5)),
        "recent": draw(st.integers(0, 70)),
        "pack_from": draw(st.integers(0, 300)),
    }
    s = CacheSettings(head_dim, heads, draw(some), draw(some), draw(st.sampled_from(("int8", "int4"))), **windows)
    batch, rng = draw(st.integers(1, 2)), np.random.default_rng(draw(st.integers(0, 99)))
    cache, oracle = Cache(s, batch), Oracle(s, batch)
    for count in (draw(st.integers(1, 260)), draw(st.integers(1, 9))):
        k, v = tokens(rng, batch, heads, count, head_dim), tokens(rng, batch, heads, count, head_dim)
        q = tokens(rng, batch, heads * group, count, head_dim)
        if count < 10:
            mask = None
            if draw(st.booleans()):
                mask = rng.standard_normal((batch, count, oracle.k.shape[2] + count)).astype(np.float32)
                mask[rng.random(mask.shape) < draw(st.sampled_from((0.1, 0.9, 1.0)))] = -np.inf  # the last: empty rows
            found = [cache.attend(q, k, v, head_dim**-0.5, mask, isa=isa) for isa in KERNELS]
            assert all((each == found[0]).all() for each in found)
            close(found[0], oracle.attend(q, k, v, head_dim**-0.5, mask, causal=True))
        cache.append(k, v)
        oracle.append(k, v)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_long_context_equals_float64_on_every_kernel(values: str) -> None:
    rng, s = np.random.default_rng(7), CacheSettings(32, 1, 0.5, 0.7, values)
    cache, oracle = Cache(s), Oracle(s, 1)
    for count in (16383, 1, 1):
        k, v, q = tokens(rng, 1, 1, count, 32), tokens(rng, 1, 1, count, 32), tokens(rng, 1, 3, 1, 32)
        if count == 1:
            expected = oracle.attend(q, k, v, 0.2, None, causal=True)
            found = [cache.attend(q, k, v, 0.2, isa=isa) for isa in KERNELS]
            close(found[0], expected)
            assert all((each == found[0]).all() for each in found)
        cache.append(k, v)
        oracle.append(k, v)
    assert cache.pages == (16385 - 4 - 64) // 64


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("at_the_end", [True, False], ids=["end", "start"])
def test_nothing_outside_of_the_inputs_is_touched(isa: str, at_the_end: bool) -> None:
    rng = np.random.default_rng(5)
    for head_dim, group, count in ((16, 1, 1), (80, 3, 2), (64, 5, 7)):
        cache = Cache(CacheSettings(head_dim, 2, sink=1, recent=3), 2)
        cache.append(tokens(rng, 2, 2, 200, head_dim), tokens(rng, 2, 2, 200, head_dim))
        inputs = [tokens(rng, 2, heads, count, head_dim) for heads in (2 * group, 2, 2)]
        mask = rng.standard_normal((2, count, 200 + count)).astype(np.float32)
        guards = [between_forbidden_pages(x, at_the_end) for x in (*inputs, mask)]
        with guards[0] as q, guards[1] as k, guards[2] as v, guards[3] as m:
            found = cache.attend(q, k, v, 0.2, m, isa=isa)
            assert np.array_equal(found, cache.attend(*inputs, 0.2, mask, isa=isa))
            cache.append(k, v)
        assert np.isfinite(found).all() and cache.tokens == 200 + count


def test_resident_memory_is_what_the_formula_says() -> None:
    """16k tokens of 8 heads: masks, codes and scales, and dense tokens at both ends."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    rng = np.random.default_rng(6)
    k, v = tokens(rng, 1, 8, 1024, 64), tokens(rng, 1, 8, 1024, 64)
    Cache(CacheSettings(64, 8)).append(k[:, :, :70], v[:, :, :70])  # what threads keep
    ctypes.CDLL(None).malloc_trim(0)  # else pages would lie in memory that was freed before
    cache, before = Cache(CacheSettings(64, 8)), resident()
    for _ in range(16):
        cache.append(k, v)
    expected = 8 * (64 * cache.pages * (2 * 64 / 8 + 2 * 32 + 2 * 4) + (4 + 64 + 64) * 2 * 64 * 4)
    found = resident() - before
    assert abs(found - expected) < 0.1 * expected and abs(cache.nbytes - expected) < 0.02 * expected, (found, expected)


def test_wrong_arrays_are_refused() -> None:
    cache = Cache(CacheSettings(32, 2))
    with pytest.raises(ValueError, match="float32"):
        cache.append(np.zeros((1, 2, 1, 32)), np.zeros((1, 2, 1, 32)))
    with pytest.raises(ValueError, match=r"\[1, 2, 1, 32\] needed"):
        cache.append(np.zeros((1, 2, 1, 16), np.float32), np.zeros((1, 2, 1, 16), np.float32))
