"""Where a blob, x and y lie in memory: at any address, and against a page that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from ov_ext.cpu_plugin.sparse_matmul import native
from tests.cpu_plugin.conftest import make_weight
from tests.cpu_plugin.test_kernels import KIND_GROUPS

LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def between_forbidden_pages(array: np.ndarray, at_the_end: bool) -> Iterator[np.ndarray]:
    """A copy of an array that ends where an inaccessible page begins, or begins where one ends."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = np.frombuffer(mmap.mmap(-1, size + 2 * page), np.uint8)
    guards = [ctypes.c_void_p(memory.ctypes.data), ctypes.c_void_p(memory.ctypes.data + page + size)]
    start = page + (size - array.nbytes if at_the_end else 0)
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    for guard in guards:
        assert LIBC.mprotect(guard, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    try:
        yield copy
    finally:
        for guard in guards:
            assert LIBC.mprotect(guard, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("at_the_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_nothing_outside_is_touched(kernel: str, kind: str, group: int, dense: bool, at_the_end: bool) -> None:
    """K is ragged, so a wide load of the last elements of blob or x would be noticed."""
    blob = native.pack(make_weight(kind, 65, 133, group=group, sparsity=0.2, bias=True), dense)
    for rows in (1, 2, 3, 4, 5, 8, 17):
        wide = np.random.default_rng(rows).standard_normal((rows, 133)).astype(np.float32)
        for x in (wide, (wide.view(np.uint32) >> 16).astype(np.uint16)):
            with between_forbidden_pages(blob, at_the_end) as b, between_forbidden_pages(x, at_the_end) as a:
                for activation_group in (0, 128, -1):
                    y = native.matmul(a, b, activation_group, isa=kernel)
                    assert np.array_equal(y, native.matmul(x, blob, activation_group, isa=kernel))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind, group", KIND_GROUPS)
def test_every_address_gives_the_same_bits(kernel: str, kind: str, group: int, dense: bool) -> None:
    blob = native.pack(make_weight(kind, 70, 200, group=group, bias=True), dense)
    x = np.random.default_rng(4).standard_normal((5, 200)).astype(np.float32)
    room = np.zeros(blob.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64
    for activation_group in (0, 128):
        expected = native.matmul(x, blob, activation_group, isa=kernel)
        for shift in range(64):
            at = room[start + shift : start + shift + blob.nbytes]
            at[:] = blob
            assert at.ctypes.data % 64 == shift
            y = native.matmul(x, at, activation_group, isa=kernel, checked=shift > 3)
            assert np.array_equal(y, expected)


def test_activations_that_are_not_aligned_are_copied() -> None:
    blob = native.pack(make_weight("int4", 10, 33))
    x = np.random.default_rng(0).standard_normal((2, 33)).astype(np.float32)
    room = np.zeros(x.nbytes + 1, np.uint8)
    odd = room[1:].view(np.float32).reshape(2, 33)
    odd[...] = x
    assert not odd.flags.aligned and np.array_equal(native.matmul(odd, blob), native.matmul(x, blob))
