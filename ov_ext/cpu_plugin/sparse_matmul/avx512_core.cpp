// AVX-512 F, BW, DQ and VL (Skylake-SP and later): no expansion of bytes or words, no nibble matrices, no dot product. Compiled a second time
// with VNNI, which brings the dot product (Cascade Lake).
//
// Integer activations are s8, and weights get an offset that makes them u8: 8 for int4, which takes one instruction together with cutting
// out the nibble, 128 for int8 with VNNI. What the offset adds to a sum depends on the activations alone, so prepare() writes it, once for
// all outputs, and compensation is never read. Without VNNI, 16-bit steps on the way must not saturate: see Dot.
//
// Few rows of x use each slice of weights the moment it is decoded, more share a decoded copy of a chunk on the stack, as in avx512.cpp.
#include <cstring>

#include "../support/avx512_activations.hpp"
#include "../support/avx512_core_expand.hpp"
#include "avx512_choice.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// How a slice of integers meets activations. Every way is exact: vpmaddubsw saturates a sum of two products at 16 bits.
enum class Dot {
    vnni,    // u8 weights: vpdpbusd
    signs,   // int8: |w| times activations that took over w's sign, at most 2 * 128 * 127
    narrow,  // int4: u8 weights; a sum of 16 products is at most 16 * 15 * 127 = 30480
};

template <Kind kind>
constexpr Dot dot =
#if defined(__AVX512VNNI__)
    Dot::vnni;
#else
    kind == Kind::int4 ? Dot::narrow : Dot::signs;
#endif

constexpr int weight_offset(Kind kind) { return kind == Kind::int4 ? 8 : dot<Kind::int8> == Dot::vnni ? 128 : 0; }

// ------------------------------------------------------------------------------------------------- slices

// Walks the masks and values of a chunk, two slices at a time, an even and an odd one.
template <Kind kind, bool dense, Input input>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even slices
    const uint8_t* odd;     // int4: cursor of the odd slices

    static constexpr uint64_t mask_bytes = kind == Kind::bf16 ? 4 : 8;  // of a slice

    INLINE Stream(const BlobView& w, uint64_t block, uint64_t chunk)
        : masks(dense ? nullptr : w.masks + (block * w.tiles + chunk * w.tiles_per_chunk) * block_panels * panel_slices * mask_bytes),
          values(w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk))),
          odd(values) {}

    // bf16: 32 words; int8, int4: 64 bytes, with the offset of integer activations.
    INLINE void next(__m512i (&pair)[2]) {
        if constexpr (kind == Kind::bf16 && !dense) {
            for (__m512i& slice : pair) {
                __m512i half[2];
                expand_words(masks, values, half);
                slice = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(half[0], 16))),
                                           _mm512_cvtepi32_epi16(_mm512_srli_epi32(half[1], 16)), 1);
            }
        } else if constexpr (dense) {
            pair[0] = _mm512_loadu_si512(values);
            if (kind == Kind::int4)
                __asm__("" : "+v"(pair[0]));  // compilers would load it twice, and it may lie in two cache lines
            pair[1] = kind == Kind::int4 ? pair[0] : _mm512_loadu_si512(values + slice_bytes);
            values += kind == Kind::int4 ? slice_bytes : 2 * slice_bytes;
        } else {
            pair[0] = expand_bytes(masks, values);
            pair[1] = expand_bytes(masks, kind == Kind::int4 ? odd : values);
        }
        if constexpr (kind == Kind::int4) {
            pair[0] = code(pair[0]);
            pair[1] = code(_mm512_srli_epi16(pair[1], 4));
        } else if constexpr (kind == Kind::int8 && input == Input::s8 && weight_offset(kind) != 0) {
            for (__m512i& slice : pair)
                slice = _mm512_xor_si512(slice, _mm512_set1_epi8(int8_t(0x80)));
        }
    }

    // The low nibbles of 64 bytes, -8 ... 7: turning the top bit of a code adds 8 to it. AVX-512 shifts words, so what is above a nibble may
    // be a neighbour's; the same instruction drops it.
    static INLINE __m512i code(__m512i bytes) {
        constexpr int and_then_xor = 0x6A;  // (a & b) ^ c
        const __m512i eight = _mm512_set1_epi8(8);
        const __m512i offset = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(15), eight, and_then_xor);
        return input == Input::s8 ? offset : _mm512_sub_epi8(offset, eight);
    }

    // Called before slices s and s + 1 of a panel.
    INLINE void prefetch(int s) const {
        const auto* value = reinterpret_cast<const char*>(values);
        if (dense) {
            for (int line = 0; line < (kind == Kind::int4 ? 1 : 2); line++)
                _mm_prefetch(value + dense_values_ahead + line * line_bytes, _MM_HINT_T1);
            return;
        }
        if (s % slices_per_fetch == 0)
            for (int line = 0; line < (kind == Kind::int4 ? 1 : 2); line++)
                _mm_prefetch(value + values_ahead + line * line_bytes, _MM_HINT_T0);
        if (s % (line_bytes / int(mask_bytes)) == 0)
            _mm_prefetch(reinterpret_cast<const char*>(masks) + slices_ahead * mask_bytes, _MM_HINT_T0);
    }
};

// ------------------------------------------------------------------------------------------------- products of integers

// Compilers like to add the products of several rows and slices first, or to load ahead, and then run out of registers.
INLINE void keep_order(__m512i& sum) { __asm__ volatile("" : "+v"(sum)); }

INLINE __m512i add_pairs(__m512i words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }

// What `signs` needs of a slice of weights.
struct Signed {
    __m512i magnitude;
    __mmask64 negative;

    INLINE explicit Signed(__m512i slice) : magnitude(_mm512_abs_epi8(slice)), negative(_mm512_movepi8_mask(slice)) {}
    INLINE void add_to(__m512i& sum, __m512i activations) const {
        const __m512i with_sign = _mm512_mask_sub_epi8(activations, negative, _mm512_setzero_si512(), activations);
        sum = _mm512_add_epi32(sum, add_pairs(_mm512_maddubs_epi16(magnitude, with_sign)));
        keep_order(sum);
    }
};

// narrow: 16-bit sums.
INLINE void add_words(__m512i& sum, __m512i weights, __m512i activations) {
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(weights, activations));
    keep_order(sum);
}

#if defined(__AVX512VNNI__)
// Written as instructions, so that activations come from memory as an operand, or that their order stays: compilers move loads ahead and
// run out of registers.
INLINE void multiply_add(__m512i& sum, __m512i weights, const uint8_t* x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const int32_t (*)[1]>(x)));
}
INLINE void multiply_add(__m512i& sum, __m512i weights, __m512i activations) {
    __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activations));
}
#endif

// Adds the products of the 16 slices of a panel and M rows of x, each slice multiplied the moment it is decoded.
template <Kind kind, bool dense, int M>
INLINE void add_panel(Stream<kind, dense, Input::s8>& stream, const Rows<M>& x, __m512i (&sums)[M][1]) {
    // As many chains of additions as hide the latency of the dot product. 16-bit sums of narrow hold 8 slices, so it needs two as well.
    constexpr int parts = dot<kind> != Dot::vnni ? 2 : M == 1 ? 4 : M < 4 ? 2 : 1;
    __m512i sum[M][parts] = {};
#pragma GCC unroll 8
    for (int s = 0; s < panel_slices; s += 2) {
        __m512i pair[2];
        stream.prefetch(s);
        stream.next(pair);
        each<2>([&](auto i) INLINED {
            if constexpr (dot<kind> == Dot::vnni) {
#if defined(__AVX512VNNI__)
                for (int m = 0; m < M; m++)
                    multiply_add(sum[m][(s + i) % parts], pair[i], x.at(m, 4 * uint64_t(s + i)));
#endif
            } else if constexpr (dot<kind> == Dot::narrow) {
                for (int m = 0; m < M; m++)
                    add_words(sum[m][i], pair[i], broadcast(x.at(m, 4 * uint64_t(s + i))));
            } else {
                const Signed weights(pair[i]);
                for (int m = 0; m < M; m++)
                    weights.add_to(sum[m][i], broadcast(x.at(m, 4 * uint64_t(s + i))));
            }
        });
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < parts; i++)
            sums[m][0] = _mm512_add_epi32(sums[m][0], dot<kind> == Dot::narrow ? add_pairs(sum[m][i]) : sum[m][i]);
}

// sums[panels][M] of some tiles of decoded slices.
template <Kind kind, int M, int panels>
INLINE void sum_integers(const uint8_t* slices, const uint8_t* x_rows, uint64_t stride, uint64_t tiles, __m512i (&sums)[panels][M][1]) {
    constexpr int run = dot<kind> == Dot::narrow ? 8 : 16;  // slices until 16-bit sums are full
    __m512i sum[panels][M] = {};
    for (; tiles; tiles--, slices += k_tile_bytes, x_rows += panel_slices * 4) {
        Rows<M> x(x_rows, stride);
        const uint8_t* at = slices;
#pragma GCC unroll 1
        for (int from = 0; from < panel_slices; from += run) {
            __m512i words[panels][M] = {};
#pragma GCC unroll 4
            for (int s = 0; s < run; s++, x.advance(4), at += slice_bytes) {
                if constexpr (dot<kind> == Dot::signs) {
                    each<panels>([&](auto p) INLINED {
                        const Signed weights(_mm512_load_si512(at + p * panel_bytes));
                        each<M>([&](auto m) INLINED { weights.add_to(sum[p][m], broadcast(x.at(m, 0))); });
                    });
                } else {
                    __m512i weights[panels];
                    each<panels>([&](auto p) INLINED { weights[p] = _mm512_load_si512(at + p * panel_bytes); });
                    each<M>([&](auto m) INLINED {
                        const __m512i activations = broadcast(x.at(m, 0));
                        each<panels>([&](auto p) INLINED {
#if defined(__AVX512VNNI__)
                            multiply_add(sum[p][m], weights[p], activations);
#else
                            add_words(words[p][m], weights[p], activations);
#endif
                        });
                    });
                }
            }
            if constexpr (dot<kind> == Dot::narrow)
                for (int p = 0; p < panels; p++)
                    for (int m = 0; m < M; m++)
                        sum[p][m] = _mm512_add_epi32(sum[p][m], add_pairs(words[p][m]));
        }
    }
    std::memcpy(sums, sum, sizeof(sum));
}

// ------------------------------------------------------------------------------------------------- products of floats

// The same for f32 activations: input j of a slice joins chain j % 2.
template <Kind kind, bool dense, int M>
INLINE void add_panel(Stream<kind, dense, Input::f32>& stream, const Rows<M>& x, __m512 (&sums)[M][2]) {
    constexpr int slice_k = kind == Kind::bf16 ? 2 : 4;
#pragma GCC unroll 8
    for (int s = 0; s < panel_slices; s += 2) {
        __m512i pair[2];
        stream.prefetch(s);
        stream.next(pair);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < slice_k; j++) {
                const __m512 weights = as_float<kind>(pair[i], j);
                for (int m = 0; m < M; m++) {
                    const auto activation = load<float>(x.at(m, 4 * uint64_t((s + i) * slice_k + j)));
                    sums[m][j % 2] = _mm512_fmadd_ps(_mm512_set1_ps(activation), weights, sums[m][j % 2]);
                }
            }
    }
}

// bf16 weights with a mask: one expanded 16-bit value is one lane, so both inputs of an output are neighbours, and each is a chain. Outputs
// 0 ... 7 of a panel are sums[m][0], the others sums[m][1].
template <int M>
INLINE void add_expanded_panel(Stream<Kind::bf16, false, Input::f32>& stream, const Rows<M>& x, __m512 (&sums)[M][2]) {
    __m512 sum[M][2];  // a copy, because the masks might lie in the memory of sums, for all that a compiler knows
    std::memcpy(sum, sums, sizeof(sum));
#pragma GCC unroll 16
    for (int s = 0; s < panel_slices; s++) {
        __m512i half[2];
        if (s % 2 == 0)
            stream.prefetch(s);
        expand_words(stream.masks, stream.values, half);
        for (int m = 0; m < M; m++) {
            const __m512 activations = _mm512_castpd_ps(_mm512_set1_pd(load<double>(x.at(m, 8 * uint64_t(s)))));
            for (int h = 0; h < 2; h++)
                sum[m][h] = _mm512_fmadd_ps(activations, _mm512_castsi512_ps(half[h]), sum[m][h]);
        }
    }
    std::memcpy(sums, sum, sizeof(sum));
}

// Neighbours apart: even and odd inputs of all 16 outputs.
INLINE void part_inputs(__m512 (&sums)[2]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 low = sums[0];
    sums[0] = _mm512_permutex2var_ps(low, even, sums[1]);
    sums[1] = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), sums[1]);
}

// ------------------------------------------------------------------------------------------------- chunks

// M rows of x, up to 8 of dense integers, else up to 4. Nothing decoded is stored. The stream visits the four panels in turn, 16 slices each, so there are sums for all of
// them, which live through a segment.
template <Kind kind, bool dense, Input input, int M>
void multiply_few(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t,
                  float* out) {
    constexpr bool by_lane = kind == Kind::bf16 && !dense;
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Stream<kind, dense, input> stream(w, block, chunk);
        const Part<kind, input> part(w, a, block, chunk, row);
        part.template multiply<M, block_panels>(0, out, [&](uint64_t tile, uint64_t end, auto& sums) INLINED {
            std::memset(sums, 0, sizeof(sums));
            for (; tile < end; tile++)
#pragma GCC unroll 1
                for (int p = 0; p < block_panels; p++) {
                    const Rows<M> x(part.x + tile * part.x_tile, part.stride);
                    if constexpr (by_lane)
                        add_expanded_panel(stream, x, sums[p]);
                    else
                        add_panel(stream, x, sums[p]);
                }
            if constexpr (by_lane)
                for (auto& panel : sums)
                    for (auto& sum : panel)
                        part_inputs(sum);
        });
    }
}

// M rows of x times a decoded chunk, whose slices each meet M rows, and activations `panels` panels: as many as the registers hold sums for.
template <Kind kind, Input input, int M>
void multiply_decoded(const Part<kind, input>& part, const uint8_t* decoded, NextRun& next, float* out) {
    constexpr int panels = input == Input::s8 && dot<kind> == Dot::vnni ? 4 : 2;
    for (int first = 0; first < block_panels; first += panels)
        part.template multiply<M, panels>(first, out, [&](uint64_t tile, uint64_t end, auto& sums) INLINED {
            next.step();
            const uint8_t* slices = decoded + (tile - part.begin) * k_tile_bytes + uint64_t(first) * panel_bytes;
            const uint8_t* x = part.x + tile * part.x_tile;
            if constexpr (input == Input::s8)
                sum_integers<kind, M, panels>(slices, x, part.stride, end - tile, sums);
            else
                sum_floats<kind, M>(slices, x, part.stride, end - tile, sums);
        });
}

constexpr uint64_t most_rows = 6;  // that multiply_decoded takes

template <Kind kind, bool dense, Input input>
void multiply_many(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                   float* out) {
    alignas(64) uint8_t decoded[chunk_k / (panel_slices * Part<kind, input>::slice_k) * k_tile_bytes];
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Stream<kind, dense, input> stream(w, block, chunk);
        Part<kind, input> part(w, a, block, chunk, row);
        uint8_t* at = decoded;
        for (uint64_t panel = block_panels * part.begin; panel < block_panels * part.end; panel++)
            for (int s = 0; s < panel_slices; s += 2, at += 2 * slice_bytes) {
                __m512i pair[2];
                stream.prefetch(s);
                stream.next(pair);
                _mm512_store_si512(at, pair[0]);
                _mm512_store_si512(at + slice_bytes, pair[1]);
            }
        // Dense bf16 is bound by memory anyway, expansion by arithmetic.
        NextRun next;
        if constexpr (dense && kind != Kind::bf16)
            next = NextRun(w, block, chunk, Stream<kind, dense, input>::mask_bytes, (rows + most_rows - 1) / most_rows * part.parts());
        for (uint64_t done = 0; done < rows; done += most_rows) {
            float* to = out + done * block_n;
            switch (rows - done) {  // the last rows: with fewer sums, added in the same order
                case 1: multiply_decoded<kind, input, 1>(part, decoded, next, to); break;
                case 2: multiply_decoded<kind, input, 2>(part, decoded, next, to); break;
                case 3: multiply_decoded<kind, input, 3>(part, decoded, next, to); break;
                case 4: multiply_decoded<kind, input, 4>(part, decoded, next, to); break;
                case 5: multiply_decoded<kind, input, 5>(part, decoded, next, to); break;
                default: multiply_decoded<kind, input, 6>(part, decoded, next, to); break;
            }
            part.x += most_rows * part.stride;
            if (integers<input>)
                part.x_scales += most_rows * part.segments;
        }
    }
}

// ------------------------------------------------------------------------------------------------- choice

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    Function function;
    if (w.kind == Kind::bf16)
        function = choose<Kind::bf16, Input::f32>(w.dense, rows);
    else if (w.kind == Kind::int8)
        function = a.integer ? choose<Kind::int8, Input::s8>(w.dense, rows) : choose<Kind::int8, Input::f32>(w.dense, rows);
    else
        function = a.integer ? choose<Kind::int4, Input::s8>(w.dense, rows) : choose<Kind::int4, Input::f32>(w.dense, rows);
    for (uint64_t i = 0; i < block_panels * rows; i++)  // chunks are added to it
        _mm512_storeu_ps(out + panel_n * i, _mm512_setzero_ps());
    function(w, a, block, first, last, row, rows, out);
}

// ------------------------------------------------------------------------------------------------- activations

// Behind the codes of a row: weight_offset times the sum of each segment's. It fits 32 bits: 2^7 * 2^7 * 127.
void prepare(const Activations& a, Kind weights, const void* x, bool x_is_bf16, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (!a.integer)
        return copy_as_f32(a.row, x, x_is_bf16, a.rounded, reinterpret_cast<float*>(to));
    quantize(a.row, x, x_is_bf16, 0, to, piece_bytes, a.scales + row * (a.row.k_pad / a.row.segment));
    for (uint64_t begin = 0; begin < a.row.k_pad; begin += a.row.segment) {
        __m512i sum = _mm512_setzero_si512();
        for (uint64_t i = begin; i < begin + a.row.segment; i += 16)
            sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(to + i))));
        const int32_t offset = weight_offset(weights) * _mm512_reduce_add_epi32(sum);
        std::memcpy(to + a.row.k_pad + 4 * (begin / a.row.segment), &offset, sizeof(offset));
    }
}

uint64_t row_bytes(const BlobView& w, int64_t activation_group) {
    return w.segment && activation_group != 0 ? w.k_pad + 4 * (w.k_pad / w.segment) : 4 * w.k_pad;
}

}  // namespace

#if defined(__AVX512VNNI__)
const Kernel avx512_core_vnni_kernel = {InstructionSet::avx512_core_vnni, max_rows, false, row_bytes, prepare, multiply};
#else
const Kernel avx512_core_kernel = {InstructionSet::avx512_core, max_rows, false, row_bytes, prepare, multiply};
#endif

}  // namespace ov_ext::sparse_matmul
