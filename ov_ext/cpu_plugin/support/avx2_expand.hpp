// Bitmap expansion with AVX2, which has no expand instruction: eight mask bits look up a byte shuffle that spreads packed values over
// their lanes. For files compiled with AVX2 only; everything is in an anonymous namespace.
#pragma once

#include <cstdint>

#include "avx2_registers.hpp"

namespace ov_ext {
namespace {

// Shuffles for 16 lanes from 16 packed values on. Bytes need two mask bytes: the lanes of the second one start where the values of the
// first one end, so shuffle = low[first] + high[second]. A clear bit gives a lane with its top bit set, which a shuffle makes zero.
//
//     first = 0b00000101, second = 0b00000011 (z: top bit set)
//     lane              0  1  2  3 ...  7     8  9 10 ... 15
//     low[first]        0  z  1  z ...  z     2  2  2 ...  2       two values are taken
//     high[second]      0  0  0  0 ...  0     0  1  z ...  z
//     sum               0  z  1  z ...  z     2  3  z ...  z
//
// The sum never carries out of a lane: 8 + 7 at most, and a set top bit stays set. Zeros stand before each shuffle, so that both halves of
// a register are sums of loads: joining halves would take a port of which many CPUs have one.
struct Shuffle {
    uint8_t zeros[16], lanes[16];
};
struct ShuffleTables {
    Shuffle low[256];        // of lanes 0..7 | number of set bits, eight times
    Shuffle high[256];       // zeros | the same shuffle for lanes 8..15
    uint8_t words[256][32];  // of 16-bit values: each to the upper half of a 32-bit lane
};

constexpr ShuffleTables make_tables() {
    ShuffleTables t{};
    for (int mask = 0; mask < 256; mask++) {
        int value = 0;
        for (int lane = 0; lane < 8; lane++) {
            const bool set = mask >> lane & 1;
            t.low[mask].lanes[lane] = t.high[mask].lanes[8 + lane] = set ? uint8_t(value) : 0x80;
            for (int byte = 0; byte < 4; byte++)
                t.words[mask][4 * lane + byte] = set && byte >= 2 ? uint8_t(2 * value + byte - 2) : 0x80;
            value += set;
        }
        for (int lane = 8; lane < 16; lane++)
            t.low[mask].lanes[lane] = uint8_t(value);
    }
    return t;
}
alignas(64) constexpr ShuffleTables tables = make_tables();

// Turns `bytes` mask bytes, a multiple of 16, into the offsets of their table entries, which have 32 bytes. A load each is less work than
// cutting every byte out of a mask.
template <int bytes>
INLINE void look_up(const uint8_t* masks, uint16_t* offsets) {
    for (int i = 0; i < bytes; i += 16)
        _mm256_store_si256(reinterpret_cast<__m256i*>(offsets + i), _mm256_slli_epi16(_mm256_cvtepu8_epi16(load128(masks + i)), 5));
}

// For slices of 32 words, which have four mask bytes: where the values of each mask byte end, in bytes from the slice's first one. `bytes` is
// a multiple of 32.
template <int bytes>
INLINE void find_ends(const uint8_t* masks, uint8_t* ends) {
    const __m256i twice_set_bits = _mm256_setr_epi8(0, 2, 2, 4, 2, 4, 4, 6, 2, 4, 4, 6, 4, 6, 6, 8,  //
                                                    0, 2, 2, 4, 2, 4, 4, 6, 2, 4, 4, 6, 4, 6, 6, 8);
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int i = 0; i < bytes; i += 32) {
        const __m256i mask = load256(masks + i);
        const __m256i sizes = _mm256_add_epi8(_mm256_shuffle_epi8(twice_set_bits, _mm256_and_si256(mask, nibble)),
                                              _mm256_shuffle_epi8(twice_set_bits, _mm256_and_si256(_mm256_srli_epi16(mask, 4), nibble)));
        // Byte i of such a product is the sum of bytes 0..i of the factor; they are 64 at most.
        _mm256_store_si256(reinterpret_cast<__m256i*>(ends + i), _mm256_mullo_epi32(sizes, _mm256_set1_epi32(0x01010101)));
    }
}

// Spreads packed 16-bit values over the upper halves of 32 lanes whose mask bits are set, zero elsewhere; the first eight to lanes[0]. So
// bf16 become f32. offsets, ends: of the four mask bytes. May read 16 bytes from any packed value on, the one behind the last included.
//
// A byte shuffle does not cross the middle of a register; the 16 bytes that eight lanes may need are loaded to both halves.
INLINE void expand_words(const uint8_t* values, const uint16_t* offsets, const uint8_t* ends, __m256 (&lanes)[4]) {
    for (int i = 0; i < 4; i++) {
        const __m256i packed = _mm256_broadcastsi128_si256(load128(values + (i ? ends[i - 1] : 0)));
        lanes[i] = floats(_mm256_shuffle_epi8(packed, load256(&tables.words[0][0] + offsets[i])));
    }
}

// Of 32 lanes, from the offsets of four table entries.
INLINE __m256i shuffle_of(const uint16_t* offsets) {
    const uint8_t *low = &tables.low[0].zeros[0], *high = &tables.high[0].zeros[0];
    const __m128i first = _mm_add_epi8(load128(low + offsets[0] + 16), load128(high + offsets[1] + 16));
    return _mm256_add_epi8(_mm256_add_epi8(_mm256_zextsi128_si256(first), load256(low + offsets[2])), load256(high + offsets[3]));
}

// Spreads packed bytes over the 64 lanes whose mask bits are set, zero elsewhere; lanes 0..31 to half[0]. mask: eight bytes; offsets: of
// them. May read 16 bytes from any packed value on, the one behind the last included.
//
// Each half of 16 bytes loads its own packed values, from where those of the lanes before it end: popcounts say where.
INLINE void expand_bytes(const uint8_t* values, uint64_t mask, const uint16_t* offsets, __m256i (&half)[2]) {
    const uint8_t* second = values + __builtin_popcount(uint32_t(mask));
    half[0] = _mm256_shuffle_epi8(join(load128(values), load128(values + __builtin_popcount(mask & 0xFFFF))), shuffle_of(offsets));
    half[1] = _mm256_shuffle_epi8(join(load128(second), load128(values + __builtin_popcountll(mask << 16))), shuffle_of(offsets + 4));
}

}  // namespace
}  // namespace ov_ext
