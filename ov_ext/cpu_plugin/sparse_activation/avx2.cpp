// AVX2 with FMA and F16C (Haswell, Zen and later). It runs on every later x86-64 CPU, too.
//
// Integers go in pairs of inputs that stay, whichever those are: their rows are interleaved byte by byte in registers, and vpmaddubsw adds
// the two products of an output. A batch of rows is read strip by strip, so that sums stay in registers for a strip; the rows of the
// next batch are brought nearer meanwhile, each from its begin to its end, as memory likes it.
#include "../support/avx2_activations.hpp"
#include "lists.hpp"

namespace ov_ext::sparse_activation {
namespace {

// Entries whose rows are read together. 16-bit sums hold 16 products of int4: at most 16 * 15 * 127 = 30480.
constexpr uint64_t batch = 16;
static_assert(batch < entries_ahead);

INLINE void add_to(int32_t* sums, __m256i v) {
    auto* at = reinterpret_cast<__m256i*>(sums);
    _mm256_store_si256(at, _mm256_add_epi32(_mm256_load_si256(at), v));
}

// Adds 16 sums of 16 bits, even and odd ones apart, which the format makes neighbours.
INLINE void add_widened(int32_t* sums, __m256i words) {
    add_to(sums, _mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16));
    add_to(sums + 8, _mm256_srai_epi32(words, 16));
}

// The pairs of a batch with a strip of their rows, a line of 64 bytes: sums[128] of int4, offset by 8, which the caller takes off.
template <Kind kind>
INLINE void add_strip(const Rows& rows, const uint32_t* channels, const int8_t* codes, uint64_t pairs, uint64_t at, Ahead& ahead,
                      int32_t* sums) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i words[8] = {};  // int4: 16 bits
    __m256i wide[8];        // int8: 32 bits
    if (kind == Kind::int8)
        for (int i = 0; i < 8; i++)
            wide[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + 8 * i));
    const auto multiply_pair = [&](uint64_t pair) INLINED {
        const uint8_t *first = rows.of(channels[2 * pair]) + at, *second = rows.of(channels[2 * pair + 1]) + at;
        const __m256i x = _mm256_set1_epi16(load<int16_t>(codes + 2 * pair));
        for (int half = 0; half < 2; half++) {
            const __m256i a = load256(first + 32 * half), b = load256(second + 32 * half);
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            if constexpr (kind == Kind::int4) {
                const auto add = [&](int i, __m256i w) INLINED {
                    words[i] = _mm256_add_epi16(words[i], _mm256_maddubs_epi16(_mm256_and_si256(w, nibble), x));
                };
                add(4 * half, low);
                add(4 * half + 1, high);
                add(4 * half + 2, _mm256_srli_epi16(low, 4));
                add(4 * half + 3, _mm256_srli_epi16(high, 4));
            } else {
                // vpmaddubsw saturates, so |w| meets x that took over the sign of w: at most 2 * 128 * 127.
                const auto add = [&](int i, __m256i w) INLINED {
                    const __m256i sum = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                    wide[i] = _mm256_add_epi32(wide[i], _mm256_srai_epi32(_mm256_slli_epi32(sum, 16), 16));
                    wide[i + 1] = _mm256_add_epi32(wide[i + 1], _mm256_srai_epi32(sum, 16));
                };
                add(4 * half, low);
                add(4 * half + 2, high);
            }
        }
        ahead.step();
    };
    if (pairs == batch / 2) {
#pragma GCC unroll 8
        for (uint64_t pair = 0; pair < batch / 2; pair++)
            multiply_pair(pair);
    } else {
        for (uint64_t pair = 0; pair < pairs; pair++)
            multiply_pair(pair);
    }
    for (int i = 0; i < 8; i++)
        if (kind == Kind::int4)
            add_widened(sums + 16 * i, words[i]);
        else
            _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8 * i), wide[i]);
}

// 64 weights of a row as floats, eight outputs a register: of 32 bytes of int4, 64 of int8, 128 of bf16.
template <Kind kind>
INLINE void add_products(const uint8_t* row, __m256 x, __m256 (&sums)[8]) {
    if constexpr (kind == Kind::bf16) {
        for (int i = 0; i < 4; i++) {
            const __m256i pairs = load256(row + 32 * i);
            sums[2 * i] = _mm256_fmadd_ps(x, floats(_mm256_slli_epi32(pairs, 16)), sums[2 * i]);
            sums[2 * i + 1] = _mm256_fmadd_ps(x, floats(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000)))), sums[2 * i + 1]);
        }
    } else {
        // A shuffle puts each byte to the top of a lane, from where an arithmetic shift brings it down with its sign.
        const auto add = [&](int i, __m256i bytes, int down) INLINED {
            const int from = 8 * (i >> 1 & 1) + (i & 1);
            const __m256i lanes = _mm256_add_epi32(_mm256_set1_epi32((from << 24) + 0x00808080),
                                                   _mm256_slli_epi32(_mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6), 24));
            const __m256i top = _mm256_shuffle_epi8(bytes, lanes);
            sums[i] = _mm256_fmadd_ps(x, _mm256_cvtepi32_ps(_mm256_srai_epi32(top, down)), sums[i]);
        };
        if constexpr (kind == Kind::int8) {
            for (int half = 0; half < 2; half++) {
                const __m256i bytes = load256(row + 32 * half);
                for (int i = 0; i < 4; i++)
                    add(4 * half + i, bytes, 24);
            }
        } else {
            const __m256i codes = _mm256_xor_si256(load256(row), _mm256_set1_epi8(int8_t(0x88)));
            for (int i = 0; i < 4; i++) {
                add(i, _mm256_slli_epi16(codes, 4), 28);
                add(4 + i, codes, 28);
            }
        }
    }
}

INLINE __m256 scales_at(const View& w, const uint8_t* scales, uint64_t c) {
    return w.scales_f32 ? _mm256_loadu_ps(reinterpret_cast<const float*>(scales + 4 * c)) : _mm256_cvtph_ps(load128(scales + 2 * c));
}

// One segment: sums of all outputs of the blocks, then scaled.
template <Kind kind>
INLINE void add_integers(const View& w, const Rows& rows, const Kept& kept, uint64_t block, uint64_t segment, Ahead& ahead,
                         float* chunk_sums) {
    constexpr uint64_t strip = 64, strip_outputs = kind == Kind::int4 ? 128 : 64;
    const uint64_t outputs = rows.bytes / strip * strip_outputs;
    alignas(32) int32_t sums[most_outputs];
    __builtin_memset(sums, 0, 4 * outputs);
    for (uint64_t from = kept.starts[segment], end = kept.starts[segment + 1], to; from < end; from = to) {
        to = from + batch < end ? from + batch : end;
        for (uint64_t at = 0; at < rows.bytes; at += strip)
            add_strip<kind>(rows, kept.channels + from, kept.codes + from, (to - from) / 2, at, ahead, sums + at / strip * strip_outputs);
    }
    const uint8_t* scales = scales_of(w, block, segment);
    const __m256i added = _mm256_set1_epi32(kind == Kind::int4 ? 8 * kept.sums[segment] : 0);
    const __m256 factor = _mm256_set1_ps(kept.factors[segment]);
    for (uint64_t c = 0; c < outputs; c += 8) {
        const __m256i sum = _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums + c)), added);
        const __m256 scale = _mm256_mul_ps(factor, scales_at(w, scales, c));
        _mm256_store_ps(chunk_sums + c, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_load_ps(chunk_sums + c)));
    }
}

template <Kind kind>
INLINE void add_floats(const View& w, const Rows& rows, const Kept& kept, uint64_t block, uint64_t segment, Ahead& ahead,
                       float* chunk_sums) {
    constexpr uint64_t strip = kind == Kind::int4 ? 32 : kind == Kind::int8 ? 64 : 128, strip_outputs = 64;
    const uint64_t outputs = rows.bytes / strip * strip_outputs;
    alignas(32) float sums[most_outputs];
    __builtin_memset(sums, 0, 4 * outputs);
    for (uint64_t from = kept.starts[segment], end = kept.starts[segment + 1], to; from < end; from = to) {
        to = from + batch < end ? from + batch : end;
        for (uint64_t at = 0; at < rows.bytes; at += strip) {
            float* const to_sums = sums + at / strip * strip_outputs;
            __m256 registers[8];
            for (int i = 0; i < 8; i++)
                registers[i] = _mm256_load_ps(to_sums + 8 * i);
            for (uint64_t i = from; i < to; i++) {
                add_products<kind>(rows.of(kept.channels[i]) + at, _mm256_set1_ps(kept.values[i]), registers);
                if ((i - from) % (128 / strip) == 0)
                    ahead.step();
            }
            for (int i = 0; i < 8; i++)
                _mm256_store_ps(to_sums + 8 * i, registers[i]);
        }
    }
    const uint8_t* scales = scales_of(w, block, segment);
    for (uint64_t c = 0; c < outputs; c += 8) {
        const __m256 sum = _mm256_load_ps(sums + c);
        _mm256_store_ps(chunk_sums + c,
                        kind == Kind::bf16 ? sum : _mm256_fmadd_ps(sum, scales_at(w, scales, c), _mm256_load_ps(chunk_sums + c)));
    }
}

template <Kind kind>
void multiply_chunk(const View& w, const Kept& kept, uint64_t first, uint64_t last, uint64_t chunk, float* out) {
    const Rows rows(w, first, last);
    const Segments segments(w, chunk);
    const uint64_t outputs = (last - first) * w.block_n;
    alignas(32) float sums[most_outputs];
    __builtin_memset(sums, 0, 4 * outputs);
    Ahead ahead(rows, kept.channels + kept.starts[segments.begin] + batch);
    for (uint64_t s = segments.begin; s < segments.end; s++) {
        if (kept.starts[s] == kept.starts[s + 1])
            continue;
        if constexpr (kind != Kind::bf16)
            if (kept.integer) {
                add_integers<kind>(w, rows, kept, first, s, ahead, sums);
                continue;
            }
        add_floats<kind>(w, rows, kept, first, s, ahead, sums);
    }
    for (uint64_t i = 0; i < outputs; i += 8)
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), _mm256_load_ps(sums + i)));
}

void multiply(const View& w, const Kept& kept, uint64_t first, uint64_t last, uint64_t chunk, float* out) {
    const auto function = w.kind == Kind::bf16   ? multiply_chunk<Kind::bf16>
                          : w.kind == Kind::int8 ? multiply_chunk<Kind::int8>
                                                 : multiply_chunk<Kind::int4>;
    function(w, kept, first, last, chunk, out);
}

// ------------------------------------------------------------------------------------------------- which inputs stay

// For eight lanes of which some stay: the numbers of those, in order.
struct Compressions {
    uint8_t lanes[256][8];
};
constexpr Compressions make_compressions() {
    Compressions t{};
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, to = 0; lane < 8; lane++)
            if (mask >> lane & 1)
                t.lanes[mask][to++] = uint8_t(lane);
    return t;
}
alignas(64) constexpr Compressions compressions = make_compressions();

// Floats of eight inputs: one for all, or one for each, without touching memory behind the last one.
INLINE __m256 rule_at(const uint8_t* rule, uint64_t step, uint64_t k, uint64_t end) {
    return step ? load_x(rule, false, k, end) : _mm256_set1_ps(load<float>(rule));
}

uint64_t keep(const View& w, const void* x, bool x_is_bf16, bool all, const Kept& kept) {
    uint64_t end = 0, total = 0;
    for (uint64_t s = 0; s < w.segments; s++) {
        kept.starts[s] = uint32_t(end);
        const uint64_t first = s * w.segment, last = first + w.segment < w.k ? first + w.segment : w.k;
        alignas(32) float of_segment[default_segment + 8];
        float* const values = kept.integer ? of_segment : kept.values + end;
        uint64_t count = 0;
        for (uint64_t k = first; k < last; k += 8) {
            __m256 value = load_x(x, x_is_bf16, k, last);
            const __m256 distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(value, _mm256_set1_ps(w.centre)));
            const __m256 near = _mm256_cmp_ps(distance, rule_at(w.threshold, w.threshold_step, k, last), _CMP_LE_OQ);
            const int valid = last - k >= 8 ? 255 : (1 << (last - k)) - 1, stay = ~_mm256_movemask_ps(near) & valid;
            const int mask = all ? valid : stay;
            if (w.replacement)
                value = _mm256_sub_ps(value, rule_at(w.replacement, w.replacement_step, k, last));
            value = _mm256_andnot_ps(near, value);
            const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(compressions.lanes[mask])));
            _mm256_storeu_ps(values + count, _mm256_permutevar8x32_ps(value, lanes));
            if (!all)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept.channels + end + count),
                                    _mm256_add_epi32(lanes, _mm256_set1_epi32(int32_t(k))));
            count += uint64_t(__builtin_popcount(unsigned(mask)));
            total += uint64_t(__builtin_popcount(unsigned(stay)));
        }
        if (!count)
            continue;
        if (kept.integer) {
            const uint64_t padded = (count + 7) / 8 * 8;
            quantize({count, padded, padded, padded}, values, false, false, reinterpret_cast<uint8_t*>(kept.codes + end), kept.factors + s);
            end = end_segment(kept, s, all, end, count);
        } else {
            end += count;
        }
    }
    kept.starts[w.segments] = uint32_t(end);
    if (!all)
        end_list(kept, end);
    return total;
}

}  // namespace

const Kernel avx2_kernel = {InstructionSet::avx2, keep, multiply, nullptr};

}  // namespace ov_ext::sparse_activation
