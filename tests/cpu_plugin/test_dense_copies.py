"""Sparse weights on CPUs that are faster with dense ones: the copies, their memory, and what users are told."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from ov_ext.cpu_plugin.sparse_matmul import native
from tests.cpu_plugin.conftest import KERNELS, make_weight
from tests.cpu_plugin.test_kernels import KIND_GROUPS

CRC = slice(112, 120)  # of the header: 0 in a copy
OLDER = [name for name in ("avx2", "avx512_core") if name in KERNELS]


@pytest.mark.parametrize("kind, group", KIND_GROUPS)
@pytest.mark.parametrize("n, k", [(1, 1), (63, 64), (65, 513), (130, 1200)])
def test_an_expanded_blob_is_the_dense_one(n: int, k: int, kind: str, group: int) -> None:
    for sparsity, bias, f32 in ((0.5, True, False), (0.97, False, True), (0.0, False, False)):
        weight = make_weight(kind, n, k, group=group, sparsity=sparsity, bias=bias, f32=f32)
        dense = native.pack(weight, dense=True)
        expanded = native.expand(native.pack(weight))
        dense[CRC] = 0
        assert np.array_equal(expanded, dense)
        native.validate(expanded)


def test_a_dense_blob_cannot_be_expanded() -> None:
    with pytest.raises(ValueError, match="only a sparse weight"):
        native.expand(native.pack(make_weight("int8", 20, 100), dense=True))


# Compiles layers and prints bytes of copies: before, with each, and when all are gone. Outputs are those of the kernel.
PROGRAM = """
import gc, sys
import numpy as np, openvino as ov
import ov_ext
from ov_ext.cpu_plugin.sparse_matmul import native
from tests.cpu_plugin.conftest import make_weight
from tests.cpu_plugin.test_operation import F32, model

LAYERS = ("int4", 128, 0.5), ("int4", 128, 0.9), ("int8", 0, 0.02), ("int8", 0, 0.9), ("bf16", 0, 0.5)
core, x = ov_ext.add_extension(ov.Core()), np.ones((2, 512), np.float32)
sizes, kept = [native.bytes_of_dense_copies()], []
for kind, group, zeros in LAYERS:
    blob = native.pack(make_weight(kind, 2000, 512, group=group, sparsity=zeros))
    kept.append(core.compile_model(model([-1, 512], blob, n=2000, k=512, kind=kind), "CPU", F32))
    sizes.append(native.bytes_of_dense_copies())
    assert np.array_equal(kept[-1](x)[0], native.matmul(x, blob)), kind
    assert native.bytes_of_dense_copies() == sizes[-1]
with native.no_dense_copies():
    blob = native.pack(make_weight("int4", 2000, 512, group=128))
    kept.append(core.compile_model(model([-1, 512], blob, n=2000, k=512), "CPU", F32))
sizes.append(native.bytes_of_dense_copies())
del kept
gc.collect()
print(*sizes, native.bytes_of_dense_copies())
"""


def run(**environment: str) -> tuple[list[int], str]:
    """Sizes that the program prints, and what users read."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()], done.stderr


def dense(kind: str, group: int) -> int:
    return native.pack(make_weight(kind, 2000, 512, group=group), dense=True).nbytes


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER or [pytest.param("", marks=pytest.mark.skip(reason="this CPU has no AVX2"))])
def test_weights_are_expanded_once_where_dense_ones_are_faster(isa: str) -> None:
    sizes, said = run(OV_EXT_ISA=isa)
    grown = list(np.diff(sizes[:-1]))
    assert sizes[0] == sizes[-1] == 0
    assert grown == [dense("int4", 128), dense("int4", 128), dense("int8", 0), 0, 0, 0]
    [line] = [line for line in said.splitlines() if line.startswith("ov_ext")]
    assert f"faster with {isa}" in line and "OV_EXT_EXPAND_MIB" in line


@pytest.mark.slow
def test_no_weight_is_expanded_for_a_kernel_with_expand_instructions() -> None:
    best = next(name for name in KERNELS if name in ("avx512", "reference"))
    assert run(OV_EXT_ISA=best) == ([0] * 8, "")


@pytest.mark.slow
@pytest.mark.skipif(not OLDER, reason="this CPU has no AVX2")
def test_memory_for_copies_has_a_limit() -> None:
    sizes, said = run(OV_EXT_ISA=OLDER[0], OV_EXT_EXPAND_MIB="1")
    assert max(sizes) == sizes[1] == dense("int4", 128) and len(said.splitlines()) == 2
    assert "no room for dense copies in 1 MiB" in said
    assert run(OV_EXT_ISA=OLDER[0], OV_EXT_EXPAND_MIB="0") == ([0] * 8, "")  # who chose it need not be told


# Two models whose constants share memory of the user's, written anew in between with a blob of the same size.
REUSED = """
import numpy as np, openvino as ov
import ov_ext
from dataclasses import replace
from ov_ext.cpu_plugin.sparse_matmul import native
from tests.cpu_plugin.conftest import make_weight
from openvino import opset13 as opset
from tests.cpu_plugin.test_operation import F32, operation

weight = make_weight("int4", 200, 512, group=128)
weight = replace(weight, values=weight.values.clip(-7, 7))
blobs = native.pack(weight), native.pack(replace(weight, values=-weight.values))
core, x, memory = ov_ext.add_extension(ov.Core()), np.ones((2, 512), np.float32), blobs[0].copy()
models = []
for blob in blobs:
    memory[:] = blob
    activations = opset.parameter([-1, 512], np.float32)
    product = operation(activations, ov.op.Constant(memory, shared_memory=True), n=200, k=512)
    models.append(core.compile_model(ov.Model([opset.result(product)], [activations], "m"), "CPU", F32))
    assert np.array_equal(models[-1](x)[0], native.matmul(x, blob))
assert native.bytes_of_dense_copies() > native.pack(weight, dense=True).nbytes
"""


@pytest.mark.skipif(not OLDER, reason="this CPU has no AVX2")
def test_memory_that_holds_another_blob_gets_another_copy() -> None:
    subprocess.run([sys.executable, "-c", REUSED], env=os.environ | {"OV_EXT_ISA": OLDER[0]}, check=True)
