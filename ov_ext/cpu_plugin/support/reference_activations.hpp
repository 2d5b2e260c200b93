// Preparing activations one value at a time, for reference kernels.
#pragma once

#include <cmath>

#include "quantization.hpp"

namespace ov_ext {
namespace {

INLINE float load_x(const void* x, bool x_is_bf16, uint64_t i) {
    return x_is_bf16 ? bf16_to_float(static_cast<const uint16_t*>(x)[i]) : static_cast<const float*>(x)[i];
}

// to: [k_pad] codes.
inline void quantize(const RowShape& row, const void* x, bool x_is_bf16, int32_t* to, float* scales) {
    const auto largest = [&](uint64_t begin, uint64_t end) {
        uint32_t bits = 0;
        for (uint64_t i = begin; i < end; i++) {
            const uint32_t magnitude = to_bits(load_x(x, x_is_bf16, i)) & 0x7FFFFFFF;
            bits = magnitude > bits ? magnitude : bits;
        }
        return bits;
    };
    const auto encode = [&](uint64_t begin, uint64_t end, uint64_t padded_end, float inverse) {
        for (uint64_t i = begin; i < padded_end; i++)
            // nearbyintf rounds in the current mode, to nearest even unless somebody changed it: just as the vector conversions do.
            to[i] = i < end && inverse != 0.0f ? int32_t(std::nearbyintf(load_x(x, x_is_bf16, i) * inverse)) : 0;
    };
    quantize_groups(row, scales, largest, encode);
}

// to: [k_pad], rounded to bf16 or as they are.
inline void copy_as_f32(const RowShape& row, const void* x, bool x_is_bf16, bool round, float* to) {
    for (uint64_t i = 0; i < row.k_pad; i++) {
        const float value = i < row.k ? load_x(x, x_is_bf16, i) : 0.0f;
        to[i] = round ? bf16_to_float(float_to_bf16(value)) : value;
    }
}

}  // namespace
}  // namespace ov_ext
