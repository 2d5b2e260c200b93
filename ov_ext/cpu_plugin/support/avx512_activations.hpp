// Preparing activations with AVX-512: what avx512.cpp and amx.cpp share. Everything is in an anonymous namespace: each of the two files
// is compiled with its own flags and keeps its own copy.
#pragma once

#include <immintrin.h>

#include "../sparse_matmul/avx512_slices.hpp"

namespace ov_ext::sparse_matmul {
namespace {

INLINE __m512 load_x(const void* x, bool x_is_bf16, uint64_t i, uint64_t end) {
    const __mmask16 mask = end - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (end - i)) - 1);
    if (!x_is_bf16)
        return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i)), 16));
}

// Where byte i of a prepared row lies, when its 64-byte pieces are `piece` bytes apart: 64 for plain rows, 1024 for rows of AMX tiles.
INLINE uint8_t* byte_at(uint8_t* row, uint64_t i, uint64_t piece) { return row + i / 64 * piece + i % 64; }

// Same rule, same bits as the reference kernel's quantization; `offset` is added to the codes.
void quantize(const BlobView& w, const void* x, bool x_is_bf16, uint64_t group, int offset, uint8_t* row, uint64_t piece, float* scales) {
    for (uint64_t start = 0; start < w.k_pad; start += group) {
        const uint64_t padded_end = start + group < w.k_pad ? start + group : w.k_pad;
        const uint64_t end = padded_end < w.k ? padded_end : w.k;
        __m512i magnitude = _mm512_setzero_si512();
        for (uint64_t i = start; i < end; i += 16)
            magnitude = _mm512_max_epu32(
                magnitude, _mm512_and_si512(_mm512_castps_si512(load_x(x, x_is_bf16, i, end)), _mm512_set1_epi32(0x7FFFFFFF)));
        const uint32_t largest = _mm512_reduce_max_epu32(magnitude);
        const bool finite = largest < 0x7F800000, zero = largest < 0x03800000;
        float peak;
        __builtin_memcpy(&peak, &largest, 4);
        const float factor = !finite ? __builtin_nanf("") : zero ? 0.0f : peak / 127.0f;
        const float inverse = finite && !zero ? 127.0f / peak : 0.0f;
        for (uint64_t i = start; i < padded_end; i += 16) {
            __m512i q = _mm512_setzero_si512();
            if (i < end && inverse != 0.0f)
                q = _mm512_cvtps_epi32(_mm512_mul_ps(load_x(x, x_is_bf16, i, end), _mm512_set1_ps(inverse)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(byte_at(row, i, piece)),
                             _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(offset))));
        }
        for (uint64_t s = start / w.segment; s * w.segment < padded_end; s++)
            scales[s] = factor;
    }
}

// To nearest, ties to even, as integers: denormals survive, NaN stays NaN. The upper halves of the lanes hold the result.
INLINE __m512i round_to_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

void round_row_to_bf16(const BlobView& w, const void* x, bool x_is_bf16, uint8_t* row, uint64_t piece) {
    for (uint64_t i = 0; i < w.k_pad; i += 16) {
        const __m512 value = i < w.k ? load_x(x, x_is_bf16, i, w.k) : _mm512_setzero_ps();
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(byte_at(row, 2 * i, piece)),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(value), 16)));
    }
}

}  // namespace
}  // namespace ov_ext::sparse_matmul
