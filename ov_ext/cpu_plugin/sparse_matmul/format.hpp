// SPW1 in C++: header, checked view, validation and packing. The layout is specified in format.md; pack.py is the readable twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../support/blob.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {

constexpr uint32_t magic = 'S' | 'P' << 8 | 'W' << 16 | '1' << 24;
constexpr uint16_t format_version = 1;
constexpr uint64_t alignment = 64;  // of every section and of the values of a block; the zero bytes behind the last value, too

enum Flags : uint32_t { bias_flag = 1, column_scales = 2, group_scales = 4, dense_flag = 16, f32_scales = 32, no_compensation = 64 };

struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint8_t kind, slice_k, panel_n, block_panels;
    uint32_t flags;
    uint64_t n, k, n_pad, k_pad;  // outputs, inputs, and both with padding
    uint32_t group, chunk_k;      // inputs
    uint64_t nnz;                 // elements
    uint64_t off_dir, off_mask, off_val, off_scale, off_bias, blob_bytes;
    uint64_t crc;
    uint64_t off_comp;
};
static_assert(sizeof(Header) == 128, "the header is 128 bytes");

// Inputs in one slice of a kind: what one dot-product instruction consumes.
constexpr uint64_t slice_inputs(Kind kind) { return kind == Kind::bf16 ? 2 : 4; }
constexpr uint64_t tile_inputs(Kind kind) { return panel_slices * slice_inputs(kind); }  // of a k tile
constexpr uint64_t mask_bytes_per_slice(Kind kind) { return kind == Kind::bf16 ? 4 : 8; }
// Inputs whose integer products are summed before they are scaled.
constexpr uint64_t segment_inputs(uint64_t group) { return group ? group : 128; }
constexpr uint64_t padded_inputs(Kind kind, uint64_t k, uint64_t group) {
    return round_up(k, kind == Kind::bf16 ? tile_inputs(kind) : segment_inputs(group));
}

// Checks everything that needs the header and the directory's last entry only, in constant time.
// The view points into `blob`, which must stay alive.
BlobView parse(const uint8_t* blob, size_t bytes);

// Checks the rest (masks, values, fills, compensation, scales) in parallel: after it the kernels cannot leave the blob.
// sums: i16[blocks][k_pad / segment][block_n] or null; receives the compensation of an integer weight, which is known on the way.
void validate_content(const BlobView& view, int16_t* sums = nullptr);
uint64_t number_of_sums(const BlobView& view);  // of compensation
void validate(const uint8_t* blob, size_t bytes);

// Compares the checksum of a blob that parse() accepted. A blob can be valid and yet hold other weights than those that were packed.
void validate_checksum(const uint8_t* blob, size_t bytes);

// A weight as plain arrays, row-major. Pointers are borrowed.
struct PlainWeight {
    Kind kind;
    uint64_t n, k;
    uint64_t group;      // 0, 64, 128
    bool dense;          // store every element
    bool scales_f32;     // else f16
    const void* values;  // [n, k]: u16 bit patterns (bf16) or s8 codes
    const void* scales;  // [n, groups] or null for bf16
    const float* bias;   // [n] or null
};

uint64_t packed_bytes(const PlainWeight& weight);
void pack(const PlainWeight& weight, uint8_t* blob, uint64_t bytes);
// values [n, k], scales [n, groups] in the blob's scale type, bias [n]; null pointers are skipped. The blob must be valid.
void unpack(const BlobView& view, void* values, void* scales, float* bias);

// The dense form of a sparse weight: its length, and the blob, but for the checksum, which stays 0. The blob of `sparse` must be valid.
uint64_t dense_bytes(const BlobView& sparse);
void expand(const BlobView& sparse, uint8_t* blob);

}  // namespace ov_ext::sparse_matmul
