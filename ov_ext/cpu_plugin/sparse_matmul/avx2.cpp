// AVX2 with FMA and F16C (Haswell, Zen and later). There is no expand instruction: eight mask bits select a byte shuffle that spreads
// eight values over eight lanes. Integer activations are s16: the u8 by s8 product of AVX2 (vpmaddubsw) saturates, vpmaddwd does not.
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

// ------------------------------------------------------------------------------------------------- decoding rows

struct ShuffleTables {
    uint8_t bytes[256][8];   // lane i takes value number (set bits below i), or zero when bit i is clear
    uint8_t words[256][16];
};

constexpr ShuffleTables make_tables() {
    ShuffleTables t{};
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, value = 0; lane < 8; lane++) {
            const bool set = mask >> lane & 1;
            t.bytes[mask][lane] = set ? uint8_t(value) : 0x80;
            t.words[mask][2 * lane] = set ? uint8_t(2 * value) : 0x80;
            t.words[mask][2 * lane + 1] = set ? uint8_t(2 * value + 1) : 0x80;
            value += set;
        }
    return t;
}
constexpr ShuffleTables tables = make_tables();

INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// Walks the masks and values of a chunk. next() writes one row as 64 dense bytes.
template <Kind kind, bool dense>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even rows
    const uint8_t* odd;     // int4: cursor of the odd rows

    INLINE void next(int parity, uint8_t* row) {
        const uint8_t*& at = kind == Kind::int4 && parity ? odd : values;
        if constexpr (dense && kind != Kind::int4) {
            __builtin_memcpy(row, at, 64);
            at += 64;
        } else if constexpr (kind == Kind::bf16) {
            for (int i = 0; i < 4; i++) {
                const uint8_t mask = *masks++;
                const __m128i spread = _mm_shuffle_epi8(load128(at), load128(tables.words[mask]));
                _mm_store_si128(reinterpret_cast<__m128i*>(row + 16 * i), spread);
                at += 2 * __builtin_popcount(mask);
            }
        } else {
            for (int i = 0; i < 8; i++) {
                __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
                if constexpr (kind == Kind::int4) {  // code -> sign-extended byte, by table
                    const __m128i extended = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
                    const __m128i code = _mm_and_si128(parity ? _mm_srli_epi16(some, 4) : some, _mm_set1_epi8(15));
                    some = _mm_shuffle_epi8(extended, code);
                }
                const uint8_t mask = dense ? 255 : *masks++;
                if (!dense)
                    some = _mm_shuffle_epi8(some, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tables.bytes[mask])));
                _mm_storel_epi64(reinterpret_cast<__m128i*>(row + 8 * i), some);
                at += __builtin_popcount(mask);
            }
        }
    }
};

// ------------------------------------------------------------------------------------------------- one panel

INLINE __m256 floats(__m256i bits) { return _mm256_castsi256_ps(bits); }
INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Integer sums of 16 outputs: sums[i] holds outputs 4i..4i+3 as pairs (inputs 0+1, inputs 2+3).
struct IntegerPanel {
    __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};

    INLINE void add(const uint8_t* row, const uint8_t* x) {  // x: 4 s16
        const __m256i activations = _mm256_set1_epi64x(load<int64_t>(x));
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_cvtepi8_epi16(load128(row + 16 * i)), activations));
    }

    INLINE void add_to(int32_t* totals) const {  // totals[16]
        for (int i = 0; i < 4; i++) {
            const __m256i paired = _mm256_hadd_epi32(sums[i], sums[i]);  // 0 1 0 1 | 2 3 2 3
            const __m128i four = _mm_unpacklo_epi64(_mm256_castsi256_si128(paired), _mm256_extracti128_si256(paired, 1));
            auto* at = reinterpret_cast<__m128i*>(totals + 4 * i);
            _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), four));
        }
    }
};

template <Kind kind>
struct FloatPanel {
    __m256 sums[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()}, {_mm256_setzero_ps(), _mm256_setzero_ps()}};

    INLINE void add(const uint8_t* row, const uint8_t* x) {  // x: row_k floats
        for (int half = 0; half < 2; half++) {
            const __m256i bits = load256(row + 32 * half);  // 8 outputs
            for (int j = 0; j < (kind == Kind::bf16 ? 2 : 4); j++) {
                __m256 w;
                if constexpr (kind == Kind::bf16)
                    w = floats(j ? _mm256_and_si256(bits, _mm256_set1_epi32(int(0xFFFF0000))) : _mm256_slli_epi32(bits, 16));
                else
                    w = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(bits, _mm_cvtsi32_si128(24 - 8 * j)), 24));
                sums[half][j & 1] = _mm256_fmadd_ps(_mm256_set1_ps(load<float>(x + 4 * j)), w, sums[half][j & 1]);
            }
        }
    }

    INLINE void add_to(float* totals) const {
        for (int half = 0; half < 2; half++)
            _mm256_storeu_ps(totals + 8 * half, _mm256_add_ps(_mm256_loadu_ps(totals + 8 * half),
                                                              _mm256_add_ps(sums[half][0], sums[half][1])));
    }
};

// ------------------------------------------------------------------------------------------------- one block

INLINE __m256 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int eight) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * 64 + uint64_t(eight) * 8;
    return w.scales_f32 ? _mm256_loadu_ps(reinterpret_cast<const float*>(w.scales + 4 * i))
                        : _mm256_cvtph_ps(load128(w.scales + 2 * i));
}

constexpr int max_rows = 2;

template <Kind kind, bool dense, bool integer, int M>
void multiply_rows(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, float* out) {
    constexpr uint64_t row_k = kind == Kind::bf16 ? 2 : 4, x_row = row_k * (integer ? 2 : 4);
    constexpr uint64_t mask_bytes = kind == Kind::bf16 ? 4 : 8, tiles_per_chunk = 512 / (16 * row_k);
    const uint64_t tiles_per_segment = kind == Kind::bf16 ? tiles_per_chunk : w.segment / 64;
    const uint64_t segments = kind == Kind::bf16 ? 0 : w.k_pad / w.segment;
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    const float* x_scales = integer ? a.scales + row * segments : nullptr;

    for (int i = 0; i < 8 * M; i++)
        _mm256_storeu_ps(out + 8 * i, _mm256_setzero_ps());
    for (uint64_t chunk = first; chunk < last; chunk++) {
        const uint64_t begin = chunk * tiles_per_chunk, end = begin + tiles_per_chunk < w.tiles ? begin + tiles_per_chunk : w.tiles;
        const uint8_t* run = w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk));
        Stream<kind, dense> stream{dense ? nullptr : w.masks + (block * w.tiles + begin) * 64 * mask_bytes, run, run};
        alignas(32) float sums[M][64] = {};
        for (uint64_t tile = begin; tile < end;) {
            alignas(32) int32_t integers[M][64] = {};
            alignas(32) float reals[M][64] = {};
            const uint64_t segment_end = tile + tiles_per_segment < end ? tile + tiles_per_segment : end;
            for (; tile < segment_end; tile++)
                for (int p = 0; p < 4; p++) {
                    IntegerPanel integer_panel[M];
                    FloatPanel<kind> float_panel[M];
                    alignas(32) uint8_t decoded[64];
                    for (int r = 0; r < 16; r++) {
                        stream.next(r & 1, decoded);
                        const uint8_t* x_at = x + (tile * 16 + uint64_t(r)) * x_row;
                        for (int m = 0; m < M; m++) {
                            if constexpr (integer)
                                integer_panel[m].add(decoded, x_at + uint64_t(m) * a.stride);
                            else
                                float_panel[m].add(decoded, x_at + uint64_t(m) * a.stride);
                        }
                    }
                    for (int m = 0; m < M; m++) {
                        if constexpr (integer)
                            integer_panel[m].add_to(integers[m] + 16 * p);
                        else
                            float_panel[m].add_to(reals[m] + 16 * p);
                    }
                }
            const uint64_t s = kind == Kind::bf16 ? 0 : tile / tiles_per_segment - 1;
            for (int m = 0; m < M; m++)
                for (int i = 0; i < 8; i++) {
                    const __m256 sum = _mm256_load_ps(sums[m] + 8 * i);
                    __m256 next;
                    if constexpr (kind == Kind::bf16) {
                        next = _mm256_load_ps(reals[m] + 8 * i);  // a chunk is one segment
                    } else {
                        const __m256 scale = scales_of(w, block, s, i);
                        if constexpr (integer)
                            next = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load256(integers[m] + 8 * i)),
                                                   _mm256_mul_ps(_mm256_set1_ps(x_scales[uint64_t(m) * segments + s]), scale), sum);
                        else
                            next = _mm256_fmadd_ps(_mm256_load_ps(reals[m] + 8 * i), scale, sum);
                    }
                    _mm256_store_ps(sums[m] + 8 * i, next);
                }
        }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < 8; i++) {
                float* at = out + m * 64 + 8 * i;
                _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), _mm256_load_ps(sums[m] + 8 * i)));
            }
    }
}

using RowsFunction = void (*)(const BlobView&, const Activations&, uint64_t, uint64_t, uint64_t, uint64_t, float*);

template <Kind kind, bool integer>
RowsFunction choose(bool dense, uint64_t rows) {
    if (dense)
        return rows == 1 ? multiply_rows<kind, true, integer, 1> : multiply_rows<kind, true, integer, 2>;
    return rows == 1 ? multiply_rows<kind, false, integer, 1> : multiply_rows<kind, false, integer, 2>;
}

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    RowsFunction function;
    if (w.kind == Kind::bf16)
        function = choose<Kind::bf16, false>(w.dense, rows);
    else if (w.kind == Kind::int8)
        function = a.integer ? choose<Kind::int8, true>(w.dense, rows) : choose<Kind::int8, false>(w.dense, rows);
    else
        function = a.integer ? choose<Kind::int4, true>(w.dense, rows) : choose<Kind::int4, false>(w.dense, rows);
    function(w, a, block, first, last, row, out);
}

// ------------------------------------------------------------------------------------------------- activations

// Eight activations from i on, zeros from `end` on.
INLINE __m256 load_x(const void* x, bool x_is_bf16, uint64_t i, uint64_t end) {
    if (end - i >= 8)
        return x_is_bf16 ? floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(static_cast<const uint16_t*>(x) + i)), 16))
                         : _mm256_loadu_ps(static_cast<const float*>(x) + i);
    alignas(32) float tail[8] = {};
    for (uint64_t j = i; j < end; j++) {
        if (x_is_bf16) {
            const uint32_t bits = uint32_t(static_cast<const uint16_t*>(x)[j]) << 16;
            tail[j - i] = load<float>(&bits);
        } else {
            tail[j - i] = static_cast<const float*>(x)[j];
        }
    }
    return _mm256_load_ps(tail);
}

INLINE uint32_t largest_of(__m256i v) {
    const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1))));
}

// Same rule, same bits as the reference kernel's quantization.
void quantize(const BlobView& w, const void* x, bool x_is_bf16, uint64_t group, int16_t* row, float* scales) {
    for (uint64_t start = 0; start < w.k_pad; start += group) {
        const uint64_t padded_end = start + group < w.k_pad ? start + group : w.k_pad;
        const uint64_t end = padded_end < w.k ? padded_end : w.k;
        __m256i magnitude = _mm256_setzero_si256();
        for (uint64_t i = start; i < end; i += 8)
            magnitude = _mm256_max_epu32(magnitude, _mm256_and_si256(_mm256_castps_si256(load_x(x, x_is_bf16, i, end)),
                                                                     _mm256_set1_epi32(0x7FFFFFFF)));
        const uint32_t largest = largest_of(magnitude);
        const bool finite = largest < 0x7F800000, zero = largest < 0x03800000;
        const float peak = load<float>(&largest);
        const float factor = !finite ? __builtin_nanf("") : zero ? 0.0f : peak / 127.0f;
        const float inverse = finite && !zero ? 127.0f / peak : 0.0f;
        for (uint64_t i = start; i < padded_end; i += 8) {
            __m256i q = _mm256_setzero_si256();
            if (i < end && inverse != 0.0f)
                q = _mm256_cvtps_epi32(_mm256_mul_ps(load_x(x, x_is_bf16, i, end), _mm256_set1_ps(inverse)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                             _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1)));
        }
        for (uint64_t s = start / w.segment; s * w.segment < padded_end; s++)
            scales[s] = factor;
    }
}

void prepare(const BlobView& w, const void* x, bool x_is_bf16, const Activations& a, uint64_t index) {
    uint8_t* const row = static_cast<uint8_t*>(a.data) + index * a.stride;
    if (a.integer) {
        quantize(w, x, x_is_bf16, a.group < 0 ? w.k_pad : uint64_t(a.group), reinterpret_cast<int16_t*>(row),
                 a.scales + index * (w.k_pad / w.segment));
        return;
    }
    const bool round = !w.segment && a.group != 0;
    for (uint64_t i = 0; i < w.k_pad; i += 8) {
        __m256 value = i < w.k ? load_x(x, x_is_bf16, i, w.k) : _mm256_setzero_ps();
        if (round) {  // to bf16, to nearest, ties to even; NaN stays NaN
            const __m256i bits = _mm256_castps_si256(value);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            const __m256i rounded = _mm256_and_si256(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd),
                                                     _mm256_set1_epi32(int(0xFFFF0000)));
            value = _mm256_blendv_ps(floats(rounded), value, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        }
        _mm256_storeu_ps(reinterpret_cast<float*>(row) + i, value);
    }
}

bool supported(const CpuFeatures& f) { return f.avx2; }

uint64_t row_bytes(const BlobView& w, int64_t activation_group) { return (w.segment && activation_group != 0 ? 2 : 4) * w.k_pad; }

}  // namespace

const Kernel avx2_kernel = {"avx2", max_rows, supported, row_bytes, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
