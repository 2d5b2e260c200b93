"""Whole models behind one interface: OpenVINO, PyTorch through transformers, llama.cpp."""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from benchmarks.arms import Settings, check_compressed, compile_model, properties
from benchmarks.llama import EPSILON, ROPE_BASE, RandomLlama

CONTEXT_TOKENS = 4096  # that llama.cpp allocates
_WARMUP_TOKENS = 2  # first steps after a prompt: caches and threads settle


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

    @abstractmethod
    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Forget everything and read a text.

        :param ids: Tokens ``[1, tokens]`` int64.
        :return: Logits of every token, float32 ``[tokens, vocab]``.
        """

    def about(self) -> dict[str, Any]:
        """:return: Fields of the record: how it computes."""
        return {}


class OpenVinoDecoder(Decoder):
    """A stateful IR, as Optimum-Intel exports it."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self._length = 0

    def about(self) -> dict[str, Any]:
        return dict(properties(self._compiled))

    def start(self, ids: np.ndarray) -> np.ndarray:
        return self.logits(ids)[-1]

    def step(self, token: int) -> np.ndarray:
        return self._infer(np.array([[token]], np.int64))[-1]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self._request.reset_state()
        self._length = 0
        return self._infer(ids)

    def _infer(self, ids: np.ndarray) -> np.ndarray:
        past, self._length = self._length, self._length + ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(past, self._length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return self._request.infer(inputs, share_inputs=True, share_outputs=True)["logits"][0]


def load_openvino(path: Path, settings: Settings, kind: str, names: Sequence[str]) -> OpenVinoDecoder:
    """Compile an IR, mapped from its file.

    :param path: The IR.
    :param settings: OpenVINO's.
    :param kind: Kind of the weights.
    :param names: Stock layers that must run in this form.
    :raises UnfairComparison: One does not.
    """
    compiled = compile_model(path, settings)
    decoder = OpenVinoDecoder(compiled)
    decoder.start(np.zeros((1, 1), np.int64))  # primitives are known after the first call
    check_compressed(compiled, kind, names)
    return decoder


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

    def about(self) -> dict[str, Any]:
        return {"precision": "bf16", "kv_cache_precision": "bf16"}

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._past = None
        return self._infer(ids)[-1]

    def step(self, token: int) -> np.ndarray:
        return self._infer(np.array([[token]], np.int64))[-1]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self._past = None
        return self._infer(ids, last=0)

    def _infer(self, ids: np.ndarray, last: int = 1) -> np.ndarray:
        with self._torch.inference_mode():
            tokens = self._torch.from_numpy(ids)
            output = self._model(tokens, past_key_values=self._past, use_cache=True, logits_to_keep=last)
        self._past = output.past_key_values
        return output.logits[0].float().numpy()


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


class LlamaCppDecoder(Decoder):
    """llama.cpp through llama-cpp-python's C functions, with its own defaults except the number of threads.

    :param path: A GGUF file.
    :param threads: For prompts and for steps.
    :param context: Tokens that it allocates memory for.
    :raises ImportError: llama_cpp is missing.
    :raises RuntimeError: llama.cpp refused the file, or failed.
    """

    def __init__(self, path: Path, threads: int, context: int = CONTEXT_TOKENS) -> None:
        import llama_cpp

        self._cpp = llama_cpp
        # llama.cpp keeps no reference to Python objects: this one must live as long as it may log.
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot read {path}.")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch = context, context
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def about(self) -> dict[str, Any]:
        built_for = self._cpp.llama_print_system_info().decode()  # a build without AMX or AVX-512 would be a poor rival
        return {"kv_cache_precision": "f16", "llama_cpp": self._cpp.__version__, "llama_cpp_built_for": built_for}

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._forget()
        return self._decode(ids[0])

    def step(self, token: int) -> np.ndarray:
        return self._decode(np.array([token]))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self._forget()
        count = ids.shape[1]
        batch = self._cpp.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(ids[0].tolist()):
                batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            self._call(batch)
        finally:
            self._cpp.llama_batch_free(batch)
        # Valid until the next call.
        return np.ctypeslib.as_array(self._cpp.llama_get_logits(self._context), (count, self._vocab)).copy()

    def _forget(self) -> None:
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        ids = (self._cpp.llama_token * len(tokens))(*tokens.tolist())
        self._call(self._cpp.llama_batch_get_one(ids, len(tokens)))
        return np.ctypeslib.as_array(self._cpp.llama_get_logits_ith(self._context, -1), (self._vocab,))

    def _call(self, batch: Any) -> None:
        status = self._cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}.")


class Generator:
    """A decoder as an engine: what `benchmarks.engines` runs in a process of its own.

    :param load: Makes the decoder.
    :param vocab: Tokens come from 0..vocab-1.
    """

    def __init__(self, load: Callable[[], Decoder], vocab: int) -> None:
        self._decoder, self._vocab = load(), vocab

    def about(self) -> dict[str, Any]:
        """:return: Fields of the record."""
        return self._decoder.about()

    def logits(self, prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """:return: Logits after a prompt of so many tokens, and after one more token, float32 ``[vocab]``."""
        return self._decoder.start(self._ids(prompt)).copy(), self._decoder.step(1).copy()

    def generate(self, prompt: int, tokens: int) -> tuple[float, list[float]]:
        """Read a prompt, decode a fixed continuation, and take the times.

        :param prompt: Tokens of the prompt.
        :param tokens: Timed steps; untimed ones come first.
        :return: Seconds of the prompt, and of each step.
        """
        start = time.perf_counter()
        self._decoder.start(self._ids(prompt))
        prompt_seconds = time.perf_counter() - start
        seconds = []
        for i in range(_WARMUP_TOKENS + tokens if tokens else 0):
            start = time.perf_counter()
            self._decoder.step((7 * i + 5) % self._vocab)
            seconds.append(time.perf_counter() - start)
        return prompt_seconds, seconds[_WARMUP_TOKENS:]

    def _ids(self, tokens: int) -> np.ndarray:
        return np.arange(tokens, dtype=np.int64)[None] % self._vocab
