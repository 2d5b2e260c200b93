"""SAM1 in numpy: writes and reads a blob. See format.md for the layout. native.py checks blobs of others."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

from ov_ext.cpu_plugin.support.weight import KINDS, Weight

MAGIC = int.from_bytes(b"SAM1", "little")
VERSION = 1
HEADER = struct.Struct("<IHHBxxxIQQQIfQQQQQQQQxxxxxxxxxxxxxxxx")
BLOCK = {"bf16": 64, "int8": 128, "int4": 256}  # outputs in 128 bytes
ALIGN = 128
BIAS, F32_SCALES, THRESHOLDS, REPLACEMENTS, REPLACED = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class Rule:
    """Which inputs x of a layer are replaced: those with ``|x - centre| <= threshold``; NaN is not.

    :param threshold: float32, ``[1]`` or ``[K]``; no NaN.
    :param centre: A finite number.
    :param replacement: float32, ``[1]`` or ``[K]``, finite.
    """

    threshold: np.ndarray
    centre: float = 0.0
    replacement: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))

    def __post_init__(self) -> None:
        for name, each in (("threshold", self.threshold), ("replacement", self.replacement)):
            if each.ndim != 1 or each.dtype != np.float32:
                raise ValueError(f"The {name} must be float32 [1] or [K], got {each.dtype} {list(each.shape)}.")
        if np.isnan(self.threshold).any() or not np.isfinite(self.replacement).all() or not np.isfinite(self.centre):
            raise ValueError("Thresholds must be numbers, centre and replacements finite.")


def pack(weight: Weight, rule: Rule) -> np.ndarray:
    """Write a weight and the rule of its inputs as a SAM1 blob.

    :param weight: The matrix ``[N, K]``, its scales and bias.
    :param rule: Of K inputs.
    :return: ``[blob_bytes]`` uint8.
    :raises ValueError: Rule and weight have different numbers of inputs.
    """
    (n, k), kind = weight.shape, weight.kind
    for each in (rule.threshold, rule.replacement):
        if each.size not in (1, k):
            raise ValueError(f"The weight has {k} inputs, its rule {each.size}.")
    block = BLOCK[kind]
    n_pad = -(-n // block) * block
    flags = BIAS * (weight.bias is not None)
    flags |= THRESHOLDS * (rule.threshold.size > 1) | REPLACED * bool(rule.replacement.any())
    sections = {"threshold": rule.threshold.tobytes()}
    if flags & REPLACED:
        flags |= REPLACEMENTS * (rule.replacement.size > 1)
        sections["replacement"] = rule.replacement.tobytes()
        sections["offset"] = _offset(weight, rule).tobytes()
    if weight.scales is not None:
        flags |= F32_SCALES * (weight.scales.dtype == np.float32)
        table = np.zeros((weight.scales.shape[1], n_pad), weight.scales.dtype)
        table[:, :n] = weight.scales.T
        sections["scale"] = table.tobytes()
    if weight.bias is not None:
        sections["bias"] = weight.bias.tobytes()
    sections["val"] = _rows(weight, n_pad).tobytes()

    offsets, body = {}, bytearray()
    for name, data in sections.items():
        offsets[name] = HEADER.size + len(body)
        body += data + bytes(-len(data) % ALIGN)
    names = ("threshold", "replacement", "offset", "scale", "bias", "val")
    header = HEADER.pack(
        *(MAGIC, VERSION, HEADER.size, KINDS[kind], flags, n, k, n_pad, weight.group, rule.centre),
        *(offsets.get(name, 0) for name in names),
        *(HEADER.size + len(body), zlib.crc32(body)),
    )
    return np.frombuffer(header + bytes(body), np.uint8)


def unpack(blob: np.ndarray) -> tuple[Weight, Rule]:
    """Read a SAM1 blob back. The inverse of :func:`pack`, bit for bit.

    :param blob: ``[blob_bytes]`` uint8, trusted: use ``native.validate`` on one that is not.
    :return: The weight, and the rule of its inputs.
    :raises ValueError: Wrong magic, version, length or checksum.
    """
    data = np.ascontiguousarray(blob).tobytes()
    if len(data) < HEADER.size or data[:4] != b"SAM1":
        raise ValueError("Not a SAM1 blob.")
    _, version, _, kind_id, flags, n, k, n_pad, group, centre, *offsets, blob_bytes, crc = HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"SAM1 version {version} is not known to this release (it reads version {VERSION}).")
    if blob_bytes != len(data) or crc != zlib.crc32(data[HEADER.size :]):
        raise ValueError("The blob is truncated or damaged: its length or checksum does not match.")
    off_threshold, off_replacement, _, off_scale, off_bias, off_val = offsets
    kind = {number: name for name, number in KINDS.items()}[kind_id]

    def floats(at: int, count: int) -> np.ndarray:
        return np.frombuffer(data, "<f4", count, at).copy()

    replacement = np.zeros(1, np.float32)
    if flags & REPLACED:
        replacement = floats(off_replacement, k if flags & REPLACEMENTS else 1)
    rule = Rule(floats(off_threshold, k if flags & THRESHOLDS else 1), centre, replacement)
    scales = None
    if off_scale:
        groups = -(-k // group) if group else 1
        dtype = np.float32 if flags & F32_SCALES else np.float16
        scales = np.ascontiguousarray(
            np.frombuffer(data, dtype, groups * n_pad, off_scale).reshape(groups, n_pad).T[:n]
        )
    values = _values(np.frombuffer(data, np.uint8, offset=off_val), kind, n, k)
    return Weight(kind, values, scales, group, floats(off_bias, n) if off_bias else None), rule


# Axes of a block's outputs, from the highest bits of their number: as format.md places them.
_BITS = {"bf16": (-1, 2, 8), "int8": (-1, 2, 2, 2, 4), "int4": (-1, 2, 2, 2, 2, 4)}  # ..., [n,] u, e, l, j
_ORDER = {"bf16": (0, 1, 3, 2), "int8": (0, 1, 4, 2, 5, 3), "int4": (0, 1, 5, 3, 6, 4, 2)}  # k, ..., l, u, j, e[, n]


def _rows(weight: Weight, n_pad: int) -> np.ndarray:
    """:return: ``[K, bytes of a row]`` uint8."""
    n, k = weight.shape
    padded = np.zeros((k, n_pad), weight.values.dtype)
    padded[:, :n] = weight.values.T
    order = _ORDER[weight.kind]
    placed = padded.reshape(k, *_BITS[weight.kind]).transpose(order)
    if weight.kind == "int4":
        codes = (placed + np.int8(8)).view(np.uint8)
        return np.ascontiguousarray(codes[..., 0] | codes[..., 1] << 4).reshape(k, -1)
    return np.ascontiguousarray(placed).reshape(k, -1).view(np.uint8)


def _values(rows: np.ndarray, kind: str, n: int, k: int) -> np.ndarray:
    """:return: ``[N, K]``: the inverse of :func:`_rows`."""
    if kind == "int4":
        placed = np.stack([rows & 15, rows >> 4], axis=-1).view(np.int8) - np.int8(8)
    else:
        placed = rows.view(np.uint16 if kind == "bf16" else np.int8)
    bits, order = (k, *_BITS[kind]), _ORDER[kind]
    natural = placed.reshape([bits[axis] for axis in order]).transpose(np.argsort(order))
    return np.ascontiguousarray(natural.reshape(k, -1)[:, :n].T)


def _offset(weight: Weight, rule: Rule) -> np.ndarray:
    """:return: ``[N]`` float32: what the replacements of all inputs give."""
    replacement = np.broadcast_to(rule.replacement, weight.shape[1]).astype(np.float64)
    offset = np.empty(weight.shape[0], np.float32)
    for start in range(0, len(offset), 1024):  # bounded scratch memory
        part = slice(start, start + 1024)
        scales = None if weight.scales is None else weight.scales[part]
        some = Weight(weight.kind, weight.values[part], scales, weight.group)
        offset[part] = some.dequantize().astype(np.float64) @ replacement
    return offset
