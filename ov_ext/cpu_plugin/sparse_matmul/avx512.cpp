// AVX-512 (Ice Lake, Zen 4 and later): F, BW, DQ, VL, VBMI2 (vpexpand), VNNI (vpdpbusd), GFNI.
//
// Up to 4 rows of x use each slice of weights the moment it is decoded. More rows share a decoded copy of a chunk on the stack.
// Both add in the same order, so a row of x gives the same bits in any company. bf16 weights are multiplied as f32, or, by a kernel of
// its own, as bf16: vdpbf16ps is twice as fast as the two multiply-adds that it replaces on Zen 4, and slower on Sapphire Rapids.
#include <cstring>

#include "../support/avx512_activations.hpp"
#include "avx512_choice.hpp"
#include "avx512_products.hpp"
#include "avx512_slices.hpp"

namespace ov_ext::sparse_matmul {
namespace {

INLINE void multiply_add(__m512i& sum, __m512i activations, __m512i weights) { sum = _mm512_dpbusd_epi32(sum, activations, weights); }
// Written as an instruction: this file is compiled for CPUs that have it and for others. It takes and gives denormals as 0, one reason
// why this kernel's bits are not those of f32.
INLINE void multiply_add(__m512& sum, __m512i activations, __m512i weights) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(activations), "v"(weights));
}

// ------------------------------------------------------------------------------------------------- up to 4 rows of x

// The slices of one panel, each multiplied the moment it is decoded. For dense weights and for f32 activations; add_sparse_panel does the
// rest.
template <Kind kind, bool dense, Input input, int M>
INLINE void add_panel(Stream<kind, dense>& stream, const Rows<M>& x, typename Register<input>::type (&sums)[M][lanes<input>]) {
    constexpr uint64_t x_slice = Part<kind, input>::x_slice;
    // As many accumulators as hide the latency: one row of x alone has too few chains. The order of integer additions does not matter, so
    // M may decide here; floating-point sums always have their two.
    constexpr int parts = input != Input::u8 ? 2 : M == 1 ? 4 : M < 4 ? 2 : 1;
    typename Register<input>::type sum[M][parts] = {};
    for (int m = 0; m < M; m++)
        for (int i = 0; i < lanes<input>; i++)
            sum[m][i] = sums[m][i];
    // u8, bf16: slice s joins chain s % parts, 4 bytes of activations against 4 bytes of each output. f32: input j joins chain j % 2.
    const auto add = [&](__m512i slice, int s) INLINED {
        if constexpr (input != Input::f32) {
            for (int m = 0; m < M; m++)
                multiply_add(sum[m][s % parts], broadcast(x.at(m, uint64_t(s) * x_slice)), slice);
        } else {
            for (int j = 0; j < int(Part<kind, input>::slice_k); j++) {
                const __m512 weights = as_float<kind>(slice, j);
                for (int m = 0; m < M; m++) {
                    const float* at = reinterpret_cast<const float*>(x.at(m, uint64_t(s) * x_slice)) + j;
                    sum[m][j % 2] = _mm512_fmadd_ps(_mm512_set1_ps(load<float>(at)), weights, sum[m][j % 2]);
                }
            }
        }
    };
#pragma GCC unroll 8
    for (int s = 0; s < panel_slices; s += 2) {
        stream.prefetch(s);
        add(stream.template next<0>(), s);
        stream.prefetch(s + 1);
        add(stream.template next<1>(), s + 1);
    }
    for (int m = 0; m < M; m++)
        if constexpr (input == Input::u8) {
            for (int i = 1; i < parts; i++)
                sum[m][0] = _mm512_add_epi32(sum[m][0], sum[m][i]);
            sums[m][0] = sum[m][0];
        } else {
            sums[m][0] = sum[m][0], sums[m][1] = sum[m][1];
        }
}

// M rows of x, up to 8 of dense integers and bf16, else up to 4. Nothing decoded is stored. The stream visits the four panels in turn, 16 slices each, so there are sums for all of
// them, which live through a segment.
template <Kind kind, bool dense, Input input, int M>
void multiply_few(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t,
                  float* out) {
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Stream<kind, dense> stream(w, block, chunk);
        const Part<kind, input> part(w, a, block, chunk, row);
        part.template multiply<M, block_panels>(0, out, [&](uint64_t tile, uint64_t end, auto& sums) INLINED {
            if constexpr (dense || input == Input::f32) {
                // The loop over panels stays a loop: its body is straight code for 16 slices already.
                std::memset(sums, 0, sizeof(sums));
                for (; tile < end; tile++)
#pragma GCC unroll 1
                    for (int p = 0; p < block_panels; p++)
                        add_panel<kind, dense, input, M>(stream, Rows<M>(part.x + tile * part.x_tile, part.stride), sums[p]);
            } else {
                // Panels are constants (each), not a loop: sums are then named registers, or places on the stack between two panels.
                typename Register<input>::type sum[block_panels][M][2] = {};  // even and odd slices
                for (; tile < end; tile++)
                    each<block_panels>([&](auto p) INLINED { add_sparse_panel(stream, part.x + tile * part.x_tile, part.stride, sum[p]); });
                for (int p = 0; p < block_panels; p++)
                    for (int m = 0; m < M; m++)
                        if constexpr (input == Input::bf16) {
                            sums[p][m][0] = sum[p][m][0], sums[p][m][1] = sum[p][m][1];
                        } else {
                            // The assembly leaves int4 codes in the upper nibbles. A segment's sum is then at most 128 * 255 * 128 < 2^22
                            // and a multiple of 16: no overflow, and the shift is exact.
                            sums[p][m][0] = _mm512_add_epi32(sum[p][m][0], sum[p][m][1]);
                            if (kind == Kind::int4)
                                sums[p][m][0] = _mm512_srai_epi32(sums[p][m][0], 4);
                        }
            }
        });
    }
}

// ------------------------------------------------------------------------------------------------- more rows of x

// M rows of x times a decoded chunk. A slice, once loaded, meets M rows of x, and an activation meets `panels` panels: as many
// sums as fit the registers. A row has 4 sums, u8 of 4 panels, the others 2 chains of each of 2 panels. 6 rows have 24; with 4 registers
// for slices and 2 for activations that is 30 of 32. Floating point therefore reads the activations twice, once for each pair of panels.
template <Kind kind, Input input, int M>
void multiply_decoded(const Part<kind, input>& part, const uint8_t* decoded, NextRun& next, float* out) {
    constexpr int panels = input == Input::u8 ? block_panels : 2;
    for (int first = 0; first < block_panels; first += panels)
        part.template multiply<M, panels>(first, out, [&](uint64_t tile, uint64_t end, auto& sums) INLINED {
            next.step();
            const uint8_t* slices = decoded + (tile - part.begin) * k_tile_bytes + uint64_t(first) * panel_bytes;
            const uint8_t* x = part.x + tile * part.x_tile;
            if constexpr (input == Input::u8)
                sum_integers<M>(slices, x, part.stride, end - tile, sums);
            else if constexpr (input == Input::bf16)
                sum_bf16<M>(slices, x, part.stride, end - tile, sums);
            else
                sum_floats<kind, M>(slices, x, part.stride, end - tile, sums);
        });
}

constexpr uint64_t most_rows = 6;  // that multiply_decoded takes: 4 sums for each, of 32 registers

// Each chunk is decoded once for all rows: [tile][panel][slice][64 bytes], the order of the stream, zeros in place and int4 as bytes. That
// takes 32 KiB of the stack, 64 KiB for bf16. It is a whole chunk because Part::multiply adds to out once, with the total of a chunk.
template <Kind kind, bool dense, Input input>
void multiply_many(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                   float* out) {
    alignas(64) uint8_t decoded[chunk_k / (panel_slices * Part<kind, input>::slice_k) * k_tile_bytes];
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Stream<kind, dense> stream(w, block, chunk);
        Part<kind, input> part(w, a, block, chunk, row);
        uint8_t* at = decoded;
        for (uint64_t panel = block_panels * part.begin; panel < block_panels * part.end; panel++, at += panel_bytes)
            if constexpr (dense) {
#pragma GCC unroll 8
                for (int s = 0; s < panel_slices; s += 2) {
                    stream.prefetch(s);
                    _mm512_store_si512(at + slice_bytes * s, stream.template next<0>());
                    stream.prefetch(s + 1);
                    _mm512_store_si512(at + slice_bytes * s + slice_bytes, stream.template next<1>());
                }
            } else {
                decode_panel(stream, at);
            }
        // Dense bf16 is bound by memory anyway.
        NextRun next;
        if constexpr (!dense || kind != Kind::bf16)
            next = NextRun(w, block, chunk, Stream<kind, dense>::mask_bytes, (rows + most_rows - 1) / most_rows * part.parts());
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
            if (input == Input::u8)
                part.x_scales += most_rows * part.segments;
        }
    }
}

// ------------------------------------------------------------------------------------------------- choice

Function choose(const BlobView& w, const Activations& a, uint64_t rows) {
    // A bf16 weight has no segments, so its activations are never integers.
    if (w.kind == Kind::bf16)
        return choose<Kind::bf16, Input::f32>(w.dense, rows);
    if (w.kind == Kind::int8)
        return a.integer ? choose<Kind::int8, Input::u8>(w.dense, rows) : choose<Kind::int8, Input::f32>(w.dense, rows);
    return a.integer ? choose<Kind::int4, Input::u8>(w.dense, rows) : choose<Kind::int4, Input::f32>(w.dense, rows);
}

// out starts at 0 because chunks are added to it; a caller that splits the chunks adds its parts in the same order.
void run(Function function, const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row,
         uint64_t rows, float* out) {
    for (uint64_t i = 0; i < block_panels * rows; i++)
        _mm512_storeu_ps(out + panel_n * i, _mm512_setzero_ps());
    function(w, a, block, first, last, row, rows, out);
}

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    run(choose(w, a, rows), w, a, block, first, last, row, rows, out);
}

void multiply_as_bf16(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                      float* out) {
    run(choose<Kind::bf16, Input::bf16>(w.dense, rows), w, a, block, first, last, row, rows, out);
}

// ------------------------------------------------------------------------------------------------- activations

// vpdpbusd multiplies u8 by s8, so codes are offset by 128; offset_of() is what this adds to a sum. Padding gets code 0, 128 here: its
// weights are 0.
void prepare(const Activations& a, Kind, const void* x, bool x_is_bf16, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (a.integer)
        quantize(a.row, x, x_is_bf16, 128, to, piece_bytes, a.scales + row * (a.row.k_pad / a.row.segment));
    else
        copy_as_f32(a.row, x, x_is_bf16, a.rounded, reinterpret_cast<float*>(to));
}

void prepare_as_bf16(const Activations& a, Kind, const void* x, bool x_is_bf16, uint64_t row) {
    copy_as_bf16(a.row, x, x_is_bf16, static_cast<uint8_t*>(a.data) + row * a.stride, piece_bytes);
}

uint64_t row_bytes(const BlobView& w, int64_t activation_group) { return (w.segment && activation_group != 0 ? 1 : 4) * w.k_pad; }

// 0, no code, for activations that are to stay as they are (group 0): bf16 would round them.
uint64_t row_bytes_as_bf16(const BlobView& w, int64_t activation_group) { return w.segment || activation_group == 0 ? 0 : 2 * w.k_pad; }

}  // namespace

const Kernel avx512_kernel = {InstructionSet::avx512, max_rows, true, row_bytes, prepare, multiply};
const Kernel avx512_bf16_kernel = {InstructionSet::avx512_bf16, max_rows, false, row_bytes_as_bf16, prepare_as_bf16, multiply_as_bf16};

}  // namespace ov_ext::sparse_matmul
