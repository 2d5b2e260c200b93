// AVX2 with FMA and F16C (Haswell, Zen and later); compiled a second time with AVX-VNNI (Alder Lake, Sierra Forest, Zen 5 and later).
//
// One slice of the format is two registers, 8 outputs each. A few rows of x are multiplied straight from the decoded registers; for more, a
// segment or a chunk is decoded to memory once. Sums are kept in one order for any number of rows, so a row's bits do not depend on its
// company. This file has the products of integers; avx2_floats.hpp those of floats.
#include <immintrin.h>

#include "../support/avx2_activations.hpp"
#include "avx2_floats.hpp"
#include "avx2_stream.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// Rows of x for which there are accumulators (two registers a row) beside the operands of the dot product, in 16 registers. The two halves
// of a slice and the activations take 3, the product of narrow one more. signs needs |w| too (2), activations with the sign of w, and ones.
constexpr uint64_t widest_of(Dot dot) { return dot == Dot::signs ? 4 : 6; }

// ------------------------------------------------------------------------------------------------- products

// Slices that were decoded to memory. They offer what a Stream offers, so that one multiply_tiles serves both; masks are gone, and what was
// written a moment ago needs no prefetch.
template <Kind kind>
struct Decoded {
    const uint8_t* at;

    template <int>
    INLINE Slice next(const Lookups<kind>&, int) {
        const Slice slice = {{load256(at), load256(at + 32)}};
        at += slice_bytes;
        return slice;
    }
    INLINE void look_up(Lookups<kind>&) const {}
    INLINE void prefetch() const {}
};

// Decodes `tiles` k tiles to memory, in the order of the stream. Slices go in pairs because the parity, which chooses the cursor of int4,
// is a template argument.
template <Kind kind, bool dense, Dot dot>
void decode(Stream<kind, dense, dot>& source, uint64_t tiles, uint8_t* to) {
    const auto put = [&](const Slice& slice) INLINED {
        for (int half = 0; half < 2; half++)
            _mm256_store_si256(reinterpret_cast<__m256i*>(to) + half, slice.half[half]);
        to += slice_bytes;
    };
    Stream<kind, dense, dot> slices = source;  // a copy, whose cursors compilers keep in registers
    for (uint64_t i = 0; i < block_panels * tiles; i++) {
        Lookups<kind> panel;
        slices.look_up(panel);
        for (int s = 0; s < panel_slices; s += 2) {
            if (s % 4 == 0)
                slices.prefetch();
            put(slices.template next<0>(panel, s));
            put(slices.template next<1>(panel, s + 1));
        }
    }
    source = slices;
}

INLINE __m256i load_sum(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// Adds the products of one decoded slice with M rows of x, `stride` bytes apart. What a 32-bit lane receives, with the activations a and
// the weights w of its output:
//
//     vnni      a0 w0 + a1 w1 + a2 w2 + a3 w3
//     signs     pairs = {|w0| (a0 sgn w0) + |w1| (a1 sgn w1), the same of 2 and 3}; pairs have no room for more and are added up at once
//     narrow    {a0 w0 + a1 w1, a2 w2 + a3 w3} to two 16-bit sums, which have room for 8 slices
template <Dot dot, int M>
INLINE void add_slice(const Slice& slice, const uint8_t* x, uint64_t stride, __m256i (&sum)[M][2]) {
    __m256i magnitude[2];
    if constexpr (dot == Dot::signs)
        for (int half = 0; half < 2; half++)
            magnitude[half] = _mm256_abs_epi8(slice.half[half]);
    for (int m = 0; m < M; m++) {
        const __m256i activations = _mm256_set1_epi32(load<int32_t>(x + uint64_t(m) * stride));
        for (int half = 0; half < 2; half++) {
            const __m256i w = slice.half[half];
#if defined(__AVXVNNI__)
            sum[m][half] = _mm256_dpbusd_avx_epi32(sum[m][half], activations, w);
#else
            if constexpr (dot == Dot::narrow) {
                sum[m][half] = _mm256_add_epi16(sum[m][half], _mm256_maddubs_epi16(w, activations));
            } else {
                const __m256i pairs = _mm256_maddubs_epi16(magnitude[half], _mm256_sign_epi8(activations, w));
                sum[m][half] = _mm256_add_epi32(sum[m][half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
#endif
            // Compilers like to add the products of several rows first, or to load ahead, and then run out of registers.
            __asm__("" : "+x"(sum[m][half]));
        }
    }
}

// Adds the products of `tiles` k tiles with M rows of x to sums[M][block_n]. Not inlined: its loop needs all registers. The sums of one
// panel fill them, and the stream changes the panel after 16 slices, so sums go to memory and back once for 16 slices.
//
//     for each k tile, for each of its 4 panels:
//         sum = sums of the panel, in registers
//         for each slice: decode it; for each row m: sum[m] += dot(slice, 4 bytes of row m)
//         sums of the panel = sum
template <Dot dot, int M, Kind kind, class Source>
__attribute__((noinline)) void multiply_tiles(Source& source, uint64_t tiles, const uint8_t* x, uint64_t stride, int32_t* sums) {
    constexpr uint64_t x_slice = 4;                   // bytes of a row of x that meet one slice
    constexpr int run = dot == Dot::narrow ? 8 : 16;  // slices until the registers must be emptied
    Source slices = source;
    Lookups<kind> looked_up;
    for (uint64_t tile = 0; tile < tiles; tile++, x += panel_slices * x_slice)
        for (int panel = 0; panel < block_panels; panel++) {
            slices.look_up(looked_up);
            for (int s = 0; s < panel_slices; s += run) {
                int32_t* at = sums + panel_n * panel;
                __m256i sum[M][2];
                for (int m = 0; m < M; m++)
                    for (int half = 0; half < 2; half++)
                        sum[m][half] = dot == Dot::narrow ? __m256i{} : load_sum(at + int(block_n) * m + 8 * half);
                for (int i = s; i < s + run; i += 4) {
                    const uint8_t* x_at = x + uint64_t(i) * x_slice;
                    slices.prefetch();
                    add_slice<dot>(slices.template next<0>(looked_up, i), x_at, stride, sum);
                    add_slice<dot>(slices.template next<1>(looked_up, i + 1), x_at + x_slice, stride, sum);
                    add_slice<dot>(slices.template next<0>(looked_up, i + 2), x_at + 2 * x_slice, stride, sum);
                    add_slice<dot>(slices.template next<1>(looked_up, i + 3), x_at + 3 * x_slice, stride, sum);
                }
                for (int m = 0; m < M; m++)
                    for (int half = 0; half < 2; half++) {
                        int32_t* to = at + int(block_n) * m + 8 * half;
                        if constexpr (dot == Dot::narrow)
                            sum[m][half] = _mm256_add_epi32(load_sum(to), _mm256_madd_epi16(sum[m][half], _mm256_set1_epi16(1)));
                        _mm256_store_si256(reinterpret_cast<__m256i*>(to), sum[m][half]);
                    }
            }
        }
    source = slices;
}

template <Dot dot, Kind kind, class Source>
void multiply_tiles(uint64_t rows, Source& source, uint64_t tiles, const uint8_t* x, uint64_t stride, int32_t* sums) {
    static_assert(widest_of(dot) <= 6, "a case for every number of rows");
    switch (rows) {
        case 1: return multiply_tiles<dot, 1, kind>(source, tiles, x, stride, sums);
        case 2: return multiply_tiles<dot, 2, kind>(source, tiles, x, stride, sums);
        case 3: return multiply_tiles<dot, 3, kind>(source, tiles, x, stride, sums);
        case 4: return multiply_tiles<dot, 4, kind>(source, tiles, x, stride, sums);
        default: break;
    }
    if constexpr (widest_of(dot) > 4) {
        if (rows == 5)
            multiply_tiles<dot, 5, kind>(source, tiles, x, stride, sums);
        else
            multiply_tiles<dot, 6, kind>(source, tiles, x, stride, sums);
    }
}

// ------------------------------------------------------------------------------------------------- one block

// Behind the codes of a row of x stands what the offset of narrow weights adds to the sum of each segment: i32[segments]. The offset of
// activations adds 128 times the sum of the weights, which a blob has.
constexpr int weight_offset(Dot dot) { return dot == Dot::narrow ? 8 : 0; }

// Scales the sums of one segment, partial[rows][block_n], and adds them to those of the chunk. x: the first row; x_scales: of it and this
// segment.
//
// The operations and their order are those of format.md, or kernels would differ in their bits: the product of the two scales is rounded,
// then one fused multiply-add. A sum without its offset is at most 128 * 127 * 128 < 2^21, so its conversion to float is exact.
template <Kind kind, Dot dot>
void add_segment(const BlobView& w, uint64_t block, uint64_t segment, const int32_t* partial, const uint8_t* x, uint64_t stride,
                 const float* x_scales, uint64_t rows, float* sums) {
    const uint64_t segments = w.k_pad / w.segment;
    for (int i = 0; i < int(block_n) / 8; i++) {
        const __m256 scale = scales_of(w, block, segment, i);
        __m256i offset = _mm256_setzero_si256();
        if (dot == Dot::vnni)
            offset = _mm256_slli_epi32(
                _mm256_cvtepi16_epi32(load128(w.compensation + 2 * ((block * segments + segment) * block_n + 8 * uint64_t(i)))), 7);
        for (uint64_t m = 0; m < rows; m++) {
            const uint64_t at = block_n * m + 8 * uint64_t(i);
            if (weight_offset(dot))
                offset = _mm256_set1_epi32(load<int32_t>(x + m * stride + w.k_pad + 4 * segment));
            const __m256i sum = _mm256_sub_epi32(_mm256_srai_epi32(load_sum(partial + at), extra_bits(kind, dot)), offset);
            const __m256 factor = _mm256_mul_ps(_mm256_set1_ps(x_scales[m * segments]), scale);
            _mm256_store_ps(sums + at, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, _mm256_load_ps(sums + at)));
        }
    }
}

// Sums climb three steps, and each begins at 0:
//
//     segment: partial, int32                           scaled and added to the chunk
//     chunk of 512 inputs: sums, f32                    added to out
//     all chunks of this call: out                      chunks of several calls are added by the caller, in the same order
template <Kind kind, bool dense>
void multiply_integers(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                       float* out) {
    constexpr Dot dot = dot_of(kind, true);
    constexpr uint64_t widest = widest_of(dot), most_tiles = 2;  // of a segment
    const bool direct = rows <= widest;
    const uint64_t segments = w.k_pad / w.segment;
    const float* x_scales = a.scales + row * segments;
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    alignas(64) uint8_t decoded[most_tiles * k_tile_bytes];  // 8 KiB, read again for every few rows of x
    alignas(64) float sums[max_rows * block_n];              // of one chunk: 256 bytes a row
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Stream<kind, dense, dot> stream(w, block, chunk);
        const Part<kind> part(w, chunk);
        __builtin_memset(sums, 0, rows * block_n * sizeof(float));
        for (uint64_t tile = part.begin, tiles; tile < part.end; tile += tiles) {
            tiles = part.tiles_from(tile);
            if (!direct)
                decode(stream, tiles, decoded);
            for (uint64_t m = 0, some; m < rows; m += some) {
                some = equal_share(rows - m, widest);
                const uint8_t* x_at = x + m * a.stride;
                alignas(64) int32_t partial[widest * block_n] = {};
                if (direct) {
                    multiply_tiles<dot, kind>(some, stream, tiles, x_at + tile * tile_inputs(kind), a.stride, partial);
                } else {
                    Decoded<kind> source{decoded};
                    multiply_tiles<dot, kind>(some, source, tiles, x_at + tile * tile_inputs(kind), a.stride, partial);
                }
                const uint64_t segment = tile / part.step;
                add_segment<kind, dot>(w, block, segment, partial, x_at, a.stride, x_scales + m * segments + segment, some,
                                       sums + block_n * m);
            }
        }
        for (uint64_t i = 0; i < rows * block_n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), _mm256_load_ps(sums + i)));
    }
}

using BlockFunction = void (*)(const BlobView&, const Activations&, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, float*);

template <Kind kind>
BlockFunction choose(bool dense, bool integer) {
    if constexpr (kind != Kind::bf16)
        if (integer)
            return dense ? multiply_integers<kind, true> : multiply_integers<kind, false>;
    return dense ? multiply_floats<kind, true> : multiply_floats<kind, false>;
}

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    const BlockFunction function = w.kind == Kind::bf16   ? choose<Kind::bf16>(w.dense, false)
                                   : w.kind == Kind::int8 ? choose<Kind::int8>(w.dense, a.integer)
                                                          : choose<Kind::int4>(w.dense, a.integer);
    __builtin_memset(out, 0, rows * block_n * sizeof(float));  // chunks are added to it
    function(w, a, block, first, last, row, rows, out);
}

// ------------------------------------------------------------------------------------------------- activations

// Eight times the sum of each segment's codes, behind them: what adding 8 to every weight adds to a sum.
void write_offsets(const RowShape& row, int offset, uint8_t* to) {
    for (uint64_t begin = 0; begin < row.k_pad; begin += row.segment) {
        __m256i sum = _mm256_setzero_si256();
        for (uint64_t i = begin; i < begin + row.segment; i += 16)
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(load128(to + i)), _mm256_set1_epi16(int16_t(offset))));
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        const int32_t total = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
        __builtin_memcpy(to + row.k_pad + 4 * (begin / row.segment), &total, sizeof(total));
    }
}

void prepare(const Activations& a, Kind weights, const void* x, bool x_is_bf16, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (!a.integer)
        return copy_as_f32(a.row, x, x_is_bf16, a.rounded, reinterpret_cast<float*>(to));
    const Dot dot = dot_of(weights, true);
    quantize(a.row, x, x_is_bf16, dot == Dot::vnni, to, a.scales + row * (a.row.k_pad / a.row.segment));
    if (weight_offset(dot))
        write_offsets(a.row, weight_offset(dot), to);
}

uint64_t row_bytes(const BlobView& w, int64_t activation_group) {
    if (!w.segment || activation_group == 0)
        return 4 * w.k_pad;
    return w.k_pad + (weight_offset(dot_of(w.kind, true)) ? 4 * (w.k_pad / w.segment) : 0);
}

}  // namespace

#if defined(__AVXVNNI__)
const Kernel avx2_vnni_kernel = {InstructionSet::avx2_vnni, max_rows, true, row_bytes, prepare, multiply};
#else
const Kernel avx2_kernel = {InstructionSet::avx2, max_rows, false, row_bytes, prepare, multiply};
#endif

}  // namespace ov_ext::sparse_matmul
