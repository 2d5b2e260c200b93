// Products of floating-point activations: of bf16 weights, and of integers whose activations are not quantized. Included by avx2.cpp.
//
// Even and odd inputs are two chains of additions for each output, which are added at the end of a segment (bf16: of a chunk), for any
// number of rows and any form of the weights: so a row's bits do not depend on its company.
#pragma once

#include "avx2_stream.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// Adds what a segment sums up to, value[2] of 16 outputs, to the total of its chunk.
template <Kind kind>
INLINE void add_segment(const BlobView& w, uint64_t block, uint64_t segment, int panel, const __m256 (&value)[2], __m256 (&total)[2]) {
    for (int half = 0; half < 2; half++)
        total[half] =
            kind == Kind::bf16 ? value[half] : _mm256_fmadd_ps(value[half], scales_of(w, block, segment, 2 * panel + half), total[half]);
}

INLINE void add_to(float* out, const __m256 (&value)[2]) {
    for (int half = 0; half < 2; half++)
        _mm256_storeu_ps(out + 8 * half, _mm256_add_ps(_mm256_loadu_ps(out + 8 * half), value[half]));
}

// Input j of a slice as floats, one output a lane. A bf16 is the upper half of an f32. An integer goes to the top of its lane and comes
// back with its sign; extra_bits falls off on the way.
template <Kind kind>
INLINE __m256 weights(__m256i half, int j) {
    if (kind == Kind::bf16)
        return floats(j ? _mm256_and_si256(half, _mm256_set1_epi32(int(0xFFFF0000))) : _mm256_slli_epi32(half, 16));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(half, 24 - 8 * j), 24 + extra_bits(kind, Dot::f32)));
}

// Parts neighbouring lanes: even ones of both registers, and odd ones.
INLINE void part_lanes(__m256 low, __m256 high, __m256& even, __m256& odd) {
    const auto in_order = [](__m256 v) INLINED { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xD8)); };
    even = in_order(_mm256_shuffle_ps(low, high, 0x88));
    odd = in_order(_mm256_shuffle_ps(low, high, 0xDD));
}

// ------------------------------------------------------------------------------------------------- few rows of x

// Expanded words are a lane each, so that the two inputs of an output are neighbours. Other slices are converted input by input.
template <Kind kind, bool dense>
constexpr bool by_word = kind == Kind::bf16 && !dense;

// Adds the products of the 16 slices of a panel, each multiplied the moment it is decoded. sums[half]: by word outputs 0..3 and 4..7 (8..11
// and 12..15) with both chains, else outputs 0..7 (8..15) of the even chain and of the odd one.
//
// There are registers for 12 sums. Up to three rows take them all at once; more go over the panel twice: by word once for each half, which
// then costs no second broadcast; others once for each chain, so that an activation is loaded once for both halves.
template <Kind kind, bool dense, int M>
INLINE void add_panel(Stream<kind, dense, Dot::f32>& stream, const uint8_t* x, uint64_t stride, __m256 (&sums)[2][M][2]) {
    constexpr int slice_k = int(slice_inputs(kind));
    constexpr bool once = M <= 3, words = by_word<kind, dense>;
    constexpr int halves = !once && words ? 1 : 2, chains = !once && !words ? 1 : 2;
    Lookups<kind> panel;
    stream.look_up(panel);
    Stream<kind, dense, Dot::f32> at = stream;
    const auto add = [&](int first, int s, auto parity, __m256(&sum)[halves][M][chains]) INLINED {
        const uint8_t* x_at = x + 4 * slice_k * s;
        if constexpr (words) {
            __m256 lanes[4];
            at.next_words(panel, s, lanes);
            for (int m = 0; m < M; m++) {
                const __m256 activations = _mm256_castpd_ps(_mm256_set1_pd(load<double>(x_at + uint64_t(m) * stride)));
                for (int half = 0; half < halves; half++)
                    for (int i = 0; i < 2; i++)
                        sum[half][m][i] = _mm256_fmadd_ps(activations, lanes[2 * (first + half) + i], sum[half][m][i]);
            }
        } else {
            const Slice slice = at.template next<decltype(parity)::value>(panel, s);
            for (int j = first; j < slice_k; j += once ? 1 : 2) {
                const __m256 w[2] = {weights<kind>(slice.half[0], j), weights<kind>(slice.half[1], j)};
                for (int m = 0; m < M; m++) {
                    const __m256 activation = _mm256_set1_ps(load<float>(x_at + uint64_t(m) * stride + 4 * j));
                    for (int half = 0; half < 2; half++) {
                        __m256& chain = sum[half][m][once ? j % 2 : 0];
                        chain = _mm256_fmadd_ps(activation, w[half], chain);
                        __asm__("" : "+x"(chain));  // compilers load ahead and run out of registers
                    }
                }
            }
        }
    };
    const auto pass = [&](auto number) INLINED {
        constexpr int first = decltype(number)::value;  // half, or chain
        constexpr int first_half = words ? first : 0, first_chain = words ? 0 : first;
        __m256 sum[halves][M][chains];
        for (int half = 0; half < halves; half++)
            for (int m = 0; m < M; m++)
                for (int i = 0; i < chains; i++)
                    sum[half][m][i] = sums[first_half + half][m][first_chain + i];
        for (int s = 0; s < panel_slices; s += 4) {
            at.prefetch();
            add(first, s, Constant<0>(), sum);
            add(first, s + 1, Constant<1>(), sum);
            add(first, s + 2, Constant<0>(), sum);
            add(first, s + 3, Constant<1>(), sum);
        }
        for (int half = 0; half < halves; half++)
            for (int m = 0; m < M; m++)
                for (int i = 0; i < chains; i++)
                    sums[first_half + half][m][first_chain + i] = sum[half][m][i];
    };
    pass(Constant<0>());
    if constexpr (!once) {
        at = stream;
        pass(Constant<1>());
    }
    stream = at;
}

template <Kind kind, bool dense>
INLINE __m256 add_chains(const __m256 (&sums)[2]) {
    __m256 even = sums[0], odd = sums[1];
    if constexpr (by_word<kind, dense>)
        part_lanes(sums[0], sums[1], even, odd);
    return _mm256_add_ps(even, odd);
}

// The stream visits the four panels in turn, 16 slices each; their sums wait in memory meanwhile.
template <Kind kind, bool dense, int M>
__attribute__((noinline)) void multiply_few(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last,
                                            uint64_t row, float* out) {
    constexpr uint64_t x_tile = 4 * tile_inputs(kind);
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Stream<kind, dense, Dot::f32> stream(w, block, chunk);
        const Part<kind> part(w, chunk);
        __m256 totals[block_panels][M][2] = {};
        for (uint64_t tile = part.begin, tiles; tile < part.end; tile += tiles) {
            tiles = part.tiles_from(tile);
            __m256 sums[block_panels][2][M][2] = {};
            for (uint64_t t = tile; t < tile + tiles; t++)
                for (int panel = 0; panel < block_panels; panel++)
                    add_panel<kind, dense, M>(stream, x + t * x_tile, a.stride, sums[panel]);
            for (int panel = 0; panel < block_panels; panel++)
                for (int m = 0; m < M; m++) {
                    const __m256 value[2] = {add_chains<kind, dense>(sums[panel][0][m]), add_chains<kind, dense>(sums[panel][1][m])};
                    add_segment<kind>(w, block, tile / part.step, panel, value, totals[panel][m]);
                }
        }
        for (int panel = 0; panel < block_panels; panel++)
            for (int m = 0; m < M; m++)
                add_to(out + m * int(block_n) + panel * panel_n, totals[panel][m]);
    }
}

// ------------------------------------------------------------------------------------------------- more rows of x

// Some tiles of a block as floats, whose inputs go in pairs: at[panel][even, odd inputs][pairs][outputs]. What one chain adds up lies in a
// row. Up to a chunk: 128 KiB, which stay in a level-2 cache while all rows meet them.
struct Expanded {
    alignas(64) float at[block_n * chunk_k];
    uint64_t pairs;

    INLINE float* pair(int panel, int odd, uint64_t i) { return at + ((uint64_t(2 * panel + odd) * pairs) + i) * panel_n; }
};

template <Kind kind, bool dense>
INLINE void expand(Stream<kind, dense, Dot::f32>& stream, uint64_t tiles, Expanded& to) {
    constexpr uint64_t slice_pairs = slice_inputs(kind) / 2;
    to.pairs = tiles * panel_slices * slice_pairs;
    for (uint64_t tile = 0; tile < tiles; tile++)
        for (int p = 0; p < block_panels; p++) {
            Lookups<kind> panel;
            stream.look_up(panel);
            float* at[2];  // even and odd inputs
            for (int odd = 0; odd < 2; odd++)
                at[odd] = to.pair(p, odd, tile * panel_slices * slice_pairs);
            const auto put = [&](int s, auto parity) INLINED {
                if constexpr (by_word<kind, dense>) {
                    __m256 lanes[4];
                    stream.next_words(panel, s, lanes);
                    for (int half = 0; half < 2; half++) {
                        __m256 parted[2];
                        part_lanes(lanes[2 * half], lanes[2 * half + 1], parted[0], parted[1]);
                        for (int odd = 0; odd < 2; odd++)
                            _mm256_store_ps(at[odd] + 8 * half, parted[odd]);
                    }
                } else {
                    const Slice slice = stream.template next<decltype(parity)::value>(panel, s);
                    for (int j = 0; j < int(slice_inputs(kind)); j++)
                        for (int half = 0; half < 2; half++)
                            _mm256_store_ps(at[j % 2] + j / 2 * panel_n + 8 * half, weights<kind>(slice.half[half], j));
                }
                for (float*& pair : at)
                    pair += slice_pairs * panel_n;
            };
            for (int s = 0; s < panel_slices; s += 2) {
                if (s % 4 == 0)
                    stream.prefetch();
                put(s, Constant<0>());
                put(s + 1, Constant<1>());
            }
        }
}

// Of a row of x: both chains of all outputs.
struct Chains {
    alignas(64) float at[block_panels][2][panel_n];
};

// Adds the products with M rows of x to sums[M]. Each of the eight parts of the weights fills the registers with two sums a row.
template <int M>
__attribute__((noinline)) void multiply_expanded(Expanded& w, const uint8_t* x, uint64_t stride, Chains* sums) {
    for (int panel = 0; panel < block_panels; panel++)
        for (int odd = 0; odd < 2; odd++) {
            __m256 sum[M][2];
            for (int m = 0; m < M; m++)
                for (int half = 0; half < 2; half++)
                    sum[m][half] = _mm256_load_ps(sums[m].at[panel][odd] + 8 * half);
            const float* at = w.pair(panel, odd, 0);
            // Addressing modes reach six rows from two registers: they add 0, 1 or 2 times `stride`.
            const uint8_t* rows[2] = {x + 4 * odd, x + 3 * stride + 4 * odd};
            __asm__("" : "+r"(rows[0]), "+r"(rows[1]));
#pragma GCC unroll 2
            for (uint64_t i = 0; i < w.pairs; i++, at += panel_n) {
                const __m256 weight[2] = {_mm256_load_ps(at), _mm256_load_ps(at + 8)};
                for (int m = 0; m < M; m++) {
                    const __m256 activation = _mm256_set1_ps(load<float>(rows[m / 3] + uint64_t(m % 3) * stride + 8 * i));
                    for (int half = 0; half < 2; half++)
                        sum[m][half] = _mm256_fmadd_ps(activation, weight[half], sum[m][half]);
                }
            }
            for (int m = 0; m < M; m++)
                for (int half = 0; half < 2; half++)
                    _mm256_store_ps(sums[m].at[panel][odd] + 8 * half, sum[m][half]);
        }
}

INLINE void multiply_expanded(uint64_t rows, Expanded& w, const uint8_t* x, uint64_t stride, Chains* sums) {
    switch (rows) {
        case 1: return multiply_expanded<1>(w, x, stride, sums);
        case 2: return multiply_expanded<2>(w, x, stride, sums);
        case 3: return multiply_expanded<3>(w, x, stride, sums);
        case 4: return multiply_expanded<4>(w, x, stride, sums);
        case 5: return multiply_expanded<5>(w, x, stride, sums);
        default: return multiply_expanded<6>(w, x, stride, sums);
    }
}

// Expanded at a time are the tiles of a segment, or a whole chunk of bf16. A few rows take two tiles of bf16, which stay in a level-1 cache.
template <Kind kind, bool dense>
void multiply_many(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                   float* out) {
    constexpr uint64_t most = 6, rows_for_a_chunk = 32;
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    Expanded expanded;
    Chains sums[max_rows];
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Stream<kind, dense, Dot::f32> stream(w, block, chunk);
        const Part<kind> part(w, chunk);
        __m256 totals[kind == Kind::bf16 ? 1 : max_rows][block_panels][2];  // of the chunk
        if constexpr (kind != Kind::bf16)
            __builtin_memset(totals, 0, rows * sizeof(totals[0]));
        for (uint64_t begin = part.begin, end; begin < part.end; begin = end) {
            end = begin + part.tiles_from(begin);
            __builtin_memset(sums, 0, rows * sizeof(Chains));
            for (uint64_t tile = begin, tiles; tile < end; tile += tiles) {
                tiles = kind == Kind::bf16 && rows < rows_for_a_chunk && end - tile > 2 ? 2 : end - tile;
                expand(stream, tiles, expanded);
                for (uint64_t m = 0, some; m < rows; m += some) {
                    some = equal_share(rows - m, most);
                    multiply_expanded(some, expanded, x + m * a.stride + 4 * tile * tile_inputs(kind), a.stride, sums + m);
                }
            }
            for (uint64_t m = 0; m < rows; m++)
                for (int panel = 0; panel < block_panels; panel++) {
                    __m256 value[2];
                    for (int half = 0; half < 2; half++)
                        value[half] =
                            _mm256_add_ps(_mm256_load_ps(sums[m].at[panel][0] + 8 * half), _mm256_load_ps(sums[m].at[panel][1] + 8 * half));
                    if constexpr (kind == Kind::bf16)
                        add_to(out + m * block_n + panel * panel_n, value);
                    else
                        add_segment<kind>(w, block, begin / part.step, panel, value, totals[m][panel]);
                }
        }
        if constexpr (kind != Kind::bf16)
            for (uint64_t m = 0; m < rows; m++)
                for (int panel = 0; panel < block_panels; panel++)
                    add_to(out + m * block_n + panel * panel_n, totals[m][panel]);
    }
}

// Adds the products of chunks [first, last) to out[rows][block_n].
template <Kind kind, bool dense>
void multiply_floats(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                     float* out) {
    switch (rows) {
        case 1: return multiply_few<kind, dense, 1>(w, a, block, first, last, row, out);
        case 2: return multiply_few<kind, dense, 2>(w, a, block, first, last, row, out);
        case 3: return multiply_few<kind, dense, 3>(w, a, block, first, last, row, out);
        default: break;
    }
    if constexpr (kind == Kind::bf16) {  // which is cheap to decode twice
        switch (rows) {
            case 4: return multiply_few<kind, dense, 4>(w, a, block, first, last, row, out);
            case 5: return multiply_few<kind, dense, 5>(w, a, block, first, last, row, out);
            case 6: return multiply_few<kind, dense, 6>(w, a, block, first, last, row, out);
            default: break;
        }
    }
    multiply_many<kind, dense>(w, a, block, first, last, row, rows, out);
}

}  // namespace
}  // namespace ov_ext::sparse_matmul
