// Rows of activations and the sums of a chunk: what the AVX-512 kernels share, whatever decodes their slices. Included by files compiled
// with these instructions only; everything is in an anonymous namespace.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <utility>

#include "avx512_sections.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// How activations arrive.
enum class Input {
    u8,    // quantized, offset by 128: vpdpbusd multiplies u8 by s8
    s8,    // quantized; weights get the offset, and behind each row stands what it adds to the sums of segments: i32[segments]
    bf16,  // vdpbf16ps
    f32,   // rounded to bf16 for bf16 weights unless activations are to stay as they are
};

template <Input input>
struct Register {
    using type = __m512;
};
template <>
struct Register<Input::u8> {
    using type = __m512i;
};
template <>
struct Register<Input::s8> {
    using type = __m512i;
};

template <Input input>
constexpr bool integers = input == Input::u8 || input == Input::s8;

// Accumulators of one output and row of x: integer sums need one, floating-point sums take even and odd inputs apart (bf16: even and odd
// slices), which is enough to hide the latency and little enough for the registers of every loop below. Every loop has to split them
// in just this way: with another number of chains the same row of x would get other bits in other company.
template <Input input>
constexpr int lanes = integers<input> ? 1 : 2;

// Four bytes of activations from memory. Written as an instruction because compilers keep them in general registers across panels, and
// moving them from there costs a cycle of port 5.
INLINE __m512i broadcast(const uint8_t* x) {
    __m512i value;
    __asm__ volatile("vpbroadcastd %1, %0" : "=v"(value) : "m"(*reinterpret_cast<const int32_t (*)[1]>(x)));
    return value;
}

// Input j of a slice as f32. A 32-bit lane is one output and holds its slice_k inputs, the first one lowest; int4 are bytes by now:
//
//     int8, int4    lane c: k0 k1 k2 k3        to the top of the lane, and back with its sign
//     bf16          lane c: k0    k1           a bf16 is the upper half of an f32
template <Kind kind>
INLINE __m512 as_float(__m512i slice, int j) {
    if constexpr (kind == Kind::bf16)
        return _mm512_castsi512_ps(j ? _mm512_and_si512(slice, _mm512_set1_epi32(int(0xFFFF0000))) : _mm512_slli_epi32(slice, 16));
    else
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(slice, _mm_cvtsi32_si128(24 - 8 * j)), 24));
}

// A constant as an argument. Like std::integral_constant, but with nothing that another object could take.
template <int i>
struct Constant {
    INLINE constexpr operator int() const { return i; }
};

// Calls f with the constants 0 ... count - 1: arrays that it indexes stay in registers, which compilers do not manage with a loop.
template <class F, int... i>
INLINE void each_of(std::integer_sequence<int, i...>, const F& f) {
    (f(Constant<i>()), ...);
}
template <int count, class F>
INLINE void each(const F& f) {
    each_of(std::make_integer_sequence<int, count>(), f);
}

// M rows of activations, `stride` bytes apart, in a register for every three: addressing modes reach all of them, since they add 0, 1 or 2
// times `stride`, but not 3 or 5 times. Left alone, compilers keep an address for each element on the stack, so a new Rows is made wherever
// a loop begins.
template <int M>
struct Rows {
    static constexpr int bases = (M + 2) / 3;
    const uint8_t* base[bases];  // rows 0, 3, 6
    uint64_t stride;

    INLINE Rows(const uint8_t* x, uint64_t stride) : stride(stride) {
        for (int i = 0; i < bases; i++) {
            base[i] = x + uint64_t(3 * i) * stride;
            __asm__("" : "+r"(base[i]));
        }
        __asm__("" : "+r"(this->stride));
    }
    INLINE void advance(uint64_t bytes) {
        for (const uint8_t*& at : base)
            at += bytes;
    }
    INLINE const uint8_t* at(int m, uint64_t offset) const { return base[m / 3] + uint64_t(m % 3) * stride + offset; }
};

// ------------------------------------------------------------------------------------------------- sums of a chunk

// What a chunk consists of, for a kind of weights and of activations.
template <Kind kind, Input input>
struct Part {
    static constexpr uint64_t slice_k = kind == Kind::bf16 ? 2 : 4;
    // u8, s8 and bf16: 4 bytes, one broadcast, whose parts the dot product sums inside a lane. f32: a broadcast for each input.
    static constexpr uint64_t x_slice = input == Input::f32 ? 4 * slice_k : 4;  // bytes of a row of x that meet a slice
    static constexpr uint64_t x_tile = panel_slices * x_slice;                  // and a k tile
    const BlobView& w;
    uint64_t block, begin, end;  // tiles
    uint64_t tiles_per_segment, segments;
    const uint8_t* x;  // row 0
    const float* x_scales;
    uint64_t stride;

    INLINE Part(const BlobView& w, const Activations& a, uint64_t block, uint64_t chunk, uint64_t row)
        : w(w),
          block(block),
          begin(chunk * w.tiles_per_chunk),
          end(begin + w.tiles_per_chunk < w.tiles ? begin + w.tiles_per_chunk : w.tiles),
          tiles_per_segment(kind == Kind::bf16 ? w.tiles_per_chunk : w.segment / (panel_slices * slice_k)),
          segments(kind == Kind::bf16 ? 0 : w.k_pad / w.segment),
          x(static_cast<const uint8_t*>(a.data) + row * a.stride),
          x_scales(integers<input> ? a.scales + row * segments : nullptr),
          stride(a.stride) {}

    // Calls of `add`, below, for all panels.
    INLINE uint64_t parts() const { return (end - begin + tiles_per_segment - 1) / tiles_per_segment; }

    // Adds the products of this chunk to out[M][block_n], for `panels` panels from `first` on. add(begin, end, sums) sums those of some
    // tiles.
    //
    // The order is that of format.md, whatever the number of rows and panels: the chunk's total starts at 0, takes the segments in
    // ascending order, and only then joins out. Adding segments to out directly would give other bits when chunks are spread over threads.
    // u8, s8: the offset leaves while sums are integers. What remains is at most 128 * 127 * 128 < 2^21, so its conversion to f32 is exact; the
    // product of the scales is rounded, then one fused multiply-add.
    template <int M, int panels, class Add>
    INLINE void multiply(int first, float* out, const Add& add) const {
        using R = typename Register<input>::type;
        __m512 totals[panels][M];
        for (int p = 0; p < panels; p++)
            for (int m = 0; m < M; m++)
                totals[p][m] = _mm512_setzero_ps();
        for (uint64_t tile = begin, segment_end; tile < end; tile = segment_end) {
            const uint64_t segment = tile / tiles_per_segment;
            segment_end = tile + tiles_per_segment < end ? tile + tiles_per_segment : end;
            R sums[panels][M][lanes<input>];
            add(tile, segment_end, sums);
            for (int p = 0; p < panels; p++)
                if constexpr (kind == Kind::bf16) {
                    for (int m = 0; m < M; m++)
                        totals[p][m] = _mm512_add_ps(sums[p][m][0], sums[p][m][1]);  // a chunk is one segment
                } else if constexpr (integers<input>) {
                    const __m512 scale = scales_of(w, block, segment, first + p);
                    __m512i offset;
                    if constexpr (input == Input::u8)
                        offset = offset_of(w, block, segment, first + p);
                    for (int m = 0; m < M; m++) {
                        if constexpr (input == Input::s8)
                            offset = _mm512_set1_epi32(load<int32_t>(x + uint64_t(m) * stride + w.k_pad + 4 * segment));
                        totals[p][m] =
                            _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[p][m][0], offset)),
                                            _mm512_mul_ps(_mm512_set1_ps(x_scales[uint64_t(m) * segments + segment]), scale), totals[p][m]);
                    }
                } else {
                    const __m512 scale = scales_of(w, block, segment, first + p);
                    for (int m = 0; m < M; m++)
                        totals[p][m] = _mm512_fmadd_ps(_mm512_add_ps(sums[p][m][0], sums[p][m][1]), scale, totals[p][m]);
                }
        }
        for (int m = 0; m < M; m++)
            for (int p = 0; p < panels; p++) {
                float* at = out + m * int(block_n) + (first + p) * panel_n;
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), totals[p][m]));
            }
    }
};

// ------------------------------------------------------------------------------------------------- more rows of x

// sums[2][M][2] of some tiles with f32 activations: two panels, even and odd inputs. Per chain the inputs come in ascending order, as in
// add_panel. An activation is broadcast once for two panels, a weight converted once for M rows.
template <Kind kind, int M>
INLINE void sum_floats(const uint8_t* slices, const uint8_t* x_rows, uint64_t stride, uint64_t tiles, __m512 (&sums)[2][M][2]) {
    constexpr int slice_k = kind == Kind::bf16 ? 2 : 4;
    __m512 sum[2][M][2] = {};
    for (; tiles; tiles--, slices += k_tile_bytes, x_rows += panel_slices * 4 * slice_k) {
        Rows<M> x(x_rows, stride);
#pragma GCC unroll 4
        for (int s = 0; s < panel_slices; s++, x.advance(4 * slice_k))
            each<slice_k>([&](auto j) INLINED {
                __m512 weights[2];
                each<2>([&](auto p)
                            INLINED { weights[p] = as_float<kind>(_mm512_load_si512(slices + p * panel_bytes + s * slice_bytes), j); });
                each<M>([&](auto m) INLINED {
                    const __m512 activation = _mm512_castsi512_ps(broadcast(x.at(m, 4 * uint64_t(j))));
                    each<2>([&](auto p) INLINED { sum[p][m][j % 2] = _mm512_fmadd_ps(activation, weights[p], sum[p][m][j % 2]); });
                });
            });
    }
    std::memcpy(sums, sum, sizeof(sum));
}

}  // namespace
}  // namespace ov_ext::sparse_matmul
