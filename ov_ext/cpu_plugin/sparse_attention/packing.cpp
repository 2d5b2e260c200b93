#include "packing.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../support/floats.hpp"
#include "layout.hpp"

namespace ov_ext::sparse_attention {
namespace {

// One token, quantized: what its elements are, and which are kept.
struct Token {
    uint8_t codes[max_head_dim];
    bool kept[max_head_dim];
    float scale;
};

// The largest threshold that at least `keep` magnitudes reach, bit by bit from the top: counting is what compilers make vectors of.
uint16_t threshold_of(const uint16_t* magnitudes, uint64_t count, uint64_t keep) {
    uint16_t threshold = 0;
    for (int bit = 14; bit >= 0; bit--) {
        const auto higher = uint16_t(threshold | 1 << bit);
        uint16_t reach = 0;
        for (uint64_t i = 0; i < count; i++)
            reach = uint16_t(reach + (magnitudes[i] >= higher));
        if (reach >= keep)
            threshold = higher;
    }
    return threshold;
}

// To nearest, ties to even, of a small number: nearbyint is a call where compilers may not assume SSE4.
int nearest(float x) { return int((x + 12582912.0f) - 12582912.0f); }

uint8_t nearest_level(float x) {  // of -8..-1, 1..8, as a code
    const int level = std::clamp(nearest(x), -8, 8);
    return uint8_t(level > 0 || (level == 0 && x >= 0.0f) ? std::max(level, 1) + 7 : std::min(level, -1) + 8);
}

void quantize_token(const float* x, uint64_t count, uint64_t keep, bool int4, Token& to) {
    uint16_t magnitudes[max_head_dim];
    uint32_t most = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint32_t bits = to_bits(x[i]) & 0x7FFFFFFF;
        most = std::max(most, bits);
        magnitudes[i] = uint16_t(bits >> 16);
    }
    const uint16_t threshold = threshold_of(magnitudes, count, keep);
    uint64_t above = 0;
    for (uint64_t i = 0; i < count; i++)
        above += magnitudes[i] > threshold;
    uint64_t equal = keep - above;  // that are kept
    for (uint64_t i = 0; i < count; i++) {
        const bool ties = magnitudes[i] == threshold && equal;
        equal -= ties;
        to.kept[i] = ties || magnitudes[i] > threshold;
    }
    const bool finite = most < 0x7F800000, zero = most < 0x03800000;  // infinity, 2^-120: see quantization.hpp
    const float peak = from_bits(most), levels = int4 ? 8.0f : 127.0f;
    const float inverse = finite && !zero ? levels / peak : 0.0f;
    to.scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : peak / levels;
    for (uint64_t i = 0; i < count; i++) {
        const float code = finite ? x[i] * inverse : 0.0f;
        to.codes[i] = int4 ? nearest_level(code) : uint8_t(std::clamp(nearest(code), -127, 127));
    }
}

// Calls slice(half, element), for all slices in order; element(lane) gives the token and the dimension of a lane.
struct Element {
    uint64_t token, dimension;
};
template <class Slice>
void key_slices(uint64_t dim, const Slice& slice) {
    for (uint64_t half = 0; half < 2; half++)
        for (uint64_t quad = 0; quad < dim / 4; quad++)
            for (uint64_t p = 0; p < 2; p++)
                slice(half, [=](uint64_t lane) { return Element{half_tokens * half + panel * p + lane / 4, 4 * quad + lane % 4}; });
}
template <class Slice>
void value_slices(uint64_t dim, const Slice& slice) {
    for (uint64_t half = 0; half < 2; half++)
        for (uint64_t group = 0; group < dim; group += 2 * panel)
            for (uint64_t quad = 0; quad < half_tokens / 4; quad++)
                for (uint64_t d = group; d < std::min(group + 2 * panel, dim); d += panel)
                    slice(half, [=](uint64_t lane) { return Element{half_tokens * half + 4 * quad + lane % 4, d + lane / 4}; });
}

// Writes the masks and codes of one kind; `slices` is key_slices or value_slices.
template <class Slices>
void write(const BlockShape& s, const Token* tokens, uint64_t kept, const Slices& slices, uint8_t* masks, uint8_t* codes) {
    uint8_t* cursor[2] = {codes, codes + half_at(s, kept, 1)};
    slices(s.head_dim, [&](uint64_t half, const auto& element) {
        uint64_t mask = 0;
        uint8_t slice[64], *to = slice;  // without branches, which no CPU could foresee
        for (uint64_t lane = 0; lane < 64; lane++) {
            const Element e = element(lane);
            const Token& token = tokens[e.token];
            mask |= uint64_t(token.kept[e.dimension]) << lane;
            *to = token.codes[e.dimension];
            to += token.kept[e.dimension];
        }
        for (const uint8_t* code = slice; code != to; code++, cursor[half]++)
            *cursor[half] = s.int4 && half ? uint8_t(*cursor[half] | *code << 4) : *code;
        std::memcpy(masks, &mask, 8);
        masks += 8;
    });
}

template <class Slices>
void read(const BlockShape& s, const uint8_t* scales, uint64_t kept, const Slices& slices, const uint8_t* masks, const uint8_t* codes,
          float* to) {
    std::memset(to, 0, 4 * block_tokens * s.head_dim);
    const uint8_t* cursor[2] = {codes, codes + half_at(s, kept, 1)};
    slices(s.head_dim, [&](uint64_t half, const auto& element) {
        const uint64_t mask = load<uint64_t>(masks);
        masks += 8;
        for (uint64_t lane = 0; lane < 64; lane++)
            if (mask >> lane & 1) {
                const Element e = element(lane);
                const uint8_t code = *cursor[half]++;
                const int value = s.int4 ? level_of(half ? code >> 4 : code & 15) : int8_t(code);
                to[e.token * s.head_dim + e.dimension] = float(value) * load<float>(scales + 4 * e.token);
            }
    });
}

constexpr auto of_keys = [](uint64_t dim, const auto& slice) { key_slices(dim, slice); };
constexpr auto of_values = [](uint64_t dim, const auto& slice) { value_slices(dim, slice); };

}  // namespace

uint64_t kept_of(uint64_t head_dim, double level) { return head_dim - uint64_t(std::floor(double(head_dim) * level)); }

uint64_t bytes_of_block(const BlockShape& shape) { return block_bytes(shape); }

void pack_block(const BlockShape& s, const float* const* k, const float* const* v, uint8_t* block) {
    std::memset(block, 0, block_bytes(s));
    Token tokens[block_tokens];
    const auto some = [&](const float* const* x, uint64_t kept, uint8_t* scales) {
        for (uint64_t j = 0; j < block_tokens; j++) {
            quantize_token(x[j], s.head_dim, kept, s.int4, tokens[j]);
            std::memcpy(scales + 4 * j, &tokens[j].scale, 4);
        }
    };
    some(k, s.k_kept, block);
    write(s, tokens, s.k_kept, of_keys, block + key_masks_at(), block + key_codes_at(s));
    some(v, s.v_kept, block + 4 * block_tokens);
    write(s, tokens, s.v_kept, of_values, block + value_masks_at(s), block + value_codes_at(s));
}

void unpack_block(const BlockShape& s, const uint8_t* block, float* k, float* v) {
    read(s, block, s.k_kept, of_keys, block + key_masks_at(), block + key_codes_at(s), k);
    read(s, block + 4 * block_tokens, s.v_kept, of_values, block + value_masks_at(s), block + value_codes_at(s), v);
}

}  // namespace ov_ext::sparse_attention
