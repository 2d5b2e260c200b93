// Decoding weights with AVX-512: what avx512.cpp and amx.cpp share. Everything is in an anonymous namespace: each of the two files is
// compiled with its own flags and keeps its own copy.
#pragma once

#include <immintrin.h>

#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

#define INLINE inline __attribute__((always_inline))

template <class T>
INLINE T load(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
}

// ------------------------------------------------------------------------------------------------- decoding rows

// 8x8 bit matrices for gf2p8affineqb (byte i of the matrix gives output bit 7 - i): sign-extended low and high nibble.
constexpr uint64_t low_nibble = 0x0102040808080808, high_nibble = 0x1020408080808080;

// Walks the masks and values of a chunk, one 64-byte row at a time.
template <Kind kind, bool dense>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even rows
    const uint8_t* odd;     // int4: cursor of the odd rows

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
        // The barrier keeps load and expand apart: their fused form is slower on every CPU measured.
        __asm__("" : "+v"(row));
        if (kind == Kind::bf16) {
            const uint32_t mask = load<uint32_t>(masks);
            masks += 4;
            at += 2 * __builtin_popcount(mask);
            return _mm512_maskz_expand_epi16(mask, row);
        }
        const uint64_t mask = load<uint64_t>(masks);
        masks += 8;
        at += __builtin_popcountll(mask);
        return _mm512_maskz_expand_epi8(mask, row);
    }

    // Called every four rows, which consume two lines of values at half density (int4: one). Hardware prefetching alone stops at every
    // page; these distances were 1.2 times faster for bf16 and int8 than one line at 1536.
    INLINE void prefetch() const {
        const char* ahead = reinterpret_cast<const char*>(values) + 2048;
        _mm_prefetch(ahead, _MM_HINT_T0);
        if (kind != Kind::int4)
            _mm_prefetch(ahead + 64, _MM_HINT_T0);
        if (!dense)
            _mm_prefetch(reinterpret_cast<const char*>(masks) + 1024, _MM_HINT_T0);
    }
};

INLINE __m512 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int panel) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * 64 + uint64_t(panel) * 16;
    if (w.scales_f32)
        return _mm512_loadu_ps(w.scales + 4 * i);
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + 2 * i)));
}

}  // namespace
}  // namespace ov_ext::sparse_matmul
