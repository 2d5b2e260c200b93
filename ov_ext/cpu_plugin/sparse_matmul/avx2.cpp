// AVX2 with FMA and F16C (Haswell, Zen and later); compiled a second time with AVX-VNNI (Alder Lake, Sierra Forest, Zen 5 and later).
//
// One slice of the format is two registers, 8 outputs each. Up to `widest` rows of x are multiplied straight from the decoded registers;
// for more, a segment is decoded once to memory that fits the first-level cache. Sums are kept in one order for any number of rows, so a
// row's bits do not depend on its company.
#include <immintrin.h>

#include "../support/avx2_activations.hpp"
#include "../support/avx2_expand.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// How a slice is multiplied. Every way is exact for integers: vpmaddubsw saturates a sum of two products at 16 bits, so it is only given
// products that fit. Weights may be -128, whose magnitude fits a u8; activations lie in -127..127, so a change of sign cannot overflow.
enum class Dot {
    f32,     // activations stay floating point
    vnni,    // u8 activations, offset by 128: vpdpbusd
    signs,   // int8 without VNNI: |w| times s8 activations that took over w's sign, at most 2 * 128 * 127
    narrow,  // int4 without VNNI: u8 activations, offset by 128; a sum of 16 products is at most 16 * 255 * 8 = 32640
};

constexpr Dot dot_of(Kind kind, bool integer) {
#if defined(__AVXVNNI__)
    return integer && kind != Kind::bf16 ? Dot::vnni : Dot::f32;
#else
    return !integer || kind == Kind::bf16 ? Dot::f32 : kind == Kind::int4 ? Dot::narrow : Dot::signs;
#endif
}

constexpr bool offset_by_128(Dot dot) { return dot == Dot::vnni || dot == Dot::narrow; }

// Cutting a nibble out is cheapest when it stays in the high half of its byte: 16 times the weight. Only narrow sums have no room. The
// others do: a segment's sum is at most 128 * 255 * 128 < 2^22. Its 4 low bits are 0, so the shift back at its end is exact.
constexpr int extra_bits(Kind kind, Dot dot) { return kind == Kind::int4 && dot != Dot::narrow ? 4 : 0; }

// Rows of x for which there are accumulators (two registers a row) beside the operands of the dot product, in 16 registers. The two halves
// of a slice and the activations take 3, the product of narrow one more. signs needs |w| too (2), activations with the sign of w, and ones.
constexpr int widest_of(Dot dot) { return dot == Dot::signs ? 4 : 6; }

// ------------------------------------------------------------------------------------------------- decoding slices

// One slice: outputs 0..7 and 8..15 of a panel, slice_k inputs each. A 32-bit lane is one output, so one broadcast of slice_k activations
// meets all lanes, and each lane sums the products of its own output:
//
//     half[0]       lane 0                lane 1                ...   lane 7
//     int8, int4    o0: k0 k1 k2 k3       o1: k0 k1 k2 k3             o7: k0 k1 k2 k3
//     bf16          o0: k0    k1          o1: k0    k1                o7: k0    k1
struct Slice {
    __m256i half[2];
};

// Input j of a slice as floats, one output a lane. A bf16 is the upper half of an f32. An integer goes to the top of its lane and comes
// back with its sign; extra_bits falls off on the way.
template <Kind kind, Dot dot>
INLINE __m256 weights(__m256i half, int j) {
    if (kind == Kind::bf16)
        return floats(j ? _mm256_and_si256(half, _mm256_set1_epi32(int(0xFFFF0000))) : _mm256_slli_epi32(half, 16));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(half, 24 - 8 * j), 24 + extra_bits(kind, dot)));
}

// Walks the masks and values of a chunk.
template <Kind kind, bool dense, Dot dot>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even slices
    const uint8_t* odd;     // int4: cursor of the odd slices

    static constexpr int mask_bytes = kind == Kind::bf16 ? 4 : 8;  // of a slice

    // For the next panel. Its 16 masks are 64 or 128 bytes in a row: whole registers, and nothing is read behind them.
    INLINE void look_up(uint16_t* offsets) const {
        if (!dense)
            ov_ext::look_up<panel_slices * mask_bytes>(masks, offsets);
    }

    // offsets: of this slice. The cursor moves by the number of mask bits; validation has proven that it stays inside the run. Loads may go
    // on behind the run: the next one follows, or the 64 zero bytes at the end of the blob.
    template <int parity>
    INLINE Slice next(const uint16_t* offsets) {
        const uint8_t*& at = kind == Kind::int4 && parity ? odd : values;
        Slice slice;
        if constexpr (dense) {
            slice = {{extended<parity>(load256(at)), extended<parity>(load256(at + 32))}};
            at += slice_bytes;
        } else if constexpr (kind == Kind::bf16) {
            const uint32_t mask = load<uint32_t>(masks);
            masks += mask_bytes;
            expand_words(at, mask, offsets, slice.half);
            at += 2 * __builtin_popcount(mask);
        } else {
            const uint64_t mask = load<uint64_t>(masks);
            masks += mask_bytes;
            expand_bytes(at, mask, offsets, [](__m256i packed) INLINED { return extended<parity>(packed); }, slice.half);
            at += __builtin_popcountll(mask);
        }
        return slice;
    }

    // The weights in packed values: int4 are cut out of their bytes. This comes before the expansion, so that lanes without a value become
    // a true zero. AVX2 shifts words, not bytes: the bits that cross into a neighbour are masked away.
    //
    //     byte of the run          H H H H L L L L      H: code of an odd slice, L: of an even one
    //     odd                      H H H H 0 0 0 0      16 times the weight, with its sign
    //     even                     L L L L 0 0 0 0
    //     narrow, L for example    L3 L3 L3 L3 L3 L2 L1 L0    the weight; a table extends the sign
    template <int parity>
    static INLINE __m256i extended(__m256i packed) {
        if constexpr (kind != Kind::int4)
            return packed;
        if constexpr (extra_bits(kind, dot) != 0)
            return _mm256_and_si256(parity ? packed : _mm256_slli_epi16(packed, 4), _mm256_set1_epi8(int8_t(0xF0)));
        const __m256i by_code = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,  //
                                                 0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        return _mm256_shuffle_epi8(by_code, _mm256_and_si256(parity ? _mm256_srli_epi16(packed, 4) : packed, _mm256_set1_epi8(15)));
    }

    static INLINE __m256 weight(const Slice& slice, int half, int j) { return weights<kind, dot>(slice.half[half], j); }

    // Called every four slices, which consume four cache lines of values, half of that at half density or as int4. Hardware prefetching
    // stops at every page. A prefetch never faults, so it may point behind the blob.
    INLINE void prefetch() const {
        constexpr int values_ahead = 2048, masks_ahead = 1024, line_bytes = 64;
        for (int line = 0; line < (dense ? 4 : 2) / (kind == Kind::int4 ? 2 : 1); line++)
            _mm_prefetch(reinterpret_cast<const char*>(values) + values_ahead + line_bytes * line, _MM_HINT_T0);
        if (!dense)
            _mm_prefetch(reinterpret_cast<const char*>(masks) + masks_ahead, _MM_HINT_T0);
    }
};

// Slices that expand() has decoded: bytes as they come out of a Stream, or all inputs as floats. They offer what a Stream offers, so that
// one multiply_tiles serves all; masks are gone, and what was written a moment ago needs no prefetch.
struct ExpandedBytes {
    const uint8_t* at;

    template <int>
    INLINE Slice next(const uint16_t*) {
        const Slice slice = {{load256(at), load256(at + 32)}};
        at += slice_bytes;
        return slice;
    }
    static constexpr int mask_bytes = 0;
    INLINE void look_up(uint16_t*) const {}
    INLINE void prefetch() const {}
};

// A slice is [slice_k][panel_n] floats: 4 bytes for every weight, but the conversion is paid once for all rows of x.
template <int slice_k>
struct ExpandedFloats {
    const uint8_t* at;

    template <int>
    INLINE const uint8_t* next(const uint16_t*) {
        const uint8_t* slice = at;
        at += 4 * panel_n * slice_k;
        return slice;
    }
    static INLINE __m256 weight(const uint8_t* slice, int half, int j) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(slice) + panel_n * j + 8 * half);
    }
    static constexpr int mask_bytes = 0;
    INLINE void look_up(uint16_t*) const {}
    INLINE void prefetch() const {}
};

template <Dot dot, int slice_k>
struct ExpandedSlices {
    using type = ExpandedBytes;
};
template <int slice_k>
struct ExpandedSlices<Dot::f32, slice_k> {
    using type = ExpandedFloats<slice_k>;
};

// Decodes `tiles` k tiles to memory, in the order of the stream. Slices go in pairs because the parity, which chooses the cursor of int4,
// is a template argument.
template <Kind kind, bool dense, Dot dot>
void expand(Stream<kind, dense, dot>& source, uint64_t tiles, uint8_t* to) {
    using Slices = Stream<kind, dense, dot>;
    constexpr int slice_k = kind == Kind::bf16 ? 2 : 4;
    const auto put = [&](const Slice& slice) INLINED {
        if constexpr (dot == Dot::f32) {
            for (int j = 0; j < slice_k; j++)
                for (int half = 0; half < 2; half++)
                    _mm256_store_ps(reinterpret_cast<float*>(to) + panel_n * j + 8 * half, Slices::weight(slice, half, j));
            to += 4 * panel_n * slice_k;
        } else {
            for (int half = 0; half < 2; half++)
                _mm256_store_si256(reinterpret_cast<__m256i*>(to) + half, slice.half[half]);
            to += slice_bytes;
        }
    };
    Slices slices = source;  // a copy, whose cursors compilers keep in registers
    alignas(32) uint16_t offsets[panel_slices * Slices::mask_bytes];
    for (uint64_t panel = 0; panel < block_panels * tiles; panel++) {
        slices.look_up(offsets);
        for (int s = 0; s < panel_slices; s += 2) {
            if (s % 4 == 0)
                slices.prefetch();
            put(slices.template next<0>(offsets + s * Slices::mask_bytes));
            put(slices.template next<1>(offsets + (s + 1) * Slices::mask_bytes));
        }
    }
    source = slices;
}

// ------------------------------------------------------------------------------------------------- products

template <Dot dot>
struct Sum {
    using Scalar = int32_t;
    using Register = __m256i;
    static INLINE Register load(const Scalar* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static INLINE void store(Scalar* p, Register v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
};
template <>
struct Sum<Dot::f32> {
    using Scalar = float;
    using Register = __m256;
    static INLINE Register load(const Scalar* p) { return _mm256_load_ps(p); }
    static INLINE void store(Scalar* p, Register v) { _mm256_store_ps(p, v); }
};

// Adds the products of one decoded slice with M rows of x, `stride` bytes apart. What a 32-bit lane receives, with the activations a and
// the weights w of its output:
//
//     f32       for each input j, in ascending order: sum = fma(a[j], w[j], sum)
//     vnni      a0 w0 + a1 w1 + a2 w2 + a3 w3
//     signs     pairs = {|w0| (a0 sgn w0) + |w1| (a1 sgn w1), the same of 2 and 3}; pairs have no room for more and are added up at once
//     narrow    {a0 w0 + a1 w1, a2 w2 + a3 w3} to two 16-bit sums, which have room for 8 slices
//
// f32 keeps one chain of additions for each output. A second chain would be another order of additions: other bits.
template <Dot dot, int slice_k, class Source, class AnySlice, int M>
INLINE void add_slice(const AnySlice& slice, const uint8_t* x, uint64_t stride, typename Sum<dot>::Register (&sum)[M][2]) {
    if constexpr (dot == Dot::f32) {
        for (int j = 0; j < slice_k; j++) {
            const __m256 w[2] = {Source::weight(slice, 0, j), Source::weight(slice, 1, j)};
            for (int m = 0; m < M; m++) {
                const __m256 activation = _mm256_set1_ps(load<float>(x + uint64_t(m) * stride + 4 * j));
                for (int half = 0; half < 2; half++)
                    sum[m][half] = _mm256_fmadd_ps(activation, w[half], sum[m][half]);
            }
        }
    } else {
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
                    sum[m][half] = _mm256_add_epi16(sum[m][half], _mm256_maddubs_epi16(activations, w));
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
}

// Adds the products of `tiles` k tiles with M rows of x to sums[M][block_n]. Not inlined: its loop needs all registers. The sums of one
// panel fill them, and the stream changes the panel after 16 slices, so sums go to memory and back once for 16 slices.
//
//     for each k tile, for each of its 4 panels:
//         sum = sums of the panel, in registers
//         for each slice: decode it; for each row m: sum[m] += dot(slice, 4 bytes (f32: slice_k floats) of row m)
//         sums of the panel = sum
template <Dot dot, int slice_k, int M, class Source>
__attribute__((noinline)) void multiply_tiles(Source& source, uint64_t tiles, const uint8_t* x, uint64_t stride,
                                              typename Sum<dot>::Scalar* sums) {
    using S = Sum<dot>;
    constexpr uint64_t x_slice = slice_k * (dot == Dot::f32 ? 4 : 1);  // bytes of a row of x that meet one slice
    constexpr int run = dot == Dot::narrow ? 8 : 16;                   // slices until the registers must be emptied
    Source slices = source;
    alignas(32) uint16_t offsets[panel_slices * Source::mask_bytes + 1];  // + 1: decoded slices have no masks, an array has elements
    for (uint64_t tile = 0; tile < tiles; tile++, x += panel_slices * x_slice)
        for (int panel = 0; panel < block_panels; panel++) {
            slices.look_up(offsets);
            for (int s = 0; s < panel_slices; s += run) {
                typename S::Scalar* at = sums + panel_n * panel;
                typename S::Register sum[M][2];
                for (int m = 0; m < M; m++)
                    for (int half = 0; half < 2; half++)
                        sum[m][half] = dot == Dot::narrow ? typename S::Register{} : S::load(at + block_n * m + 8 * half);
                for (int i = s; i < s + run; i += 4) {
                    const uint8_t* x_at = x + uint64_t(i) * x_slice;
                    const uint16_t* of = offsets + i * Source::mask_bytes;
                    slices.prefetch();
                    add_slice<dot, slice_k, Source>(slices.template next<0>(of), x_at, stride, sum);
                    add_slice<dot, slice_k, Source>(slices.template next<1>(of + Source::mask_bytes), x_at + x_slice, stride, sum);
                    add_slice<dot, slice_k, Source>(slices.template next<0>(of + 2 * Source::mask_bytes), x_at + 2 * x_slice, stride, sum);
                    add_slice<dot, slice_k, Source>(slices.template next<1>(of + 3 * Source::mask_bytes), x_at + 3 * x_slice, stride, sum);
                }
                for (int m = 0; m < M; m++)
                    for (int half = 0; half < 2; half++) {
                        if constexpr (dot == Dot::narrow)
                            sum[m][half] = _mm256_add_epi32(S::load(at + block_n * m + 8 * half),
                                                            _mm256_madd_epi16(sum[m][half], _mm256_set1_epi16(1)));
                        S::store(at + block_n * m + 8 * half, sum[m][half]);
                    }
            }
        }
    source = slices;
}

template <Dot dot, int slice_k, class Source>
void multiply_tiles(uint64_t rows, Source& source, uint64_t tiles, const uint8_t* x, uint64_t stride, typename Sum<dot>::Scalar* sums) {
    static_assert(widest_of(dot) <= 6, "a case for every number of rows");
    switch (rows) {
        case 1: return multiply_tiles<dot, slice_k, 1>(source, tiles, x, stride, sums);
        case 2: return multiply_tiles<dot, slice_k, 2>(source, tiles, x, stride, sums);
        case 3: return multiply_tiles<dot, slice_k, 3>(source, tiles, x, stride, sums);
        case 4: return multiply_tiles<dot, slice_k, 4>(source, tiles, x, stride, sums);
        default: break;
    }
    if constexpr (widest_of(dot) > 4) {
        if (rows == 5)
            multiply_tiles<dot, slice_k, 5>(source, tiles, x, stride, sums);
        else
            multiply_tiles<dot, slice_k, 6>(source, tiles, x, stride, sums);
    }
}

// ------------------------------------------------------------------------------------------------- one block

INLINE __m256 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int eight) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * block_n + uint64_t(eight) * 8;
    return w.scales_f32 ? _mm256_loadu_ps(reinterpret_cast<const float*>(w.scales + 4 * i)) : _mm256_cvtph_ps(load128(w.scales + 2 * i));
}

// Scales the sums of one segment, partial[rows][block_n], and adds them to those of the chunk. x_scales: of the first row and this segment.
//
// The operations and their order are those of format.md, or kernels would differ in their bits: the product of the two scales is rounded,
// then one fused multiply-add. A sum without its offset is at most 128 * 127 * 128 < 2^21, so its conversion to float is exact.
template <Kind kind, Dot dot>
void add_segment(const BlobView& w, uint64_t block, uint64_t segment, const typename Sum<dot>::Scalar* partial, const float* x_scales,
                 uint64_t rows, float* sums) {
    const uint64_t segments = w.k_pad / w.segment;
    for (int i = 0; i < int(block_n) / 8; i++) {
        const __m256 scale = scales_of(w, block, segment, i);
        const uint8_t* comp = w.compensation + 2 * ((block * segments + segment) * block_n + 8 * uint64_t(i));
        const __m256i offset = _mm256_slli_epi32(_mm256_cvtepi16_epi32(load128(comp)), 7);
        for (uint64_t m = 0; m < rows; m++) {
            const uint64_t at = block_n * m + 8 * uint64_t(i);
            __m256 value, factor = scale;
            if constexpr (dot == Dot::f32) {
                value = Sum<dot>::load(partial + at);
            } else {
                __m256i sum = _mm256_srai_epi32(Sum<dot>::load(partial + at), extra_bits(kind, dot));
                if (offset_by_128(dot))
                    sum = _mm256_sub_epi32(sum, offset);
                value = _mm256_cvtepi32_ps(sum);
                factor = _mm256_mul_ps(_mm256_set1_ps(x_scales[m * segments]), scale);
            }
            _mm256_store_ps(sums + at, _mm256_fmadd_ps(value, factor, _mm256_load_ps(sums + at)));
        }
    }
}

// Rows that share one expansion. The sums of a chunk lie on the stack, 256 bytes for each row.
constexpr uint64_t max_rows = 64;

// One block of 64 outputs: see Kernel::multiply. Sums climb three steps, and each begins at 0:
//
//     segment (int8, int4): partial, int32 or f32       scaled and added to the chunk
//     chunk of 512 inputs: sums, f32                    added to out
//     all chunks of this call: out                      chunks of several calls are added by the caller, in the same order

template <Kind kind, bool dense, bool integer>
void multiply_block(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                    float* out) {
    constexpr Dot dot = dot_of(kind, integer);
    constexpr uint64_t slice_k = kind == Kind::bf16 ? 2 : 4, mask_bytes = 2 * slice_k, tiles_per_chunk = chunk_k / (panel_slices * slice_k);
    constexpr uint64_t widest = widest_of(dot), most_tiles = kind == Kind::bf16 ? 1 : 2;
    using Scalar = typename Sum<dot>::Scalar;
    using Expanded = typename ExpandedSlices<dot, slice_k>::type;
    const bool direct = rows <= widest;
    // Tiles that are multiplied at a time: a segment, whose sums are scaled then. bf16 has none, and its sums continue across steps: a step
    // is the whole chunk, or, if it is decoded to memory first, one tile. It does not change the order of additions.
    const uint64_t step = kind != Kind::bf16 ? w.segment / (panel_slices * slice_k) : direct ? tiles_per_chunk : most_tiles;
    const uint64_t segments = kind == Kind::bf16 ? 0 : w.k_pad / w.segment;
    const float* x_scales = integer ? a.scales + row * segments : nullptr;
    // 8 KiB, or 32 KiB for int8 and int4 as floats. Read again for every few rows of x, so it must not outgrow the level-1 cache.
    alignas(64) uint8_t expanded[most_tiles * k_tile_bytes * (dot == Dot::f32 ? slice_k : 1)];
    alignas(64) float sums[max_rows * block_n];  // of one chunk

    __builtin_memset(out, 0, rows * block_n * sizeof(float));
    for (uint64_t chunk = first; chunk < last; chunk++) {
        const uint64_t begin = chunk * tiles_per_chunk, end = begin + tiles_per_chunk < w.tiles ? begin + tiles_per_chunk : w.tiles;
        const uint8_t* run = w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk));
        Stream<kind, dense, dot> stream{dense ? nullptr : w.masks + (block * w.tiles + begin) * block_panels * panel_slices * mask_bytes,
                                        run, run};
        __builtin_memset(sums, 0, rows * block_n * sizeof(float));
        for (uint64_t tile = begin; tile < end; tile += step) {
            const uint64_t tiles = tile + step < end ? step : end - tile;
            if (!direct)
                expand(stream, tiles, expanded);
            for (uint64_t m = 0, some; m < rows; m += some) {
                // Equal passes: 7 rows go as 4 and 3, not as 6 and 1, whose last row would load every slice for itself.
                const uint64_t left = rows - m, passes = (left + widest - 1) / widest;
                some = (left + passes - 1) / passes;
                const uint8_t* x =
                    static_cast<const uint8_t*>(a.data) + (row + m) * a.stride + tile * panel_slices * slice_k * (integer ? 1 : 4);
                const auto multiply = [&](Scalar* to) {
                    if (direct)
                        return multiply_tiles<dot, slice_k>(some, stream, tiles, x, a.stride, to);
                    Expanded source{expanded};
                    multiply_tiles<dot, slice_k>(some, source, tiles, x, a.stride, to);
                };
                if constexpr (kind == Kind::bf16) {
                    multiply(sums + block_n * m);
                } else {
                    alignas(64) Scalar partial[widest * block_n] = {};
                    multiply(partial);
                    const uint64_t segment = tile / step;
                    add_segment<kind, dot>(w, block, segment, partial, x_scales + m * segments + segment, some, sums + block_n * m);
                }
            }
        }
        for (uint64_t i = 0; i < rows * block_n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), _mm256_load_ps(sums + i)));
    }
}

using BlockFunction = void (*)(const BlobView&, const Activations&, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, float*);

template <Kind kind, bool integer>
BlockFunction choose(bool dense) {
    return dense ? multiply_block<kind, true, integer> : multiply_block<kind, false, integer>;
}

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    BlockFunction function;
    if (w.kind == Kind::bf16)
        function = choose<Kind::bf16, false>(w.dense);
    else if (w.kind == Kind::int8)
        function = a.integer ? choose<Kind::int8, true>(w.dense) : choose<Kind::int8, false>(w.dense);
    else
        function = a.integer ? choose<Kind::int4, true>(w.dense) : choose<Kind::int4, false>(w.dense);
    function(w, a, block, first, last, row, rows, out);
}

// ------------------------------------------------------------------------------------------------- activations

void prepare(const Activations& a, Kind weights, const void* x, bool x_is_bf16, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (a.integer)
        quantize(a.row, x, x_is_bf16, offset_by_128(dot_of(weights, true)), to, a.scales + row * (a.row.k_pad / a.row.segment));
    else
        copy_as_f32(a.row, x, x_is_bf16, a.rounded, reinterpret_cast<float*>(to));
}

uint64_t row_bytes(const BlobView& w, int64_t activation_group) { return (w.segment && activation_group != 0 ? 1 : 4) * w.k_pad; }

}  // namespace

#if defined(__AVXVNNI__)
const Kernel avx2_vnni_kernel = {InstructionSet::avx2_vnni, max_rows, row_bytes, prepare, multiply};
#else
const Kernel avx2_kernel = {InstructionSet::avx2, max_rows, row_bytes, prepare, multiply};
#endif

}  // namespace ov_ext::sparse_matmul
