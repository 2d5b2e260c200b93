"""The column walk against dense least squares, and the grid against NNCF's own arithmetic."""

from dataclasses import dataclass

import nncf
import numpy as np
import pytest
import torch
from torch import nn

from nncf_ext.algorithms.sparse_weights.solver import AdaptiveMask, FixedMask, dead_columns, inverse_factor, solve
from nncf_ext.weights.int4 import group_scale, round_to_grid

DAMPING = 0.01


def correlated_inputs(columns: int, tokens: int, seed: int) -> torch.Tensor:
    """Inputs [tokens, columns] whose columns share directions and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, columns, generator=generator)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.exp(torch.randn(columns, generator=generator) * 0.5)
    return (base + base[:, :1]) @ mix * sizes


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def oracle(weight, hessian, ratio, block, pattern=None, group=None):
    """
    The same walk in float64 without any factorization: before a column is treated, all columns not yet treated are the
    exact least-squares solution given those that are. The error of zeroing entry (i, j) is w^2 / inv(H[j:, j:])[0, 0].
    """
    original, done = weight.astype(np.float64), np.zeros_like(weight, dtype=np.float64)
    h = hessian.astype(np.float64).copy()
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    rows, columns = weight.shape
    first = [np.linalg.inv(h[j:, j:])[0, 0] for j in range(columns)]

    def current(j):
        correction = np.linalg.solve(h[j:, j:], h[j:, :j] @ (original[:, :j] - done[:, :j]).T).T
        return original[:, j:] + correction

    mask, codes = np.zeros_like(weight, dtype=bool), np.zeros_like(weight, dtype=np.int64)
    for j in range(columns):
        if pattern is None and j % block == 0:
            width = min(block, columns - j)
            scores = (current(j)[:, :width] ** 2 / np.array(first[j : j + width])).ravel()
            count = int(rows * (j + width) * ratio) - int(rows * j * ratio)
            chosen = np.zeros(scores.size, dtype=bool)
            chosen[np.argsort(scores, kind="stable")[:count]] = True
            mask[:, j : j + width] = chosen.reshape(rows, width)
        if pattern is not None and j % pattern[1] == 0:
            scores = current(j)[:, : pattern[1]] ** 2 / np.array(first[j : j + pattern[1]])
            order = np.argsort(scores, axis=1, kind="stable")[:, : pattern[1] - pattern[0]]
            np.put_along_axis(mask[:, j : j + pattern[1]], order, True, axis=1)
        if group is not None and j % group == 0:
            masked = np.where(mask[:, j : j + group], 0.0, current(j)[:, :group])
            low, high = -masked.min(axis=1), masked.max(axis=1)
            scale = np.where(low >= high, low, -high).astype(np.float32) / np.float32(8)
            scale = scale.astype(np.float16).astype(np.float64)
        value = np.where(mask[:, j], 0.0, current(j)[:, 0])
        if group is not None:
            codes[:, j] = np.clip(np.round(value / scale), -8, 7)
            value = (codes[:, j] * scale).astype(np.float16)
        done[:, j] = value
    return done, mask, codes


@dataclass(frozen=True)
class WalkCase:
    rows: int
    columns: int
    ratio: float
    block: int
    pattern: tuple[int, int] | None = None
    group: int | None = None

    def __str__(self):
        return f"{self.rows}x{self.columns}-{self.ratio}-{self.block}-{self.pattern}-{self.group}"


WALKS = [
    WalkCase(5, 12, 0.5, 12),
    WalkCase(1, 7, 0.3, 7),
    WalkCase(6, 20, 0.5, 8),  # blocks that do not divide the columns
    WalkCase(4, 9, 0.75, 1),
    WalkCase(3, 24, 0.5, 8, (2, 4)),
    WalkCase(3, 24, 0.5, 16, (4, 8)),
    WalkCase(4, 24, 0.0, 8, None, 8),
    WalkCase(4, 24, 0.5, 8, None, 8),
    WalkCase(4, 24, 0.5, 16, None, 8),
]


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_walk_equals_dense_least_squares(case):
    weight = random_weight(case.rows, case.columns, seed=4)
    inputs = correlated_inputs(case.columns, 200, seed=5)
    hessian = 2 * inputs.T @ inputs
    choose = AdaptiveMask(weight == 0, case.ratio, *(case.pattern or (0, None)))
    found = solve(
        weight.clone(), inverse_factor(hessian.clone(), DAMPING), choose, block_size=case.block, group_size=case.group
    )
    expected, mask, codes = oracle(weight.numpy(), hessian.numpy(), case.ratio, case.block, case.pattern, case.group)
    assert np.array_equal(found.weight.numpy() == 0, mask | (codes == 0) if case.group else mask)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=2e-3, atol=2e-4)
    if case.group:
        assert np.array_equal(found.codes.numpy(), codes)


def test_correction_lowers_the_output_error():
    weight, inputs = random_weight(16, 64, seed=6), correlated_inputs(64, 500, seed=7)
    factor = inverse_factor(2 * inputs.T @ inputs, DAMPING)
    found = solve(weight.clone(), factor, AdaptiveMask(weight == 0, 0.5), block_size=32)
    only_masked = weight.masked_fill(found.weight == 0, 0.0)
    assert int((found.weight == 0).sum()) == 16 * 64 // 2
    error = [float((inputs @ (weight - other).T).square().mean()) for other in (found.weight, only_masked)]
    assert error[0] < 0.6 * error[1]


def test_gptq_is_better_than_rounding_to_nearest():
    weight, inputs = random_weight(32, 128, seed=8), correlated_inputs(128, 1000, seed=9)
    factor = inverse_factor(2 * inputs.T @ inputs, DAMPING)
    mask = torch.rand(32, 128, generator=torch.Generator().manual_seed(1)) < 0.5
    sparse = weight.masked_fill(mask, 0.0)
    found = solve(sparse.clone(), factor, FixedMask(mask), block_size=128, group_size=64)
    scales = torch.cat([group_scale(sparse[:, :64]), group_scale(sparse[:, 64:])], dim=1)
    nearest = (round_to_grid(sparse, scales).reshape(32, 2, 64) * scales.unsqueeze(2)).reshape(32, 128).float()
    error = [float((inputs @ (sparse - other).T).square().mean()) for other in (found.weight, nearest)]
    assert error[0] < 0.8 * error[1]


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9])
def test_rounding_the_kept_weight_gives_the_codes(group, ratio):
    weight, inputs = random_weight(24, 256, seed=10), correlated_inputs(256, 600, seed=11)
    factor = inverse_factor(2 * inputs.T @ inputs, DAMPING)
    choose = AdaptiveMask(weight == 0, ratio)
    found = solve(weight.clone(), factor, choose, block_size=128, group_size=group, keep_prerounding=True)
    scales = found.scales.float().repeat_interleave(group, dim=1)
    codes = (found.prerounding / scales).round().clamp(-8, 7)
    assert torch.equal(codes, found.codes.float())
    assert torch.equal(round_to_grid(found.prerounding, found.scales), found.codes)
    assert int((found.prerounding == 0).sum()) == int(24 * 256 * ratio)
    assert torch.equal((found.codes.half() * scales.half()).float(), found.weight)


def test_masked_entries_have_code_zero_for_every_scale():
    """Scales of all sizes float16 has, both signs, a group of zeros, and groups of one sign only."""
    exponents = torch.arange(-30, 16, dtype=torch.float32)
    rows = 2 * len(exponents) + 2
    magnitudes = torch.cat([2.0**exponents, -(2.0**exponents), torch.zeros(2)]).unsqueeze(1)
    weight = random_weight(rows, 64, seed=12).clamp(-3, 3) * magnitudes
    weight[: rows // 4] = weight[: rows // 4].abs()
    mask = torch.rand(rows, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    found = solve(weight.clone(), torch.eye(64), FixedMask(mask), block_size=64, group_size=64)
    assert bool((found.codes[mask] == 0).all())
    assert bool((found.weight[mask] == 0).all())
    assert bool((found.scales != 0).all()) and bool(found.scales.isfinite().all())
    assert int(found.codes.min()) == -8 and int(found.codes.max()) == 7


def test_masked_entries_do_not_widen_the_scale():
    weight = random_weight(6, 64, seed=17).clamp(-2, 2)
    mask = torch.zeros(6, 64, dtype=torch.bool)
    mask[:, 7] = True
    large = weight.clone()
    large[:, 7] = 100.0
    found, plain = (
        solve(each.masked_fill(mask, 0.0) if each is weight else each, torch.eye(64), FixedMask(mask),
              block_size=64, group_size=64)
        for each in (large, weight)
    )  # fmt: skip
    assert torch.equal(found.scales, plain.scales)
    assert torch.equal(found.codes, plain.codes)


class OneLinear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data = weight

    def forward(self, inputs):
        return self.linear(inputs)


def test_scales_follow_nncf():
    """On an uncorrelated Hessian GPTQ is rounding to nearest, so NNCF's own INT4_SYM must give the same scales."""
    weight = random_weight(48, 256, seed=13)
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2, :128] = 0.0
    stock = nncf.compress_weights(
        OneLinear(weight.clone()),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=128,
        all_layers=True,
        dataset=nncf.Dataset([torch.zeros(1, 256)]),
    )
    hook = next(module for name, module in stock.named_modules() if name.endswith("linear:weight__0.0"))
    found = solve(weight.clone(), torch.eye(256), FixedMask(weight == 0), block_size=128, group_size=128)
    assert torch.equal(hook._scale.squeeze(2), found.scales)
    stock_weight = hook(stock.linear.weight)
    # NNCF rounds with the scale before it becomes float16; codes may differ only where that crosses a half.
    differing = stock_weight != found.weight
    assert int(differing.sum()) < 20
    spacing = found.scales.float().abs().repeat_interleave(128, dim=1)
    assert bool(((stock_weight - found.weight).abs() <= 1.01 * spacing).all())


def test_dead_columns_are_found_and_do_not_change_the_others():
    inputs = correlated_inputs(16, 100, seed=14)
    inputs[:, [3, 11]] = 0.0
    alive = [column for column in range(16) if column not in (3, 11)]
    hessian = 2 * inputs.T @ inputs
    assert dead_columns(hessian).nonzero().flatten().tolist() == [3, 11]
    factor = inverse_factor(hessian.clone(), DAMPING)
    reduced = inverse_factor(hessian[alive][:, alive].clone(), DAMPING)
    torch.testing.assert_close(factor[alive][:, alive], reduced)


def test_singular_hessian_is_damped_until_it_can_be_factored():
    inputs = torch.ones(3, 32) * 1e4
    factor = inverse_factor(2 * inputs.T @ inputs, 1e-9)
    assert bool(factor.isfinite().all())


def test_hessian_that_is_not_finite_is_refused():
    with pytest.raises(nncf.ValidationError, match="cannot be inverted"):
        inverse_factor(torch.full((4, 4), float("nan")), DAMPING)


def test_zeros_of_the_weight_stay_and_count():
    weight, inputs = random_weight(8, 64, seed=15), correlated_inputs(64, 300, seed=16)
    inputs[:, 32:] = inputs[:, :32] + 0.1 * inputs[:, 32:]  # what is pruned on the left is wanted back on the right
    zeros = torch.zeros(8, 64, dtype=torch.bool)
    zeros[:, 32::2] = True
    weight[zeros] = 0.0
    factor = inverse_factor(2 * inputs.T @ inputs, DAMPING)
    found = solve(weight.clone(), factor, AdaptiveMask(zeros, 0.5), block_size=32).weight
    assert bool((found[zeros] == 0).all())
    assert int((found == 0).sum()) == 8 * 64 // 2
