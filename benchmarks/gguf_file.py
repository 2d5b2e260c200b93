"""A random Llama as a GGUF file for llama.cpp, with exactly the weights of the OpenVINO model.

bf16 becomes BF16, INT8 becomes Q8_0 and INT4 becomes Q4_0. Their blocks hold 32 weights and an f16 scale, so codes are
taken over unchanged and the scale of an output, or of a group of 128, is repeated in each of its blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llama import EPSILON, HEAD, ROPE_BASE, RandomLlama
from ov_ext.cpu_plugin.support.weight import Weight

FORMATS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_BLOCK = 32
_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    HEAD: "output",
}


def write(llama: RandomLlama, path: Path) -> int:
    """Write a model.

    :param llama: The weights.
    :param path: The file.
    :return: Bytes of the linear layers and lm_head in it: what decoding a token reads.
    :raises ImportError: gguf is missing.
    """
    import gguf

    shape = llama.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("none")
    read = 0

    def add(name: str, weight: Weight) -> int:
        blocks = tensor(weight)
        kind = gguf.GGMLQuantizationType[FORMATS[weight.kind]]
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
        return blocks.nbytes

    add("token_embd", llama.embedding())
    for i in range(shape.layers):
        for norm, index in (("attn_norm", 2 * i), ("ffn_norm", 2 * i + 1)):
            writer.add_tensor(f"blk.{i}.{norm}.weight", llama.norm(index))
        for name in shape.linears:
            weight = llama.weight(i, name)
            if name in ("q_proj", "k_proj"):
                weight = _rotated_in_pairs(weight, shape.head_dim)
            read += add(f"blk.{i}.{_NAMES[name]}", weight)
    writer.add_tensor("output_norm.weight", llama.norm(2 * shape.layers))
    read += add(_NAMES[HEAD], llama.head())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def tensor(weight: Weight) -> np.ndarray:
    """:return: uint8 ``[N, bytes of a row]`` in the format of :data:`FORMATS`."""
    n, k = weight.shape
    if weight.scales is None:
        return weight.values.view(np.uint8)
    scales = np.repeat(weight.scales, k // _BLOCK // weight.scales.shape[1], axis=1)
    codes = weight.values.reshape(n, k // _BLOCK, _BLOCK)
    if weight.kind == "int4":  # offset by 8; the first half of a block in the low nibbles, the second in the high
        nibbles = (codes + 8).astype(np.uint8)
        codes = nibbles[..., : _BLOCK // 2] | nibbles[..., _BLOCK // 2 :] << 4
    blocks = np.concatenate([scales.astype(np.float16)[..., None].view(np.uint8), codes.view(np.uint8)], axis=2)
    return blocks.reshape(n, -1)


def _rotated_in_pairs(weight: Weight, head_dim: int) -> Weight:
    """llama.cpp turns neighbouring outputs of a head together; transformers turns output i with i + head_dim / 2."""

    def moved(rows: np.ndarray) -> np.ndarray:
        halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)

    scales: Any = None if weight.scales is None else moved(weight.scales)
    return Weight(weight.kind, moved(weight.values), scales, weight.group)
