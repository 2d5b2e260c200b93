// AVX2 with FMA and F16C (Haswell, Zen and later): all slices of a block's keys, or values, are expanded to bytes in memory, once for all
// query rows, and then multiplied as 16-bit words.
//
// vpmaddwd multiplies words and adds up neighbours. The even and the odd bytes of a slice become words of their own, so that each 32-bit
// lane stays the sum of one token (of scores) or one dimension (of values):
//
//     a lane of a slice    b0 b1 b2 b3
//     even                 b0    b2       with the factors f0 f2
//     odd                     b1    b3    with f1 f3
//
// The factors lie in the order f0 f2 f1 f3.
#include <immintrin.h>

#include "../support/avx2_expand.hpp"
#include "steps.hpp"

namespace ov_ext::sparse_attention {
namespace {

// Rows that multiply a slice while it is in registers: two sums each, beside four words of it, two factors and a product.
constexpr uint64_t most_rows = 4;

constexpr uint64_t most_slice_bytes = max_head_dim * slice_bytes;  // of the keys, or values, of a block

INLINE void store256(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

// Levels of 4 bits as bytes, both halves: the low nibbles of `bytes` bytes, a multiple of 32, then the high ones.
INLINE void unpack_nibbles(const uint8_t* codes, uint64_t bytes, uint8_t* to) {
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8));
    const __m256i nibble = _mm256_set1_epi8(15);
    for (uint64_t i = 0; i < bytes; i += 32) {
        const __m256i both = load256(codes + i);
        store256(to + i, _mm256_shuffle_epi8(levels, _mm256_and_si256(both, nibble)));
        store256(to + bytes + i, _mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble)));
    }
}

// `slices`: a multiple of 8. `next` is fetched meanwhile, `step` bytes with each slice.
__attribute__((noinline)) void expand_slices(const uint8_t* masks, const uint8_t* codes, uint64_t slices, const uint8_t* next,
                                             uint64_t step, uint8_t* to) {
    constexpr uint64_t at_once = 8, mask_bytes = 8;
    for (uint64_t i = 0; i < slices; i += at_once) {
        alignas(32) uint16_t offsets[at_once * mask_bytes];
        look_up<at_once * mask_bytes>(masks, offsets);
        for (uint64_t s = 0; s < at_once; s++) {
            const auto mask = load<uint64_t>(masks);
            __m256i half[2];
            expand_bytes(codes, mask, offsets + s * mask_bytes, half);
            codes += __builtin_popcountll(mask);
            masks += mask_bytes;
            store256(to, half[0]);
            store256(to + 32, half[1]);
            to += slice_bytes;
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
            next += step;
        }
    }
}
// The keys or values of a block: slices one after the other, halves too.
struct Slices {
    const uint8_t* at;

    // bytes and expanded: [most_slice_bytes] each, bytes with 16 more.
    Slices(const BlockShape& s, const uint8_t* masks, const uint8_t* codes, uint64_t kept, const uint8_t* next, uint8_t* bytes,
           uint8_t* expanded) {
        if (s.int4) {
            unpack_nibbles(codes, half_tokens * kept, bytes);
            codes = bytes;
        }
        if (kept != s.head_dim)
            expand_slices(masks, codes, s.head_dim, next, block_bytes(s) / (2 * s.head_dim), expanded);
        at = kept == s.head_dim ? codes : expanded;
    }
};

// Factors of 4 lanes in the order that goes with even and odd bytes. count: a multiple of 16.
INLINE void reorder(const int16_t* from, uint64_t count, int16_t* to) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (uint64_t i = 0; i < count; i += 16)
        store256(to + i, _mm256_shuffle_epi8(load256(from + i), order));
}

// sum[row] += products of `count` slices, `step` bytes apart, with 4 factors each of rows that are `stride` factors apart.
template <int rows>
INLINE void multiply(const uint8_t* slices, uint64_t step, uint64_t count, const int16_t* factors, uint64_t stride,
                     __m256i (&sum)[rows][2]) {
    for (uint64_t i = 0; i < count; i++, slices += step, factors += 4) {
        __m256i even[2], odd[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m256i bytes = load256(slices + 32 * half);
            even[half] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
            odd[half] = _mm256_srai_epi16(bytes, 8);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i first = _mm256_set1_epi32(load<int32_t>(factors + r * stride));
            const __m256i second = _mm256_set1_epi32(load<int32_t>(factors + r * stride + 2));
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                sum[r][half] = _mm256_add_epi32(
                    sum[r][half], _mm256_add_epi32(_mm256_madd_epi16(even[half], first), _mm256_madd_epi16(odd[half], second)));
                __asm__("" : "+x"(sum[r][half]));  // compilers like to add up products of several rows first, and run out of registers
            }
        }
    }
}

template <int rows>
INLINE void clear(__m256i (&sum)[rows][2]) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
}
template <int rows>
INLINE void store(const __m256i (&sum)[rows][2], int32_t* to, uint64_t stride) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        store256(to + r * stride, sum[r][0]);
        store256(to + r * stride + 8, sum[r][1]);
    }
}

// sums[row][64] of slices [half][quads of dimensions][2 panels].
template <int rows>
__attribute__((noinline)) void score_rows(const uint8_t* slices, uint64_t dim, const int16_t* q, int32_t* sums) {
    for (uint64_t half = 0; half < 2; half++)
        for (uint64_t p = 0; p < 2; p++) {
            __m256i sum[rows][2];
            clear<rows>(sum);
            multiply<rows>(slices + (half * dim / 2 + p) * slice_bytes, 2 * slice_bytes, dim / 4, q, dim, sum);
            store<rows>(sum, sums + half_tokens * half + panel * p, block_tokens);
        }
}

// sums[row][dim] of slices [half][groups of 2 panels, or 1][8 quads of tokens][panels].
template <int rows>
__attribute__((noinline)) void value_rows(const uint8_t* slices, uint64_t dim, const int16_t* p15, int32_t* sums) {
    constexpr uint64_t quads = half_tokens / 4;
    for (uint64_t d = 0; d < dim; d += panel) {
        const uint64_t group = d / (2 * panel) * 2 * panel, panels = dim - group < 2 * panel ? 1 : 2;
        __m256i sum[rows][2];
        clear<rows>(sum);
        for (uint64_t half = 0; half < 2; half++) {
            const uint64_t first = half * dim / 2 + group / panel * quads + (d - group) / panel;
            multiply<rows>(slices + first * slice_bytes, panels * slice_bytes, quads, p15 + half_tokens * half, block_tokens, sum);
        }
        store<rows>(sum, sums + d, dim);
    }
}

// Calls run(first, rows) as functions of 1 ... 4 rows, in equal shares.
template <class Run>
INLINE void by_rows(uint64_t rows, const Run& run) {
    for (uint64_t row = 0, some; row < rows; row += some) {
        const uint64_t left = rows - row, passes = (left + most_rows - 1) / most_rows;
        some = (left + passes - 1) / passes;
        run(row, some);
    }
}

struct Products {
    static void scores(const BlockShape& s, const uint8_t* block, const uint8_t* next, const int16_t* q, uint64_t rows, int32_t* sums) {
        alignas(32) uint8_t bytes[most_slice_bytes + 16], expanded[most_slice_bytes];
        alignas(32) int16_t factors[max_rows * max_head_dim];
        reorder(q, rows * s.head_dim, factors);
        const Slices slices(s, block + key_masks_at(), block + key_codes_at(s), s.k_kept, next, bytes, expanded);
        by_rows(rows, [&](uint64_t row, uint64_t some) INLINED {
            const int16_t* f = factors + row * s.head_dim;
            int32_t* to = sums + row * block_tokens;
            switch (some) {
                case 1: return score_rows<1>(slices.at, s.head_dim, f, to);
                case 2: return score_rows<2>(slices.at, s.head_dim, f, to);
                case 3: return score_rows<3>(slices.at, s.head_dim, f, to);
                default: return score_rows<4>(slices.at, s.head_dim, f, to);
            }
        });
    }
    static void values(const BlockShape& s, const uint8_t* block, const uint8_t* next, const int16_t* p15, uint64_t rows, int32_t* sums) {
        alignas(32) uint8_t bytes[most_slice_bytes + 16], expanded[most_slice_bytes];
        alignas(32) int16_t factors[max_rows * block_tokens];
        reorder(p15, rows * block_tokens, factors);
        const Slices slices(s, block + value_masks_at(s), block + value_codes_at(s), s.v_kept, next + block_bytes(s) / 2, bytes, expanded);
        by_rows(rows, [&](uint64_t row, uint64_t some) INLINED {
            const int16_t* f = factors + row * block_tokens;
            int32_t* to = sums + row * s.head_dim;
            switch (some) {
                case 1: return value_rows<1>(slices.at, s.head_dim, f, to);
                case 2: return value_rows<2>(slices.at, s.head_dim, f, to);
                case 3: return value_rows<3>(slices.at, s.head_dim, f, to);
                default: return value_rows<4>(slices.at, s.head_dim, f, to);
            }
        });
    }
};

void run(const Part& part, float* out) { attend<Products>(part, out); }

}  // namespace

const Kernel avx2_kernel = {InstructionSet::avx2, run};

}  // namespace ov_ext::sparse_attention
