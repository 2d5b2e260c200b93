// bf16 and f16, one value at a time: for reference kernels and for what stores results. Safe in kernel objects: see unaligned.hpp.
#pragma once

#include <cstdint>

#include "unaligned.hpp"

namespace ov_ext {
namespace {

INLINE float from_bits(uint32_t bits) { return load<float>(&bits); }
INLINE uint32_t to_bits(float value) { return load<uint32_t>(&value); }

INLINE float bf16_to_float(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

// To nearest, ties to even; NaN stays NaN, also one whose upper half alone would be an infinity. 0x7FFF is half of the last bit that stays,
// less one, and a last bit that is odd adds the one: ties go to even. A carry out of the mantissa gives the next power of 2, or infinity.
INLINE uint16_t float_to_bf16(float value) {
    const uint32_t bits = to_bits(value);
    if (value != value)
        return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Finite values only: the scales of a blob are. (1024 + mantissa) * 2^(exponent - 15 - 10); denormals are multiples of 2^-24.
INLINE float f16_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent ? __builtin_ldexpf(float(1024 + mantissa), exponent - 25) : __builtin_ldexpf(float(mantissa), -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

}  // namespace
}  // namespace ov_ext
