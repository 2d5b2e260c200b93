// Internal to the format: what parsing, validation and packing share.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "../support/parallel.hpp"
#include "../support/unaligned.hpp"
#include "format.hpp"

namespace ov_ext::sparse_matmul {

[[noreturn]] inline void fail(const std::string& what) { throw InvalidBlob("SPW1 blob: " + what); }

inline void require(bool ok, const char* what) {
    if (!ok)
        fail(what);
}

inline std::string number(uint64_t v) { return std::to_string(v); }

// Section offsets follow from the sizes alone, so a blob has exactly one legal layout. Products cannot overflow: n, k < 2^31 and
// checked() guards the two that exceed 64 bits in theory.
inline uint64_t checked(unsigned __int128 v) {
    if (v >> 62)
        fail("the matrix is too large");
    return uint64_t(v);
}

// Offsets from the first byte of the blob, in the order of the sections; 0 = absent, as in the header.
struct Layout {
    uint64_t dir, mask = 0, scale = 0, comp = 0, bias = 0, val;
};

// Of a header whose kind, flags, sizes and group are right; its offsets are not looked at.
inline Layout layout_of(const Header& h) {
    const Kind kind = Kind(h.kind);
    const uint64_t blocks = h.n_pad / block_n, tiles = h.k_pad / tile_inputs(kind);
    const uint64_t chunks = (h.k_pad + chunk_k - 1) / chunk_k;
    Layout at;
    unsigned __int128 end = sizeof(Header);
    auto section = [&](unsigned __int128 bytes) {
        const uint64_t start = checked(end);
        end = (end + bytes + alignment - 1) / alignment * alignment;
        return start;
    };
    at.dir = section(8 * ((unsigned __int128)blocks * chunks + 1));
    if (!(h.flags & dense_flag))
        at.mask = section((unsigned __int128)blocks * tiles * block_panels * panel_slices * mask_bytes_per_slice(kind));
    if (kind != Kind::bf16) {
        const uint64_t groups = h.group ? h.k_pad / h.group : 1;
        at.scale = section((unsigned __int128)h.n_pad * groups * (h.flags & f32_scales ? 4 : 2));
        if (!(h.flags & no_compensation))
            at.comp = section((unsigned __int128)h.n_pad * (h.k_pad / segment_inputs(h.group)) * 2);
    }
    if (h.flags & bias_flag)
        at.bias = section((unsigned __int128)h.n * 4);
    at.val = checked(end);
    return at;
}

// Of two's complement: 0..7 stay, 8..15 become -8..-1.
inline int sign_extend(uint8_t nibble) { return (nibble ^ 8) - 8; }

// Number of a slice in stream order.
inline uint64_t slice_index(const BlobView& w, uint64_t block, uint64_t tile, uint64_t panel, uint64_t slice) {
    return ((block * w.tiles + tile) * block_panels + panel) * panel_slices + slice;
}

// A dense blob has no masks; full ones let it take the same path as a sparse one.
inline uint64_t mask_of(const BlobView& w, uint64_t block, uint64_t tile, uint64_t panel, uint64_t slice) {
    if (w.dense)
        return w.kind == Kind::bf16 ? 0xFFFFFFFFull : ~0ull;
    const uint64_t index = slice_index(w, block, tile, panel, slice);
    return w.kind == Kind::bf16 ? load<uint32_t>(w.masks + 4 * index) : load<uint64_t>(w.masks + 8 * index);
}

// Counts the bits of a chunk's masks by stream: [0] all slices (bf16, int8) or even slices (int4), [1] odd slices.
inline std::array<uint64_t, 2> count_bits(const BlobView& w, uint64_t block, uint64_t first_tile, uint64_t last_tile) {
    std::array<uint64_t, 2> counts{};
    for (uint64_t tile = first_tile; tile < last_tile; tile++)
        for (uint64_t panel = 0; panel < block_panels; panel++)
            for (uint64_t slice = 0; slice < panel_slices; slice++)
                counts[w.kind == Kind::int4 ? slice & 1 : 0] += __builtin_popcountll(mask_of(w, block, tile, panel, slice));
    return counts;
}

// The two streams of int4 share their bytes, a nibble each, so the longer one counts.
inline uint64_t run_bytes(Kind kind, const std::array<uint64_t, 2>& counts) {
    if (kind == Kind::int4)
        return counts[0] > counts[1] ? counts[0] : counts[1];
    return counts[0] * (kind == Kind::bf16 ? 2 : 1);
}

inline uint64_t directory_entry(const BlobView& w, uint64_t index) { return load<uint64_t>(w.directory + 8 * index); }

// Sizes only; the addresses are null.
inline BlobView geometry_of(const Header& h) {
    BlobView w{};
    w.kind = Kind(h.kind);
    w.dense = h.flags & dense_flag;
    w.scales_f32 = h.flags & f32_scales;
    w.n = h.n, w.k = h.k, w.n_pad = h.n_pad, w.k_pad = h.k_pad, w.group = h.group;
    w.segment = w.kind == Kind::bf16 ? 0 : segment_inputs(h.group);
    w.slice_k = h.slice_k;
    w.blocks = h.n_pad / block_n;
    w.tiles_per_chunk = chunk_k / tile_inputs(w.kind);
    w.tiles = h.k_pad / tile_inputs(w.kind);
    w.chunks = (h.k_pad + chunk_k - 1) / chunk_k;
    w.nnz = h.nnz;
    return w;
}

inline BlobView view_of(const uint8_t* blob, const Header& h, const Layout& at) {
    BlobView w = geometry_of(h);
    w.directory = blob + at.dir;
    w.masks = at.mask ? blob + at.mask : nullptr;
    w.values = blob + at.val;
    w.scales = at.scale ? blob + at.scale : nullptr;
    w.compensation = at.comp ? blob + at.comp : nullptr;
    w.bias = at.bias ? blob + at.bias : nullptr;
    return w;
}

}  // namespace ov_ext::sparse_matmul
