"""Weights and kernels the plug-in tests share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ov_ext.cpu_plugin.support import native
from ov_ext.cpu_plugin.support.weight import Weight

KERNELS = native.cpu_info()["kernels"]


def make_weight(
    kind: str,
    n: int,
    k: int,
    *,
    group: int = 0,
    sparsity: float = 0.5,
    f32: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Weight:
    """A random weight with the full range of codes and signed scales."""
    rng = np.random.default_rng([seed, n, k])
    scales = None
    if kind == "bf16":
        values = (rng.standard_normal((n, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        low, high = (-128, 128) if kind == "int8" else (-8, 8)
        values = rng.integers(low, high, (n, k)).astype(np.int8)
        groups = -(-k // group) if group else 1
        scales = (rng.standard_normal((n, groups)) / 8).astype(np.float32 if f32 else np.float16)
    values[rng.random((n, k)) < sparsity] = 0
    return Weight(kind, values, scales, group, rng.standard_normal(n).astype(np.float32) if bias else None)


@pytest.fixture
def weight() -> Callable[..., Weight]:
    return make_weight


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Every kernel this CPU can run, the reference kernel last."""
    return request.param


ONE_CPU = len(os.sched_getaffinity(0)) == 1


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[[Callable[[], Mapping[Any, np.ndarray]], str], None]:
    """Checks that an inference fails with a message. On one CPU OpenVINO loses errors: all outputs are NaN then."""

    def check(infer: Callable[[], Mapping[Any, np.ndarray]], message: str) -> None:
        if not ONE_CPU:
            with pytest.raises(RuntimeError, match=message):
                infer()
            return
        assert all(np.isnan(y).all() for y in infer().values())
        [line] = capfd.readouterr().err.splitlines()
        assert re.search(message, line)

    return check
