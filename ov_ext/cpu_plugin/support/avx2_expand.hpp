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
// The sum never carries out of a lane: 8 + 7 at most, and a set top bit stays set. Words need no sum: 8 lanes have one mask byte.
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

// Turns `bytes` mask bytes, a multiple of 16, into the offsets of their table entries. A load each is less work than cutting every byte
// out of a mask.
template <int bytes>
INLINE void look_up(const uint8_t* masks, uint16_t* offsets) {
    for (int i = 0; i < bytes; i += 16)
        _mm256_store_si256(reinterpret_cast<__m256i*>(offsets + i), _mm256_slli_epi16(_mm256_cvtepu8_epi16(load128(masks + i)), 4));
}

// Spreads the packed 16-bit values over the lanes whose mask bits are set, zero elsewhere; lanes 0..15 to half[0]. offsets: of the four
// mask bytes. May read 32 bytes from any packed value on, the one behind the last included.
//
// A byte shuffle does not cross the middle of a register. So each half of 16 bytes loads its own packed values, from where those of the
// lanes before it end: popcounts of the mask's lower part say where.
INLINE void expand_words(const uint8_t* values, uint32_t mask, const uint16_t* offsets, __m256i (&half)[2]) {
    for (int h = 0; h < 2; h++) {
        const uint8_t* from = values + (h ? 2 * __builtin_popcount(mask & 0xFFFF) : 0);
        const uint8_t* middle = values + 2 * __builtin_popcount(mask & (h ? 0xFFFFFF : 0xFF));
        half[h] = _mm256_shuffle_epi8(join(load128(from), load128(middle)),
                                      join(entry(tables.words, offsets[2 * h]), entry(tables.words, offsets[2 * h + 1])));
    }
}

// The same for 8-bit values and eight mask bytes. extend(packed) makes bytes of what is packed in less: a value must stay in its byte.
template <class Extend>
INLINE void expand_bytes(const uint8_t* values, uint64_t mask, const uint16_t* offsets, const Extend& extend, __m256i (&half)[2]) {
    const uint8_t* second = values + __builtin_popcount(uint32_t(mask));
    for (int h = 0; h < 2; h++) {
        const uint8_t* from = h ? second : values;
        const uint8_t* middle = h ? values + __builtin_popcountll(mask << 16) : values + __builtin_popcount(mask & 0xFFFF);
        const uint16_t* of = offsets + 4 * h;
        const __m256i shuffle = _mm256_add_epi8(join(entry(tables.low, of[0]), entry(tables.low, of[2])),
                                                join(entry(tables.high, of[1]), entry(tables.high, of[3])));
        half[h] = _mm256_shuffle_epi8(extend(join(load128(from), load128(middle))), shuffle);
    }
}

}  // namespace
}  // namespace ov_ext
