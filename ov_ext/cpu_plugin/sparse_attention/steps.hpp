// Attention of one part, in the order of format.md: what all instruction sets have in common. A kernel file gives two integer products and
// gets the rest: loops over 16 lanes that its compiler makes vectors of. No value depends on the instruction set.
//
// Everything is in an anonymous namespace: each kernel object has its own copy, made with its own flags.
#pragma once

#include <cstring>

#include "../support/floats.hpp"
#include "layout.hpp"

namespace ov_ext::sparse_attention {
namespace {

constexpr int lanes = 16;
constexpr float largest_q16 = 32639.0f;  // 127 * 257: its bytes, split into a signed high and low one, stay within -128..127
constexpr float largest_p15 = 32767.0f;

// exp(x) for x <= 0 and NaN; 0 below -87. Cody and Waite's reduction, then a polynomial (relative error 2^-22).
INLINE float exp_of(float x) {
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
    const float at_least = x < -87.0f ? -87.0f : x;
    const float shifted = at_least * 1.44269504f + rounder, n = shifted - rounder;
    const float r = (at_least - n * 0.693359375f) - n * -2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const float power = from_bits((to_bits(shifted) - to_bits(rounder) + 127) << 23);
    const float result = y * power;  // on its own: a product that is made under a condition is no vector operation
    return x < -87.0f ? 0.0f : result;
}

// 16 lanes are one, two or four registers of the instruction set, and sums over them go in the same order everywhere. These are types of
// their own, because compilers keep arrays that loops add to in memory.
#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif
typedef float Register __attribute__((vector_size(4 * width)));
typedef float Anywhere __attribute__((vector_size(4 * width), aligned(4), may_alias));  // the same in memory
typedef float Four __attribute__((vector_size(16)));
constexpr int registers = lanes / width;

struct Lanes {
    Register of[registers];

    INLINE void fill(float value) {
#pragma GCC unroll 4
        for (int i = 0; i < registers; i++)
            of[i] = value - Register{};
    }
    INLINE static Lanes load(const float* from) {
        Lanes x;
#pragma GCC unroll 4
        for (int i = 0; i < registers; i++)
            x.of[i] = *reinterpret_cast<const Anywhere*>(from + width * i);
        return x;
    }
    INLINE void store(float* to) const {
#pragma GCC unroll 4
        for (int i = 0; i < registers; i++)
            *reinterpret_cast<Anywhere*>(to + width * i) = of[i];
    }
    INLINE void add(const Lanes& x) {
#pragma GCC unroll 4
        for (int i = 0; i < registers; i++)
            of[i] += x.of[i];
    }
    INLINE void add_product(const Lanes& x, const Lanes& y) {
#pragma GCC unroll 4
        for (int i = 0; i < registers; i++)
            of[i] += x.of[i] * y.of[i];
    }
    INLINE void take_greater(const Lanes& x) {  // NaN counts as nothing
#pragma GCC unroll 4
        for (int i = 0; i < registers; i++)
            of[i] = x.of[i] > of[i] ? x.of[i] : of[i];
    }
};

// The first half of a reduction: lanes l, l + 4, l + 8, l + 12.
template <class Step>
INLINE Four to_four(const Lanes& x, const Step& step) {
    Four quarters[4];
    std::memcpy(quarters, &x, sizeof(quarters));
    return step(step(quarters[0], quarters[2]), step(quarters[1], quarters[3]));
}
constexpr auto plus = [](Four a, Four b) INLINED { return a + b; };

INLINE float sum_of(const Lanes& x) {
    const Four four = to_four(x, plus);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
// sum_of four at once.
INLINE Four sums_of(const Lanes (&x)[4]) {
    Four four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        four[i] = to_four(x[i], plus);
    Four halves[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        halves[i] = __builtin_shufflevector(four[2 * i], four[2 * i + 1], 0, 4, 1, 5) +
                    __builtin_shufflevector(four[2 * i], four[2 * i + 1], 2, 6, 3, 7);
    return __builtin_shufflevector(halves[0], halves[1], 0, 1, 4, 5) + __builtin_shufflevector(halves[0], halves[1], 2, 3, 6, 7);
}

// `count` is a multiple of 16: callers fill up.
INLINE float greatest(const float* x, uint64_t count) {
    Lanes best;
    best.fill(-__builtin_inff());
    for (uint64_t i = 0; i < count; i += lanes)
        best.take_greater(Lanes::load(x + i));
    const Four four = to_four(best, [](Four a, Four b) INLINED { return a > b ? a : b; });
    const float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
    return a > b ? a : b;
}

// A row while it attends. m is the largest score, l the sum of weights, in lanes, o the sum of weighted values: they belong together.
struct Running {
    float m;
    Lanes l;
    float* o;
};

// Scores to weights: `scores`, a multiple of 16 of them, become exp(score - m) with the new m; what was there before is scaled down to it.
INLINE void soften(Running& row, float* scores, uint64_t count, uint64_t head_dim) {
    const float best = greatest(scores, count), m = best > row.m ? best : row.m;
    if (m == -__builtin_inff()) {  // nothing to attend to yet; exp(-inf - -inf) would be NaN. NaN scores stay NaN.
        for (uint64_t j = 0; j < count; j++)
            scores[j] = scores[j] == scores[j] ? 0.0f : scores[j];
    } else {
        if (m != row.m) {
            const float factor = exp_of(row.m - m);
            for (int i = 0; i < registers; i++)
                row.l.of[i] *= factor;
            for (uint64_t d = 0; d < head_dim; d++)
                row.o[d] *= factor;
        }
        for (uint64_t j = 0; j < count; j++)
            scores[j] = exp_of(scores[j] - m);
    }
    row.m = m;
    for (uint64_t j = 0; j < count; j += lanes)
        row.l.add(Lanes::load(scores + j));
}

INLINE void add_mask(const Part& part, uint64_t row, uint64_t column, float* scores, uint64_t count) {
    if (const float* mask = part.mask ? part.mask[row] : nullptr)
        for (uint64_t j = 0; j < count; j++)
            scores[j] += mask[column + j];
    if (column + count > part.visible[row])
        for (uint64_t j = 0; j < count; j++)
            scores[j] = column + j < part.visible[row] ? scores[j] : -__builtin_inff();
}

// o[16 * parts] += sum over tokens of p * v.
template <int parts>
INLINE void add_values(float* o, const float* p, const float* v, uint64_t tokens, uint64_t dim) {
    Lanes sums[parts], weight;
#pragma GCC unroll 4
    for (int i = 0; i < parts; i++)
        sums[i] = Lanes::load(o + lanes * i);
    for (uint64_t j = 0; j < tokens; j++, v += dim) {
        weight.fill(p[j]);
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            sums[i].add_product(weight, Lanes::load(v + lanes * i));
    }
#pragma GCC unroll 4
    for (int i = 0; i < parts; i++)
        sums[i].store(o + lanes * i);
}

// scores[4] of successive tokens.
INLINE void dot_products(const float* q, const float* k, uint64_t dim, float scale, float* scores) {
    Lanes sums[4];
#pragma GCC unroll 4
    for (Lanes& sum : sums)
        sum.fill(0.0f);
    for (uint64_t d = 0; d < dim; d += lanes) {
        const Lanes x = Lanes::load(q + d);
#pragma GCC unroll 4
        for (uint64_t j = 0; j < 4; j++)
            sums[j].add_product(x, Lanes::load(k + j * dim + d));
    }
    const Four products = sums_of(sums) * scale;
    std::memcpy(scores, &products, sizeof(products));
}
INLINE float dot_product(const float* q, const float* k, uint64_t dim) {
    Lanes sum;
    sum.fill(0.0f);
    for (uint64_t d = 0; d < dim; d += lanes)
        sum.add_product(Lanes::load(q + d), Lanes::load(k + d));
    return sum_of(sum);
}

INLINE void attend_dense(const Part& part, const DenseTokens& tokens, Running* rows) {
    const uint64_t dim = part.head_dim;
    alignas(64) float scores[block_tokens];
    for (uint64_t first = 0; first < tokens.tokens; first += block_tokens) {
        const uint64_t left = tokens.tokens - first, count = left < block_tokens ? left : block_tokens;
        const uint64_t filled = (count + lanes - 1) / lanes * lanes;
        const float *k = tokens.k + first * dim, *v = tokens.v + first * dim;
        for (uint64_t r = 0; r < part.rows; r++) {
            uint64_t j = 0;
            for (; j + 4 <= count; j += 4)
                dot_products(part.q[r], k + j * dim, dim, part.scale, scores + j);
            for (; j < count; j++)
                scores[j] = dot_product(part.q[r], k + j * dim, dim) * part.scale;
            add_mask(part, r, tokens.first_column + first, scores, count);
            for (; j < filled; j++)
                scores[j] = -__builtin_inff();
            soften(rows[r], scores, filled, dim);
            uint64_t d = 0;
            for (; d + 4 * lanes <= dim; d += 4 * lanes)
                add_values<4>(rows[r].o + d, scores, v + d, count, dim);
            for (; d < dim; d += lanes)
                add_values<1>(rows[r].o + d, scores, v + d, count, dim);
        }
    }
}

struct QuantizedRows {
    alignas(64) int16_t q[max_rows * max_head_dim];
    float scale[max_rows];
};

INLINE void quantize(const Part& part, QuantizedRows& to) {
    for (uint64_t r = 0; r < part.rows; r++) {
        const float* q = part.q[r];
        uint32_t most[lanes] = {};
        for (uint64_t d = 0; d < part.head_dim; d += lanes)
            for (int l = 0; l < lanes; l++) {
                const uint32_t bits = to_bits(q[d + l]) & 0x7FFFFFFF;
                most[l] = bits > most[l] ? bits : most[l];
            }
        uint32_t bits = 0;
        for (int l = 0; l < lanes; l++)
            bits = most[l] > bits ? most[l] : bits;
        const bool finite = bits < 0x7F800000, zero = bits < 0x03800000;  // infinity, 2^-120: see quantization.hpp
        const float peak = from_bits(bits), inverse = finite && !zero ? largest_q16 / peak : 0.0f;
        to.scale[r] = !finite ? __builtin_nanf("") : zero ? 0.0f : peak / largest_q16 * part.scale;
        for (uint64_t d = 0; d < part.head_dim; d++) {
            const float x = finite ? q[d] * inverse : 0.0f;
            to.q[r * part.head_dim + d] = int16_t(int32_t((x + 12582912.0f) - 12582912.0f));
        }
    }
}

// Products: struct with
//   scores(shape, block, next, q, rows, sums): sums[rows][64] = sum over d of K[j][d] * q[row][d]
//   values(shape, block, next, p, rows, sums): sums[rows][head_dim] = sum over j of V[j][d] * p[row][j], p >= 0
// `next` is the block that follows, for them to prefetch: pages lie anywhere.
// What the tokens of a block are scaled by.
struct BlockScales {
    alignas(64) float k[block_tokens], v[block_tokens];
    float lost;  // NaN where a scale of values is, else 0

    INLINE explicit BlockScales(const uint8_t* block) {
        std::memcpy(k, block, sizeof(k));
        std::memcpy(v, block + sizeof(k), sizeof(v));
        Lanes sum;
        sum.fill(0.0f);
        for (uint64_t j = 0; j < block_tokens; j += lanes)
            sum.add(Lanes::load(v + j));
        lost = sum_of(sum) * 0.0f;
    }
};

// Sums of products to 15-bit weights p15[64], which also have the scales of the values in them. Returns the factor of their products.
INLINE float weigh(const Part& part, uint64_t r, uint64_t column, const BlockScales& scales, const int32_t* sums, float q_scale,
                   Running& row, int16_t* p15) {
    alignas(64) float s[block_tokens];
    for (uint64_t j = 0; j < block_tokens; j++)
        s[j] = float(sums[j]) * (q_scale * scales.k[j]);
    add_mask(part, r, column, s, block_tokens);
    soften(row, s, block_tokens, part.head_dim);
    for (uint64_t j = 0; j < block_tokens; j++)
        s[j] *= scales.v[j];
    const float most = greatest(s, block_tokens);
    const bool usable = most > 0x1p-100f;  // else its inverse might overflow, and its share is nothing
    const float inverse = usable ? largest_p15 / most : 0.0f;
    for (uint64_t j = 0; j < block_tokens; j++) {
        const float share = s[j] * inverse, x = share > 0.0f ? share : 0.0f;  // NaN: see `lost`, or in the sum of weights already
        p15[j] = int16_t(int32_t((x + 12582912.0f) - 12582912.0f));
    }
    return (usable ? most / largest_p15 : 0.0f) + scales.lost;
}

// Products: struct with
//   scores(shape, block, next, q, rows, sums): sums[rows][64] = sum over d of K[j][d] * q[row][d]
//   values(shape, block, next, p, rows, sums): sums[rows][head_dim] = sum over j of V[j][d] * p[row][j], p >= 0
// `next` is the block that follows, for them to prefetch: pages lie anywhere.
template <class Products>
INLINE void attend_blocks(const Part& part, Running* rows) {
    QuantizedRows query;
    quantize(part, query);
    alignas(64) int32_t sums[max_rows * max_head_dim];
    alignas(64) int16_t p15[max_rows * block_tokens];
    static_assert(max_head_dim >= block_tokens, "sums holds both products");
    const uint64_t dim = part.head_dim;
    for (uint64_t b = 0; b < part.block_count; b++) {
        const uint8_t *block = part.blocks[b], *next = part.blocks[b + 1 < part.block_count ? b + 1 : b];
        const BlockScales scales(block);
        float back[max_rows];
        Products::scores(part.shape, block, next, query.q, part.rows, sums);
        for (uint64_t r = 0; r < part.rows; r++)
            back[r] = weigh(part, r, part.first_column + b * block_tokens, scales, sums + r * block_tokens, query.scale[r], rows[r],
                            p15 + r * block_tokens);
        Products::values(part.shape, block, next, p15, part.rows, sums);
        for (uint64_t r = 0; r < part.rows; r++) {
            float* __restrict o = rows[r].o;
            const int32_t* __restrict sum = sums + r * dim;
            for (uint64_t d = 0; d < dim; d++)
                o[d] += float(sum[d]) * back[r];
        }
    }
}

template <class Products>
INLINE void attend(const Part& part, float* out) {
    Running rows[max_rows];
    const uint64_t size = 2 + part.head_dim;
    std::memset(out, 0, 4 * part.rows * size);
    for (uint64_t r = 0; r < part.rows; r++) {
        rows[r].m = -__builtin_inff();
        rows[r].l.fill(0.0f);
        rows[r].o = out + r * size + 2;
    }
    if (part.block_count)
        attend_blocks<Products>(part, rows);
    for (uint64_t i = 0; i < part.dense_count; i++)
        attend_dense(part, part.dense[i], rows);
    for (uint64_t r = 0; r < part.rows; r++) {
        out[r * size] = rows[r].m;
        out[r * size + 1] = sum_of(rows[r].l);
    }
}

}  // namespace
}  // namespace ov_ext::sparse_attention
