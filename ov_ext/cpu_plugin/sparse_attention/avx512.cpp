// AVX-512 with VBMI2 and VNNI: a slice is loaded, expanded and multiplied while it is in a register.
//
// vpdpbusd multiplies unsigned by signed bytes. The 16-bit factors go as two bytes each, exact together: scores take K + 128 as the unsigned
// one, and lose 128 * sum(q) again; values take the bytes of p as the unsigned ones.
#include <immintrin.h>

#include "../support/avx512_expand.hpp"
#include "steps.hpp"

namespace ov_ext::sparse_attention {
namespace {

// Rows that multiply a slice while it is in a register: two products a row and panel, 16 sums in all. More rows expand to memory first.
constexpr int most_rows = 4;

// sum += the products of four bytes each, in assembly: of the intrinsic GCC 12 makes copies of every sum.
INLINE void add_product(__m512i& sum, __m512i unsigned_bytes, const int8_t* signed_quad) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "m"(*reinterpret_cast<const int32_t (*)[1]>(signed_quad)));
}
INLINE void add_product(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}
// Sums over high and low bytes. With a mask, because GCC 12 warns of _mm512_slli_epi32's own undefined operand.
INLINE __m512i together(const __m512i (&sums)[2]) { return _mm512_add_epi32(_mm512_maskz_slli_epi32(0xFFFF, sums[0], 8), sums[1]); }
INLINE __m512i next_slice(const uint8_t* at) { return _mm512_loadu_si512(at); }

// Fetches the next block, some bytes with each slice of this one.
struct Ahead {
    const uint8_t* at;
    uint64_t step;
    INLINE void fetch() {
        _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
        at += step;
    }
};

// Where slices come from: codes of a half, or slices that were expanded before.
struct Bytes {
    const uint8_t *masks, *codes;
    Ahead ahead;
    INLINE __m512i next() {
        ahead.fetch();
        return expand<uint64_t>(next_slice(codes), masks, codes);
    }
};
template <int half>
struct Nibbles {
    const uint8_t *masks, *codes;
    Ahead ahead;
    INLINE __m512i next() {
        ahead.fetch();
        const __m512i levels =
            _mm512_set4_epi32(0x08070605, 0x04030201, int(0xFFFEFDFC), int(0xFBFAF9F8));  // of codes 0..15: -8 ... -1, 1 ... 8
        const __m512i packed = next_slice(codes);
        const __m512i nibble = _mm512_and_si512(half ? _mm512_maskz_srli_epi16(~__mmask32(0), packed, 4) : packed, _mm512_set1_epi8(15));
        return expand<uint64_t>(_mm512_shuffle_epi8(levels, nibble), masks, codes);
    }
};
struct Expanded {
    const uint8_t* slices;
    INLINE __m512i next() {
        const __m512i slice = _mm512_load_si512(slices);
        slices += slice_bytes;
        return slice;
    }
};

// The bytes of 16-bit factors: [rows][2][count], high bytes first. The low byte of a signed factor is signed, too: high takes the rest.
template <bool is_signed>
INLINE void split(const int16_t* from, uint64_t rows, uint64_t count, int8_t* to) {
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < count; i += 32) {
            const uint64_t left = count - i;
            const __mmask32 here = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
            const __m512i x = _mm512_maskz_loadu_epi16(here, from + r * count + i);
            const __m512i high = _mm512_srai_epi16(is_signed ? _mm512_add_epi16(x, _mm512_set1_epi16(128)) : x, 8);
            _mm512_mask_cvtepi16_storeu_epi8(to + 2 * r * count + i, here, high);
            _mm512_mask_cvtepi16_storeu_epi8(to + (2 * r + 1) * count + i, here, x);
        }
}

// sums[row][32 half + ...] of one half.
template <int rows, class Slices>
INLINE void score_half(Slices slices, uint64_t dim, const int8_t* q, int half, const int32_t* shift, int32_t* sums) {
    __m512i sum[2][rows][2];
    // All loops over sums are unrolled: a sum that is found by a variable index lies in memory.
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        sum[0][r][0] = sum[0][r][1] = sum[1][r][0] = sum[1][r][1] = _mm512_setzero_si512();
    const __m512i top = _mm512_set1_epi8(-128);
    for (uint64_t d = 0; d < dim; d += 4) {
        const __m512i first = _mm512_xor_si512(slices.next(), top), second = _mm512_xor_si512(slices.next(), top);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                const int8_t* factor = q + (2 * r + part) * dim + d;
                add_product(sum[0][r][part], first, factor);
                add_product(sum[1][r][part], second, factor);
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
INLINE void value_group(First& first, Second& second, uint64_t dim, const int8_t* p15, int32_t* sums) {
    __m512i sum[panels][rows][2];
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            sum[p][r][0] = sum[p][r][1] = _mm512_setzero_si512();
    const auto add = [&](auto& slices, int quad) INLINED {
        __m512i slice[panels];
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++)
            slice[p] = slices.next();
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                const __m512i factor = _mm512_set1_epi32(load<int32_t>(p15 + (2 * r + part) * block_tokens + 4 * quad));
#pragma GCC unroll 2
                for (int p = 0; p < panels; p++)
                    add_product(sum[p][r][part], factor, slice[p]);
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
void score_rows(First first, Second second, uint64_t dim, const int8_t* q, const int32_t* shift, int32_t* sums) {
    score_half<rows>(first, dim, q, 0, shift, sums);
    score_half<rows>(second, dim, q, 1, shift, sums);
}
template <int rows, class First, class Second>
void value_rows(First first, Second second, uint64_t dim, const int8_t* p15, int32_t* sums) {
    uint64_t d = 0;
    for (; d + 2 * panel <= dim; d += 2 * panel)
        value_group<rows, 2>(first, second, dim, p15, sums + d);
    if (d < dim)
        value_group<rows, 1>(first, second, dim, p15, sums + d);
}

struct Scores {
    uint64_t dim;
    const int8_t* q;
    const int32_t* shift;
    int32_t* sums;
    template <int rows, class First, class Second>
    INLINE void run(uint64_t row, First first, Second second) const {
        score_rows<rows>(first, second, dim, q + 2 * row * dim, shift + row, sums + row * block_tokens);
    }
};
struct Values {
    uint64_t dim;
    const int8_t* p15;
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
INLINE void all_rows(const Product& product, uint64_t rows, uint64_t slices, First first, Second second) {
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

template <class Product>
INLINE void either_code(const Product& product, const BlockShape& s, uint64_t rows, const uint8_t* masks, const uint8_t* codes,
                        uint64_t kept, const uint8_t* next) {
    const uint8_t *late_masks = masks + 4 * s.head_dim, *late_codes = codes + half_at(s, kept, 1);
    // A block is read with 2 * head_dim slices: `next` is where the half begins that goes with these.
    const uint64_t step = block_bytes(s) / (2 * s.head_dim);
    const Ahead ahead{next, step}, later{next + step * (s.head_dim / 2), step};
    if (s.int4)
        all_rows(product, rows, s.head_dim, Nibbles<0>{masks, codes, ahead}, Nibbles<1>{late_masks, late_codes, later});
    else
        all_rows(product, rows, s.head_dim, Bytes{masks, codes, ahead}, Bytes{late_masks, late_codes, later});
}

struct Products {
    static void scores(const BlockShape& s, const uint8_t* block, const uint8_t* next, const int16_t* q, uint64_t rows, int32_t* sums) {
        alignas(64) int8_t bytes[2 * max_rows * max_head_dim];
        int32_t shift[max_rows];
        split<true>(q, rows, s.head_dim, bytes);
        for (uint64_t r = 0; r < rows; r++) {
            shift[r] = 0;
            for (uint64_t d = 0; d < s.head_dim; d++)
                shift[r] += q[r * s.head_dim + d];
            shift[r] *= 128;
        }
        either_code(Scores{s.head_dim, bytes, shift, sums}, s, rows, block + key_masks_at(), block + key_codes_at(s), s.k_kept, next);
    }
    static void values(const BlockShape& s, const uint8_t* block, const uint8_t* next, const int16_t* p15, uint64_t rows, int32_t* sums) {
        alignas(64) int8_t bytes[2 * max_rows * block_tokens];
        split<false>(p15, rows, block_tokens, bytes);
        either_code(Values{s.head_dim, bytes, sums}, s, rows, block + value_masks_at(s), block + value_codes_at(s), s.v_kept,
                    next + block_bytes(s) / 2);
    }
};

void run(const Part& part, float* out) { attend<Products>(part, out); }

}  // namespace

const Kernel avx512_kernel = {InstructionSet::avx512, run};

}  // namespace ov_ext::sparse_attention
