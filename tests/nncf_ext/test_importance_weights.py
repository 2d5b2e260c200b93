"""Scores and masks against expectations written by hand and a stable sort."""

from dataclasses import dataclass

import pytest
import torch

from nncf_ext.importance.weights import (
    magnitude_score,
    optimal_brain_score,
    pattern_mask,
    smallest_mask,
    wanda_score,
)

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.5, 0.0, -0.25, 8.0]])


def test_magnitude_score():
    assert magnitude_score(WEIGHT).tolist() == [[1, 2, 3, 4], [0.5, 0, 0.25, 8]]


def test_wanda_score_multiplies_by_the_input_norm():
    mean_square = torch.tensor([16.0, 1.0, 0.0, 4.0])
    assert wanda_score(WEIGHT, mean_square).tolist() == [[4, 2, 0, 8], [2, 0, 0, 16]]


def test_optimal_brain_score_divides_by_the_factor():
    assert optimal_brain_score(WEIGHT, torch.tensor([1.0, 2.0, 0.5, 4.0])).tolist() == [
        [1, 1, 36, 1],
        [0.25, 0, 0.25, 4],
    ]


@dataclass(frozen=True)
class MaskCase:
    id: str
    scores: list[list[float]]
    count: int
    expected: list[list[int]]


@pytest.mark.parametrize(
    "case",
    [
        MaskCase("none", [[3, 1, 2, 4]], 0, [[0, 0, 0, 0]]),
        MaskCase("two", [[3, 1, 2, 4]], 2, [[0, 1, 1, 0]]),
        MaskCase("all", [[3, 1, 2, 4]], 4, [[1, 1, 1, 1]]),
        MaskCase("ties go left to right", [[5, 2, 2, 2], [0, 0, 0, 0]], 2, [[0, 1, 1, 0], [1, 1, 0, 0]]),
        MaskCase("tie at the threshold after smaller ones", [[2, 1, 2, 2]], 2, [[1, 1, 0, 0]]),
    ],
    ids=lambda case: case.id,
)
def test_smallest_mask_by_hand(case):
    assert smallest_mask(torch.tensor(case.scores), case.count).int().tolist() == case.expected


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 33, 128, 129])
def test_smallest_mask_equals_a_stable_sort(columns):
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randint(0, 5, (6, columns), generator=generator).float()  # full of ties
    for count in range(columns + 1):
        expected = torch.zeros_like(scores, dtype=torch.bool)
        expected.scatter_(1, torch.sort(scores, dim=1, stable=True).indices[:, :count], True)
        assert torch.equal(smallest_mask(scores, count), expected)


@pytest.mark.parametrize(("keep", "run"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 3)])
def test_pattern_mask_keeps_the_highest_of_each_run(keep, run):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 6, (5, 6 * run), generator=generator).float()
    mask = pattern_mask(scores, keep, run)
    for row in range(5):
        for start in range(0, 6 * run, run):
            values = scores[row, start : start + run].tolist()
            zeroed = sorted(range(run), key=lambda index: (values[index], index))[: run - keep]
            assert mask[row, start : start + run].nonzero().flatten().tolist() == sorted(zeroed)
