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
    return x < -87.0f ? 0.0f : y * power;
}

// Reductions of 16 lanes in halves: written out, because a loop over the halves goes through memory.
template <class Step>
INLINE float reduce(const float (&x)[lanes], const Step& step) {
    float a[8], b[4], c[2];
    for (int l = 0; l < 8; l++)
        a[l] = step(x[l], x[l + 8]);
    for (int l = 0; l < 4; l++)
        b[l] = step(a[l], a[l + 4]);
    for (int l = 0; l < 2; l++)
        c[l] = step(b[l], b[l + 2]);
    return step(c[0], c[1]);
}
INLINE float sum_of(const float (&x)[lanes]) {
    return reduce(x, [](float a, float b) INLINED { return a + b; });
}

// `count` is a multiple of 16: callers fill up. NaN counts as nothing.
INLINE float greatest(const float* x, uint64_t count) {
    float best[lanes];
    for (int l = 0; l < lanes; l++)
        best[l] = -__builtin_inff();
    for (uint64_t i = 0; i < count; i += lanes)
        for (int l = 0; l < lanes; l++)
            best[l] = x[i + l] > best[l] ? x[i + l] : best[l];
    return reduce(best, [](float a, float b) INLINED { return a > b ? a : b; });
}

INLINE float total(const float* x, uint64_t count) {
    float sums[lanes] = {};
    for (uint64_t i = 0; i < count; i += lanes)
        for (int l = 0; l < lanes; l++)
            sums[l] += x[i + l];
    return sum_of(sums);
}

// A row while it attends: o, l and m belong together.
struct Running {
    float *m, *l, *o;
};

// Scores to weights: `scores`, a multiple of 16 of them, become exp(score - m) with the new m; what was there before is scaled down to it.
INLINE void soften(const Running& row, float* scores, uint64_t count, uint64_t head_dim) {
    const float best = greatest(scores, count), m = best > *row.m ? best : *row.m;
    if (m == -__builtin_inff()) {  // nothing to attend to yet; exp(-inf - -inf) would be NaN. NaN scores stay NaN.
        for (uint64_t j = 0; j < count; j++)
            scores[j] = scores[j] == scores[j] ? 0.0f : scores[j];
    } else {
        if (m != *row.m) {
            const float factor = exp_of(*row.m - m);
            *row.l *= factor;
            for (uint64_t d = 0; d < head_dim; d++)
                row.o[d] *= factor;
        }
        for (uint64_t j = 0; j < count; j++)
            scores[j] = exp_of(scores[j] - m);
    }
    *row.m = m;
    *row.l += total(scores, count);
}

INLINE void add_mask(const Part& part, uint64_t row, uint64_t column, float* scores, uint64_t count) {
    if (const float* mask = part.mask ? part.mask[row] : nullptr)
        for (uint64_t j = 0; j < count; j++)
            scores[j] += mask[column + j];
    if (column + count > part.visible[row])
        for (uint64_t j = 0; j < count; j++)
            scores[j] = column + j < part.visible[row] ? scores[j] : -__builtin_inff();
}

// o[width] += sum over tokens of p * v: sums stay in registers.
template <int width>
INLINE void add_values(float* o, const float* p, const float* v, uint64_t tokens, uint64_t dim) {
    float sums[width];
    for (int l = 0; l < width; l++)
        sums[l] = o[l];
    for (uint64_t j = 0; j < tokens; j++)
        for (int l = 0; l < width; l++)
            sums[l] += p[j] * v[j * dim + l];
    for (int l = 0; l < width; l++)
        o[l] = sums[l];
}

INLINE void attend_dense(const Part& part, const DenseTokens& tokens, const Running* rows) {
    const uint64_t dim = part.head_dim;
    alignas(64) float scores[max_rows][block_tokens];
    for (uint64_t first = 0; first < tokens.tokens; first += block_tokens) {
        const uint64_t left = tokens.tokens - first, count = left < block_tokens ? left : block_tokens;
        const uint64_t filled = (count + lanes - 1) / lanes * lanes;
        for (uint64_t j = 0; j < count; j++) {
            const float* k = tokens.k + (first + j) * dim;
            for (uint64_t r = 0; r < part.rows; r++) {
                const float* q = part.q[r];
                float sums[lanes] = {};
                for (uint64_t d = 0; d < dim; d += lanes)
                    for (int l = 0; l < lanes; l++)
                        sums[l] += q[d + l] * k[d + l];
                scores[r][j] = sum_of(sums) * part.scale;
            }
        }
        for (uint64_t r = 0; r < part.rows; r++) {
            add_mask(part, r, tokens.first_column + first, scores[r], count);
            for (uint64_t j = count; j < filled; j++)
                scores[r][j] = -__builtin_inff();
            soften(rows[r], scores[r], filled, dim);
            const float* v = tokens.v + first * dim;
            uint64_t d = 0;
            for (; d + 4 * lanes <= dim; d += 4 * lanes)
                add_values<4 * lanes>(rows[r].o + d, scores[r], v + d, count, dim);
            for (; d < dim; d += lanes)
                add_values<lanes>(rows[r].o + d, scores[r], v + d, count, dim);
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
template <class Products>
INLINE void attend_blocks(const Part& part, const Running* rows) {
    QuantizedRows query;
    quantize(part, query);
    alignas(64) int32_t sums[max_rows * max_head_dim];
    alignas(64) float scores[max_rows][block_tokens];
    alignas(64) int16_t p15[max_rows * block_tokens];
    static_assert(max_head_dim >= block_tokens, "sums holds both products");
    const uint64_t dim = part.head_dim;
    for (uint64_t b = 0; b < part.block_count; b++) {
        const uint8_t *block = part.blocks[b], *next = part.blocks[b + 1 < part.block_count ? b + 1 : b];
        float key_scales[block_tokens], value_scales[block_tokens], back[max_rows];
        std::memcpy(key_scales, block, sizeof(key_scales));
        std::memcpy(value_scales, block + sizeof(key_scales), sizeof(value_scales));
        Products::scores(part.shape, block, next, query.q, part.rows, sums);
        for (uint64_t r = 0; r < part.rows; r++) {
            float* s = scores[r];
            for (uint64_t j = 0; j < block_tokens; j++)
                s[j] = float(sums[r * block_tokens + j]) * (query.scale[r] * key_scales[j]);
            add_mask(part, r, part.first_column + b * block_tokens, s, block_tokens);
            soften(rows[r], s, block_tokens, dim);
            for (uint64_t j = 0; j < block_tokens; j++)
                s[j] *= value_scales[j];
            const float most = greatest(s, block_tokens);
            const bool usable = most > 0x1p-100f;  // else its inverse might overflow, and its share is nothing
            const float inverse = usable ? largest_p15 / most : 0.0f;
            float lost[block_tokens];  // zeros, but NaN where a value's scale is
            for (uint64_t j = 0; j < block_tokens; j++)
                lost[j] = s[j] * 0.0f;
            back[r] = (usable ? most / largest_p15 : 0.0f) + total(lost, block_tokens);
            int16_t* p = p15 + r * block_tokens;
            for (uint64_t j = 0; j < block_tokens; j++) {
                const float x = s[j] > 0.0f ? s[j] * inverse : 0.0f;  // NaN: see `lost`, or in the sum of weights already
                p[j] = int16_t(int32_t((x + 12582912.0f) - 12582912.0f));
            }
        }
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
    for (uint64_t r = 0; r < part.rows; r++) {
        float* to = out + r * (2 + part.head_dim);
        rows[r] = {to, to + 1, to + 2};
        std::memset(to, 0, 4 * (2 + part.head_dim));
        *rows[r].m = -__builtin_inff();
    }
    if (part.block_count)
        attend_blocks<Products>(part, rows);
    for (uint64_t i = 0; i < part.dense_count; i++)
        attend_dense(part, part.dense[i], rows);
}

}  // namespace
}  // namespace ov_ext::sparse_attention
