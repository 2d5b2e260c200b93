// The two innermost loops, in assembly. In the first, few rows of activations meet slices of weights the moment these are decoded: the
// order in which compilers put its instructions costs a fifth to a half of its speed. In the second, up to 6 rows of activations meet
// decoded slices: compilers spill sums that fit the 32 registers.
//
// Numbers in the text of an instruction: %c[name] is a constant operand; ov_ext_s is a number of the assembler that counts slices within a
// panel, in loops that it unrolls itself (.rept).
#pragma once

#include <immintrin.h>

#include "avx512_slices.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// clang-format off
// ------------------------------------------------------------------------------------------------- slices with a mask

// An instruction for each of M rows of activations, whose 4 bytes for slice s lie at x + m * stride + 4 * s.
#define PRODUCT(dot, parity, m, address)                                                                                             \
    "vpbroadcastd 4*ov_ext_s" address ", %[activations]\n\t" dot " %[slice], %[activations], %[" parity m "]\n\t"
#define PRODUCTS_1(dot, parity) PRODUCT(dot, parity, "0", "(%[x])")
#define PRODUCTS_2(dot, parity) PRODUCTS_1(dot, parity) PRODUCT(dot, parity, "1", "(%[x],%[stride])")
#define PRODUCTS_3(dot, parity) PRODUCTS_2(dot, parity) PRODUCT(dot, parity, "2", "(%[x],%[stride],2)")
#define PRODUCTS_4(dot, parity) PRODUCTS_3(dot, parity) PRODUCT(dot, parity, "3", "(%[x3])")
#define SUMS_1 [even0] "+v"(sums[0][0]), [odd0] "+v"(sums[0][1])
#define SUMS_2 SUMS_1, [even1] "+v"(sums[1][0]), [odd1] "+v"(sums[1][1])
#define SUMS_3 SUMS_2, [even2] "+v"(sums[2][0]), [odd2] "+v"(sums[2][1])
#define SUMS_4 SUMS_3, [even3] "+v"(sums[3][0]), [odd3] "+v"(sums[3][1])

// One slice, and its cursor moved on: two cursors for int4, one for all others.
#define INT8(cursor, parity) OV_EXT_EXPAND_BYTES("values", "")
// Codes stay in the upper nibbles, so sums are 16 times too large.
#define INT4(cursor, parity) OV_EXT_EXPAND_BYTES(cursor, INT4_##parity "vpandd %[upper], %[slice], %[slice]\n\t")
#define INT4_even "vpsllw $4, %[slice], %[slice]\n\t"
#define INT4_odd
#define WORDS(cursor, parity) OV_EXT_EXPAND_WORDS("values")

// Before every four slices: one or two lines of values, and of the masks a line whenever one has been used up. As in Stream::prefetch;
// a statement has two operands left for numbers.
#define LINE "64"
#define FETCH_LINE "prefetcht0 %c[values_ahead](%[values])\n\t"
#define FETCH_TWO_LINES FETCH_LINE "prefetcht0 %c[values_ahead]+" LINE "(%[values])\n\t"
#define FETCH_MASKS(bytes)                                                                                                           \
    ".if ov_ext_s%%(" LINE "/" bytes ") == 0\n\tprefetcht0 " bytes "*(%c[slices_ahead]+ov_ext_s)(%[masks])\n\t.endif\n\t"
#define FETCHES [values_ahead] "i"(values_ahead), [slices_ahead] "i"(slices_ahead)

#define TWO_SLICES(decode, use, dot)                                                                                                 \
    decode("values", even) use(dot, "even") ".set ov_ext_s, ov_ext_s+1\n\t"                                                          \
    decode("odd", odd) use(dot, "odd") ".set ov_ext_s, ov_ext_s+1\n\t"
// The 16 slices of a panel.
#define FOR_SLICES(fetch, decode, use, dot)                                                                                          \
    ".set ov_ext_s, 0\n\t.rept 4\n\t" fetch TWO_SLICES(decode, use, dot) TWO_SLICES(decode, use, dot) ".endr"

#define PANEL(fetch, decode, dot, M)                                                                                                 \
    __asm__ volatile(FOR_SLICES(fetch, decode, PRODUCTS_##M, dot)                                                                    \
                     : [values] "+r"(stream.values), [odd] "+r"(stream.odd), SUMS_##M, [slice] "=&v"(slice),                         \
                       [activations] "=&v"(activations), [mask] "=&r"(mask)                                                          \
                     : [masks] "r"(stream.masks), [x] "r"(x), [stride] "r"(stride), [x3] "r"(x + 3 * stride), [upper] "v"(upper),    \
                       FETCHES                                                                                                       \
                     : "k1", "cc", "memory")
#define PANEL_OF_KIND(M)                                                                                                             \
    if constexpr (kind == Kind::int4)                                                                                                \
        PANEL(FETCH_LINE FETCH_MASKS("8"), INT4, "vpdpbusd", M);                                                                     \
    else if constexpr (kind == Kind::int8)                                                                                           \
        PANEL(FETCH_TWO_LINES FETCH_MASKS("8"), INT8, "vpdpbusd", M);                                                                \
    else                                                                                                                             \
        PANEL(FETCH_TWO_LINES FETCH_MASKS("4"), WORDS, "vdpbf16ps", M)

// Adds the products of the 16 slices of a panel and M <= 4 rows of x, `stride` bytes apart, to sums[M][2]: those of even and of odd slices,
// two chains of additions that hide the latency of the dot product. The sums of int4 are 16 times too large.
//
//     for s in 0 ... 15:
//         every four slices: prefetch
//         slice = 64 bytes at the cursor (int4: the odd or the even nibbles of them)
//         slice = expand(slice, mask[s]);  cursor += bytes taken
//         for m in 0 ... M - 1:
//             sums[m][s % 2] += dot(broadcast(4 bytes at x + m * stride + 4 * s), slice)
template <Kind kind, class Sum, size_t M>
INLINE void add_sparse_panel(Stream<kind, false>& stream, const uint8_t* x, uint64_t stride, Sum (&sums)[M][2]) {
    const __m512i upper = _mm512_set1_epi8(int8_t(0xF0));
    __m512i slice, activations;
    uint64_t mask;
    if constexpr (M == 1) {
        PANEL_OF_KIND(1);
    } else if constexpr (M == 2) {
        PANEL_OF_KIND(2);
    } else if constexpr (M == 3) {
        PANEL_OF_KIND(3);
    } else {
        static_assert(M == 4, "as many operands as an assembly statement may have");
        PANEL_OF_KIND(4);
    }
    stream.masks += panel_slices * stream.mask_bytes;
}

#define CODES(cursor, parity) OV_EXT_EXPAND_BYTES(cursor, "vgf2p8affineqb $0, %[" #parity "_nibble], %[slice], %[slice]\n\t")
#define STORE(...) "vmovdqa64 %[slice], %c[slice_bytes]*ov_ext_s(%[to])\n\t"
#define DECODE(fetch, decode)                                                                                                        \
    __asm__ volatile(FOR_SLICES(fetch, decode, STORE, )                                                                              \
                     : [values] "+r"(stream.values), [odd] "+r"(stream.odd), [slice] "=&v"(slice), [mask] "=&r"(mask)                \
                     : [masks] "r"(stream.masks), [to] "r"(to), [even_nibble] "v"(even), [odd_nibble] "v"(odd),                      \
                       [slice_bytes] "i"(slice_bytes), FETCHES                                                                       \
                     : "k1", "cc", "memory")

// Decodes the 16 slices of a panel to an address that is a multiple of 64.
//
//     for s in 0 ... 15:
//         every four slices: prefetch
//         slice = 64 bytes at the cursor (int4: their odd or even nibbles, with their signs)
//         to[s] = expand(slice, mask[s]);  cursor += bytes taken
template <Kind kind>
INLINE void decode_panel(Stream<kind, false>& stream, uint8_t* to) {
    const __m512i even = _mm512_set1_epi64(int64_t(low_nibble)), odd = _mm512_set1_epi64(int64_t(high_nibble));
    __m512i slice;
    uint64_t mask;
    if constexpr (kind == Kind::int4)
        DECODE(FETCH_LINE FETCH_MASKS("8"), CODES);
    else if constexpr (kind == Kind::int8)
        DECODE(FETCH_TWO_LINES FETCH_MASKS("8"), INT8);
    else
        DECODE(FETCH_TWO_LINES FETCH_MASKS("4"), WORDS);
    stream.masks += panel_slices * stream.mask_bytes;
}

#undef PRODUCT
#undef PRODUCTS_1
#undef PRODUCTS_2
#undef PRODUCTS_3
#undef PRODUCTS_4
#undef SUMS_1
#undef SUMS_2
#undef SUMS_3
#undef SUMS_4
#undef INT8
#undef INT4
#undef INT4_even
#undef INT4_odd
#undef WORDS
#undef LINE
#undef FETCH_LINE
#undef FETCH_TWO_LINES
#undef FETCH_MASKS
#undef FETCHES
#undef TWO_SLICES
#undef FOR_SLICES
#undef PANEL
#undef PANEL_OF_KIND
#undef CODES
#undef STORE
#undef DECODE

// ------------------------------------------------------------------------------------------------- decoded slices

// zmm0 ... zmm23 hold the sums, four for each row of x; zmm24 ... zmm27 slices; zmm28 and zmm29 activations. A step loads four slices: of
// integers one of each of 4 panels, of bf16 two of each of 2 panels, whose sums are kept apart.
#define LOAD(offset, slice) "vmovdqa64 %c[slice_bytes]*ov_ext_s+" offset "(%[weights]), %%zmm" slice "\n\t"
#define BROADCAST(s, address, to) "vpbroadcastd 4*(" s ")" address ", %%zmm" to "\n\t"
#define DOT(instruction, slice, x, sum) instruction " %%zmm" slice ", %%zmm" x ", %%zmm" sum "\n\t"
#define ZERO(sum) "vpxord %%zmm" sum ", %%zmm" sum ", %%zmm" sum "\n\t"
#define STORE(index, sum) "vmovdqa64 %%zmm" sum ", 64*(" index ")(%[sums])\n\t"

// code(address of the row of x, its number, its four sums) for each row that there is.
#define IF_ROW(m, code) ".if %c[M] > " m "\n\t" code ".endif\n\t"
#define FOR_ROWS(code)                                                                                                               \
    IF_ROW("0", code("(%[low])", "0", "0", "1", "2", "3"))                                                                           \
    IF_ROW("1", code("(%[low],%[stride])", "1", "4", "5", "6", "7"))                                                                 \
    IF_ROW("2", code("(%[low],%[stride],2)", "2", "8", "9", "10", "11"))                                                             \
    IF_ROW("3", code("(%[high])", "3", "12", "13", "14", "15"))                                                                      \
    IF_ROW("4", code("(%[high],%[stride])", "4", "16", "17", "18", "19"))                                                            \
    IF_ROW("5", code("(%[high],%[stride],2)", "5", "20", "21", "22", "23"))
// code for the slices of each k tile, `step` at a time.
#define FOR_TILES(step, code)                                                                                                        \
    "1:\n\t.set ov_ext_s, 0\n\t.rept 16/" step "\n\t" code ".set ov_ext_s, ov_ext_s+" step "\n\t.endr\n\t"                           \
    "add %[k_tile], %[weights]\n\tadd %[x_tile], %[low]\n\tadd %[x_tile], %[high]\n\tdec %[tiles]\n\tjnz 1b\n\t"

#define ZERO_ROW(address, m, a, b, c, d) ZERO(a) ZERO(b) ZERO(c) ZERO(d)
#define INTEGERS(address, m, a, b, c, d)                                                                                             \
    BROADCAST("ov_ext_s", address, "28")                                                                                             \
    DOT("vpdpbusd", "24", "28", a) DOT("vpdpbusd", "25", "28", b) DOT("vpdpbusd", "26", "28", c) DOT("vpdpbusd", "27", "28", d)
#define STORE_INTEGERS(address, m, a, b, c, d)                                                                                       \
    STORE(m, a) STORE("%c[M]+" m, b) STORE("2*%c[M]+" m, c) STORE("3*%c[M]+" m, d)
#define BF16(address, m, a, b, c, d)                                                                                                 \
    BROADCAST("ov_ext_s", address, "28") BROADCAST("ov_ext_s+1", address, "29")                                                      \
    DOT("vdpbf16ps", "24", "28", a) DOT("vdpbf16ps", "25", "28", b) DOT("vdpbf16ps", "26", "29", c) DOT("vdpbf16ps", "27", "29", d)
#define STORE_BF16(address, m, a, b, c, d)                                                                                           \
    STORE("2*" m, a) STORE("2*(%c[M]+" m ")", b) STORE("2*" m "+1", c) STORE("2*(%c[M]+" m ")+1", d)

#define OPERANDS                                                                                                                     \
    [weights] "+r"(slices), [low] "+r"(x), [high] "+r"(high), [tiles] "+r"(tiles)                                                    \
    : [stride] "r"(stride), [sums] "r"(sums), [M] "i"(M), [slice_bytes] "i"(slice_bytes), [panel] "i"(panel_bytes),                  \
      [k_tile] "i"(k_tile_bytes), [x_tile] "i"(4 * panel_slices)                                                                     \
    : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",   \
      "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",  \
      "xmm29", "memory", "cc"

// Sums of products over some k tiles, at least one, of all four panels.
//
// slices: decoded weights, k_tile_bytes for each k tile, aligned to 64. x: M rows, `stride` bytes apart, 64 bytes of each for a k tile.
//
//     all sums = 0
//     for each k tile:
//         for s in 0 ... 15:
//             load slice s of panels 0 ... 3
//             for m in 0 ... M - 1:
//                 activations = broadcast(4 bytes at x + m * stride + 4 * s)
//                 for p in 0 ... 3: sums[p][m] += dot(activations, slice of panel p)
//         x, slices: to the next k tile
template <int M>
INLINE void sum_integers(const uint8_t* slices, const uint8_t* x, uint64_t stride, uint64_t tiles, __m512i (&sums)[4][M][1]) {
    const uint8_t* high = x + 3 * stride;
    __asm__ volatile(FOR_ROWS(ZERO_ROW)
                     FOR_TILES("1", LOAD("0", "24") LOAD("%c[panel]", "25") LOAD("2*%c[panel]", "26") LOAD("3*%c[panel]", "27")
                                    FOR_ROWS(INTEGERS))
                     FOR_ROWS(STORE_INTEGERS) : OPERANDS);
}

// The same of two panels, with the sums of even and odd slices apart: half as many sums at a time would not hide the latency.
//
//     for s in 0, 2 ... 14:
//         load slices s and s + 1 of panels 0 and 1
//         for m in 0 ... M - 1:
//             even, odd = broadcasts of 4 bytes at x + m * stride + 4 * s and behind them
//             for p in 0, 1: sums[p][m][0] += dot(even, slice s of p);  sums[p][m][1] += dot(odd, slice s + 1 of p)
template <int M>
INLINE void sum_bf16(const uint8_t* slices, const uint8_t* x, uint64_t stride, uint64_t tiles, __m512 (&sums)[2][M][2]) {
    const uint8_t* high = x + 3 * stride;
    __asm__ volatile(FOR_ROWS(ZERO_ROW)
                     FOR_TILES("2", LOAD("0", "24") LOAD("%c[panel]", "25") LOAD("%c[slice_bytes]", "26")
                                    LOAD("%c[panel]+%c[slice_bytes]", "27") FOR_ROWS(BF16))
                     FOR_ROWS(STORE_BF16) : OPERANDS);
}
// clang-format on

#undef LOAD
#undef BROADCAST
#undef DOT
#undef ZERO
#undef STORE
#undef IF_ROW
#undef FOR_ROWS
#undef FOR_TILES
#undef ZERO_ROW
#undef INTEGERS
#undef STORE_INTEGERS
#undef BF16
#undef STORE_BF16
#undef OPERANDS

}  // namespace
}  // namespace ov_ext::sparse_matmul
