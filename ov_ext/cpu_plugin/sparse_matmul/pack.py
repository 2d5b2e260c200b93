"""SPW1 in numpy: the readable twin of format.hpp, and the oracle of the C++ packer. See format.md for the layout."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from ov_ext.cpu_plugin.support.weight import KINDS, Weight

MAGIC = int.from_bytes(b"SPW1", "little")
VERSION = 1
HEADER = struct.Struct("<IHHBBBBIQQQQIIQQQQQQQQQ")
SLICE_K = {"bf16": 2, "int8": 4, "int4": 4}
BLOCK_N, CHUNK_K, ALIGN = 64, 512, 64
BIAS, COLUMN_SCALES, GROUP_SCALES, DENSE, F32_SCALES, NO_COMPENSATION = 1, 2, 4, 16, 32, 64


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _segment(weight_group: int) -> int:
    return weight_group or 128


def _stream_order(values: np.ndarray, slice_k: int) -> np.ndarray:
    """[Npad, Kpad] -> [block, tile, panel, slice, element]."""
    n, k = values.shape
    # block, panel, column, tile, slice, j
    tiled = values.reshape(n // BLOCK_N, 4, 16, k // (16 * slice_k), 16, slice_k)
    return tiled.transpose(0, 3, 1, 4, 2, 5).reshape(n // BLOCK_N, -1, 4, 16, 16 * slice_k)


def _natural_order(slices: np.ndarray, slice_k: int) -> np.ndarray:
    """[block, tile, panel, slice, element] -> [Npad, Kpad]; the inverse of :func:`_stream_order`."""
    blocks, tiles = slices.shape[:2]
    split = slices.reshape(blocks, tiles, 4, 16, 16, slice_k)  # block, tile, panel, slice, column, j
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(blocks * BLOCK_N, tiles * 16 * slice_k)


def _per_block(table: np.ndarray, blocks: int) -> np.ndarray:
    """[Npad, G] -> [block, G, 64], the order of scales."""
    return np.ascontiguousarray(table.reshape(blocks, BLOCK_N, -1).transpose(0, 2, 1))


def _run(slices: np.ndarray, stored: np.ndarray, kind: str) -> bytes:
    """Value bytes of one (block, chunk); slices and stored are [tile, panel, slice, element]."""
    if kind == "bf16":
        return slices[stored].astype("<u2").tobytes()
    if kind == "int8":
        return slices[stored].tobytes()
    low, high = (slices[:, :, s::2][stored[:, :, s::2]].view(np.uint8) & 15 for s in (0, 1))
    run = np.zeros(max(len(low), len(high)), np.uint8)
    run[: len(low)] |= low
    run[: len(high)] |= high << 4
    return run.tobytes()


def pack(weight: Weight, dense: bool = False) -> np.ndarray:
    """Write a weight as an SPW1 blob.

    :param weight: The matrix, its scales and bias.
    :param dense: Store every element and no mask.
    :return: ``[blob_bytes]`` uint8.
    """
    (n, k), kind, slice_k = weight.shape, weight.kind, SLICE_K[weight.kind]
    segment = _segment(weight.group)
    n_pad, k_pad = round_up(n, BLOCK_N), round_up(k, 32 if kind == "bf16" else max(64, segment))
    padded = np.zeros((n_pad, k_pad), weight.values.dtype)
    padded[:n, :k] = weight.values
    if kind == "bf16" and not dense:
        padded[(padded & 0x7FFF) == 0] = 0
    slices = _stream_order(padded, slice_k)
    stored = np.ones(slices.shape, bool) if dense else slices != 0

    blocks, tiles_per_chunk = n_pad // BLOCK_N, CHUNK_K // (16 * slice_k)
    directory, runs, size = [], [], 0
    for b in range(blocks):
        for t in range(0, slices.shape[1], tiles_per_chunk):
            directory.append(size)
            runs.append(_run(slices[b, t : t + tiles_per_chunk], stored[b, t : t + tiles_per_chunk], kind))
            size += len(runs[-1])
        runs.append(bytes(-size % ALIGN))
        size += len(runs[-1])
    directory.append(size)

    sections = {"dir": np.array(directory, "<u8").tobytes()}
    if not dense:
        sections["mask"] = np.packbits(stored, axis=-1, bitorder="little").tobytes()
    flags = DENSE if dense else 0
    if weight.scales is not None:
        flags |= (GROUP_SCALES if weight.group else COLUMN_SCALES) | NO_COMPENSATION
        flags |= F32_SCALES if weight.scales.dtype == np.float32 else 0
        table = np.zeros((n_pad, k_pad // weight.group if weight.group else 1), weight.scales.dtype)
        table[:n, : weight.scales.shape[1]] = weight.scales
        sections["scale"] = _per_block(table, blocks).tobytes()
    if weight.bias is not None:
        flags |= BIAS
        sections["bias"] = weight.bias.tobytes()
    sections["val"] = b"".join(runs) + bytes(ALIGN)

    offsets, body = {}, bytearray()
    for name, data in sections.items():
        offsets[name] = HEADER.size + len(body)
        body += data + bytes(-len(data) % ALIGN)
    header = HEADER.pack(
        *(MAGIC, VERSION, HEADER.size, KINDS[kind], slice_k, 16, 4, flags, n, k, n_pad, k_pad, weight.group, CHUNK_K),
        n * k if dense else int(stored.sum()),
        *(offsets.get(name, 0) for name in ("dir", "mask", "val", "scale", "bias")),
        HEADER.size + len(body),
        zlib.crc32(body),
        0,
    )
    return np.frombuffer(header + bytes(body), np.uint8)


def unpack(blob: np.ndarray) -> Weight:
    """Read an SPW1 blob back. The inverse of :func:`pack`, bit for bit (-0.0 of sparse bf16 becomes +0.0).

    :param blob: ``[blob_bytes]`` uint8, trusted: use ``native.validate`` on one that is not.
    :return: The weight.
    :raises ValueError: Wrong magic, version, length or checksum.
    """
    data = np.ascontiguousarray(blob).tobytes()
    if len(data) < HEADER.size or data[:4] != b"SPW1":
        raise ValueError("Not an SPW1 blob.")
    fields = HEADER.unpack_from(data)
    _, version, _, kind_id, slice_k, _, _, flags, n, k, n_pad, k_pad, group, _, _ = fields[:15]
    off_dir, off_mask, off_val, off_scale, off_bias, blob_bytes, crc, _ = fields[15:]
    if version != VERSION:
        raise ValueError(f"SPW1 version {version} is not known to this release (it reads version {VERSION}).")
    if blob_bytes != len(data) or crc != zlib.crc32(data[HEADER.size :]):
        raise ValueError("The blob is truncated or damaged: its length or checksum does not match.")
    kind = {v: name for name, v in KINDS.items()}[kind_id]
    blocks, tiles, tiles_per_chunk = n_pad // BLOCK_N, k_pad // (16 * slice_k), CHUNK_K // (16 * slice_k)
    shape = (blocks, tiles, 4, 16, 16 * slice_k)
    if flags & DENSE:
        stored = np.ones(shape, bool)
    else:
        mask = np.frombuffer(data, np.uint8, int(np.prod(shape)) // 8, off_mask)
        stored = np.unpackbits(mask, bitorder="little").astype(bool).reshape(shape)
    chunks = -(-tiles // tiles_per_chunk)
    directory = np.frombuffer(data, "<u8", blocks * chunks + 1, off_dir).astype(np.int64)

    slices = np.zeros(shape, np.uint16 if kind == "bf16" else np.int8)
    for b in range(blocks):
        for c in range(chunks):
            start, end = off_val + directory[b * chunks + c], off_val + directory[b * chunks + c + 1]
            raw = np.frombuffer(data[start:end], np.uint8)
            part = (b, slice(c * tiles_per_chunk, (c + 1) * tiles_per_chunk))
            if kind == "int4":
                for parity, nibbles in enumerate((raw & 15, raw >> 4)):
                    where = stored[part][:, :, parity::2]
                    codes = ((nibbles[: where.sum()] ^ 8).astype(np.int8)) - 8  # sign extension
                    slices[part][:, :, parity::2][where] = codes
            else:
                where = stored[part]
                slices[part][where] = raw[: where.sum() * slices.itemsize].view(slices.dtype)
    values = np.ascontiguousarray(_natural_order(slices, slice_k)[:n, :k])

    scales = bias = None
    if off_scale:
        dtype = np.dtype(np.float32 if flags & F32_SCALES else np.float16)
        groups = k_pad // group if group else 1
        table = np.frombuffer(data, dtype, n_pad * groups, off_scale).reshape(blocks, groups, BLOCK_N)
        kept = -(-k // group) if group else 1
        scales = np.ascontiguousarray(table.transpose(0, 2, 1).reshape(n_pad, groups)[:n, :kept])
    if flags & BIAS:
        bias = np.frombuffer(data, np.float32, n, off_bias).copy()
    return Weight(kind, values, scales, group, bias)
