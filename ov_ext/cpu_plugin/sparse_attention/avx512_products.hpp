// Products of slices with AVX-512, and the order in which they are made: what the kernels share. A kernel file gives `Codes`, which knows
// where slices come from, and gets `Products<Codes>`. Everything is in an anonymous namespace.
//
// A slice meets 16-bit factors, exactly, in two products. Four factors take 8 bytes, in an order that goes with the instruction:
//
// - VNNI: vpdpbusd multiplies unsigned by signed bytes. Factors are high bytes, then low ones. Scores take K + 128 as the unsigned operand, and
//   lose 128 * sum(q) again; values take the bytes of p as the unsigned ones.
// - without: vpmaddwd multiplies words and adds up neighbours. The even and the odd bytes of a slice become words, so that each 32-bit lane
//   stays the sum of one token (of scores) or one dimension (of values). Factors are f0 f2, then f1 f3.
#pragma once

#include <immintrin.h>

#include "steps.hpp"

namespace ov_ext::sparse_attention {
namespace {

// Rows that multiply a slice while it is in a register: two products a row and panel, 16 sums in all. More rows expand to memory first.
constexpr int most_rows = 4;

#if defined(__AVX512VNNI__)
constexpr bool vnni = true;

// sum += the products of four bytes each, in assembly: of the intrinsic GCC 12 makes copies of every sum.
INLINE void add_product(__m512i& sum, __m512i unsigned_bytes, const uint8_t* signed_quad) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "m"(*reinterpret_cast<const int32_t (*)[1]>(signed_quad)));
}
INLINE void add_product(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}
#else
constexpr bool vnni = false;

INLINE void add_product(__m512i& sum, __m512i factors, __m512i words) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(words, factors));
    __asm__("" : "+v"(sum));  // compilers like to add up products of several rows first, and run out of registers
}
INLINE void add_product(__m512i& sum, __m512i words, const uint8_t* two_factors) {
    add_product(sum, _mm512_set1_epi32(load<int32_t>(two_factors)), words);
}
#endif

// What a slice is multiplied as: the same in both products, or two halves of it. With masks, because GCC 12 warns of some shifts' own
// undefined operands.
struct Operand {
    __m512i of[2];

    INLINE Operand() = default;
    INLINE Operand(__m512i slice, bool is_key) {
        if constexpr (vnni) {
            of[0] = of[1] = is_key ? _mm512_xor_si512(slice, _mm512_set1_epi8(-128)) : slice;
        } else {
            of[0] = _mm512_srai_epi16(_mm512_maskz_slli_epi16(~__mmask32(0), slice, 8), 8);
            of[1] = _mm512_srai_epi16(slice, 8);
        }
    }
};
INLINE __m512i together(const __m512i (&sums)[2]) {
    return _mm512_add_epi32(vnni ? _mm512_maskz_slli_epi32(0xFFFF, sums[0], 8) : sums[0], sums[1]);
}

// Factors in fours, in the order above. count: a multiple of 16. The low byte of a signed factor is signed, too: high takes the rest.
template <bool is_signed>
INLINE void reorder(const int16_t* from, uint64_t count, uint8_t* to) {
    const __m128i order = vnni ? _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14)
                               : _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    for (uint64_t i = 0; i < count; i += 16) {
        __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
        if (vnni && is_signed)
            x = _mm256_xor_si256(_mm256_add_epi16(x, _mm256_set1_epi16(128)), _mm256_set1_epi16(128));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(order)));
    }
}
constexpr uint64_t quad_bytes = 8, part_bytes = 4;  // of factors

// Fetches the next block, some bytes with each slice of this one, which has 2 * head_dim of them: `next` is where what goes with the keys, or
// values, begins, and half says which half of these.
struct Ahead {
    const uint8_t* at;
    uint64_t step;
    INLINE Ahead(const BlockShape& s, const uint8_t* next, uint64_t half) {
        step = block_bytes(s) / (2 * s.head_dim);
        at = next + half * step * (s.head_dim / 2);
    }
    INLINE void fetch() {
        _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
        at += step;
    }
};

// Where slices come from, of a half. These were expanded before, or nothing is pruned.
struct Expanded {
    const uint8_t* slices;
    INLINE __m512i next() {
        const __m512i slice = _mm512_loadu_si512(slices);
        slices += slice_bytes;
        return slice;
    }
};

// sums[row][32 half + ...] of one half.
template <int rows, class Slices>
INLINE void score_half(Slices slices, uint64_t dim, const uint8_t* q, int half, const int32_t* shift, int32_t* sums) {
    __m512i sum[2][rows][2];
    // All loops over sums are unrolled: a sum that is found by a variable index lies in memory.
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        sum[0][r][0] = sum[0][r][1] = sum[1][r][0] = sum[1][r][1] = _mm512_setzero_si512();
    for (uint64_t quad = 0; quad < dim / 4; quad++) {
        const Operand first(slices.next(), true), second(slices.next(), true);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                const uint8_t* factors = q + r * 2 * dim + quad * quad_bytes + part * part_bytes;
                add_product(sum[0][r][part], first.of[part], factors);
                add_product(sum[1][r][part], second.of[part], factors);
            }
    }
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m512i all = together(sum[p][r]);
            _mm512_storeu_si512(sums + r * block_tokens + 32 * half + 16 * p, _mm512_sub_epi32(all, _mm512_set1_epi32(shift[r])));
        }
}

// sums[row][d ...] of one group of panels, both halves.
template <int rows, int panels, class First, class Second>
INLINE void value_group(First& first, Second& second, uint64_t dim, const uint8_t* p15, int32_t* sums) {
    __m512i sum[panels][rows][2];
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            sum[p][r][0] = sum[p][r][1] = _mm512_setzero_si512();
    const auto add = [&](auto& slices, int quad) INLINED {
        Operand slice[panels];
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++)
            slice[p] = Operand(slices.next(), false);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                const uint8_t* factors = p15 + r * 2 * block_tokens + quad * quad_bytes + part * part_bytes;
                const __m512i factor = _mm512_set1_epi32(load<int32_t>(factors));
#pragma GCC unroll 2
                for (int p = 0; p < panels; p++)
                    add_product(sum[p][r][part], factor, slice[p].of[part]);
            }
    };
    for (int quad = 0; quad < 8; quad++)
        add(first, quad);
    for (int quad = 8; quad < 16; quad++)
        add(second, quad);
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            _mm512_storeu_si512(sums + r * dim + panel * p, together(sum[p][r]));
}

template <int rows, class First, class Second>
void score_rows(First first, Second second, uint64_t dim, const uint8_t* q, const int32_t* shift, int32_t* sums) {
    score_half<rows>(first, dim, q, 0, shift, sums);
    score_half<rows>(second, dim, q, 1, shift, sums);
}
template <int rows, class First, class Second>
void value_rows(First first, Second second, uint64_t dim, const uint8_t* p15, int32_t* sums) {
    uint64_t d = 0;
    for (; d + 2 * panel <= dim; d += 2 * panel)
        value_group<rows, 2>(first, second, dim, p15, sums + d);
    if (d < dim)
        value_group<rows, 1>(first, second, dim, p15, sums + d);
}

struct Scores {
    uint64_t dim;
    const uint8_t* q;
    const int32_t* shift;
    int32_t* sums;
    template <int rows, class First, class Second>
    INLINE void run(uint64_t row, First first, Second second) const {
        score_rows<rows>(first, second, dim, q + 2 * row * dim, shift + row, sums + row * block_tokens);
    }
};
struct Values {
    uint64_t dim;
    const uint8_t* p15;
    int32_t* sums;
    template <int rows, class First, class Second>
    INLINE void run(uint64_t row, First first, Second second) const {
        value_rows<rows>(first, second, dim, p15 + 2 * row * block_tokens, sums + row * dim);
    }
};

template <class Product, class First, class Second>
INLINE void some_rows(const Product& product, uint64_t row, uint64_t rows, First first, Second second) {
    switch (rows) {
        case 1: product.template run<1>(row, first, second); break;
        case 2: product.template run<2>(row, first, second); break;
        case 3: product.template run<3>(row, first, second); break;
        default: product.template run<4>(row, first, second); break;
    }
}

// slices: of both halves together.
template <class Product, class First, class Second>
INLINE void multiply_slices(const Product& product, uint64_t rows, uint64_t slices, First first, Second second) {
    if (rows <= most_rows)
        return some_rows(product, 0, rows, first, second);
    alignas(64) uint8_t expanded[max_head_dim * slice_bytes];
    uint8_t* const middle = expanded + slices / 2 * slice_bytes;
    for (uint64_t i = 0; i < slices / 2; i++)
        _mm512_store_si512(expanded + i * slice_bytes, first.next());
    for (uint64_t i = 0; i < slices / 2; i++)
        _mm512_store_si512(middle + i * slice_bytes, second.next());
    for (uint64_t row = 0; row < rows; row += most_rows)
        some_rows(product, row, rows - row < most_rows ? rows - row : most_rows, Expanded{expanded}, Expanded{middle});
}

// What attend() wants. Codes: struct with
//   multiply(product, shape, rows, masks, codes, kept, next): calls multiply_slices for the keys, or values, of a block
template <class Codes>
struct Products {
    static void scores(const BlockShape& s, const uint8_t* block, const uint8_t* next, const int16_t* q, uint64_t rows, int32_t* sums) {
        alignas(64) uint8_t factors[2 * max_rows * max_head_dim];
        int32_t shift[max_rows];
        reorder<true>(q, rows * s.head_dim, factors);
        for (uint64_t r = 0; r < rows; r++) {
            shift[r] = 0;
            for (uint64_t d = 0; vnni && d < s.head_dim; d++)
                shift[r] += q[r * s.head_dim + d];
            shift[r] *= 128;
        }
        Codes::multiply(Scores{s.head_dim, factors, shift, sums}, s, rows, block + key_masks_at(), block + key_codes_at(s), s.k_kept, next);
    }
    static void values(const BlockShape& s, const uint8_t* block, const uint8_t* next, const int16_t* p15, uint64_t rows, int32_t* sums) {
        alignas(64) uint8_t factors[2 * max_rows * block_tokens];
        reorder<false>(p15, rows * block_tokens, factors);
        Codes::multiply(Values{s.head_dim, factors, sums}, s, rows, block + value_masks_at(s), block + value_codes_at(s), s.v_kept,
                        next + block_bytes(s) / 2);
    }
};

}  // namespace
}  // namespace ov_ext::sparse_attention
