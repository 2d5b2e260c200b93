// AVX-512 (Ice Lake, Zen 4 and later): F, BW, DQ, VL, VBMI2 (vpexpand), VNNI (vpdpbusd), GFNI, and BF16 where present.
//
// One row of the format is one register. Decoding a row costs one mask load, one value load, one expand (2 cycles on port 5 of Intel
// cores) and, for int4, one gf2p8affineqb that cuts out a nibble and extends its sign. Everything here is in an anonymous namespace:
// nothing compiled with these flags may be shared with other object files.
#include <immintrin.h>

#include "../support/cpu_features.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

#define INLINE inline __attribute__((always_inline))

template <class T>
INLINE T load(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
}

// How activations arrive.
enum class Input {
    u8,      // quantized, offset by 128: vpdpbusd multiplies u8 by s8
    bf16,    // pairs for vdpbf16ps
    f32,
};

// Bytes of an activation.
constexpr uint64_t width(Input input) { return input == Input::u8 ? 1 : input == Input::bf16 ? 2 : 4; }

// ------------------------------------------------------------------------------------------------- decoding rows

// 8x8 bit matrices for gf2p8affineqb (byte i of the matrix gives output bit 7 - i): sign-extended low and high nibble.
constexpr uint64_t low_nibble = 0x0102040808080808, high_nibble = 0x1020408080808080;

// Walks the masks and values of a chunk, one 64-byte row at a time.
template <Kind kind, bool dense>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even rows
    const uint8_t* odd;     // int4: cursor of the odd rows

    template <int parity>
    INLINE __m512i next() {
        const uint8_t*& at = kind == Kind::int4 && parity ? odd : values;
        __m512i row = _mm512_loadu_si512(at);
        if (kind == Kind::int4)
            row = _mm512_gf2p8affine_epi64_epi8(row, _mm512_set1_epi64(int64_t(parity ? high_nibble : low_nibble)), 0);
        if (dense) {
            at += 64;
            return row;
        }
        // The barrier keeps load and expand apart: their fused form is slower on every CPU measured.
        __asm__("" : "+v"(row));
        if (kind == Kind::bf16) {
            const uint32_t mask = load<uint32_t>(masks);
            masks += 4;
            at += 2 * __builtin_popcount(mask);
            return _mm512_maskz_expand_epi16(mask, row);
        }
        const uint64_t mask = load<uint64_t>(masks);
        masks += 8;
        at += __builtin_popcountll(mask);
        return _mm512_maskz_expand_epi8(mask, row);
    }

    // Called every four rows, which consume two lines of values at half density (int4: one). Hardware prefetching alone stops at every
    // page; these distances were 1.2 times faster for bf16 and int8 than one line at 1536.
    INLINE void prefetch() const {
        const char* ahead = reinterpret_cast<const char*>(values) + 2048;
        _mm_prefetch(ahead, _MM_HINT_T0);
        if (kind != Kind::int4)
            _mm_prefetch(ahead + 64, _MM_HINT_T0);
        if (!dense)
            _mm_prefetch(reinterpret_cast<const char*>(masks) + 1024, _MM_HINT_T0);
    }
};

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

INLINE __m512 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int panel) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * 64 + uint64_t(panel) * 16;
    if (w.scales_f32)
        return _mm512_loadu_ps(w.scales + 4 * i);
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + 2 * i)));
}

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

INLINE __m512 load_x(const void* x, bool x_is_bf16, uint64_t i, uint64_t end) {
    const __mmask16 mask = end - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (end - i)) - 1);
    if (!x_is_bf16)
        return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i)), 16));
}

// Same rule, same bits as the reference kernel's quantization.
void quantize(const BlobView& w, const void* x, bool x_is_bf16, uint64_t group, uint8_t* row, float* scales) {
    for (uint64_t start = 0; start < w.k_pad; start += group) {
        const uint64_t padded_end = start + group < w.k_pad ? start + group : w.k_pad;
        const uint64_t end = padded_end < w.k ? padded_end : w.k;
        __m512i magnitude = _mm512_setzero_si512();
        for (uint64_t i = start; i < end; i += 16)
            magnitude = _mm512_max_epu32(
                magnitude, _mm512_and_si512(_mm512_castps_si512(load_x(x, x_is_bf16, i, end)), _mm512_set1_epi32(0x7FFFFFFF)));
        const uint32_t largest = _mm512_reduce_max_epu32(magnitude);
        const bool finite = largest < 0x7F800000, zero = largest < 0x03800000;
        const float peak = load<float>(&largest);
        const float factor = !finite ? __builtin_nanf("") : zero ? 0.0f : peak / 127.0f;
        const float inverse = finite && !zero ? 127.0f / peak : 0.0f;
        for (uint64_t i = start; i < padded_end; i += 16) {
            __m512i q = _mm512_setzero_si512();
            if (i < end && inverse != 0.0f)
                q = _mm512_cvtps_epi32(_mm512_mul_ps(load_x(x, x_is_bf16, i, end), _mm512_set1_ps(inverse)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
        }
        for (uint64_t s = start / w.segment; s * w.segment < padded_end; s++)
            scales[s] = factor;
    }
}

// To nearest, ties to even, as integers: denormals survive, NaN stays NaN. The upper halves of the lanes hold the result.
INLINE __m512i round_to_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

void prepare(const BlobView& w, const void* x, bool x_is_bf16, int64_t activation_group, void* row, float* scales) {
    if (w.segment && activation_group != 0) {
        quantize(w, x, x_is_bf16, activation_group < 0 ? w.k_pad : uint64_t(activation_group), static_cast<uint8_t*>(row), scales);
        return;
    }
    const bool round = !w.segment && activation_group != 0, pairs = round && bf16_pairs(activation_group);
    for (uint64_t i = 0; i < w.k_pad; i += 16) {
        const __m512 value = i < w.k ? load_x(x, x_is_bf16, i, w.k) : _mm512_setzero_ps();
        if (pairs)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(row) + i),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(value), 16)));
        else if (round)
            _mm512_storeu_si512(static_cast<float*>(row) + i,
                                _mm512_and_si512(round_to_bf16(value), _mm512_set1_epi32(int(0xFFFF0000))));
        else
            _mm512_storeu_ps(static_cast<float*>(row) + i, value);
    }
}

bool supported(const CpuFeatures& f) { return f.avx512 && f.avx512_vbmi2 && f.avx512_vnni && f.gfni; }

}  // namespace

const Kernel avx512_kernel = {"avx512", max_rows, 4, supported, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
