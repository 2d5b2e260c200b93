"""The packed cache of keys and values from Python, without OpenVINO: for tests and timings."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ov_ext.cpu_plugin.support.native import call, library, pointer

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class CacheSettings:
    """What a cache keeps; see format.md.

    :param head_dim: Elements of a key or value, a multiple of 16 up to 256.
    :param heads: Heads of keys and values.
    :param k_level: Fraction 0..0.9 of each key that is pruned.
    :param v_level: The same of each value.
    :param values: ``"int8"`` or ``"int4"``.
    :param sink: First tokens that stay dense.
    :param recent: Last tokens that stay dense; up to 63 more do.
    :param pack_from: Nothing is packed while a sequence has fewer tokens.
    """

    head_dim: int
    heads: int
    k_level: float = 0.5
    v_level: float = 0.5
    values: str = "int8"
    sink: int = 4
    recent: int = 64
    pack_from: int = 0


class _Settings(ctypes.Structure):  # OvExtCacheSettings of capi.cpp
    _fields_ = [(name, ctypes.c_double) for name in ("k_level", "v_level")] + [
        (name, ctypes.c_int64) for name in ("head_dim", "heads", "int4", "sink", "recent", "pack_from")
    ]


def _arguments(s: CacheSettings) -> _Settings:
    int4 = s.values == "int4"
    return _Settings(s.k_level, s.v_level, s.head_dim, s.heads, int4, s.sink, s.recent, s.pack_from)


def block_bytes(settings: CacheSettings) -> int:
    """:return: Bytes of 64 packed tokens of one head, keys and values."""
    size = ctypes.c_uint64()
    call("ov_ext_kv_block_bytes", ctypes.byref(_arguments(settings)), ctypes.byref(size))
    return size.value


def pack_block(settings: CacheSettings, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Pack 64 tokens of one head.

    :param settings: Levels and kind of values.
    :param k: ``[64, head_dim]`` float32.
    :param v: The same of values.
    :return: ``[block_bytes]`` uint8.
    """
    block = np.empty(block_bytes(settings), np.uint8)
    k, v = (_f32(each, (BLOCK_TOKENS, settings.head_dim)) for each in (k, v))
    call("ov_ext_kv_pack", ctypes.byref(_arguments(settings)), pointer(k), pointer(v), pointer(block))
    return block


def unpack_block(settings: CacheSettings, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:return: What a block of :func:`pack_block` stands for: keys and values, ``[64, head_dim]`` float32 each."""
    if block.dtype != np.uint8 or block.shape != (block_bytes(settings),):
        raise ValueError(f"The block must be {block_bytes(settings)} uint8, got {list(block.shape)} {block.dtype}.")
    k, v = (np.empty((BLOCK_TOKENS, settings.head_dim), np.float32) for _ in range(2))
    call("ov_ext_kv_unpack", ctypes.byref(_arguments(settings)), pointer(block), pointer(k), pointer(v))
    return k, v


class Cache:
    """Keys and values of a batch of sequences.

    :param settings: What to keep.
    :param sequences: How many there are.
    """

    def __init__(self, settings: CacheSettings, sequences: int = 1) -> None:
        self.settings, self.sequences = settings, sequences
        self._cache = ctypes.c_void_p()
        arguments = ctypes.byref(_arguments(settings)), ctypes.c_uint64(sequences), ctypes.byref(self._cache)
        call("ov_ext_cache_new", *arguments)

    def __del__(self) -> None:
        if self._cache:
            library().ov_ext_cache_free(self._cache)

    def _count(self, function: str) -> int:
        of_library = getattr(library(), function)
        of_library.restype = ctypes.c_uint64
        return int(of_library(self._cache))

    @property
    def tokens(self) -> int:
        """Tokens of each sequence."""
        return self._count("ov_ext_cache_tokens")

    @property
    def pages(self) -> int:
        """Packed pages, of 64 tokens, of each sequence."""
        return self._count("ov_ext_cache_pages")

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences; pages that they share count once."""
        return self._count("ov_ext_cache_bytes")

    def reorder(self, source: np.ndarray) -> None:
        """Let sequence b continue sequence ``source[b]``.

        :param source: ``[new number of sequences]`` int32.
        :raises ValueError: There is no such sequence.
        """
        source = np.ascontiguousarray(source, np.int32)
        call("ov_ext_cache_reorder", self._cache, pointer(source), ctypes.c_uint64(len(source)))
        self.sequences = len(source)

    def append(self, k: np.ndarray, v: np.ndarray, threads: int = 0) -> None:
        """Keep new tokens, and pack what leaves the recent window.

        :param k: ``[sequences, heads, tokens, head_dim]`` float32.
        :param v: The same of values.
        :param threads: 0 = all of the calling arena.
        """
        count = k.shape[2]
        k, v = (_f32(x, (self.sequences, self.settings.heads, count, self.settings.head_dim)) for x in (k, v))
        call("ov_ext_cache_append", self._cache, pointer(k), pointer(v), ctypes.c_uint64(count), threads)

    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        scale: float,
        mask: np.ndarray | None = None,
        causal: bool = True,
        isa: str | None = None,
        threads: int = 0,
    ) -> np.ndarray:
        """Attend from new tokens to the cache and to themselves; :meth:`append` keeps them.

        :param q: ``[sequences, query heads, tokens, head_dim]`` float32.
        :param k: ``[sequences, heads, tokens, head_dim]`` float32.
        :param v: The same of values.
        :param scale: Factor of the products.
        :param mask: ``[sequences or 1, tokens or 1, all tokens]`` float32, added to the scaled products.
        :param causal: A token attends to those before it and to itself.
        :param isa: Kernel by name; None = the one OpenVINO would use.
        :param threads: 0 = all of the calling arena.
        :return: Of q's shape.
        """
        q_heads, count = q.shape[1:3]
        q = _f32(q, (self.sequences, q_heads, count, self.settings.head_dim))
        k, v = (_f32(x, (self.sequences, self.settings.heads, count, self.settings.head_dim)) for x in (k, v))
        mask_shape = (0, 0)
        if mask is not None:
            mask = _f32(mask, (*mask.shape[:2], self.tokens + count))
            mask_shape = mask.shape[0], mask.shape[1]
        y = np.empty_like(q)
        call(
            "ov_ext_cache_attend",
            *(self._cache, pointer(q), pointer(k), pointer(v), ctypes.c_uint64(q_heads), ctypes.c_uint64(count)),
            *(ctypes.c_float(scale), int(causal), pointer(mask), *map(ctypes.c_uint64, mask_shape)),
            *(isa.encode() if isa else None, threads, pointer(y)),
        )
        return y


def _f32(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"float32 {list(shape)} needed, got {array.dtype} {list(array.shape)}.")
    return np.ascontiguousarray(array)
