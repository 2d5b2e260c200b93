"""The graphs compute a Llama, and a stock one runs on OpenVINO's compressed primitives."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from benchmarks import gguf_file
from benchmarks.arms import Settings, UnfairComparison, check_compressed, compile_model, linear_primitives, pack
from benchmarks.decoders import Decoder, LlamaCppDecoder, OpenVinoDecoder, TorchDecoder
from benchmarks.llama import HEAD, TINY, LlamaShape, RandomLlama, decoder, matmul_names, stack
from benchmarks.weights import KINDS

ODD = LlamaShape(hidden=128, mlp=384, heads=6, kv_heads=2, head_dim=64, vocab=77, layers=3)
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight


def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def reference_logits(llama: RandomLlama, ids: list[int]) -> np.ndarray:
    """A Llama in float64 without a cache: logits [tokens, vocab]."""
    shape, positions = llama.shape, np.arange(len(ids))
    h = llama.embedding().dequantize().astype(np.float64)[ids]

    def linear(layer: int, name: str, x: np.ndarray) -> np.ndarray:
        return x @ llama.weight(layer, name).dequantize().astype(np.float64).T

    for i in range(shape.layers):
        x = rms_norm(h, llama.norm(2 * i))
        q = rotate(linear(i, "q_proj", x).reshape(len(ids), shape.heads, shape.head_dim), positions)
        k = rotate(linear(i, "k_proj", x).reshape(len(ids), shape.kv_heads, shape.head_dim), positions)
        v = linear(i, "v_proj", x).reshape(len(ids), shape.kv_heads, shape.head_dim)
        context = np.empty_like(q)
        for head in range(shape.heads):
            shared = head // (shape.heads // shape.kv_heads)
            scores = q[:, head] @ k[:, shared].T / np.sqrt(shape.head_dim)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            context[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, shared]
        h = h + linear(i, "o_proj", context.reshape(len(ids), -1))
        x = rms_norm(h, llama.norm(2 * i + 1))
        h = h + linear(i, "down_proj", silu(linear(i, "gate_proj", x)) * linear(i, "up_proj", x))
    return rms_norm(h, llama.norm(2 * shape.layers)) @ llama.head().dequantize().astype(np.float64).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_decoder_computes_a_llama_with_a_cache(kind: str, heads: tuple[int, int]) -> None:
    shape = LlamaShape(128, 384, *heads, head_dim=64, vocab=77, layers=3)
    llama = RandomLlama(shape, kind, 0.5, seed=1)
    running = OpenVinoDecoder(ov.Core().compile_model(decoder(llama), "CPU", EXACT))
    ids = [5, 3, 76, 0, 41, 5, 12]
    expected = reference_logits(llama, ids)
    got = [running.start(np.array([ids[:4]], np.int64)).copy(), *(running.step(token).copy() for token in ids[4:])]
    # Weights are decompressed to f16 and rotary angles computed in f32: 2^-11 relative, over 22 layers.
    assert np.abs(np.stack(got) - expected[3:]).max() <= 22 * 2.0**-11 * np.abs(expected).max()
    again = running.start(np.array([ids[:4]], np.int64))
    assert (again == got[0]).all()  # nothing of the first sequence is left


def test_transformers_runs_the_same_model() -> None:
    llama = RandomLlama(TINY, "bf16", 0.5, seed=2)
    torch_decoder = TorchDecoder(llama, threads=1)
    expected = reference_logits(llama, [1, 2, 3, 4])
    torch_decoder.start(np.array([[1, 2, 3]], np.int64))
    got = torch_decoder.step(4)
    assert np.linalg.norm(got - expected[3]) <= 22 * 2.0**-8 * np.linalg.norm(expected[3])  # bf16 throughout


@pytest.mark.parametrize("engine", ["OpenVINO", "PyTorch", *(["llama.cpp"] if find_spec("llama_cpp") else [])])
def test_logits_of_every_token(engine: str, tmp_path: Path) -> None:
    llama, ids = RandomLlama(TINY, "bf16", 0.5, seed=2), [1, 7, 3, 0, 2]
    running: Decoder
    if engine == "OpenVINO":
        running = OpenVinoDecoder(ov.Core().compile_model(decoder(llama), "CPU", EXACT))
    elif engine == "PyTorch":
        running = TorchDecoder(llama, threads=1)
    else:
        gguf_file.write(llama, tmp_path / "model.gguf")
        running = LlamaCppDecoder(tmp_path / "model.gguf", threads=1, context=64)
    expected = reference_logits(llama, ids)
    running.start(np.array([[9, 9]], np.int64))  # is forgotten
    got = running.logits(np.array([ids], np.int64)).copy()
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= 22 * 2.0**-8 * np.linalg.norm(expected)  # bf16 throughout
    after = np.stack([running.start(np.array([ids[:-1]], np.int64)).copy(), running.step(ids[-1])])
    assert np.linalg.norm(after - expected[-2:]) <= 22 * 2.0**-8 * np.linalg.norm(expected[-2:])


@pytest.mark.parametrize("kind", KINDS)
def test_stack_computes_all_linear_layers(kind: str) -> None:
    shape = LlamaShape(hidden=128, mlp=256, heads=4, kv_heads=2, head_dim=32, vocab=64, layers=2)
    llama = RandomLlama(shape, kind, 0.5, seed=3)
    x = np.random.default_rng(1).standard_normal((1, 3, 128)).astype(np.float32)
    compiled = ov.Core().compile_model(stack(llama), "CPU", EXACT)
    outputs = compiled(x)
    h, expected = x[0].astype(np.float64), []

    def linear(layer: int, name: str, values: np.ndarray) -> np.ndarray:
        return values @ llama.weight(layer, name).dequantize().astype(np.float64).T

    for i in range(shape.layers):
        expected += [linear(i, "k_proj", h), linear(i, "v_proj", h)]
        h = h + linear(i, "o_proj", linear(i, "q_proj", h))
        h = h + linear(i, "down_proj", silu(linear(i, "gate_proj", h)) * linear(i, "up_proj", h))
    for index, values in enumerate([h, *expected]):
        bound = 14 * 2.0**-11 * np.abs(values).max()
        assert np.abs(outputs[index][0] - values).max() <= bound, index


@pytest.mark.parametrize("kind", KINDS)
def test_stock_runs_compressed_primitives_and_fused_attention(kind: str) -> None:
    llama = RandomLlama(ODD, kind, 0.5)
    names = [*matmul_names(ODD), HEAD]
    compiled = compile_model(decoder(llama), Settings())
    OpenVinoDecoder(compiled).start(np.zeros((1, 2), np.int64))
    check_compressed(compiled, kind, names)
    primitives = linear_primitives(compiled)
    expected = {"int8": "i8", "int4": "i4", "bf16": primitives[HEAD][2]}[kind]
    assert {primitives[name][2] for name in names} == {expected}
    types = [str(n.get_rt_info()["layerType"].astype(str)) for n in compiled.get_runtime_model().get_ops()]
    assert types.count("ScaledDotProductAttention") == types.count("RoPE") // 2 == ODD.layers
    assert types.count("RMS") == 2 * ODD.layers + 1
    # A cache that attention does not own would be gathered and concatenated at every step.
    assert types.count("MemoryInput") == types.count("MemoryOutput") == 2 * ODD.layers


def test_expanded_or_missing_layers_are_refused() -> None:
    llama = RandomLlama(ODD, "int8", 0.5)
    compiled = compile_model(stack(llama), Settings())
    with pytest.raises(UnfairComparison, match="not as int4"):
        check_compressed(compiled, "int4", matmul_names(ODD))
    model = stack(llama)
    pack(model)
    with pytest.raises(UnfairComparison, match="something else"):
        check_compressed(compile_model(model, Settings()), "int8", matmul_names(ODD))


def test_packing_leaves_nothing_out() -> None:
    forms = {layer.name: layer.form for layer in pack(decoder(RandomLlama(ODD, "int4", 0.5))).layers}
    assert forms == dict.fromkeys(matmul_names(ODD), "sparse") | {HEAD: "dense"}
    assert {layer.form for layer in pack(decoder(RandomLlama(ODD, "int4", 0.5, sparse_head=True))).layers} == {"sparse"}
