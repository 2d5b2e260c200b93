// AVX-512 (Ice Lake, Zen 4 and later): F, BW, DQ, VL, VBMI2 (vpexpand), VNNI (vpdpbusd), GFNI.
//
// Up to 8 rows of x use each row of weights the moment it is decoded. More rows share a decoded copy of a part of a chunk in the L1 cache.
// Both add in the same order, so a row of x gives the same bits in any company. bf16 weights are multiplied as f32: vdpbf16ps takes twice
// the time of the two multiply-adds that it replaces on Intel cores.
#include "../support/cpu_features.hpp"
#include "avx512_activations.hpp"
#include "avx512_rows.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// How activations arrive.
enum class Input {
    u8,   // quantized, offset by 128: vpdpbusd multiplies u8 by s8
    f32,  // rounded to bf16 for bf16 weights unless activations are to stay as they are
};

template <Input input>
struct Register {
    using type = __m512;
};
template <>
struct Register<Input::u8> {
    using type = __m512i;
};

// Accumulators of one output and row of x: integer sums need one, floating-point sums take even and odd inputs apart, which is enough to
// hide the latency and little enough for the registers of every loop below.
template <Input input>
constexpr int lanes = input == Input::f32 ? 2 : 1;

// Four activations from memory. Written as an instruction because compilers keep them in general registers across panels, and moving them
// from there costs a cycle of port 5.
INLINE __m512i broadcast(const uint8_t* x) {
    __m512i value;
    __asm__ volatile("vpbroadcastd %1, %0" : "=v"(value) : "m"(*reinterpret_cast<const int32_t(*)[1]>(x)));
    return value;
}

// Input j of a row of weights as f32.
template <Kind kind>
INLINE __m512 as_float(__m512i row, int j) {
    if constexpr (kind == Kind::bf16)
        return _mm512_castsi512_ps(j ? _mm512_and_si512(row, _mm512_set1_epi32(int(0xFFFF0000))) : _mm512_slli_epi32(row, 16));
    else
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(row, _mm_cvtsi32_si128(24 - 8 * j)), 24));
}

// ------------------------------------------------------------------------------------------------- the end of a segment

// What the offset of 128 added to the sum of a segment.
INLINE __m512i offset_of(const BlobView& w, uint64_t block, uint64_t segment, int panel) {
    const auto* at = w.compensation + 2 * ((block * (w.k_pad / w.segment) + segment) * 64 + uint64_t(panel) * 16);
    return _mm512_slli_epi32(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))), 7);
}

// ------------------------------------------------------------------------------------------------- few rows of x

// Sixteen rows of one panel times M rows of activations, `stride` bytes apart, added to sums.
template <Kind kind, bool dense, Input input, int M>
INLINE void add_panel(Stream<kind, dense>& stream, const uint8_t* x, uint64_t stride, typename Register<input>::type (&sums)[M][lanes<input>]) {
    constexpr uint64_t x_row = (kind == Kind::bf16 ? 2 : 4) * (input == Input::u8 ? 1 : 4);
    // Two bases and two strides reach 8 rows by addressing modes. Left alone, compilers keep an address for each element on the stack.
    const uint8_t *base = x, *upper = x + 4 * stride;
    uint64_t stride3 = 3 * stride;
    __asm__("" : "+r"(base), "+r"(stride));
    if (M > 3)
        __asm__("" : "+r"(stride3));
    if (M > 4)
        __asm__("" : "+r"(upper));
    const auto at = [&](int m, uint64_t i) __attribute__((always_inline)) {
        return (m < 4 ? base : upper) + (m % 4 == 3 ? stride3 : uint64_t(m % 4) * stride) + i;
    };
    if constexpr (input == Input::u8) {
        constexpr int parts = M == 1 ? 4 : M <= 4 ? 2 : 1;  // hides the latency of vpdpbusd
        __m512i sum[M][parts];
        for (int m = 0; m < M; m++) {
            sum[m][0] = sums[m][0];
            for (int i = 1; i < parts; i++)
                sum[m][i] = _mm512_setzero_si512();
        }
        const auto add = [&](__m512i row, int r) __attribute__((always_inline)) {
            for (int m = 0; m < M; m++)
                sum[m][r % parts] = _mm512_dpbusd_epi32(sum[m][r % parts], broadcast(at(m, uint64_t(r) * x_row)), row);
        };
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2) {
            if (r % 4 == 0)
                stream.prefetch();
            add(stream.template next<0>(), r);
            add(stream.template next<1>(), r + 1);
        }
        for (int m = 0; m < M; m++)
            sums[m][0] = parts == 4   ? _mm512_add_epi32(_mm512_add_epi32(sum[m][0], sum[m][1]), _mm512_add_epi32(sum[m][2], sum[m][3]))
                         : parts == 2 ? _mm512_add_epi32(sum[m][0], sum[m][1])
                                      : sum[m][0];
    } else {
        __m512 sum[M][2];
        for (int m = 0; m < M; m++)
            sum[m][0] = sums[m][0], sum[m][1] = sums[m][1];
        const auto add = [&](__m512i row, int r) __attribute__((always_inline)) {
            constexpr int inputs = kind == Kind::bf16 ? 2 : 4;
            for (int j = 0; j < inputs; j++) {
                const __m512 w = as_float<kind>(row, j);
                for (int m = 0; m < M; m++)
                    sum[m][j % 2] = _mm512_fmadd_ps(_mm512_set1_ps(load<float>(at(m, uint64_t(r) * x_row + 4 * uint64_t(j)))), w, sum[m][j % 2]);
            }
        };
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2) {
            if (r % 4 == 0)
                stream.prefetch();
            add(stream.template next<0>(), r);
            add(stream.template next<1>(), r + 1);
        }
        for (int m = 0; m < M; m++)
            sums[m][0] = sum[m][0], sums[m][1] = sum[m][1];
    }
}

template <Kind kind, bool dense, Input input, int M>
void multiply_rows(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, float* out) {
    using R = typename Register<input>::type;
    constexpr uint64_t row_k = kind == Kind::bf16 ? 2 : 4, x_tile = 16 * row_k * (input == Input::u8 ? 1 : 4);
    const uint64_t tiles_per_segment = kind == Kind::bf16 ? w.tiles_per_chunk : w.segment / 64;
    const uint64_t segments = kind == Kind::bf16 ? 0 : w.k_pad / w.segment;
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    const float* x_scales = input == Input::u8 ? a.scales + row * segments : nullptr;

    for (int i = 0; i < 4 * M; i++)
        _mm512_storeu_ps(out + 16 * i, _mm512_setzero_ps());
    for (uint64_t chunk = first; chunk < last; chunk++) {
        const uint64_t begin = chunk * w.tiles_per_chunk, end = begin + w.tiles_per_chunk < w.tiles ? begin + w.tiles_per_chunk : w.tiles;
        Stream<kind, dense> stream(w, block, chunk);
        __m512 totals[4][M];  // of this chunk
        for (int p = 0; p < 4; p++)
            for (int m = 0; m < M; m++)
                totals[p][m] = _mm512_setzero_ps();
        for (uint64_t tile = begin; tile < end;) {
            R sums[4][M][lanes<input>];
            for (int p = 0; p < 4; p++)
                for (int m = 0; m < M; m++)
                    for (int i = 0; i < lanes<input>; i++)
                        sums[p][m][i] = R{};
            const uint64_t segment_end = tile + tiles_per_segment < end ? tile + tiles_per_segment : end;
            for (; tile < segment_end; tile++) {
#pragma GCC unroll 1
                for (int p = 0; p < 4; p++)
                    add_panel<kind, dense, input, M>(stream, x + tile * x_tile, a.stride, sums[p]);
            }
            for (int p = 0; p < 4; p++) {
                if constexpr (kind == Kind::bf16) {
                    for (int m = 0; m < M; m++)
                        totals[p][m] = _mm512_add_ps(sums[p][m][0], sums[p][m][1]);  // a chunk is one segment
                } else {
                    const uint64_t s = tile / tiles_per_segment - 1;
                    const __m512 scale = scales_of(w, block, s, p);
                    for (int m = 0; m < M; m++)
                        if constexpr (input == Input::u8)
                            totals[p][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[p][m][0], offset_of(w, block, s, p))),
                                                         _mm512_mul_ps(_mm512_set1_ps(x_scales[uint64_t(m) * segments + s]), scale),
                                                         totals[p][m]);
                        else
                            totals[p][m] = _mm512_fmadd_ps(_mm512_add_ps(sums[p][m][0], sums[p][m][1]), scale, totals[p][m]);
                }
            }
        }
        for (int m = 0; m < M; m++)
            for (int p = 0; p < 4; p++) {
                float* at = out + m * 64 + p * 16;
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), totals[p][m]));
            }
    }
}

using RowsFunction = void (*)(const BlobView&, const Activations&, uint64_t, uint64_t, uint64_t, uint64_t, float*);
constexpr int max_rows = 8;

template <Kind kind, bool dense, Input input>
RowsFunction by_rows(uint64_t rows) {
    switch (rows) {
        case 1: return multiply_rows<kind, dense, input, 1>;
        case 2: return multiply_rows<kind, dense, input, 2>;
        case 3: return multiply_rows<kind, dense, input, 3>;
        case 4: return multiply_rows<kind, dense, input, 4>;
        default: return multiply_rows<kind, dense, input, 8>;
    }
}

template <Kind kind, Input input>
RowsFunction choose(bool dense, uint64_t rows) {
    return dense ? by_rows<kind, true, input>(rows) : by_rows<kind, false, input>(rows);
}

RowsFunction choose(const BlobView& w, const Activations& a, uint64_t rows) {
    if (w.kind == Kind::bf16)
        return choose<Kind::bf16, Input::f32>(w.dense, rows);
    if (w.kind == Kind::int8)
        return a.integer ? choose<Kind::int8, Input::u8>(w.dense, rows) : choose<Kind::int8, Input::f32>(w.dense, rows);
    return a.integer ? choose<Kind::int4, Input::u8>(w.dense, rows) : choose<Kind::int4, Input::f32>(w.dense, rows);
}

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    while (rows) {
        const uint64_t some = rows >= 8 ? 8 : rows > 4 ? 4 : rows;
        choose(w, a, some)(w, a, block, first, last, row, out);
        row += some, rows -= some, out += some * 64;
    }
}

// ------------------------------------------------------------------------------------------------- activations

void prepare(const BlobView& w, const void* x, bool x_is_bf16, const Activations& a, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (a.integer) {
        quantize(w, x, x_is_bf16, a.group < 0 ? w.k_pad : uint64_t(a.group), 128, to, 64, a.scales + row * (w.k_pad / w.segment));
        return;
    }
    const bool round = !w.segment && a.group != 0;
    for (uint64_t i = 0; i < w.k_pad; i += 16) {
        const __m512 value = i < w.k ? load_x(x, x_is_bf16, i, w.k) : _mm512_setzero_ps();
        const __m512i bits =
            round ? _mm512_and_si512(round_to_bf16(value), _mm512_set1_epi32(int(0xFFFF0000))) : _mm512_castps_si512(value);
        _mm512_storeu_si512(to + 4 * i, bits);
    }
}

bool supported(const CpuFeatures& f) { return f.avx512 && f.avx512_vbmi2 && f.avx512_vnni && f.gfni; }

uint64_t row_bytes(const BlobView& w, int64_t activation_group) { return (w.segment && activation_group != 0 ? 1 : 4) * w.k_pad; }

}  // namespace

const Kernel avx512_kernel = {"avx512", max_rows, supported, row_bytes, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
