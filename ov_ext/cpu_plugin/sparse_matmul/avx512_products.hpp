// Up to 6 rows of activations times decoded rows of weights: the innermost loop of many rows, in assembly, because compilers spill sums
// that fit the 32 registers.
//
// zmm0 ... zmm23 hold the sums, four for each row of x; zmm24 ... zmm27 rows of weights; zmm28 and zmm29 activations. A step loads four
// rows of weights: of integers one row of each of 4 panels, of bf16 two rows of each of 2 panels, whose sums are kept apart.
#pragma once

#include <immintrin.h>

#include "unaligned.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// clang-format off
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
