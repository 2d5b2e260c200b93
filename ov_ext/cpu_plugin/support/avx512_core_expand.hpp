// Bitmap expansion with AVX-512 F, BW, DQ and VL alone, for CPUs without VBMI2 (Skylake-SP, Cascade Lake). For files compiled with these
// instructions only; everything is in an anonymous namespace.
//
// There is no expansion of bytes or words, but one of 32-bit lanes (vpexpandd), which 16-bit values can take one by one, and there are
// shuffles within 16 bytes. A shuffle for 64 bytes comes from registers: a table in memory costs twice the instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unaligned.hpp"

namespace ov_ext {
namespace {

// Of each nibble of a mask: where its values lie, counted back from the end of those that it takes; 0x80, whose top bit makes a shuffle give
// zero, where there is none. And how many it takes, four times. Both are read with vpermd.
struct NibbleTables {
    uint32_t lanes[16], counts[16];
};
constexpr NibbleTables make_nibble_tables() {
    NibbleTables t{};
    for (uint32_t nibble = 0; nibble < 16; nibble++) {
        const uint32_t count = (nibble & 1) + (nibble >> 1 & 1) + (nibble >> 2 & 1) + (nibble >> 3);
        uint32_t value = 0;
        for (int lane = 0; lane < 4; lane++) {
            const bool set = nibble >> lane & 1;
            t.lanes[nibble] |= (set ? (value - count) & 0xFF : 0x80) << 8 * lane;
            value += set;
        }
        t.counts[nibble] = count * 0x01010101;
    }
    return t;
}
alignas(64) constexpr NibbleTables nibble_tables = make_nibble_tables();

// Spreads the packed bytes at `values` over the lanes whose bits are set in the next mask, zero elsewhere, and moves both cursors behind
// what was used. May read 16 bytes from any packed value on, the one behind the last included.
//
// A shuffle does not cross 16 bytes: each quarter of the register loads its own values, from where those of the quarters before it end. A
// 32-bit lane c is nibble c of the mask. Within a quarter its values end where the counts of nibbles 0 ... c end:
//
//     counts                       a     b     c     d
//     pairs = counts + (<< 32)     a    a+b    c    c+d
//     second of the first pair     0     0    a+b   a+b
//     sum of both: their ends      a    a+b  a+b+c  a+b+c+d
INLINE __m512i expand_bytes(const uint8_t*& masks, const uint8_t*& values) {
    const uint64_t mask = load<uint64_t>(masks);
    const auto quarter = [&](int bits) INLINED {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + (bits ? __builtin_popcountll(mask << (64 - bits)) : 0)));
    };
    __m512i packed = _mm512_castsi128_si512(quarter(0));
    packed = _mm512_inserti32x4(packed, quarter(16), 1);
    packed = _mm512_inserti32x4(packed, quarter(32), 2);
    packed = _mm512_inserti32x4(packed, quarter(48), 3);
    // vpermd looks at the lowest four bits of an index.
    const __m512i halves = _mm512_inserti64x4(_mm512_set1_epi32(load<int32_t>(masks)), _mm256_set1_epi32(load<int32_t>(masks + 4)), 1);
    const __m512i nibbles = _mm512_srlv_epi32(halves, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
    const __m512i lanes = _mm512_permutexvar_epi32(nibbles, _mm512_load_si512(nibble_tables.lanes));
    const __m512i counts = _mm512_permutexvar_epi32(nibbles, _mm512_load_si512(nibble_tables.counts));
    const __m512i pairs = _mm512_add_epi32(counts, _mm512_slli_epi64(counts, 32));
    const __m512i before = _mm512_maskz_shuffle_epi32(0xCCCC, pairs, _MM_PERM_BBBB);
    masks += 8;
    values += __builtin_popcountll(mask);
    return _mm512_shuffle_epi8(packed, _mm512_add_epi8(_mm512_add_epi8(lanes, pairs), before));
}

// The same for 16-bit values, one to a 32-bit lane, in its upper half: lanes 0 ... 15 to half[0], 16 ... 31 to half[1]. May read 32 bytes
// from any packed value on.
//
// The barrier keeps compilers from loading the mask into a general register and from there into one for masks, a second instruction on
// port 5, which is what bounds this: 8 of its cycles.
INLINE void expand_words(const uint8_t*& masks, const uint8_t*& values, __m512i (&half)[2]) {
    const uint32_t mask = load<uint32_t>(masks);
    for (int h = 0; h < 2; h++) {
        const uint8_t* from = values + (h ? 2 * __builtin_popcount(mask & 0xFFFF) : 0);
        __mmask16 bits;
        __asm__("kmovw %1, %0" : "=k"(bits) : "m"(*reinterpret_cast<const uint16_t (*)[1]>(masks + 2 * h)));
        __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        __asm__("" : "+v"(words));  // apart from the expansion, also when a compiler prefers to expand from memory
        half[h] = _mm512_slli_epi32(_mm512_maskz_expand_epi32(bits, words), 16);
    }
    masks += 4;
    values += 2 * __builtin_popcount(mask);
}

}  // namespace
}  // namespace ov_ext
