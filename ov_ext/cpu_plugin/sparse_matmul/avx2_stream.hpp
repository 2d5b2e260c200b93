// What the AVX2 kernels share: how slices are decoded, and where the scales lie. Included by files compiled with AVX2 only; everything is in
// an anonymous namespace.
#pragma once

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
    narrow,  // int4 without VNNI: u8 weights, offset by 8; a sum of 16 products is at most 16 * 15 * 127 = 30480
};

constexpr Dot dot_of(Kind kind, bool integer) {
#if defined(__AVXVNNI__)
    return integer && kind != Kind::bf16 ? Dot::vnni : Dot::f32;
#else
    return !integer || kind == Kind::bf16 ? Dot::f32 : kind == Kind::int4 ? Dot::narrow : Dot::signs;
#endif
}

// Cutting a nibble out is cheapest when it stays in the high half of its byte: 16 times the weight. Only narrow sums have no room. The
// others do: a segment's sum is at most 128 * 255 * 128 < 2^22. Its 4 low bits are 0, so the shift back at its end is exact.
constexpr int extra_bits(Kind kind, Dot dot) { return kind == Kind::int4 && dot != Dot::narrow ? 4 : 0; }

constexpr uint64_t slice_inputs(Kind kind) { return kind == Kind::bf16 ? 2 : 4; }
constexpr uint64_t tile_inputs(Kind kind) { return panel_slices * slice_inputs(kind); }

// One slice: outputs 0..7 and 8..15 of a panel, slice_k inputs each. A 32-bit lane is one output, so one broadcast of slice_k activations
// meets all lanes, and each lane sums the products of its own output:
//
//     half[0]       lane 0                lane 1                ...   lane 7
//     int8, int4    o0: k0 k1 k2 k3       o1: k0 k1 k2 k3             o7: k0 k1 k2 k3
//     bf16          o0: k0    k1          o1: k0    k1                o7: k0    k1
struct Slice {
    __m256i half[2];
};

// What a stream looks up for the 16 slices of a panel at once, by mask byte.
template <Kind kind>
struct Lookups {
    static constexpr int mask_bytes = kind == Kind::bf16 ? 4 : 8;  // of a slice
    alignas(32) uint16_t offsets[panel_slices * mask_bytes];
    alignas(32) uint8_t ends[kind == Kind::bf16 ? panel_slices * mask_bytes : 1];
};

// A number known to the compiler, as an argument of a lambda.
template <int i>
struct Constant {
    static constexpr int value = i;
};

// Walks the masks and values of a chunk.
template <Kind kind, bool dense, Dot dot>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even slices
    const uint8_t* odd;     // int4: cursor of the odd slices

    static constexpr int mask_bytes = Lookups<kind>::mask_bytes;

    INLINE Stream(const BlobView& w, uint64_t block, uint64_t chunk)
        : masks(dense ? nullptr
                      : w.masks + (block * w.tiles + chunk * w.tiles_per_chunk) * block_panels * panel_slices * uint64_t(mask_bytes)),
          values(w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk))),
          odd(values) {}

    // For the next panel. Its 16 masks are 64 or 128 bytes in a row: whole registers, and nothing is read behind them.
    INLINE void look_up(Lookups<kind>& panel) const {
        if constexpr (!dense)
            ov_ext::look_up<panel_slices * mask_bytes>(masks, panel.offsets);
        if constexpr (!dense && kind == Kind::bf16)
            find_ends<panel_slices * mask_bytes>(masks, panel.ends);
    }

    // Slice s of the panel that was looked up; parity is that of s, as a constant. The cursor moves by the number of mask bits; validation
    // has proven that it stays inside the run. Loads may go on behind the run: the next one follows, or the 64 zero bytes at the end of the
    // blob.
    template <int parity>
    INLINE Slice next(const Lookups<kind>& panel, int s) {
        static_assert(dense || kind != Kind::bf16, "that is next_words");
        const uint8_t*& at = kind == Kind::int4 && parity ? odd : values;
        Slice slice;
        if constexpr (dense) {
            slice = {{load256(at), load256(at + 32)}};
            at += slice_bytes;
        } else {
            const uint64_t mask = load<uint64_t>(masks);
            masks += mask_bytes;
            expand_bytes(at, mask, panel.offsets + s * mask_bytes, slice.half);
            at += __builtin_popcountll(mask);
        }
        for (__m256i& half : slice.half)
            half = extended<parity>(half);
        return slice;
    }

    // A sparse slice of bf16 as floats, an element a lane: lanes[0] is k0 and k1 of output 0, k0 and k1 of output 1, and so on.
    INLINE void next_words(const Lookups<kind>& panel, int s, __m256 (&lanes)[4]) {
        const uint8_t* ends = panel.ends + s * mask_bytes;
        expand_words(values, panel.offsets + s * mask_bytes, ends, lanes);
        masks += mask_bytes;
        values += ends[mask_bytes - 1];
    }

    // The weights in bytes; int4 are cut out of them. AVX2 shifts words, not bytes: the bits that cross into a neighbour are masked away. A
    // lane without a value holds 0, which stays a weight of 0.
    //
    //     byte                     H H H H L L L L      H: code of an odd slice, L: of an even one
    //     odd                      H H H H 0 0 0 0      16 times the weight, with its sign
    //     even                     L L L L 0 0 0 0
    //     narrow, L for example    0 0 0 0 L L L L      the weight and 8: its top bit turned
    template <int parity>
    static INLINE __m256i extended(__m256i bytes) {
        if constexpr (kind != Kind::int4)
            return bytes;
        if constexpr (extra_bits(kind, dot) != 0)
            return _mm256_and_si256(parity ? bytes : _mm256_slli_epi16(bytes, 4), _mm256_set1_epi8(int8_t(0xF0)));
        const __m256i turned = _mm256_xor_si256(bytes, _mm256_set1_epi8(int8_t(0x88)));
        return _mm256_and_si256(parity ? _mm256_srli_epi16(turned, 4) : turned, _mm256_set1_epi8(15));
    }

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

// Scales of eight outputs of a block.
INLINE __m256 scales_of(const BlobView& w, uint64_t block, uint64_t segment, int eight) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * block_n + uint64_t(eight) * 8;
    return w.scales_f32 ? _mm256_loadu_ps(reinterpret_cast<const float*>(w.scales + 4 * i)) : _mm256_cvtph_ps(load128(w.scales + 2 * i));
}

// Rows of x that share one expansion.
constexpr uint64_t max_rows = 128;

// Rows of the next pass when `most` are possible. Passes are equal: 7 rows go as 4 and 3, not as 6 and 1, whose last row would load every
// slice for itself.
INLINE uint64_t equal_share(uint64_t rows, uint64_t most) {
    const uint64_t passes = (rows + most - 1) / most;
    return (rows + passes - 1) / passes;
}

// The tiles of a chunk, and of a segment in it. bf16 has no segments: a chunk is one.
template <Kind kind>
struct Part {
    uint64_t begin, end, step;

    INLINE Part(const BlobView& w, uint64_t chunk)
        : begin(chunk * w.tiles_per_chunk),
          end(begin + w.tiles_per_chunk < w.tiles ? begin + w.tiles_per_chunk : w.tiles),
          step(kind == Kind::bf16 ? w.tiles_per_chunk : w.segment / tile_inputs(kind)) {}
    INLINE uint64_t tiles_from(uint64_t tile) const { return tile + step < end ? step : end - tile; }
};

}  // namespace
}  // namespace ov_ext::sparse_matmul
