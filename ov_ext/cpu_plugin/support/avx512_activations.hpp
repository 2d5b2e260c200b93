// Preparing activations with AVX-512. For files compiled with AVX-512 only; everything is in an anonymous namespace, so that each keeps
// its own copy.
#pragma once

#include <immintrin.h>

#include "quantization.hpp"

namespace ov_ext {
namespace {

// Sixteen activations from i on, zeros from `end` on; a masked load touches no memory behind x.
INLINE __m512 load_x(const void* x, bool x_is_bf16, uint64_t i, uint64_t end) {
    const __mmask16 mask = end - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (end - i)) - 1);
    if (!x_is_bf16)
        return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i)), 16));
}

constexpr uint64_t piece_bytes = 64;  // of a prepared row that lie together: a register, and a row of an AMX tile

// Where byte i of a prepared row lies, when its pieces are `distance` bytes apart: piece_bytes for plain rows, the size of a tile for rows
// of AMX tiles.
INLINE uint8_t* byte_at(uint8_t* row, uint64_t i, uint64_t distance) { return row + i / piece_bytes * distance + i % piece_bytes; }

// to: [k_pad] codes with `offset` added, in pieces.
inline void quantize(const RowShape& row, const void* x, bool x_is_bf16, int offset, uint8_t* to, uint64_t distance, float* scales) {
    const auto largest = [&](uint64_t begin, uint64_t end) INLINED {
        __m512i magnitude = _mm512_setzero_si512();
        for (uint64_t i = begin; i < end; i += 16)
            magnitude = _mm512_max_epu32(
                magnitude, _mm512_and_si512(_mm512_castps_si512(load_x(x, x_is_bf16, i, end)), _mm512_set1_epi32(0x7FFFFFFF)));
        return uint32_t(_mm512_reduce_max_epu32(magnitude));
    };
    const auto encode = [&](uint64_t begin, uint64_t end, uint64_t padded_end, float inverse) INLINED {
        for (uint64_t i = begin; i < padded_end; i += 16) {
            __m512i q = _mm512_setzero_si512();
            // Not x * 0 for a group that becomes zero: x may be NaN or infinity there, and the product NaN.
            if (i < end && inverse != 0.0f)
                q = _mm512_cvtps_epi32(_mm512_mul_ps(load_x(x, x_is_bf16, i, end), _mm512_set1_ps(inverse)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(byte_at(to, i, distance)),
                             _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(offset))));
        }
    };
    quantize_groups(row, scales, largest, encode);
}

// To nearest, ties to even, as integers: denormals survive, NaN stays NaN. The upper halves of the lanes hold the result. A NaN is not
// rounded, since the addition could carry out of its mantissa; its quiet bit is set, or the upper half alone might be an infinity.
INLINE __m512i round_to_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

// to: [k_pad] bf16, in pieces. k_pad is a multiple of 16.
inline void copy_as_bf16(const RowShape& row, const void* x, bool x_is_bf16, uint8_t* to, uint64_t distance) {
    for (uint64_t i = 0; i < row.k_pad; i += 16) {
        const __m512 value = i < row.k ? load_x(x, x_is_bf16, i, row.k) : _mm512_setzero_ps();
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(byte_at(to, 2 * i, distance)),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(value), 16)));
    }
}

// to: [k_pad], rounded to bf16 or as they are. k_pad is a multiple of 16.
inline void copy_as_f32(const RowShape& row, const void* x, bool x_is_bf16, bool round, float* to) {
    for (uint64_t i = 0; i < row.k_pad; i += 16) {
        const __m512 value = i < row.k ? load_x(x, x_is_bf16, i, row.k) : _mm512_setzero_ps();
        const __m512i bits =
            round ? _mm512_and_si512(round_to_bf16(value), _mm512_set1_epi32(int(0xFFFF0000))) : _mm512_castps_si512(value);
        _mm512_storeu_si512(to + i, bits);
    }
}

}  // namespace
}  // namespace ov_ext
