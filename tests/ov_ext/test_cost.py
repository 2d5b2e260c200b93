"""The cost model against the sizes of real blobs and constants, and what follows from it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ov_ext.cpu_plugin.sparse_matmul import native
from ov_ext.sparse_weights import cost
from tests.cpu_plugin.conftest import make_weight

KINDS = [("bf16", 0), ("int8", 0), ("int8", 128), ("int4", 64), ("int4", 128)]
TARGETS = sorted(cost.RATES)


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("kind, group", KINDS)
def test_bytes_are_those_of_real_weights(kind: str, group: int, zeros: float) -> None:
    weight = make_weight(kind, 1024, 2048, group=group, sparsity=zeros)
    blob = native.pack(weight, dense=zeros == 0)
    estimate = cost.bytes_per_weight(
        "dense" if zeros == 0 else "sparse", kind, float(np.mean(weight.values == 0)), group
    )
    assert blob.nbytes / (1024 * 2048) == pytest.approx(estimate, rel=0.03)
    bits = {"bf16": 16, "int8": 8, "int4": 4}[kind]
    stock = (1024 * 2048 * bits / 8 + (weight.scales.nbytes if group else 0)) / (1024 * 2048)
    assert cost.bytes_per_weight("stock", kind, zeros, group) == pytest.approx(stock)


@pytest.mark.parametrize("target, kind_group", itertools.product(TARGETS, KINDS))
def test_more_zeros_never_lead_back_to_a_denser_form(target: str, kind_group: tuple[str, int]) -> None:
    order = ["stock", "dense", "sparse"]
    forms = [order.index(cost.cheapest(target, kind_group[0], z / 100, kind_group[1])[0]) for z in range(100)]
    assert forms == sorted(forms)
    costs = [cost.costs(target, kind_group[0], z / 100, kind_group[1])["sparse"] for z in range(100)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("target, kind_group", itertools.product(TARGETS, KINDS))
def test_the_break_even_is_where_the_choice_changes(target: str, kind_group: tuple[str, int]) -> None:
    kind, group = kind_group
    needed = cost.break_even(target, kind, group)
    if needed is None:
        assert all(cost.cheapest(target, kind, z / 100, group)[0] == "stock" for z in range(100))
        return
    assert cost.cheapest(target, kind, needed, group)[0] != "stock"
    if needed > 0:
        form, _, reason = cost.cheapest(target, kind, needed - 0.01, group)
        assert form == "stock" and f"from {needed:.0%} zeros on ours is faster on {target}" in reason


@pytest.mark.parametrize("target, kind_group", itertools.product(["amx", "avx512"], KINDS))
def test_half_the_weights_zero_pay_with_avx512(target: str, kind_group: tuple[str, int]) -> None:
    form, speedup, reason = cost.cheapest(target, kind_group[0], 0.5, kind_group[1])
    assert form == "sparse" and speedup is not None and speedup >= cost.MARGIN and not reason


def test_the_reference_kernel_is_never_faster() -> None:
    form, speedup, reason = cost.cheapest("reference", "int4", 0.9, 128)
    assert form == "stock" and speedup is None and "no fast kernels for reference" in reason
