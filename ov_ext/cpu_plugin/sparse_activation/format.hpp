// SAM1 in C++: header, checked view and validation. The layout is specified in format.md; pack.py writes and reads it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../support/blob.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_activation {

constexpr uint32_t magic = 'S' | 'A' << 8 | 'M' << 16 | '1' << 24;
constexpr uint16_t format_version = 1;
constexpr uint64_t alignment = 128;  // of every section: the lines of a row

enum Flags : uint32_t { bias_flag = 1, f32_scales = 2, thresholds = 4, replacements = 8, replaced = 16 };

struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint8_t kind, zeros[3];
    uint32_t flags;
    uint64_t n, k, n_pad;  // outputs, inputs, outputs with padding
    uint32_t group;        // inputs
    float centre;
    uint64_t off_threshold, off_replacement, off_offset, off_scale, off_bias, off_val, blob_bytes;
    uint64_t crc;
    uint64_t more_zeros[2];
};
static_assert(sizeof(Header) == 128, "the header is 128 bytes");

// Checks the header, in constant time. The view points into `blob`, which must stay alive.
View parse(const uint8_t* blob, size_t bytes);

// Checks the rest, in parallel: results would depend on the kernel. No content can lead one out of the blob.
void validate_content(const View& view);
void validate(const uint8_t* blob, size_t bytes);

// Compares the checksum of a blob that parse() accepted.
void validate_checksum(const uint8_t* blob, size_t bytes);

}  // namespace ov_ext::sparse_activation
