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

// Brings the values and masks of the run behind a chunk into L2, while that chunk, decoded by now, is multiplied in `steps` steps: memory
// would rest meanwhile.
class NextRun {
  public:
    INLINE NextRun() {}
    INLINE NextRun(const BlobView& w, uint64_t block, uint64_t chunk, uint64_t mask_bytes, uint64_t steps) {
        const uint64_t next = block * w.chunks + chunk + 1;
        if (next == w.blocks * w.chunks)
            return;
        const uint64_t begin = load<uint64_t>(w.directory + 8 * next), end = load<uint64_t>(w.directory + 8 * next + 8);
        m_values = {w.values + begin, (end - begin) / line_bytes + 1, steps};
        if (w.dense)
            return;
        const uint64_t tile_bytes = block_panels * panel_slices * mask_bytes, first = (chunk + 1) * w.tiles_per_chunk;
        const uint64_t tile = block * w.tiles + (first < w.tiles ? first : w.tiles);
        m_masks = {w.masks + tile * tile_bytes, w.tiles_per_chunk * tile_bytes / line_bytes, steps};
    }
    INLINE void step() {
        m_values.step();
        m_masks.step();
    }

  private:
    struct Lines {
        const uint8_t* at = nullptr;
        uint64_t left = 0, each = 0;

        INLINE Lines() {}
        INLINE Lines(const uint8_t* at, uint64_t lines, uint64_t steps) : at(at), left(lines), each((lines + steps - 1) / steps) {}
        INLINE void step() {
            const uint64_t count = each < left ? each : left;
            left -= count;
            for (const uint8_t* const end = at + count * line_bytes; at != end; at += line_bytes)
                _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
        }
    } m_values, m_masks;
};

}  // namespace
}  // namespace ov_ext::sparse_matmul
