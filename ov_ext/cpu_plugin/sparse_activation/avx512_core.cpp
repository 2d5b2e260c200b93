// AVX-512 F, BW, DQ and VL (Skylake-SP and later), and the same with VNNI (Cascade Lake, Zen 4 and later): compiled twice.
//
// Integers go in fours of inputs that stay, whichever those are: their rows are interleaved byte by byte in registers, so that each 32-bit
// lane holds four weights of one output for a dot product. A batch of rows is read line by line, so that sums stay in registers for a
// line; the rows of the next batch are brought nearer meanwhile, each from its begin to its end, as memory likes it.
#include "../support/avx512_activations.hpp"
#include "lists.hpp"

namespace ov_ext::sparse_activation {
namespace {

constexpr uint64_t line = 64;  // bytes, of a row: a register

// Entries whose rows are read together. 16-bit sums hold 32 products of int4 in two parts: at most 16 * 15 * 127 = 30480 each. Rows that are
// a multiple of 4 KiB apart meet in few sets of a level-1 cache and keep pushing sums out of it: longer batches read those less often.
constexpr uint64_t longest_batch = 32;
static_assert(longest_batch < entries_ahead);
INLINE uint64_t batch_of(const Rows& rows) { return rows.stride % 4096 ? 16 : longest_batch; }

INLINE __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
INLINE __m512i broadcast(const int8_t* codes) { return _mm512_set1_epi32(load<int32_t>(codes)); }

// ------------------------------------------------------------------------------------------------- integers

// A line has as many sums of 16 outputs as interleaving and nibbles make of it; outputs of a line.
template <Kind kind>
constexpr int sums_of_line = kind == Kind::int4 ? 8 : 4;
template <Kind kind>
constexpr uint64_t line_outputs = 16 * sums_of_line<kind>;
// What is added to weights to make them unsigned. Without VNNI int8 keeps its sign.
#if defined(__AVX512VNNI__)
constexpr bool vnni = true;
#else
constexpr bool vnni = false;
#endif
template <Kind kind>
constexpr int weight_offset = kind == Kind::int4 ? 8
                              : vnni             ? 128
                                                 : 0;

// Adds pairs of words, which are neighbours.
INLINE __m512i add_pairs(__m512i words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }

// The weights of four rows, as operands of products: one for each sum of a line.
template <Kind kind>
INLINE void interleave(const uint8_t* const (&row)[4], __m512i (&weights)[sums_of_line<kind>]) {
    const __m512i a = load512(row[0]), b = load512(row[1]), c = load512(row[2]), d = load512(row[3]);
    __m512i fours[4];
    for (int high = 0; high < 2; high++) {
        const __m512i ab = high ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
        const __m512i cd = high ? _mm512_unpackhi_epi8(c, d) : _mm512_unpacklo_epi8(c, d);
        fours[2 * high] = _mm512_unpacklo_epi16(ab, cd);
        fours[2 * high + 1] = _mm512_unpackhi_epi16(ab, cd);
    }
    for (int i = 0; i < 4; i++)
        if constexpr (kind == Kind::int4) {
            weights[i] = _mm512_and_si512(fours[i], _mm512_set1_epi8(15));
            weights[4 + i] = _mm512_and_si512(_mm512_srli_epi16(fours[i], 4), _mm512_set1_epi8(15));
        } else {
            weights[i] = vnni ? _mm512_xor_si512(fours[i], _mm512_set1_epi8(int8_t(0x80))) : fours[i];
        }
}

// Adds the products of four inputs. Without VNNI sums of int4 are words, for a batch at most: see widened. Assembly keeps the order of
// instructions: compilers move loads and products ahead and run out of registers.
template <Kind kind>
INLINE void multiply_add(__m512i& sum, __m512i weights, __m512i codes) {
#if defined(__AVX512VNNI__)
    __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(codes));
#else
    if constexpr (kind == Kind::int4) {
        sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(weights, codes));
    } else {
        // vpmaddubsw saturates, so |w| meets codes that took over the sign of w: at most 2 * 128 * 127.
        const __m512i with_sign = _mm512_mask_sub_epi8(codes, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), codes);
        sum = _mm512_add_epi32(sum, add_pairs(_mm512_maddubs_epi16(_mm512_abs_epi8(weights), with_sign)));
    }
    __asm__ volatile("" : "+v"(sum));
#endif
}

template <Kind kind>
INLINE __m512i widened(__m512i sum) {
    return kind == Kind::int4 && !vnni ? add_pairs(sum) : sum;
}

INLINE __m512 scales_at(const View& w, const uint8_t* scales, uint64_t c) {
    return w.scales_f32 ? _mm512_loadu_ps(scales + 4 * c)
                        : _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 2 * c)));
}

// Scales the sums of a line and a segment. Sums 2i and 2i + 1 hold 16 neighbours each in turn: bits of a lane's number are, from the lowest
// one, bits 3, 0 and 2 of an output's, and which half of the line it is in; bit 1 is the number of the sum.
template <Kind kind>
INLINE void scale(const View& w, const Kept& kept, uint64_t segment, const uint8_t* scales, uint64_t first,
                  const __m512i (&sums)[sums_of_line<kind>], float* chunk_sums) {
    const __m512i near = _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 1, 3, 17, 19, 5, 7, 21, 23);
    const __m512i far = _mm512_add_epi32(near, _mm512_set1_epi32(8));
    const __m512i added = _mm512_set1_epi32(weight_offset<kind> * kept.sums[segment]);
    const __m512 factor = _mm512_set1_ps(kept.factors[segment]);
    for (uint64_t i = 0; i < sums_of_line<kind> / 2; i++)
        for (uint64_t half = 0; half < 2; half++) {
            const uint64_t c = 16 * i + half * (line_outputs<kind> / 2);
            const __m512i sum = _mm512_sub_epi32(_mm512_permutex2var_epi32(sums[2 * i], half ? far : near, sums[2 * i + 1]), added);
            const __m512 by = _mm512_mul_ps(factor, scales_at(w, scales, first + c));
            _mm512_store_ps(chunk_sums + c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by, _mm512_load_ps(chunk_sums + c)));
        }
}

// A batch, or what is left of a segment, and a line of its rows.
template <Kind kind>
INLINE void add_line(const Rows& rows, const uint32_t* channels, const int8_t* codes, uint64_t entries, uint64_t at, Ahead& ahead,
                     __m512i* sums) {
    constexpr int count = sums_of_line<kind>;
    __m512i sum[count] = {};
    const auto multiply_four = [&](uint64_t i) INLINED {
        const uint8_t* const row[4] = {rows.of(channels[i]) + at, rows.of(channels[i + 1]) + at, rows.of(channels[i + 2]) + at,
                                       rows.of(channels[i + 3]) + at};
        __m512i weights[count];
        interleave<kind>(row, weights);
        const __m512i x = broadcast(codes + i);
        for (int s = 0; s < count; s++)
            multiply_add<kind>(sum[s], weights[s], x);
        ahead.step();
        ahead.step();
    };
    for (uint64_t i = 0; i < entries; i += 4)
        multiply_four(i);
    for (int s = 0; s < count; s++)
        sums[s] = _mm512_add_epi32(sums[s], widened<kind>(sum[s]));
}

// One segment: sums of all outputs of the blocks, then scaled.
template <Kind kind>
INLINE void add_integers(const View& w, const Rows& rows, const Kept& kept, uint64_t block, uint64_t segment, Ahead& ahead,
                         float* chunk_sums) {
    constexpr int count = sums_of_line<kind>;
    const uint64_t lines = rows.bytes / line, batch = batch_of(rows);
    __m512i sums[most_outputs / 16];
    __builtin_memset(sums, 0, lines * count * sizeof(*sums));
    for (uint64_t from = kept.starts[segment], end = kept.starts[segment + 1], to; from < end; from = to) {
        to = from + batch < end ? from + batch : end;
        for (uint64_t i = 0; i < lines; i++)
            add_line<kind>(rows, kept.channels + from, kept.codes + from, to - from, i * line, ahead, sums + i * count);
    }
    const uint8_t* scales = scales_of(w, block, segment);
    for (uint64_t i = 0; i < lines; i++) {
        __m512i of_line[count];
        __builtin_memcpy(of_line, sums + i * count, sizeof(of_line));
        scale<kind>(w, kept, segment, scales, i * line_outputs<kind>, of_line, chunk_sums + i * line_outputs<kind>);
    }
}

// ------------------------------------------------------------------------------------------------- all inputs, many rows of x

constexpr uint64_t run = vnni ? 128 : 32;  // inputs whose weights are taken apart at a time; 16-bit sums of int4 hold no more
constexpr uint64_t most_rows = 4;          // of x that meet them with their sums in registers

// sums[M][sums of a line] of a run of weights that were taken apart.
template <Kind kind, int M>
void multiply_run(const __m512i* weights, uint64_t fours, const Kept* rows, uint64_t entry, __m512i* sums) {
    constexpr int count = sums_of_line<kind>;
    const int8_t* codes[M];
    for (int m = 0; m < M; m++)
        codes[m] = rows[m].codes + entry;
    for (int first = 0; first < count; first += 4) {
        __m512i sum[M][4] = {};
        for (uint64_t f = 0; f < fours; f++) {
            __m512i of_four[4];
            for (int i = 0; i < 4; i++)
                of_four[i] = _mm512_load_si512(weights + f * count + first + i);
            for (int m = 0; m < M; m++) {
                const __m512i x = broadcast(codes[m] + 4 * f);
                for (int i = 0; i < 4; i++)
                    multiply_add<kind>(sum[m][i], of_four[i], x);
            }
        }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < 4; i++)
                sums[m * count + first + i] = _mm512_add_epi32(sums[m * count + first + i], widened<kind>(sum[m][i]));
    }
}

template <Kind kind>
INLINE void multiply_run(const __m512i* weights, uint64_t fours, const Kept* rows, uint64_t count, uint64_t entry, __m512i* sums) {
    for (; count; rows += most_rows, sums += most_rows * sums_of_line<kind>) {
        switch (count) {
            case 1: return multiply_run<kind, 1>(weights, fours, rows, entry, sums);
            case 2: return multiply_run<kind, 2>(weights, fours, rows, entry, sums);
            case 3: return multiply_run<kind, 3>(weights, fours, rows, entry, sums);
            default: multiply_run<kind, most_rows>(weights, fours, rows, entry, sums); count -= most_rows;
        }
    }
}

template <Kind kind>
void multiply_chunk_all(const View& w, const Kept* kept, uint64_t count, uint64_t first, uint64_t last, uint64_t chunk, float* out,
                        uint64_t stride) {
    constexpr int of_line = sums_of_line<kind>;
    const Rows rows(w, first, last);
    const Segments segments(w, chunk);
    const uint64_t outputs = (last - first) * w.block_n, lines = rows.bytes / line;
    alignas(64) float chunk_sums[most_sums];
    __builtin_memset(chunk_sums, 0, 4 * count * outputs);
    const uint32_t* const channels = kept->channels;
    Ahead ahead(rows, channels + kept->starts[segments.begin + 1]);
    for (uint64_t s = segments.begin; s < segments.end; s++) {
        const uint8_t* scales = scales_of(w, first, s);
        for (uint64_t i = 0; i < lines; i++) {
            __m512i sums[most_sums / 1024 * of_line];
            __builtin_memset(sums, 0, count * of_line * sizeof(*sums));
            for (uint64_t from = kept->starts[s], end = kept->starts[s + 1], to; from < end; from = to) {
                to = from + run < end ? from + run : end;
                __m512i weights[run / 4][of_line];
                for (uint64_t e = from; e < to; e += 4) {
                    const uint8_t* const row[4] = {rows.of(channels[e]) + i * line, rows.of(channels[e + 1]) + i * line,
                                                   rows.of(channels[e + 2]) + i * line, rows.of(channels[e + 3]) + i * line};
                    interleave<kind>(row, weights[(e - from) / 4]);
                    ahead.step();
                    ahead.step();
                }
                multiply_run<kind>(weights[0], (to - from) / 4, kept, count, from, sums);
            }
            for (uint64_t row = 0; row < count; row++) {
                const auto& of_row = *reinterpret_cast<const __m512i(*)[of_line]>(sums + row * of_line);
                const uint64_t c = i * line_outputs<kind>;
                scale<kind>(w, kept[row], s, scales, c, of_row, chunk_sums + row * outputs + c);
            }
        }
    }
    for (uint64_t row = 0; row < count; row++)
        for (uint64_t i = 0; i < outputs; i += 16) {
            float* const to = out + row * stride + i;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(chunk_sums + row * outputs + i)));
        }
}

void multiply_all(const View& w, const Kept* rows, uint64_t count, uint64_t first, uint64_t last, uint64_t chunk, float* out,
                  uint64_t stride) {
    (w.kind == Kind::int8 ? multiply_chunk_all<Kind::int8> : multiply_chunk_all<Kind::int4>)(w, rows, count, first, last, chunk, out,
                                                                                             stride);
}

// ------------------------------------------------------------------------------------------------- floats

// A strip is what fills as many sums as hide the latency of a multiply-add.
template <Kind kind>
constexpr uint64_t strip = kind == Kind::int4 ? line : 2 * line;
template <Kind kind>
constexpr int sums_of_strip = kind == Kind::bf16 ? 4 : 8;

// The weights of one input in a strip, of 16 outputs each, in pairs: see store_pair.
template <Kind kind>
INLINE void add_products(const uint8_t* row, __m512 x, __m512 (&sums)[sums_of_strip<kind>]) {
    if constexpr (kind == Kind::bf16) {
        for (int i = 0; i < 2; i++) {
            const __m512i pairs = load512(row + line * i);
            const __m512i odd = _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000)));
            sums[2 * i] = _mm512_fmadd_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), sums[2 * i]);
            sums[2 * i + 1] = _mm512_fmadd_ps(x, _mm512_castsi512_ps(odd), sums[2 * i + 1]);
        }
    } else {
        // A shuffle puts each byte to the top of a lane, from where an arithmetic shift brings it down with its sign.
        const auto add = [&](int i, __m512i bytes, int down) INLINED {
            const int from = 8 * (i >> 1 & 1) + (i & 1);
            const __m512i lanes =
                _mm512_add_epi32(_mm512_set1_epi32((from << 24) + 0x00808080), _mm512_slli_epi32(_mm512_set4_epi32(6, 4, 2, 0), 24));
            const __m512i top = _mm512_shuffle_epi8(bytes, lanes);
            sums[i] = _mm512_fmadd_ps(x, _mm512_cvtepi32_ps(_mm512_srai_epi32(top, unsigned(down))), sums[i]);
        };
        if constexpr (kind == Kind::int8) {
            for (int half = 0; half < 2; half++) {
                const __m512i bytes = load512(row + line * half);
                for (int i = 0; i < 4; i++)
                    add(4 * half + i, bytes, 24);
            }
        } else {
            const __m512i codes = _mm512_xor_si512(load512(row), _mm512_set1_epi8(int8_t(0x88)));
            for (int i = 0; i < 4; i++) {
                add(i, _mm512_slli_epi16(codes, 4), 28);
                add(4 + i, codes, 28);
            }
        }
    }
}

// Of sums 2i and 2i + 1 of a strip: the first output of the 16 that their lower halves make, and how far behind those of the upper halves
// are.
template <Kind kind>
INLINE uint64_t output_of_pair(uint64_t i) {
    return kind == Kind::bf16 ? 32 * i : kind == Kind::int8 ? 64 * (i / 2) + 16 * (i % 2) : 16 * i;
}
template <Kind kind>
constexpr uint64_t upper_half = kind == Kind::bf16   ? 16
                                : kind == Kind::int8 ? 32
                                                     : 64;

template <Kind kind>
INLINE void add_floats(const View& w, const Rows& rows, const Kept& kept, uint64_t block, uint64_t segment, Ahead& ahead,
                       float* chunk_sums) {
    constexpr int count = sums_of_strip<kind>;
    constexpr uint64_t outputs = 16 * count;
    const uint64_t strips = rows.bytes / strip<kind>, batch = batch_of(rows);
    __m512 sums[most_outputs / 16];
    __builtin_memset(sums, 0, strips * count * sizeof(*sums));
    for (uint64_t from = kept.starts[segment], end = kept.starts[segment + 1], to; from < end; from = to) {
        to = from + batch < end ? from + batch : end;
        for (uint64_t at = 0; at < strips; at++) {
            __m512 registers[count];
            __builtin_memcpy(registers, sums + at * count, sizeof(registers));
            for (uint64_t i = from; i < to; i++) {
                add_products<kind>(rows.of(kept.channels[i]) + at * strip<kind>, _mm512_set1_ps(kept.values[i]), registers);
                if (strip<kind> == 2 * line || (i - from) % 2 == 0)
                    ahead.step();
            }
            __builtin_memcpy(sums + at * count, registers, sizeof(registers));
        }
    }
    const uint8_t* scales = scales_of(w, block, segment);
    for (uint64_t at = 0; at < strips; at++)
        for (uint64_t i = 0; i < count / 2; i++)
            for (uint64_t half = 0; half < 2; half++) {
                const __m512 a = sums[at * count + 2 * i], b = sums[at * count + 2 * i + 1];
                const __m512 sum = half ? _mm512_shuffle_f32x4(a, b, 0xEE) : _mm512_shuffle_f32x4(a, b, 0x44);
                const uint64_t c = at * outputs + output_of_pair<kind>(i) + half * upper_half<kind>;
                float* const to = chunk_sums + c;
                _mm512_store_ps(to, kind == Kind::bf16 ? sum : _mm512_fmadd_ps(sum, scales_at(w, scales, c), _mm512_load_ps(to)));
            }
}

template <Kind kind>
void multiply_chunk(const View& w, const Kept& kept, uint64_t first, uint64_t last, uint64_t chunk, float* out) {
    const Rows rows(w, first, last);
    const Segments segments(w, chunk);
    const uint64_t outputs = (last - first) * w.block_n;
    alignas(64) float sums[most_outputs];
    __builtin_memset(sums, 0, 4 * outputs);
    Ahead ahead(rows, kept.channels + kept.starts[segments.begin] + batch_of(rows));
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
    for (uint64_t i = 0; i < outputs; i += 16)
        _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(out + i), _mm512_load_ps(sums + i)));
}

void multiply(const View& w, const Kept& kept, uint64_t first, uint64_t last, uint64_t chunk, float* out) {
    const auto function = w.kind == Kind::bf16   ? multiply_chunk<Kind::bf16>
                          : w.kind == Kind::int8 ? multiply_chunk<Kind::int8>
                                                 : multiply_chunk<Kind::int4>;
    function(w, kept, first, last, chunk, out);
}

// ------------------------------------------------------------------------------------------------- which inputs stay

// Floats of 16 inputs: one for all, or one for each, without touching memory behind the last one.
INLINE __m512 rule_at(const uint8_t* rule, uint64_t step, uint64_t k, uint64_t end) {
    return step ? load_x(rule, false, k, end) : _mm512_set1_ps(load<float>(rule));
}

uint64_t keep(const View& w, const void* x, bool x_is_bf16, bool all, const Kept& kept) {
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint64_t end = 0, total = 0;
    for (uint64_t s = 0; s < w.segments; s++) {
        kept.starts[s] = uint32_t(end);
        const uint64_t first = s * w.segment, last = first + w.segment < w.k ? first + w.segment : w.k;
        alignas(64) float of_segment[default_segment + 16];
        float* const values = kept.integer ? of_segment : kept.values + end;
        uint64_t count = 0, staying = 0;
        for (uint64_t k = first; k < last; k += 16) {
            __m512 value = load_x(x, x_is_bf16, k, last);
            const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(value, _mm512_set1_ps(w.centre)));
            const __mmask16 valid = last - k >= 16 ? 0xFFFF : __mmask16((1u << (last - k)) - 1);
            const __mmask16 near = _mm512_cmp_ps_mask(distance, rule_at(w.threshold, w.threshold_step, k, last), _CMP_LE_OQ);
            const __mmask16 stay = valid & ~near, mask = all ? valid : stay;
            if (w.replacement)
                value = _mm512_sub_ps(value, rule_at(w.replacement, w.replacement_step, k, last));
            _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(mask, _mm512_maskz_mov_ps(stay, value)));
            if (!all) {
                const __m512i channels = _mm512_add_epi32(numbers, _mm512_set1_epi32(int32_t(k)));
                _mm512_storeu_si512(kept.channels + end + count, _mm512_maskz_compress_epi32(mask, channels));
            }
            count += uint64_t(__builtin_popcount(mask));
            staying += uint64_t(__builtin_popcount(stay));
        }
        total += staying;
        if (!count)
            continue;
        if (kept.integer) {
            const uint64_t padded = (count + 15) / 16 * 16;
            quantize({count, padded, padded, padded}, values, false, 0, reinterpret_cast<uint8_t*>(kept.codes + end), piece_bytes,
                     kept.factors + s);
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

#if defined(__AVX512VNNI__)
const Kernel avx512_core_vnni_kernel = {InstructionSet::avx512_core_vnni, keep, multiply, multiply_all};
#else
const Kernel avx512_core_kernel = {InstructionSet::avx512_core, keep, multiply, multiply_all};
#endif

}  // namespace ov_ext::sparse_activation
