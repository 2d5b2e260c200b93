// AVX-512 (Ice Lake, Zen 4 and later): F, BW, DQ, VL, VBMI2 (vpexpand), VNNI (vpdpbusd), GFNI, and BF16 where present.
//
// One row of the format is one register. Decoding a row costs one mask load, one value load, one expand (2 cycles on port 5 of Intel
// cores) and, for int4, one gf2p8affineqb that cuts out a nibble and extends its sign. Everything here is in an anonymous namespace:
// nothing compiled with these flags may be shared with other object files.
#include <immintrin.h>

#include "../support/cpu_features.hpp"
#include "avx512_activations.hpp"
#include "avx512_rows.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// How activations arrive.
enum class Input {
    u8,      // quantized, offset by 128: vpdpbusd multiplies u8 by s8
    bf16,    // pairs for vdpbf16ps
    f32,
};

// Bytes of an activation.
constexpr uint64_t width(Input input) { return input == Input::u8 ? 1 : input == Input::bf16 ? 2 : 4; }

// ------------------------------------------------------------------------------------------------- one panel

template <Input input>
struct Register {
    using type = __m512;
};
template <>
struct Register<Input::u8> {
    using type = __m512i;
};

// Accumulators of one panel, M rows of activations. Several per row hide the latency of the dot products.
template <Input input, Kind kind, int M>
struct Panel {
    static constexpr int lanes = input == Input::f32 ? 4 : 2;  // the same for every M: a row's bits do not depend on its company
    using R = typename Register<input>::type;
    R sum[M][lanes];

    INLINE Panel() {
        for (int m = 0; m < M; m++)
            for (int i = 0; i < lanes; i++)
                sum[m][i] = R{};
    }

    // x: the row_k activations of this row, rows `stride` bytes apart.
    template <int parity>
    INLINE void add(__m512i row, const uint8_t* x, uint64_t stride) {
        if constexpr (input == Input::u8) {
            for (int m = 0; m < M; m++)
                sum[m][parity] = _mm512_dpbusd_epi32(sum[m][parity], _mm512_set1_epi32(load<int32_t>(x + m * stride)), row);
        } else if constexpr (input == Input::bf16) {
            for (int m = 0; m < M; m++)
                sum[m][parity] = _mm512_dpbf16_ps(sum[m][parity], (__m512bh)_mm512_set1_epi32(load<int32_t>(x + m * stride)),
                                                  (__m512bh)row);
        } else if constexpr (kind == Kind::bf16) {
            const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(row, 16));
            const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(int(0xFFFF0000))));
            for (int m = 0; m < M; m++) {
                sum[m][2 * parity] = _mm512_fmadd_ps(_mm512_set1_ps(load<float>(x + m * stride)), first, sum[m][2 * parity]);
                sum[m][2 * parity + 1] =
                    _mm512_fmadd_ps(_mm512_set1_ps(load<float>(x + m * stride + 4)), second, sum[m][2 * parity + 1]);
            }
        } else {
            for (int j = 0; j < 4; j++) {
                const __m512 w = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(row, _mm_cvtsi32_si128(24 - 8 * j)), 24));
                for (int m = 0; m < M; m++)
                    sum[m][j] = _mm512_fmadd_ps(_mm512_set1_ps(load<float>(x + m * stride + 4 * j)), w, sum[m][j]);
            }
        }
    }

    INLINE R total(int m) const {
        if constexpr (input == Input::u8)
            return _mm512_add_epi32(sum[m][0], sum[m][1]);
        else if constexpr (lanes == 2)
            return _mm512_add_ps(sum[m][0], sum[m][1]);
        else
            return _mm512_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]), _mm512_add_ps(sum[m][2], sum[m][3]));
    }
};

// ------------------------------------------------------------------------------------------------- one block

template <Kind kind, bool dense, Input input, int M>
void multiply_rows(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, float* out) {
    using R = typename Register<input>::type;
    constexpr uint64_t row_k = kind == Kind::bf16 ? 2 : 4, x_row = row_k * width(input), x_tile = 16 * x_row;
    constexpr uint64_t mask_bytes = kind == Kind::bf16 ? 4 : 8, tiles_per_chunk = 512 / (16 * row_k);
    const uint64_t tiles_per_segment = kind == Kind::bf16 ? tiles_per_chunk : w.segment / 64;
    const uint64_t segments = kind == Kind::bf16 ? 0 : w.k_pad / w.segment;
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    const float* x_scales = input == Input::u8 ? a.scales + row * segments : nullptr;

    for (int i = 0; i < 4 * M; i++)
        _mm512_storeu_ps(out + 16 * i, _mm512_setzero_ps());
    for (uint64_t chunk = first; chunk < last; chunk++) {
        const uint64_t begin = chunk * tiles_per_chunk, end = begin + tiles_per_chunk < w.tiles ? begin + tiles_per_chunk : w.tiles;
        const uint8_t* run = w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk));
        Stream<kind, dense> stream{dense ? nullptr : w.masks + (block * w.tiles + begin) * 64 * mask_bytes, run, run};
        __m512 sums[4][M];  // of this chunk
        for (int p = 0; p < 4; p++)
            for (int m = 0; m < M; m++)
                sums[p][m] = _mm512_setzero_ps();
        for (uint64_t tile = begin; tile < end;) {
            R segment[4][M];
            for (int p = 0; p < 4; p++)
                for (int m = 0; m < M; m++)
                    segment[p][m] = R{};
            const uint64_t segment_end = tile + tiles_per_segment < end ? tile + tiles_per_segment : end;
            for (; tile < segment_end; tile++) {
                const uint8_t* x_at = x + tile * x_tile;
                for (int p = 0; p < 4; p++) {
                    Panel<input, kind, M> panel;
#pragma GCC unroll 8
                    for (int r = 0; r < 16; r += 2) {
                        if (r % 4 == 0)
                            stream.prefetch();
                        panel.template add<0>(stream.template next<0>(), x_at + uint64_t(r) * x_row, a.stride);
                        panel.template add<1>(stream.template next<1>(), x_at + uint64_t(r + 1) * x_row, a.stride);
                    }
                    for (int m = 0; m < M; m++) {
                        if constexpr (input == Input::u8)
                            segment[p][m] = _mm512_add_epi32(segment[p][m], panel.total(m));
                        else
                            segment[p][m] = _mm512_add_ps(segment[p][m], panel.total(m));
                    }
                }
            }
            for (int p = 0; p < 4; p++) {
                if constexpr (kind == Kind::bf16) {
                    for (int m = 0; m < M; m++)
                        sums[p][m] = segment[p][m];  // a chunk is one segment
                    continue;
                } else {
                    const uint64_t s = tile / tiles_per_segment - 1;
                    const __m512 scale = scales_of(w, block, s, p);
                    if constexpr (input == Input::u8) {
                        const auto* comp = w.compensation + 2 * ((block * segments + s) * 64 + uint64_t(p) * 16);
                        const __m512i offset = _mm512_slli_epi32(
                            _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(comp))), 7);
                        for (int m = 0; m < M; m++)
                            sums[p][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(segment[p][m], offset)),
                                                         _mm512_mul_ps(_mm512_set1_ps(x_scales[uint64_t(m) * segments + s]), scale),
                                                         sums[p][m]);
                    } else {
                        for (int m = 0; m < M; m++)
                            sums[p][m] = _mm512_fmadd_ps(segment[p][m], scale, sums[p][m]);
                    }
                }
            }
        }
        for (int m = 0; m < M; m++)
            for (int p = 0; p < 4; p++) {
                float* at = out + m * 64 + p * 16;
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[p][m]));
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
        default: return multiply_rows<kind, dense, input, input == Input::f32 ? 4 : 8>;
    }
}

template <Kind kind, Input input>
RowsFunction choose(bool dense, uint64_t rows) {
    return dense ? by_rows<kind, true, input>(rows) : by_rows<kind, false, input>(rows);
}

// A bf16 weight takes bf16 activations in pairs where the CPU has vdpbf16ps, else f32.
bool bf16_pairs(int64_t activation_group) { return activation_group != 0 && cpu_features().avx512_bf16; }

RowsFunction choose(const BlobView& w, const Activations& a, uint64_t rows) {
    if (w.kind == Kind::bf16)
        return bf16_pairs(a.group) ? choose<Kind::bf16, Input::bf16>(w.dense, rows) : choose<Kind::bf16, Input::f32>(w.dense, rows);
    if (w.kind == Kind::int8)
        return a.integer ? choose<Kind::int8, Input::u8>(w.dense, rows) : choose<Kind::int8, Input::f32>(w.dense, rows);
    return a.integer ? choose<Kind::int4, Input::u8>(w.dense, rows) : choose<Kind::int4, Input::f32>(w.dense, rows);
}

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    // In runs of 8, else 4, else what is left. Eight rows of f32 sums do not fit the 32 registers.
    const uint64_t widest = a.integer || (w.kind == Kind::bf16 && bf16_pairs(a.group)) ? 8 : 4;
    while (rows) {
        const uint64_t some = rows >= widest ? widest : rows > 4 ? 4 : rows;
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
    if (round && bf16_pairs(a.group)) {
        round_row_to_bf16(w, x, x_is_bf16, to, 64);
        return;
    }
    for (uint64_t i = 0; i < w.k_pad; i += 16) {
        const __m512 value = i < w.k ? load_x(x, x_is_bf16, i, w.k) : _mm512_setzero_ps();
        const __m512i bits =
            round ? _mm512_and_si512(round_to_bf16(value), _mm512_set1_epi32(int(0xFFFF0000))) : _mm512_castps_si512(value);
        _mm512_storeu_si512(to + 4 * i, bits);
    }
}

bool supported(const CpuFeatures& f) { return f.avx512 && f.avx512_vbmi2 && f.avx512_vnni && f.gfni; }

uint64_t row_bytes(const BlobView& w, int64_t activation_group) {
    const bool integer = w.segment && activation_group != 0, pairs = !w.segment && bf16_pairs(activation_group);
    return (integer ? 1 : pairs ? 2 : 4) * w.k_pad;
}

}  // namespace

const Kernel avx512_kernel = {"avx512", max_rows, supported, row_bytes, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
