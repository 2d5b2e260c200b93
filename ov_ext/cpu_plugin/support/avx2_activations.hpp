// Preparing activations with AVX2. For files compiled with AVX2 only; everything is in an anonymous namespace.
#pragma once

#include "avx2_registers.hpp"
#include "quantization.hpp"

namespace ov_ext {
namespace {

// Eight activations from i on, zeros from `end` on, without touching memory behind x.
INLINE __m256 load_x(const void* x, bool x_is_bf16, uint64_t i, uint64_t end) {
    if (end - i >= 8)
        return x_is_bf16 ? floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(static_cast<const uint16_t*>(x) + i)), 16))
                         : _mm256_loadu_ps(static_cast<const float*>(x) + i);
    alignas(32) float tail[8] = {};
    for (uint64_t j = i; j < end; j++)
        tail[j - i] = x_is_bf16 ? bf16_to_float(static_cast<const uint16_t*>(x)[j])
                                : load<float>(static_cast<const uint8_t*>(x) + 4 * j);  // at any address
    return _mm256_load_ps(tail);
}

// The largest of eight unsigned numbers: halves against each other, then pairs, then neighbours.
INLINE uint32_t largest_of(__m256i v) {
    const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1))));
}

// to: [k_pad] codes, s8, or u8 with 128 added.
inline void quantize(const RowShape& row, const void* x, bool x_is_bf16, bool offset_by_128, uint8_t* to, float* scales) {
    const auto largest = [&](uint64_t begin, uint64_t end) INLINED {
        __m256i magnitude = _mm256_setzero_si256();
        for (uint64_t i = begin; i < end; i += 8)
            magnitude = _mm256_max_epu32(
                magnitude, _mm256_and_si256(_mm256_castps_si256(load_x(x, x_is_bf16, i, end)), _mm256_set1_epi32(0x7FFFFFFF)));
        return largest_of(magnitude);
    };
    const auto encode = [&](uint64_t begin, uint64_t end, uint64_t padded_end, float inverse) INLINED {
        for (uint64_t i = begin; i < padded_end; i += 8) {
            __m256i q = _mm256_setzero_si256();
            // Not x * 0 for a group that becomes zero: x may be NaN or infinity there, and the product NaN.
            if (i < end && inverse != 0.0f)
                q = _mm256_cvtps_epi32(_mm256_mul_ps(load_x(x, x_is_bf16, i, end), _mm256_set1_ps(inverse)));
            // Codes lie in -127..127, so packing does not saturate. Adding 128 to a byte is turning its top bit.
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
            const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(offset_by_128 ? int8_t(0x80) : int8_t(0)));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), bytes);
        }
    };
    quantize_groups(row, scales, largest, encode);
}

// To nearest, ties to even: adds one half of the last bit that stays, less one if that bit is even. NaN stays NaN: the addition could carry
// its mantissa into the exponent and beyond.
INLINE __m256 round_to_bf16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_and_si256(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), _mm256_set1_epi32(int(0xFFFF0000)));
    return _mm256_blendv_ps(floats(rounded), value, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
}

// to: [k_pad], rounded to bf16 or as they are. k_pad is a multiple of 8.
inline void copy_as_f32(const RowShape& row, const void* x, bool x_is_bf16, bool round, float* to) {
    for (uint64_t i = 0; i < row.k_pad; i += 8) {
        const __m256 value = i < row.k ? load_x(x, x_is_bf16, i, row.k) : _mm256_setzero_ps();
        _mm256_storeu_ps(to + i, round ? round_to_bf16(value) : value);
    }
}

}  // namespace
}  // namespace ov_ext
