// Writing a blob from plain arrays, and reading it back.
//
// Packing goes over the weight twice: first every run is only counted, which gives the directory and the length of the blob, then it is
// written in its place. So runs can be written in parallel, and no run has to be moved or to grow. Threads write disjoint bytes: masks,
// runs and scales of different blocks do not share any.
#include <vector>

#include "layout.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// Which (output, input) element e of a slice is, inside its block.
struct Position {
    uint64_t column, input;
};
Position position(const BlobView& w, uint64_t tile, uint64_t panel, uint64_t slice, uint64_t e) {
    return {panel * panel_n + e / w.slice_k, (tile * panel_slices + slice) * w.slice_k + e % w.slice_k};
}

Header header_of(const PlainWeight& p) {
    if (p.n < 1 || p.k < 1 || p.n >> 31 || p.k >> 31)
        fail("N and K must lie in 1..2^31-1, got N = " + number(p.n) + ", K = " + number(p.k));
    require(!(p.n * p.k >> 47), "a matrix that no memory holds cannot be packed");
    if (p.kind == Kind::bf16 ? p.group != 0 : p.group != 0 && p.group != 64 && p.group != 128)
        fail("scale groups are 64, 128 or 0, got " + number(p.group));
    require((p.scales != nullptr) == (p.kind != Kind::bf16), "integer kinds need scales, bf16 has none");
    Header h{};
    h.magic = magic, h.version = format_version, h.header_bytes = sizeof(Header);
    h.kind = uint8_t(p.kind), h.slice_k = uint8_t(slice_inputs(p.kind)), h.panel_n = panel_n, h.block_panels = block_panels;
    h.flags = (p.bias ? uint32_t(bias_flag) : 0) | (p.dense ? uint32_t(dense_flag) : 0);
    if (p.kind != Kind::bf16)
        h.flags |= uint32_t(p.group ? group_scales : column_scales) | (p.scales_f32 ? uint32_t(f32_scales) : 0) | uint32_t(no_compensation);
    h.n = p.n, h.k = p.k, h.n_pad = round_up(p.n, block_n), h.k_pad = padded_inputs(p.kind, p.k, p.group);
    h.group = uint32_t(p.group), h.chunk_k = chunk_k;
    return h;
}

// One slice of a plain weight as its 64 dense bytes: slice_k inputs of 16 outputs, zero outside the matrix. The slice_k inputs of an output
// are 4 bytes for every kind.
void gather_slice(const PlainWeight& p, const BlobView& w, uint64_t n, uint64_t k, uint8_t slice[slice_bytes]) {
    const uint64_t width = p.kind == Kind::bf16 ? 2 : 1;
    const auto* values = static_cast<const uint8_t*>(p.values);
    if (n + panel_n <= p.n && k + w.slice_k <= p.k) {
        for (uint64_t c = 0; c < panel_n; c++)
            std::memcpy(slice + 4 * c, values + ((n + c) * p.k + k) * width, 4);
        return;
    }
    std::memset(slice, 0, slice_bytes);
    const uint64_t inputs = k < p.k ? std::min(w.slice_k, p.k - k) : 0;
    for (uint64_t c = 0; c < panel_n && n + c < p.n && inputs; c++)
        std::memcpy(slice + 4 * c, values + ((n + c) * p.k + k) * width, inputs * width);
}

// Moves the stored elements of a slice to its front, without branches, and returns its mask. zero_bits: those that a zero may have (the
// sign). Every element is written where the next stored one belongs, and stays if it is stored. What lies behind the stored elements has no
// meaning and must not get into a blob.
template <class T>
uint64_t compress_slice(uint8_t slice[slice_bytes], bool dense, T zero_bits) {
    constexpr int elements = slice_bytes / sizeof(T);
    T in[elements], out[elements + 1];
    std::memcpy(in, slice, slice_bytes);
    uint64_t mask = 0;
    int count = 0;
    for (int e = 0; e < elements; e++) {
        const bool stored = dense || T(in[e] & ~zero_bits) != 0;
        mask |= uint64_t(stored) << e;
        out[count] = in[e];
        count += stored;
    }
    std::memcpy(slice, out, slice_bytes);
    return mask;
}

// Writes the masks and values of one (block, chunk) and returns the bytes of the run. Null outputs only count.
uint64_t pack_run(const PlainWeight& p, const BlobView& w, uint64_t block, uint64_t chunk, uint8_t* masks, uint8_t* run) {
    const uint64_t first = chunk * w.tiles_per_chunk, last = std::min(w.tiles, first + w.tiles_per_chunk);
    const bool bf16 = w.kind == Kind::bf16, int4 = w.kind == Kind::int4;
    std::array<uint64_t, 2> cursor{};
    for (uint64_t tile = first; tile < last; tile++)
        for (uint64_t panel = 0; panel < block_panels; panel++)
            for (uint64_t slice = 0; slice < panel_slices; slice++) {
                uint8_t bytes[slice_bytes];
                gather_slice(p, w, block * block_n + panel * panel_n, (tile * panel_slices + slice) * w.slice_k, bytes);
                const uint64_t mask = bf16 ? compress_slice<uint16_t>(bytes, w.dense, 0x8000) : compress_slice<uint8_t>(bytes, w.dense, 0);
                const uint64_t count = uint64_t(__builtin_popcountll(mask));
                uint64_t& at = cursor[int4 ? slice & 1 : 0];
                // int4: a byte belongs to an even and an odd slice, so nibbles are added to bytes that pack() has zeroed. Those that the
                // shorter stream leaves over stay 0, as the format wants.
                if (run && int4)
                    for (uint64_t i = 0; i < count; i++)
                        run[at + i] = uint8_t(run[at + i] | (bytes[i] & 15) << (slice & 1 ? 4 : 0));
                else if (run)
                    std::memcpy(run + at * (bf16 ? 2 : 1), bytes, count * (bf16 ? 2 : 1));
                at += count;
                const uint64_t index = slice_index(w, block, tile, panel, slice), width = mask_bytes_per_slice(w.kind);
                if (masks)
                    std::memcpy(masks + width * index, &mask, width);
            }
    return run_bytes(w.kind, cursor);
}

// Length of every run and the directory that follows from them. Entry i + 1 is the end of run i and the start of the next; only behind the
// last chunk of a block is there a fill, so that blocks start at multiples of 64.
std::vector<uint64_t> directory_of(const PlainWeight& p, const BlobView& w) {
    std::vector<uint64_t> directory(w.blocks * w.chunks + 1);
    parallel_ranges(w.blocks, [&](uint64_t begin, uint64_t end) {
        for (uint64_t i = begin * w.chunks; i < end * w.chunks; i++)
            directory[i + 1] = pack_run(p, w, i / w.chunks, i % w.chunks, nullptr, nullptr);
    });
    for (uint64_t i = 0; i < w.blocks * w.chunks; i++) {
        directory[i + 1] += directory[i];
        if ((i + 1) % w.chunks == 0)
            directory[i + 1] = round_up(directory[i + 1], alignment);
    }
    return directory;
}

}  // namespace

uint64_t packed_bytes(const PlainWeight& p) {
    const Header h = header_of(p);
    return layout_of(h).val + directory_of(p, geometry_of(h)).back() + alignment;
}

void pack(const PlainWeight& p, uint8_t* blob, uint64_t bytes) {
    Header h = header_of(p);
    const Layout at = layout_of(h);
    const BlobView w = view_of(blob, h, at);
    const auto directory = directory_of(p, w);
    if (bytes != at.val + directory.back() + alignment)
        fail("pack needs a buffer of " + number(at.val + directory.back() + alignment) + " bytes, got " + number(bytes));
    std::memset(blob, 0, bytes);  // padding, fills, slack and the unused nibbles of int4 are zero from here on
    std::memcpy(blob + at.dir, directory.data(), 8 * directory.size());
    if (p.bias)
        std::memcpy(blob + at.bias, p.bias, 4 * p.n);
    std::atomic<uint64_t> nnz{0};
    parallel_each(w.blocks, [&](uint64_t block) {
        for (uint64_t chunk = 0; chunk < w.chunks; chunk++) {
            const uint64_t first = chunk * w.tiles_per_chunk;
            pack_run(p, w, block, chunk, p.dense ? nullptr : blob + at.mask, blob + at.val + directory[block * w.chunks + chunk]);
            const auto counts = count_bits(w, block, first, std::min(w.tiles, first + w.tiles_per_chunk));
            nnz += counts[0] + counts[1];
        }
        if (!w.segment)
            return;
        const uint64_t groups = w.group ? w.k_pad / w.group : 1, width = w.scales_f32 ? 4 : 2;
        const uint64_t real_groups = w.group ? (w.k + w.group - 1) / w.group : 1;
        for (uint64_t c = 0; c < block_n && block * block_n + c < p.n; c++) {
            const uint64_t n = block * block_n + c;
            for (uint64_t g = 0; g < real_groups; g++)
                std::memcpy(blob + at.scale + width * ((block * groups + g) * block_n + c),
                            static_cast<const uint8_t*>(p.scales) + width * (n * real_groups + g), width);
        }
    });
    // Padding is no element: of a dense blob the mask bits would count it.
    h.nnz = p.dense ? p.n * p.k : nnz.load();
    h.off_dir = at.dir, h.off_mask = at.mask, h.off_val = at.val, h.off_scale = at.scale, h.off_bias = at.bias;
    h.blob_bytes = bytes;
    // Last, over everything but the header, which holds it.
    h.crc = crc32(blob + sizeof(Header), bytes - sizeof(Header));
    std::memcpy(blob, &h, sizeof(Header));
}

void unpack(const BlobView& w, void* values, void* scales, float* bias) {
    parallel_each(w.blocks, [&](uint64_t block) {
        const uint64_t columns = std::min(block_n, w.n - block * block_n), width = w.kind == Kind::bf16 ? 2 : 1;
        auto* out = static_cast<uint8_t*>(values);
        if (out)
            std::memset(out + block * block_n * w.k * width, 0, columns * w.k * width);
        for (uint64_t chunk = 0; out && chunk < w.chunks; chunk++) {
            const uint8_t* run = w.values + directory_entry(w, block * w.chunks + chunk);
            uint64_t cursor[2] = {0, 0};
            const uint64_t first = chunk * w.tiles_per_chunk, last = std::min(w.tiles, first + w.tiles_per_chunk);
            for (uint64_t tile = first; tile < last; tile++)
                for (uint64_t panel = 0; panel < block_panels; panel++)
                    for (uint64_t slice = 0; slice < panel_slices; slice++)
                        for (uint64_t mask = mask_of(w, block, tile, panel, slice); mask; mask &= mask - 1) {
                            const auto [column, input] = position(w, tile, panel, slice, __builtin_ctzll(mask));
                            uint64_t& at = cursor[w.kind == Kind::int4 ? slice & 1 : 0];
                            const uint64_t t = at++;
                            // Padding of a dense blob is stored, so its cursor moves, but it has no place in the matrix.
                            if (column >= columns || input >= w.k)
                                continue;
                            uint8_t* to = out + ((block * block_n + column) * w.k + input) * width;
                            if (w.kind == Kind::bf16)
                                std::memcpy(to, run + 2 * t, 2);
                            else if (w.kind == Kind::int8)
                                *to = run[t];
                            else
                                *to = uint8_t(sign_extend(slice & 1 ? run[t] >> 4 : run[t] & 15));
                        }
        }
        const uint64_t groups = w.group ? w.k_pad / w.group : 1, real_groups = w.group ? (w.k + w.group - 1) / w.group : 1;
        const uint64_t scale_width = w.scales_f32 ? 4 : 2;
        for (uint64_t c = 0; scales && w.scales && c < columns; c++)
            for (uint64_t g = 0; g < real_groups; g++)
                std::memcpy(static_cast<uint8_t*>(scales) + scale_width * ((block * block_n + c) * real_groups + g),
                            w.scales + scale_width * ((block * groups + g) * block_n + c), scale_width);
    });
    if (bias && w.bias)
        std::memcpy(bias, w.bias, 4 * w.n);
}

namespace {

// What a dense weight of the same shape has; values are never looked at.
PlainWeight dense_weight(const BlobView& w) {
    return {w.kind, w.n, w.k, w.group, true, w.scales_f32, nullptr, w.scales, reinterpret_cast<const float*>(w.bias)};
}

// Of all runs: those of a dense weight have as many bytes as they have tiles.
uint64_t tile_bytes(Kind kind) { return kind == Kind::int4 ? k_tile_bytes / 2 : k_tile_bytes; }

// One (block, chunk): every stored element to its place among zeros. `to` holds zeros.
void expand_run(const BlobView& w, uint64_t block, uint64_t chunk, uint8_t* to) {
    const uint8_t* run = w.values + directory_entry(w, block * w.chunks + chunk);
    const uint64_t first = chunk * w.tiles_per_chunk, last = std::min(w.tiles, first + w.tiles_per_chunk);
    uint64_t cursor[2] = {0, 0};
    uint64_t slice = slice_index(w, block, first, 0, 0);
    for (const uint64_t end = slice_index(w, block, last, 0, 0); slice < end; slice++) {
        const uint64_t odd = w.kind == Kind::int4 ? slice & 1 : 0;
        uint64_t& at = cursor[odd];
        uint64_t mask = w.kind == Kind::bf16 ? load<uint32_t>(w.masks + 4 * slice) : load<uint64_t>(w.masks + 8 * slice);
        for (; mask; mask &= mask - 1, at++) {
            const auto e = uint64_t(__builtin_ctzll(mask));
            if (w.kind == Kind::bf16)
                std::memcpy(to + 2 * e, run + 2 * at, 2);
            else if (w.kind == Kind::int8)
                to[e] = run[at];
            else
                to[e] = uint8_t(to[e] | (run[at] & (odd ? 0xF0 : 0x0F)));
        }
        if (w.kind != Kind::int4 || odd)
            to += slice_bytes;
    }
}

}  // namespace

uint64_t dense_bytes(const BlobView& sparse) {
    require(!sparse.dense, "only a sparse weight can be expanded");
    return layout_of(header_of(dense_weight(sparse))).val + sparse.blocks * sparse.tiles * tile_bytes(sparse.kind) + alignment;
}

void expand(const BlobView& w, uint8_t* blob) {
    Header h = header_of(dense_weight(w));
    const Layout at = layout_of(h);
    h.nnz = w.n * w.k;
    h.off_dir = at.dir, h.off_val = at.val, h.off_scale = at.scale, h.off_bias = at.bias;
    h.blob_bytes = dense_bytes(w);
    std::memset(blob, 0, at.val);
    std::memcpy(blob, &h, sizeof(Header));
    // Both forms have the same sections of scales and bias.
    if (w.scales) {
        const uint64_t groups = w.group ? w.k_pad / w.group : 1;
        std::memcpy(blob + at.scale, w.scales, w.n_pad * groups * (w.scales_f32 ? 4 : 2));
    }
    if (w.bias)
        std::memcpy(blob + at.bias, w.bias, 4 * w.n);
    parallel_each(w.blocks, [&](uint64_t block) {
        uint8_t* to = blob + at.val + block * w.tiles * tile_bytes(w.kind);
        std::memset(to, 0, w.tiles * tile_bytes(w.kind));
        for (uint64_t chunk = 0; chunk < w.chunks; chunk++) {
            const uint64_t offset = chunk * w.tiles_per_chunk * tile_bytes(w.kind), from = offset + block * w.tiles * tile_bytes(w.kind);
            std::memcpy(blob + at.dir + 8 * (block * w.chunks + chunk), &from, 8);
            expand_run(w, block, chunk, to + offset);
        }
    });
    const uint64_t end = w.blocks * w.tiles * tile_bytes(w.kind);
    std::memcpy(blob + at.dir + 8 * w.blocks * w.chunks, &end, 8);
    std::memset(blob + at.val + end, 0, alignment);
}

}  // namespace ov_ext::sparse_matmul
