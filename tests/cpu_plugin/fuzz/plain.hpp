// SPW1 once more, written from format.md alone and sharing nothing with the library: what the fuzzer compares the library with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace spw1 {

enum Kind : int { bf16 = 1, int8 = 2, int4 = 3 };

// One weight as plain arrays, row-major.
struct Plain {
    int kind = int8;
    bool dense = false, f32_scales = false, has_bias = false, compensated = false;
    uint64_t n = 1, k = 1, group = 0;
    std::vector<int32_t> values;   // [n, k]: bf16 bit patterns or integer codes
    std::vector<uint32_t> scales;  // [n, groups]: f16 or f32 bit patterns; empty for bf16
    std::vector<uint32_t> bias;    // [n]: f32 bit patterns

    uint64_t flags() const;  // of the header
    uint64_t groups() const { return kind == bf16 ? 0 : group ? (k + group - 1) / group : 1; }
    float scale(uint64_t output, uint64_t input) const;
};

// Everything that follows from the sizes. Offsets and lengths are in bytes and exact for any sizes below 2^64.
struct Geometry {
    using Wide = unsigned __int128;
    uint64_t slice_k, segment;  // inputs
    Wide n_pad, k_pad, blocks, tiles, chunks, tiles_per_chunk;
    Wide dir, mask, scale, comp, bias, val;  // offsets, 0 when absent
    Wide dir_bytes, mask_bytes, scale_bytes, comp_bytes, bias_bytes;

    Geometry(int kind, uint64_t flags, uint64_t n, uint64_t k, uint64_t group);  // flags: of the header
};

// What format.md calls a valid blob, decoded; nothing for every other byte string.
std::optional<Plain> decode(const uint8_t* blob, size_t bytes);
// `stored` names an element (row-major) that is stored although it is zero: malformed when sparse, and in nothing else.
std::vector<uint8_t> encode(const Plain& weight, std::optional<uint64_t> stored = {});

// y[rows, n]. Integer activations: the exact float32 result that format.md asks for, bound 0. Otherwise the product in float64 and a
// bound on the error of any order of float32 additions; an infinite bound where float32 may overflow.
struct Product {
    std::vector<double> y, bound;
};
Product multiply(const Plain& weight, const std::vector<float>& x, uint64_t rows, int64_t activation_group);

float from_bits(uint32_t bits);
uint32_t to_bits(float value);
uint16_t round_to_bf16(float value);

}  // namespace spw1
