"""Weights and kernels the plug-in tests share."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ov_ext.cpu_plugin.sparse_matmul.pack import BLOCK_N, HEADER, NO_COMPENSATION, pack
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


def compensation(weight: Weight) -> np.ndarray:
    """int16 ``[Npad / 64, Kpad / segment, 64]``: the sums of the codes of each segment."""
    (n, k), segment = weight.shape, weight.group or 128
    padded = np.zeros((-(-n // BLOCK_N), BLOCK_N, -(-k // segment), segment), np.int64)
    for output, codes in enumerate(weight.values):
        padded[output // BLOCK_N, output % BLOCK_N].reshape(-1)[:k] = codes
    return padded.sum(axis=3).transpose(0, 2, 1).astype(np.int16)


def with_compensation(weight: Weight, dense: bool = False) -> np.ndarray:
    """A blob of an integer weight in the older form: one section more, behind the scales."""
    blob = pack(weight, dense).tobytes()
    fields = list(HEADER.unpack_from(blob))
    flags, off_val, off_bias, size, crc, off_comp = 7, 17, 19, 20, 21, 22  # in the order of the header
    at = fields[off_bias] or fields[off_val]
    section = compensation(weight).tobytes()
    section += bytes(-len(section) % 64)
    body = blob[HEADER.size : at] + section + blob[at:]
    fields[flags] &= ~NO_COMPENSATION
    fields[off_comp] = at
    fields[off_bias] += len(section) if fields[off_bias] else 0
    fields[off_val] += len(section)
    fields[size] += len(section)
    fields[crc] = zlib.crc32(body)
    return np.frombuffer(HEADER.pack(*fields) + body, np.uint8)


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
