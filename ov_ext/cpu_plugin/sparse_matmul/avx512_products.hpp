// The two innermost loops, in assembly. In the first, few rows of activations meet rows of weights the moment these are decoded: the order
// in which compilers put its instructions costs a fifth to a half of its speed. In the second, up to 6 rows of activations meet decoded rows
// of weights: compilers spill sums that fit the 32 registers.
#pragma once

#include <immintrin.h>

#include "avx512_slices.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// clang-format off
// ------------------------------------------------------------------------------------------------- rows with a mask

#define PRODUCT(dot, parity, m, address)                                                                                             \
    "vpbroadcastd 4*ov_ext_r" address ", %[activations]\n\t" dot " %[row], %[activations], %[" parity m "]\n\t"
#define PRODUCTS_1(dot, parity) PRODUCT(dot, parity, "0", "(%[x])")
#define PRODUCTS_2(dot, parity) PRODUCTS_1(dot, parity) PRODUCT(dot, parity, "1", "(%[x],%[stride])")
#define PRODUCTS_3(dot, parity) PRODUCTS_2(dot, parity) PRODUCT(dot, parity, "2", "(%[x],%[stride],2)")
#define PRODUCTS_4(dot, parity) PRODUCTS_3(dot, parity) PRODUCT(dot, parity, "3", "(%[x3])")
#define SUMS_1 [even0] "+v"(sums[0][0]), [odd0] "+v"(sums[0][1])
#define SUMS_2 SUMS_1, [even1] "+v"(sums[1][0]), [odd1] "+v"(sums[1][1])
#define SUMS_3 SUMS_2, [even2] "+v"(sums[2][0]), [odd2] "+v"(sums[2][1])
#define SUMS_4 SUMS_3, [even3] "+v"(sums[3][0]), [odd3] "+v"(sums[3][1])

// One row: its values, its mask, the cursor moved behind its values. Load and expand are apart: their fused form is slower on every CPU
// measured.
#define BYTES(at, nibble)                                                                                                            \
    "vmovdqu64 (%[" at "]), %[row]\n\t" nibble "mov 8*ov_ext_r(%[masks]), %[mask]\n\tkmovq %[mask], %%k1\n\t"                          \
    "popcnt %[mask], %[mask]\n\tvpexpandb %[row], %[row]%{%%k1%}%{z%}\n\tadd %[mask], %[" at "]\n\t"
#define INT8(at, parity) BYTES("values", "")
// Codes stay in the upper nibbles, so sums are 16 times too large.
#define INT4(at, parity) BYTES(at, INT4_##parity "vpandd %[upper], %[row], %[row]\n\t")
#define INT4_even "vpsllw $4, %[row], %[row]\n\t"
#define INT4_odd
#define WORDS(at, parity)                                                                                                            \
    "vmovdqu64 (%[values]), %[row]\n\tmovl 4*ov_ext_r(%[masks]), %k[mask]\n\tkmovd %k[mask], %%k1\n\tpopcnt %k[mask], %k[mask]\n\t"    \
    "vpexpandw %[row], %[row]%{%%k1%}%{z%}\n\tlea (%[values],%[mask],2), %[values]\n\t"
#define FETCH_VALUES(offset) "prefetcht0 " offset "(%[values])\n\t"
#define FETCH_MASKS(rows, ahead, bytes)                                                                                              \
    ".if ov_ext_r%%" rows " == 0\n\tprefetcht0 " ahead "+" bytes "*ov_ext_r(%[masks])\n\t.endif\n\t"
#define TWO_ROWS(decode, products, dot)                                                                                                 \
    decode("values", even) products(dot, "even") ".set ov_ext_r, ov_ext_r+1\n\t"                                                        \
    decode("odd", odd) products(dot, "odd") ".set ov_ext_r, ov_ext_r+1\n\t"
// Hardware prefetching stops at every page. Four rows consume two lines of values at half density, of int4 one.
#define PANEL(fetch, decode, dot, M)                                                                                                    \
    __asm__ volatile(".set ov_ext_r, 0\n\t.rept 4\n\t" fetch TWO_ROWS(decode, PRODUCTS_##M, dot) TWO_ROWS(decode, PRODUCTS_##M, dot)       \
                     ".endr"                                                                                                         \
                     : [values] "+r"(stream.values), [odd] "+r"(stream.odd), SUMS_##M, [row] "=&v"(row),                             \
                       [activations] "=&v"(activations), [mask] "=&r"(mask)                                                          \
                     : [masks] "r"(stream.masks), [x] "r"(x), [stride] "r"(stride), [x3] "r"(x + 3 * stride), [upper] "v"(upper)     \
                     : "k1", "cc", "memory")
#define PANEL_OF_KIND(M)                                                                                                             \
    if constexpr (kind == Kind::int4)                                                                                                \
        PANEL(FETCH_VALUES("2048") FETCH_MASKS("8", "1024", "8"), INT4, "vpdpbusd", M);                                              \
    else if constexpr (kind == Kind::int8)                                                                                           \
        PANEL(FETCH_VALUES("2048") FETCH_VALUES("2112") FETCH_MASKS("8", "1024", "8"), INT8, "vpdpbusd", M);                         \
    else                                                                                                                             \
        PANEL(FETCH_VALUES("2048") FETCH_VALUES("2112") FETCH_MASKS("16", "512", "4"), WORDS, "vdpbf16ps", M)

// Adds the products of the 16 rows of a panel and M <= 4 rows of x, `stride` bytes apart, to sums[M][2]: those of even and of odd rows.
// The sums of int4 are 16 times too large.
template <Kind kind, class Sum, size_t M>
INLINE void add_sparse_panel(Stream<kind, false>& stream, const uint8_t* x, uint64_t stride, Sum (&sums)[M][2]) {
    const __m512i upper = _mm512_set1_epi8(int8_t(0xF0));
    __m512i row, activations;
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
    stream.masks += kind == Kind::bf16 ? 64 : 128;
}

#define CODES(at, parity)  BYTES(at, "vgf2p8affineqb $0, %[" #parity "_nibble], %[row], %[row]\n\t")
#define STORE(...) "vmovdqa64 %[row], 64*ov_ext_r(%[to])\n\t"
#define DECODE(fetch, decode)                                                                                                        \
    __asm__ volatile(".set ov_ext_r, 0\n\t.rept 4\n\t" fetch TWO_ROWS(decode, STORE, ) TWO_ROWS(decode, STORE, ) ".endr"             \
                     : [values] "+r"(stream.values), [odd] "+r"(stream.odd), [row] "=&v"(row), [mask] "=&r"(mask)                    \
                     : [masks] "r"(stream.masks), [to] "r"(to), [even_nibble] "v"(even), [odd_nibble] "v"(odd)                       \
                     : "k1", "cc", "memory")

// Decodes the 16 rows of a panel, 64 bytes each, to an address that is a multiple of 64.
template <Kind kind>
INLINE void decode_panel(Stream<kind, false>& stream, uint8_t* to) {
    const __m512i even = _mm512_set1_epi64(int64_t(low_nibble)), odd = _mm512_set1_epi64(int64_t(high_nibble));
    __m512i row;
    uint64_t mask;
    if constexpr (kind == Kind::int4)
        DECODE(FETCH_VALUES("2048") FETCH_MASKS("8", "1024", "8"), CODES);
    else if constexpr (kind == Kind::int8)
        DECODE(FETCH_VALUES("2048") FETCH_VALUES("2112") FETCH_MASKS("8", "1024", "8"), INT8);
    else
        DECODE(FETCH_VALUES("2048") FETCH_VALUES("2112") FETCH_MASKS("16", "512", "4"), WORDS);
    stream.masks += kind == Kind::bf16 ? 64 : 128;
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
#undef BYTES
#undef INT8
#undef INT4
#undef INT4_even
#undef INT4_odd
#undef WORDS
#undef FETCH_VALUES
#undef FETCH_MASKS
#undef TWO_ROWS
#undef PANEL
#undef PANEL_OF_KIND
#undef CODES
#undef STORE
#undef DECODE

// ------------------------------------------------------------------------------------------------- decoded rows

// zmm0 ... zmm23 hold the sums, four for each row of x; zmm24 ... zmm27 rows of weights; zmm28 and zmm29 activations. A step loads four
// rows of weights: of integers one row of each of 4 panels, of bf16 two rows of each of 2 panels, whose sums are kept apart.
#define LOAD(offset, row) "vmovdqa64 64*ov_ext_r+" offset "(%[weights]), %%zmm" row "\n\t"
#define BROADCAST(r, address, to) "vpbroadcastd 4*(" r ")" address ", %%zmm" to "\n\t"
#define DOT(instruction, row, x, sum) instruction " %%zmm" row ", %%zmm" x ", %%zmm" sum "\n\t"
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
// code for the 16 rows of weights of each tile, `step` at a time.
#define FOR_TILES(step, code)                                                                                                        \
    "1:\n\t.set ov_ext_r, 0\n\t.rept 16/" step "\n\t" code ".set ov_ext_r, ov_ext_r+" step "\n\t.endr\n\t"                         \
    "add $4096, %[weights]\n\tadd $64, %[low]\n\tadd $64, %[high]\n\tdec %[tiles]\n\tjnz 1b\n\t"

#define ZERO_ROW(address, m, a, b, c, d) ZERO(a) ZERO(b) ZERO(c) ZERO(d)
#define INTEGERS(address, m, a, b, c, d)                                                                                             \
    BROADCAST("ov_ext_r", address, "28")                                                                                             \
    DOT("vpdpbusd", "24", "28", a) DOT("vpdpbusd", "25", "28", b) DOT("vpdpbusd", "26", "28", c) DOT("vpdpbusd", "27", "28", d)
#define STORE_INTEGERS(address, m, a, b, c, d)                                                                                       \
    STORE(m, a) STORE("%c[M]+" m, b) STORE("2*%c[M]+" m, c) STORE("3*%c[M]+" m, d)
#define BF16(address, m, a, b, c, d)                                                                                                 \
    BROADCAST("ov_ext_r", address, "28") BROADCAST("ov_ext_r+1", address, "29")                                                      \
    DOT("vdpbf16ps", "24", "28", a) DOT("vdpbf16ps", "25", "28", b) DOT("vdpbf16ps", "26", "29", c) DOT("vdpbf16ps", "27", "29", d)
#define STORE_BF16(address, m, a, b, c, d)                                                                                           \
    STORE("2*" m, a) STORE("2*(%c[M]+" m ")", b) STORE("2*" m "+1", c) STORE("2*(%c[M]+" m ")+1", d)

#define OPERANDS                                                                                                                     \
    [weights] "+r"(rows), [low] "+r"(x), [high] "+r"(high), [tiles] "+r"(tiles) : [stride] "r"(stride), [sums] "r"(sums), [M] "i"(M) \
    : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",   \
      "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",  \
      "xmm29", "memory", "cc"

// Sums of products over some tiles, at least one.
//
// rows: decoded weights, 4096 bytes a tile, aligned to 64. x: M rows, `stride` bytes apart, 64 bytes of each a tile.
template <int M>
INLINE void sum_integers(const uint8_t* rows, const uint8_t* x, uint64_t stride, uint64_t tiles, __m512i (&sums)[4][M][1]) {
    const uint8_t* high = x + 3 * stride;
    __asm__ volatile(FOR_ROWS(ZERO_ROW)
                     FOR_TILES("1", LOAD("0", "24") LOAD("1024", "25") LOAD("2048", "26") LOAD("3072", "27") FOR_ROWS(INTEGERS))
                     FOR_ROWS(STORE_INTEGERS) : OPERANDS);
}

// The same of two panels, even and odd rows of weights apart.
template <int M>
INLINE void sum_bf16(const uint8_t* rows, const uint8_t* x, uint64_t stride, uint64_t tiles, __m512 (&sums)[2][M][2]) {
    const uint8_t* high = x + 3 * stride;
    __asm__ volatile(FOR_ROWS(ZERO_ROW)
                     FOR_TILES("2", LOAD("0", "24") LOAD("1024", "25") LOAD("64", "26") LOAD("1088", "27") FOR_ROWS(BF16))
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
