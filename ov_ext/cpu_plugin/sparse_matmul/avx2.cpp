// AVX2 with FMA and F16C (Haswell, Zen and later); compiled a second time with AVX-VNNI (Alder Lake, Sierra Forest, Zen 5 and later).
//
// There is no expand instruction: eight mask bits look up a byte shuffle that spreads packed values over their lanes. One row of the
// format is two registers, 8 outputs each. Up to `widest` rows of x are multiplied straight from the decoded registers; for more, a
// segment is decoded once to memory that fits the first-level cache. Sums are kept in one order for any number of rows, so a
// row's bits do not depend on its company.
#include <immintrin.h>

#include "../support/cpu_features.hpp"
#include "kernel.hpp"
#include "../support/unaligned.hpp"

namespace ov_ext::sparse_matmul {
namespace {

INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m256 floats(__m256i bits) { return _mm256_castsi256_ps(bits); }
INLINE __m256i join(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

// How a row is multiplied. Every way is exact for integers: vpmaddubsw saturates a sum of two products at 16 bits, so it is only given
// products that fit.
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

// Cutting a nibble out is cheapest when it stays in the high half of its byte: 16 times the weight. Only narrow sums have no room.
constexpr int extra_bits(Kind kind, Dot dot) { return kind == Kind::int4 && dot != Dot::narrow ? 4 : 0; }

// Rows of x for which there are accumulators (two registers a row) beside the operands of the dot product, in 16 registers.
constexpr int widest_of(Dot dot) { return dot == Dot::signs ? 4 : 6; }

// ------------------------------------------------------------------------------------------------- decoding rows

// Shuffles for 16 lanes from 16 packed values on. Bytes need two mask bytes: the lanes of the second one start where the values of the
// first one end, so shuffle = low[first] + high[second]. A clear bit gives a lane with its top bit set, which a shuffle makes zero.
struct ShuffleTables {
    uint8_t low[256][16];   // shuffle of lanes 0..7 | number of set bits, eight times
    uint8_t high[256][16];  // zeros | the same shuffle for lanes 8..15
    uint8_t words[256][16];
};

constexpr ShuffleTables make_tables() {
    ShuffleTables t{};
    for (int mask = 0; mask < 256; mask++) {
        int value = 0;
        for (int lane = 0; lane < 8; lane++) {
            const bool set = mask >> lane & 1;
            t.low[mask][lane] = t.high[mask][8 + lane] = set ? uint8_t(value) : 0x80;
            t.words[mask][2 * lane] = set ? uint8_t(2 * value) : 0x80;
            t.words[mask][2 * lane + 1] = set ? uint8_t(2 * value + 1) : 0x80;
            value += set;
        }
        for (int lane = 8; lane < 16; lane++)
            t.low[mask][lane] = uint8_t(value);
    }
    return t;
}
alignas(64) constexpr ShuffleTables tables = make_tables();

// Table entry at an offset in bytes.
INLINE __m128i entry(const uint8_t (&table)[256][16], uint16_t offset) { return load128(&table[0][0] + offset); }

// One row: outputs 0..7 and 8..15 of a panel, row_k inputs each.
struct Row {
    __m256i half[2];
};

// Input j of the row as floats.
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
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even rows
    const uint8_t* odd;     // int4: cursor of the odd rows

    static constexpr int mask_bytes = kind == Kind::bf16 ? 4 : 8;  // of a row

    // Offsets of the table entries of the next 16 rows. A load each is less work than cutting every byte out of a mask.
    INLINE void look_up(uint16_t* offsets) const {
        if (!dense)
            for (int i = 0; i < 16 * mask_bytes; i += 16)
                _mm256_store_si256(reinterpret_cast<__m256i*>(offsets + i),
                                   _mm256_slli_epi16(_mm256_cvtepu8_epi16(load128(masks + i)), 4));
    }

    // offsets: of this row.
    template <int parity>
    INLINE Row next(const uint16_t* offsets) {
        const uint8_t*& at = kind == Kind::int4 && parity ? odd : values;
        Row row;
        if constexpr (dense) {
            row = {{extended<parity>(load256(at)), extended<parity>(load256(at + 32))}};
            at += 64;
        } else if constexpr (kind == Kind::bf16) {
            const uint32_t mask = load<uint32_t>(masks);
            masks += 4;
            for (int half = 0; half < 2; half++) {
                const uint8_t* from = at + (half ? 2 * __builtin_popcount(mask & 0xFFFF) : 0);
                const uint8_t* middle = at + 2 * __builtin_popcount(mask & (half ? 0xFFFFFF : 0xFF));
                row.half[half] =
                    _mm256_shuffle_epi8(join(load128(from), load128(middle)), join(entry(tables.words, offsets[2 * half]),
                                                                                   entry(tables.words, offsets[2 * half + 1])));
            }
            at += 2 * __builtin_popcount(mask);
        } else {
            const uint64_t mask = load<uint64_t>(masks);
            masks += 8;
            const uint8_t* second = at + __builtin_popcount(uint32_t(mask));
            for (int half = 0; half < 2; half++) {
                const uint8_t* from = half ? second : at;
                const uint8_t* middle = half ? at + __builtin_popcountll(mask << 16) : at + __builtin_popcount(mask & 0xFFFF);
                const uint16_t* of = offsets + 4 * half;
                const __m256i shuffle = _mm256_add_epi8(join(entry(tables.low, of[0]), entry(tables.low, of[2])),
                                                        join(entry(tables.high, of[1]), entry(tables.high, of[3])));
                row.half[half] = _mm256_shuffle_epi8(extended<parity>(join(load128(from), load128(middle))), shuffle);
            }
            at += __builtin_popcountll(mask);
        }
        return row;
    }

    // The weights in packed values: int4 are cut out of their bytes.
    template <int parity>
    static INLINE __m256i extended(__m256i packed) {
        if constexpr (kind != Kind::int4)
            return packed;
        if constexpr (extra_bits(kind, dot) != 0)
            return _mm256_and_si256(parity ? packed : _mm256_slli_epi16(packed, 4), _mm256_set1_epi8(int8_t(0xF0)));
        const __m256i by_code = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,  //
                                                 0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        return _mm256_shuffle_epi8(by_code,
                                   _mm256_and_si256(parity ? _mm256_srli_epi16(packed, 4) : packed, _mm256_set1_epi8(15)));
    }

    static INLINE __m256 weight(const Row& row, int half, int j) { return weights<kind, dot>(row.half[half], j); }

    // Called every four rows, which consume four lines of values, half of that at half density or as int4.
    INLINE void prefetch() const {
        for (int line = 0; line < (dense ? 4 : 2) / (kind == Kind::int4 ? 2 : 1); line++)
            _mm_prefetch(reinterpret_cast<const char*>(values) + 2048 + 64 * line, _MM_HINT_T0);
        if (!dense)
            _mm_prefetch(reinterpret_cast<const char*>(masks) + 1024, _MM_HINT_T0);
    }
};

// Rows that expand() has decoded: bytes as they come out of a Stream, or all inputs as floats.
struct ExpandedBytes {
    const uint8_t* at;

    template <int>
    INLINE Row next(const uint16_t*) {
        const Row row = {{load256(at), load256(at + 32)}};
        at += 64;
        return row;
    }
    static constexpr int mask_bytes = 0;
    INLINE void look_up(uint16_t*) const {}
    INLINE void prefetch() const {}
};

template <int row_k>
struct ExpandedFloats {
    const uint8_t* at;

    template <int>
    INLINE const uint8_t* next(const uint16_t*) {
        const uint8_t* row = at;
        at += 64 * row_k;
        return row;
    }
    static INLINE __m256 weight(const uint8_t* row, int half, int j) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + 16 * j + 8 * half);
    }
    static constexpr int mask_bytes = 0;
    INLINE void look_up(uint16_t*) const {}
    INLINE void prefetch() const {}
};

template <Dot dot, int row_k>
struct ExpandedRows {
    using type = ExpandedBytes;
};
template <int row_k>
struct ExpandedRows<Dot::f32, row_k> {
    using type = ExpandedFloats<row_k>;
};

// Decodes `tiles` tiles to memory.
template <Kind kind, bool dense, Dot dot>
void expand(Stream<kind, dense, dot>& source, uint64_t tiles, uint8_t* to) {
    using Rows = Stream<kind, dense, dot>;
    constexpr int row_k = kind == Kind::bf16 ? 2 : 4;
    const auto put = [&](const Row& row) __attribute__((always_inline)) {
        if constexpr (dot == Dot::f32) {
            for (int j = 0; j < row_k; j++)
                for (int half = 0; half < 2; half++)
                    _mm256_store_ps(reinterpret_cast<float*>(to) + 16 * j + 8 * half, Rows::weight(row, half, j));
            to += 64 * row_k;
        } else {
            for (int half = 0; half < 2; half++)
                _mm256_store_si256(reinterpret_cast<__m256i*>(to) + half, row.half[half]);
            to += 64;
        }
    };
    Rows rows = source;
    alignas(32) uint16_t offsets[16 * Rows::mask_bytes];
    for (uint64_t panel = 0; panel < 4 * tiles; panel++) {
        rows.look_up(offsets);
        for (int r = 0; r < 16; r += 2) {
            if (r % 4 == 0)
                rows.prefetch();
            put(rows.template next<0>(offsets + r * Rows::mask_bytes));
            put(rows.template next<1>(offsets + (r + 1) * Rows::mask_bytes));
        }
    }
    source = rows;
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

// Adds the products of one decoded row with M rows of x, `stride` bytes apart.
template <Dot dot, int row_k, class Source, class AnyRow, int M>
INLINE void add_row(const AnyRow& row, const uint8_t* x, uint64_t stride, typename Sum<dot>::Register (&sum)[M][2]) {
    if constexpr (dot == Dot::f32) {
        for (int j = 0; j < row_k; j++) {
            const __m256 w[2] = {Source::weight(row, 0, j), Source::weight(row, 1, j)};
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
                magnitude[half] = _mm256_abs_epi8(row.half[half]);
        for (int m = 0; m < M; m++) {
            const __m256i activations = _mm256_set1_epi32(load<int32_t>(x + uint64_t(m) * stride));
            for (int half = 0; half < 2; half++) {
                const __m256i w = row.half[half];
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

// Adds the products of `tiles` tiles with M rows of x to sums[M][64]. Not inlined: its loop needs all registers.
template <Dot dot, int row_k, int M, class Source>
__attribute__((noinline)) void multiply_tiles(Source& source, uint64_t tiles, const uint8_t* x, uint64_t stride, typename Sum<dot>::Scalar* sums) {
    using S = Sum<dot>;
    constexpr uint64_t x_row = row_k * (dot == Dot::f32 ? 4 : 1);
    constexpr int run = dot == Dot::narrow ? 8 : 16;  // rows until the registers must be emptied
    Source rows = source;
    alignas(32) uint16_t offsets[16 * Source::mask_bytes + 1];
    for (uint64_t tile = 0; tile < tiles; tile++, x += 16 * x_row)
        for (int panel = 0; panel < 4; panel++) {
            rows.look_up(offsets);
            for (int r = 0; r < 16; r += run) {
                typename S::Scalar* at = sums + 16 * panel;
                typename S::Register sum[M][2];
                for (int m = 0; m < M; m++)
                    for (int half = 0; half < 2; half++)
                        sum[m][half] = dot == Dot::narrow ? typename S::Register{} : S::load(at + 64 * m + 8 * half);
                for (int i = r; i < r + run; i += 4) {
                    const uint8_t* x_at = x + uint64_t(i) * x_row;
                    const uint16_t* of = offsets + i * Source::mask_bytes;
                    rows.prefetch();
                    add_row<dot, row_k, Source>(rows.template next<0>(of), x_at, stride, sum);
                    add_row<dot, row_k, Source>(rows.template next<1>(of + Source::mask_bytes), x_at + x_row, stride, sum);
                    add_row<dot, row_k, Source>(rows.template next<0>(of + 2 * Source::mask_bytes), x_at + 2 * x_row, stride, sum);
                    add_row<dot, row_k, Source>(rows.template next<1>(of + 3 * Source::mask_bytes), x_at + 3 * x_row, stride, sum);
                }
                for (int m = 0; m < M; m++)
                    for (int half = 0; half < 2; half++) {
                        if constexpr (dot == Dot::narrow)
                            sum[m][half] = _mm256_add_epi32(S::load(at + 64 * m + 8 * half),
                                                            _mm256_madd_epi16(sum[m][half], _mm256_set1_epi16(1)));
                        S::store(at + 64 * m + 8 * half, sum[m][half]);
                    }
            }
        }
    source = rows;
}

template <Dot dot, int row_k, class Source>
void multiply_tiles(uint64_t rows, Source& source, uint64_t tiles, const uint8_t* x, uint64_t stride,
                    typename Sum<dot>::Scalar* sums) {
    static_assert(widest_of(dot) <= 6, "a case for every number of rows");
    switch (rows) {
        case 1: return multiply_tiles<dot, row_k, 1>(source, tiles, x, stride, sums);
        case 2: return multiply_tiles<dot, row_k, 2>(source, tiles, x, stride, sums);
        case 3: return multiply_tiles<dot, row_k, 3>(source, tiles, x, stride, sums);
        case 4: return multiply_tiles<dot, row_k, 4>(source, tiles, x, stride, sums);
        default: break;
    }
    if constexpr (widest_of(dot) > 4) {
        if (rows == 5)
            multiply_tiles<dot, row_k, 5>(source, tiles, x, stride, sums);
        else
            multiply_tiles<dot, row_k, 6>(source, tiles, x, stride, sums);
    }
}

// ------------------------------------------------------------------------------------------------- one block

INLINE __m256 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int eight) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * 64 + uint64_t(eight) * 8;
    return w.scales_f32 ? _mm256_loadu_ps(reinterpret_cast<const float*>(w.scales + 4 * i))
                        : _mm256_cvtph_ps(load128(w.scales + 2 * i));
}

// Scales the sums of one segment, partial[rows][64], and adds them to those of the chunk. x_scales: of the first row and this segment.
template <Kind kind, Dot dot>
void add_segment(const BlobView& w, uint64_t block, uint64_t segment, const typename Sum<dot>::Scalar* partial, const float* x_scales,
                 uint64_t rows, float* sums) {
    const uint64_t segments = w.k_pad / w.segment;
    for (int i = 0; i < 8; i++) {
        const __m256 scale = scales_of(w, block, segment, i);
        const uint8_t* comp = w.compensation + 2 * ((block * segments + segment) * 64 + 8 * uint64_t(i));
        const __m256i offset = _mm256_slli_epi32(_mm256_cvtepi16_epi32(load128(comp)), 7);
        for (uint64_t m = 0; m < rows; m++) {
            const uint64_t at = 64 * m + 8 * uint64_t(i);
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

constexpr uint64_t max_rows = 64;

template <Kind kind, bool dense, bool integer>
void multiply_block(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row,
                    uint64_t rows, float* out) {
    constexpr Dot dot = dot_of(kind, integer);
    constexpr uint64_t row_k = kind == Kind::bf16 ? 2 : 4, mask_bytes = 2 * row_k, tiles_per_chunk = 512 / (16 * row_k);
    constexpr uint64_t widest = widest_of(dot), most_tiles = kind == Kind::bf16 ? 1 : 2;
    using Scalar = typename Sum<dot>::Scalar;
    using Expanded = typename ExpandedRows<dot, row_k>::type;
    const bool direct = rows <= widest;
    // What is decoded at a time: a segment; bf16 has none.
    const uint64_t step = kind != Kind::bf16 ? w.segment / 64 : direct ? tiles_per_chunk : most_tiles;
    const uint64_t segments = kind == Kind::bf16 ? 0 : w.k_pad / w.segment;
    const float* x_scales = integer ? a.scales + row * segments : nullptr;
    alignas(64) uint8_t expanded[most_tiles * 64 * 64 * (dot == Dot::f32 ? row_k : 1)];
    alignas(64) float sums[max_rows * 64];  // of one chunk

    __builtin_memset(out, 0, rows * 64 * sizeof(float));
    for (uint64_t chunk = first; chunk < last; chunk++) {
        const uint64_t begin = chunk * tiles_per_chunk, end = begin + tiles_per_chunk < w.tiles ? begin + tiles_per_chunk : w.tiles;
        const uint8_t* run = w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk));
        Stream<kind, dense, dot> stream{dense ? nullptr : w.masks + (block * w.tiles + begin) * 64 * mask_bytes, run, run};
        __builtin_memset(sums, 0, rows * 64 * sizeof(float));
        for (uint64_t tile = begin; tile < end; tile += step) {
            const uint64_t tiles = tile + step < end ? step : end - tile;
            if (!direct)
                expand(stream, tiles, expanded);
            for (uint64_t m = 0, some; m < rows; m += some) {
                const uint64_t left = rows - m, passes = (left + widest - 1) / widest;
                some = (left + passes - 1) / passes;
                const uint8_t* x = static_cast<const uint8_t*>(a.data) + (row + m) * a.stride + tile * 16 * row_k * (integer ? 1 : 4);
                const auto multiply = [&](Scalar* to) {
                    if (direct)
                        return multiply_tiles<dot, row_k>(some, stream, tiles, x, a.stride, to);
                    Expanded source{expanded};
                    multiply_tiles<dot, row_k>(some, source, tiles, x, a.stride, to);
                };
                if constexpr (kind == Kind::bf16) {
                    multiply(sums + 64 * m);
                } else {
                    alignas(64) Scalar partial[widest * 64] = {};
                    multiply(partial);
                    const uint64_t segment = tile / step;
                    add_segment<kind, dot>(w, block, segment, partial, x_scales + m * segments + segment, some, sums + 64 * m);
                }
            }
        }
        for (uint64_t i = 0; i < rows * 64; i += 8)
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
void quantize(const BlobView& w, const void* x, bool x_is_bf16, uint64_t group, bool offset, uint8_t* row,
              float* scales) {
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
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
            const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(offset ? int8_t(0x80) : int8_t(0)));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(row + i), bytes);
        }
        for (uint64_t s = start / w.segment; s * w.segment < padded_end; s++)
            scales[s] = factor;
    }
}

void prepare(const BlobView& w, const void* x, bool x_is_bf16, const Activations& a, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (a.integer) {
        quantize(w, x, x_is_bf16, a.group < 0 ? w.k_pad : uint64_t(a.group), offset_by_128(dot_of(w.kind, true)), to,
                 a.scales + row * (w.k_pad / w.segment));
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
        _mm256_storeu_ps(reinterpret_cast<float*>(to) + i, value);
    }
}

uint64_t row_bytes(const BlobView& w, int64_t activation_group) { return (w.segment && activation_group != 0 ? 1 : 4) * w.k_pad; }

#if defined(__AVXVNNI__)
bool supported(const CpuFeatures& f) { return f.avx_vnni; }
#else
bool supported(const CpuFeatures& f) { return f.avx2; }
#endif

}  // namespace

#if defined(__AVXVNNI__)
const Kernel avx2_vnni_kernel = {"avx2_vnni", max_rows, supported, row_bytes, prepare, multiply};
#else
const Kernel avx2_kernel = {"avx2", max_rows, supported, row_bytes, prepare, multiply};
#endif

}  // namespace ov_ext::sparse_matmul
