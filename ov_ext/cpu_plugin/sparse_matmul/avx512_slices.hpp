// Rows of the format in AVX-512 registers: what the AVX-512 and AMX kernels share. Included by files compiled with these instructions
// only; everything is in an anonymous namespace, so that no other object file can pick it up.
//
// One row of the format is one register. Decoding a row costs one load of a mask, one of values, one expand (2 of the 3 cycles that port 5
// of Intel cores spends on a row, the third is the move to a mask register) and, for int4, one gf2p8affineqb that cuts out a nibble and
// extends its sign.
#pragma once

#include <immintrin.h>

#include "kernel.hpp"
#include "../support/unaligned.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// 8x8 bit matrices for gf2p8affineqb (byte i of the matrix gives output bit 7 - i): sign-extended low and high nibble.
constexpr uint64_t low_nibble = 0x0102040808080808, high_nibble = 0x1020408080808080;

// Walks the masks and values of a chunk, one 64-byte row at a time.
template <Kind kind, bool dense>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even rows
    const uint8_t* odd;     // int4: cursor of the odd rows

    INLINE Stream(const BlobView& w, uint64_t block, uint64_t chunk)
        : masks(dense ? nullptr : w.masks + (block * w.tiles + chunk * w.tiles_per_chunk) * 64 * (kind == Kind::bf16 ? 4 : 8)),
          values(w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk))),
          odd(values) {}

    // Rows with even and with odd r alternate.
    template <int parity>
    INLINE __m512i next() {
        const uint8_t*& at = kind == Kind::int4 && parity ? odd : values;
        __m512i row = _mm512_loadu_si512(at);
        if (kind == Kind::int4)
            row = _mm512_gf2p8affine_epi64_epi8(row, _mm512_set1_epi64(int64_t(parity ? high_nibble : low_nibble)), 0);
        if (dense) {
            at += 64;
            return row;
        }
        // The barriers keep load and expand apart (their fused form is slower on every CPU measured), and the mask in one load.
        __asm__("" : "+v"(row));
        if (kind == Kind::bf16) {
            uint32_t mask = load<uint32_t>(masks);
            __asm__("" : "+r"(mask));
            masks += 4;
            at += 2 * __builtin_popcount(mask);
            return _mm512_maskz_expand_epi16(mask, row);
        }
        uint64_t mask = load<uint64_t>(masks);
        __asm__("" : "+r"(mask));
        masks += 8;
        at += __builtin_popcountll(mask);
        return _mm512_maskz_expand_epi8(mask, row);
    }

    // Called before row r of a panel. Hardware prefetching stops at every page; what lies ahead of a chunk's end is the next chunk's run.
    INLINE void prefetch(int r) const {
        const auto* value = reinterpret_cast<const char*>(values);
        if (dense) {  // bound by memory alone: early, and into L2, because the line buffers of L1 are few
            if (kind != Kind::int4 || r % 2 == 0)
                _mm_prefetch(value + 4096, _MM_HINT_T1);
            return;
        }
        if (r % 4 == 0) {  // four rows consume two lines of values at half density (int4: one)
            _mm_prefetch(value + 2048, _MM_HINT_T0);
            if (kind != Kind::int4)
                _mm_prefetch(value + 2048 + 64, _MM_HINT_T0);
        }
        if (r % (kind == Kind::bf16 ? 16 : 8) == 0)
            _mm_prefetch(reinterpret_cast<const char*>(masks) + (kind == Kind::bf16 ? 512 : 1024), _MM_HINT_T0);
    }
};

INLINE __m512 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int panel) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * 64 + uint64_t(panel) * 16;
    if (w.scales_f32)
        return _mm512_loadu_ps(w.scales + 4 * i);
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + 2 * i)));
}

// What the offset of 128 added to the sum of a segment.
INLINE __m512i offset_of(const BlobView& w, uint64_t block, uint64_t segment, int panel) {
    const auto* at = w.compensation + 2 * ((block * (w.k_pad / w.segment) + segment) * 64 + uint64_t(panel) * 16);
    return _mm512_slli_epi32(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))), 7);
}

}  // namespace
}  // namespace ov_ext::sparse_matmul
