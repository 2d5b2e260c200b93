// Bitmap expansion with AVX-512 VBMI2. For files compiled with it only; everything is in an anonymous namespace.
//
// A 64-byte slice of values costs one load of a mask, one of values and one expand: 2 of the 3 cycles that port 5 of Intel cores spends on
// it, the third is the move to a mask register. Load and expand are apart, because their fused form is slower on every CPU measured.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unaligned.hpp"

namespace ov_ext {
namespace {

// Spreads the first values of `packed` (those at `values`, loaded and extended by the caller) over the lanes whose bits are set in the
// next mask, zero elsewhere, and moves both cursors behind what was used. Mask: uint64_t for 64 values of 8 bits, uint32_t for 32 of 16.
// The barriers keep compilers from fusing load and expand, and make them load the mask once for the expansion and the count.
//
// A template on purpose: of a plain function GCC 12 makes loops that are up to 14 % slower (it optimizes load() alone before they meet).
template <class Mask>
INLINE __m512i expand(__m512i packed, const uint8_t*& masks, const uint8_t*& values) {
    __asm__("" : "+v"(packed));
    Mask mask = load<Mask>(masks);
    __asm__("" : "+r"(mask));
    masks += sizeof(Mask);
    if constexpr (sizeof(Mask) == 4) {
        values += 2 * __builtin_popcount(mask);
        return _mm512_maskz_expand_epi16(mask, packed);
    } else {
        values += __builtin_popcountll(mask);
        return _mm512_maskz_expand_epi8(mask, packed);
    }
}

// 8x8 bit matrices for gf2p8affineqb (byte i of the matrix gives output bit 7 - i): sign-extended low and high nibble.
constexpr uint64_t low_nibble = 0x0102040808080808, high_nibble = 0x1020408080808080;

// clang-format off
// The same in assembly, for loops in which the order of instructions decides the speed:
//
//     slice = 64 bytes at the cursor
//     slice = extend(slice)
//     k1 = mask number ov_ext_s from `masks` on
//     slice = expand(slice, k1)
//     cursor += number of bits in k1 (words: twice that)
//
// Operands of the statement: %[slice] a vector register, %[mask] a general register, %[masks] the address of the masks, and a cursor by
// name. k1 is overwritten, and the flags. ov_ext_s is a number of the assembler, which the loop sets and counts.
#define OV_EXT_EXPAND_BYTES(cursor, extend)                                                                                          \
    "vmovdqu64 (%[" cursor "]), %[slice]\n\t" extend "mov 8*ov_ext_s(%[masks]), %[mask]\n\tkmovq %[mask], %%k1\n\t"                    \
    "popcnt %[mask], %[mask]\n\tvpexpandb %[slice], %[slice]%{%%k1%}%{z%}\n\tadd %[mask], %[" cursor "]\n\t"
#define OV_EXT_EXPAND_WORDS(cursor)                                                                                                  \
    "vmovdqu64 (%[" cursor "]), %[slice]\n\tmovl 4*ov_ext_s(%[masks]), %k[mask]\n\tkmovd %k[mask], %%k1\n\t"                           \
    "popcnt %k[mask], %k[mask]\n\tvpexpandw %[slice], %[slice]%{%%k1%}%{z%}\n\tlea (%[" cursor "],%[mask],2), %[" cursor "]\n\t"
// clang-format on

}  // namespace
}  // namespace ov_ext
