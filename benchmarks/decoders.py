"""The engines of the decode benchmark behind one interface: OpenVINO, and PyTorch through transformers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import openvino as ov

from benchmarks.llama import EPSILON, ROPE_BASE, RandomLlama

PROMPT_TOKENS = 32
WARMUP_TOKENS = 2  # first steps after a prompt: caches and threads settle


class Decoder(ABC):
    """A model with a KV cache that generates one sequence."""

    @abstractmethod
    def start(self, ids: np.ndarray) -> np.ndarray:
        """Forget everything and read a prompt.

        :param ids: Tokens ``[1, tokens]`` int64.
        :return: Logits of the last token, float32 ``[vocab]``.
        """

    @abstractmethod
    def step(self, token: int) -> np.ndarray:
        """:return: Logits after one more token, float32 ``[vocab]``."""


class OpenVinoDecoder(Decoder):
    """A stateful IR, as Optimum-Intel exports it."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._length = 0

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._request.reset_state()
        self._length = 0
        return self._infer(ids)

    def step(self, token: int) -> np.ndarray:
        return self._infer(np.array([[token]], np.int64))

    def _infer(self, ids: np.ndarray) -> np.ndarray:
        past, self._length = self._length, self._length + ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(past, self._length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return self._request.infer(inputs, share_inputs=True, share_outputs=True)["logits"][0, -1]


class TorchDecoder(Decoder):
    """LlamaForCausalLM of transformers in bf16, eager mode (scaled_dot_product_attention).

    :param llama: Weights of kind bf16.
    :param threads: For torch.set_num_threads.
    :raises ImportError: torch or transformers is missing.
    """

    def __init__(self, llama: RandomLlama, threads: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = llama.shape
        sizes: dict[str, Any] = {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "num_hidden_layers": shape.layers,
            "vocab_size": shape.vocab,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "rms_norm_eps": EPSILON,
            "rope_theta": ROPE_BASE,
        }
        config = LlamaConfig(**sizes)
        torch.set_num_threads(threads)
        tensors = {
            name: torch.from_numpy(bits).view(torch.bfloat16) for name, bits in _transformers_weights(llama).items()
        }
        model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.bfloat16)
        self._torch, self._model = torch, model.eval()
        self._past: Any = None

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._past = None
        return self._infer(ids)

    def step(self, token: int) -> np.ndarray:
        return self._infer(np.array([[token]], np.int64))

    def _infer(self, ids: np.ndarray) -> np.ndarray:
        with self._torch.inference_mode():
            tokens = self._torch.from_numpy(ids)
            output = self._model(tokens, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = output.past_key_values
        return output.logits[0, -1].float().numpy()


def _transformers_weights(llama: RandomLlama) -> dict[str, np.ndarray]:
    """:return: bf16 bits (uint16) by the names that transformers uses."""
    weights = {
        "model.embed_tokens.weight": llama.embedding().values,
        "model.norm.weight": _bits(llama.norm(2 * llama.shape.layers)),
        "lm_head.weight": llama.head().values,
    }
    for i in range(llama.shape.layers):
        prefix = f"model.layers.{i}"
        weights[f"{prefix}.input_layernorm.weight"] = _bits(llama.norm(2 * i))
        weights[f"{prefix}.post_attention_layernorm.weight"] = _bits(llama.norm(2 * i + 1))
        for name in llama.shape.linears:
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            weights[f"{prefix}.{block}.{name}.weight"] = llama.weight(i, name).values
    return weights


def _bits(exact: np.ndarray) -> np.ndarray:
    """:return: bf16 bits of float32 values that bf16 holds exactly."""
    return (exact.view(np.uint32) >> 16).astype(np.uint16)


def generation(decoder: Decoder, vocab: int, tokens: int) -> tuple[float, float]:
    """Read a prompt, decode a fixed continuation, and take the times.

    :param decoder: What to time.
    :param vocab: Tokens come from 0..vocab-1.
    :param tokens: Timed steps.
    :return: Seconds of the prompt, and median seconds of a step.
    """
    start = time.perf_counter()
    decoder.start(np.arange(PROMPT_TOKENS, dtype=np.int64)[None] % vocab)
    prompt = time.perf_counter() - start
    seconds = []
    for i in range(WARMUP_TOKENS + tokens):
        start = time.perf_counter()
        decoder.step((7 * i + 5) % vocab)
        seconds.append(time.perf_counter() - start)
    return prompt, float(np.median(seconds[WARMUP_TOKENS:]))
