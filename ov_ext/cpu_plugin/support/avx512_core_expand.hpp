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

// Four bytes of a mask in the lanes of `where`, those of `others` elsewhere. Written as an instruction, which needs no port but that of loads:
// compilers read a mask once, into a general register, and pay on port 5 for every way from there.
INLINE __m512i repeat(const uint8_t* mask, __mmask16 where, __m512i others) {
    __asm__("vpbroadcastd %1, %0%{%2%}" : "+v"(others) : "m"(*reinterpret_cast<const uint32_t (*)[1]>(mask)), "Yk"(where));
    return others;
}
INLINE __m512i repeat(const uint8_t* mask) {
    __m512i value;
    __asm__("vpbroadcastd %1, %0" : "=v"(value) : "m"(*reinterpret_cast<const uint32_t (*)[1]>(mask)));
    return value;
}

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
    const auto count = [](uint64_t mask) INLINED { return uint64_t(__builtin_popcountll(mask)); };
    const auto quarter = [&](uint64_t before) INLINED { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + before)); };
    __m512i packed = _mm512_castsi128_si512(quarter(0));
    packed = _mm512_inserti32x4(packed, quarter(count(load<uint16_t>(masks))), 1);
    packed = _mm512_inserti32x4(packed, quarter(count(load<uint32_t>(masks))), 2);
    packed = _mm512_inserti32x4(packed, quarter(count(load<uint64_t>(masks) << 16)), 3);
    values += count(load<uint64_t>(masks));
    // vpermd looks at the lowest four bits of an index.
    const __m512i halves = repeat(masks + 4, 0xFF00, repeat(masks));
    const __m512i nibbles = _mm512_srlv_epi32(halves, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
    const __m512i lanes = _mm512_permutexvar_epi32(nibbles, _mm512_load_si512(nibble_tables.lanes));
    const __m512i counts = _mm512_permutexvar_epi32(nibbles, _mm512_load_si512(nibble_tables.counts));
    const __m512i pairs = _mm512_add_epi32(counts, _mm512_maskz_slli_epi64(0xFF, counts, 32));
    const __m512i before = _mm512_maskz_shuffle_epi32(0xCCCC, pairs, _MM_PERM_BBBB);
    masks += 8;
    return _mm512_shuffle_epi8(packed, _mm512_add_epi8(_mm512_add_epi8(lanes, pairs), before));
}

// The same for 16-bit values, one to a 32-bit lane, in its upper half: lanes 0 ... 15 to half[0], 16 ... 31 to half[1]. May read 32 bytes
// from any packed value on.
//
// Port 5 bounds this: for each half one instruction that widens, two that expand, and one that moves the mask to its register. The second
// mask goes another way, which takes two instructions of port 0: bit 16 + c to the top of lane c.
INLINE void expand_words(const uint8_t*& masks, const uint8_t*& values, __m512i (&half)[2]) {
    const auto low = uint64_t(__builtin_popcountll(load<uint16_t>(masks))), all = uint64_t(__builtin_popcountll(load<uint32_t>(masks)));
    __mmask16 bits[2];
    __asm__("kmovw %1, %0" : "=k"(bits[0]) : "m"(*reinterpret_cast<const uint16_t (*)[1]>(masks)));
    const __m512i to_top = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    bits[1] = _mm512_movepi32_mask(_mm512_sllv_epi32(repeat(masks), to_top));
    for (int h = 0; h < 2; h++) {
        const uint8_t* from = values + (h ? 2 * low : 0);
        __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        __asm__("" : "+v"(words));  // apart from the expansion, also when a compiler prefers to expand from memory
        half[h] = _mm512_slli_epi32(_mm512_maskz_expand_epi32(bits[h], words), 16);
    }
    masks += 4;
    values += 2 * all;
}

}  // namespace
}  // namespace ov_ext
