// What every AVX-512 kernel does alike with the sections of a blob: scales and compensation in registers, distances of prefetches.
// Included by files compiled with these instructions only; everything is in an anonymous namespace.
#pragma once

#include <immintrin.h>

#include "../support/unaligned.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// What is prefetched, and how far ahead. Hardware prefetching stops at every page; what lies ahead of a chunk's end is the next chunk's
// run. Behind the last one a prefetch does nothing: it never faults.
constexpr int line_bytes = 64;            // of a cache line
constexpr int values_ahead = 2048;        // bytes, of sparse values, into L1
constexpr int dense_values_ahead = 4096;  // bytes, of dense values, into L2
constexpr int slices_ahead = 128;         // whose masks are fetched
constexpr int slices_per_fetch = 4;       // consume two lines of values at half density, of int4 one

// Of 16 outputs, one a lane, as the sums have them. Scales and compensation lie at any address, like the blob.
INLINE __m512 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int panel) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * block_n + uint64_t(panel) * panel_n;
    if (w.scales_f32)
        return _mm512_loadu_ps(w.scales + 4 * i);
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + 2 * i)));
}

// What the offset of 128 added to the sum of a segment: 128 times the sum of its weights, which fits 32 bits easily (2^7 * 2^15).
INLINE __m512i offset_of(const BlobView& w, uint64_t block, uint64_t segment, int panel) {
    const auto* at = w.compensation + 2 * ((block * (w.k_pad / w.segment) + segment) * block_n + uint64_t(panel) * panel_n);
    return _mm512_slli_epi32(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))), 7);
}

}  // namespace
}  // namespace ov_ext::sparse_matmul
