"""llama.cpp gets exactly the weights of the OpenVINO model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks import gguf_file
from benchmarks.llama import LlamaShape, RandomLlama
from benchmarks.weights import KINDS, random_weight

SHAPE = LlamaShape(hidden=128, mlp=256, heads=4, kv_heads=2, head_dim=32, vocab=64, layers=2)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_the_same_numbers(kind: str) -> None:
    weight = random_weight(kind, 6, 384, 0.5, np.random.default_rng(1))
    got = gguf.quants.dequantize(gguf_file.tensor(weight), gguf.GGMLQuantizationType[gguf_file.FORMATS[kind]])
    np.testing.assert_array_equal(got, weight.dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_file_has_every_tensor_with_heads_turned_in_pairs(kind: str, tmp_path: Path) -> None:
    llama, path = RandomLlama(SHAPE, kind, 0.5), tmp_path / "model.gguf"
    read = gguf_file.write(llama, path)
    reader = gguf.GGUFReader(path)
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    sizes = {t.name: t.n_bytes for t in reader.tensors}
    assert len(found) == 3 + 9 * SHAPE.layers
    assert read == sum(size for name, size in sizes.items() if "norm" not in name and "token_embd" not in name)
    np.testing.assert_array_equal(found["output.weight"], llama.head().dequantize())
    np.testing.assert_array_equal(found["token_embd.weight"], llama.embedding().dequantize())
    np.testing.assert_array_equal(found["blk.1.ffn_norm.weight"], llama.norm(3))
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], llama.weight(1, "down_proj").dequantize())
    q = llama.weight(1, "q_proj").dequantize()
    # Head 3: transformers turns output i with i + 16, llama.cpp 2 i with 2 i + 1.
    got = found["blk.1.attn_q.weight"][3 * 32 : 4 * 32]
    np.testing.assert_array_equal(got[0::2], q[3 * 32 : 3 * 32 + 16])
    np.testing.assert_array_equal(got[1::2], q[3 * 32 + 16 : 4 * 32])
