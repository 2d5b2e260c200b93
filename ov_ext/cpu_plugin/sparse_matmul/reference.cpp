// The reference kernel: scalar, for any CPU, and what every other kernel is checked against. It multiplies pruned elements too (as
// zeros), so that infinities and NaN in the activations behave as in a dense product.
#include <cmath>
#include <cstring>
#include <limits>

#include "kernel.hpp"
#include "../support/unaligned.hpp"

namespace ov_ext::sparse_matmul {
namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float magnitude = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24);
    return h & 0x8000 ? -magnitude : magnitude;
}

float round_to_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = to_bits(value);
    if (value != value)
        return value;
    return from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

float activation(const void* x, bool x_is_bf16, uint64_t i) {
    return x_is_bf16 ? from_bits(uint32_t(static_cast<const uint16_t*>(x)[i]) << 16) : static_cast<const float*>(x)[i];
}

// Integer activations: q = round(x · 127 / max|x|) over one activation group, factor max|x| / 127. Groups that are practically zero
// (below 2^-120) become zero; a group with NaN or infinity gets factor NaN, which makes the whole output row NaN.
void quantize(const BlobView& w, const void* x, bool x_is_bf16, uint64_t group, int32_t* row, float* scales) {
    for (uint64_t start = 0; start < w.k_pad; start += group) {
        const uint64_t padded_end = start + group < w.k_pad ? start + group : w.k_pad;
        const uint64_t end = padded_end < w.k ? padded_end : w.k;
        uint32_t largest = 0;  // bit pattern of max|x|: ordered like the values, NaN above infinity
        for (uint64_t i = start; i < end; i++) {
            const uint32_t magnitude = to_bits(activation(x, x_is_bf16, i)) & 0x7FFFFFFF;
            largest = magnitude > largest ? magnitude : largest;
        }
        const bool finite = largest < 0x7F800000, zero = largest < 0x03800000;
        const float factor = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : from_bits(largest) / 127.0f;
        const float inverse = finite && !zero ? 127.0f / from_bits(largest) : 0.0f;
        for (uint64_t i = start; i < padded_end; i++)
            row[i] = i < end && inverse != 0.0f ? int32_t(std::nearbyintf(activation(x, x_is_bf16, i) * inverse)) : 0;
        for (uint64_t s = start / w.segment; s * w.segment < padded_end; s++)
            scales[s] = factor;
    }
}

uint64_t row_bytes(const BlobView& w, int64_t) { return 4 * w.k_pad; }

void prepare(const BlobView& w, const void* x, bool x_is_bf16, const Activations& a, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (a.integer) {
        quantize(w, x, x_is_bf16, a.group < 0 ? w.k_pad : uint64_t(a.group), reinterpret_cast<int32_t*>(to),
                 a.scales + row * (w.k_pad / w.segment));
        return;
    }
    float* out = reinterpret_cast<float*>(to);
    for (uint64_t i = 0; i < w.k_pad; i++) {
        const float value = i < w.k ? activation(x, x_is_bf16, i) : 0.0f;
        out[i] = w.segment || a.group == 0 ? value : round_to_bf16(value);
    }
}

float scale_of(const BlobView& w, uint64_t block, uint64_t segment, uint64_t column) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * 64 + column;
    return w.scales_f32 ? load<float>(w.scales + 4 * i) : half_to_float(load<uint16_t>(w.scales + 2 * i));
}

// Decodes one k tile: values[column][input of the tile], as integers or as bf16 bit patterns.
struct Decoder {
    const BlobView& w;
    uint64_t block;
    uint64_t cursor[2] = {0, 0};

    void tile(const uint8_t* run, uint64_t t, int32_t values[64][64]) {
        const uint64_t elements = 16 * w.row_k;
        for (uint64_t panel = 0; panel < 4; panel++)
            for (uint64_t r = 0; r < 16; r++) {
                const uint64_t index = ((block * w.tiles + t) * 4 + panel) * 16 + r;
                uint64_t mask = ~0ull;
                if (!w.dense)
                    mask = w.kind == Kind::bf16 ? load<uint32_t>(w.masks + 4 * index) : load<uint64_t>(w.masks + 8 * index);
                for (uint64_t e = 0; e < elements; e++)
                    values[panel * 16 + e / w.row_k][r * w.row_k + e % w.row_k] = mask >> e & 1 ? next(run, r & 1) : 0;
            }
    }

    int32_t next(const uint8_t* run, uint64_t odd) {
        if (w.kind == Kind::bf16)
            return load<uint16_t>(run + 2 * cursor[0]++);
        if (w.kind == Kind::int8)
            return int8_t(run[cursor[0]++]);
        const uint8_t byte = run[cursor[odd]++];
        return ((odd ? byte >> 4 : byte & 15) ^ 8) - 8;
    }
};

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t,
              float* out) {
    int32_t values[64][64];
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    const float* x_scales = a.integer ? a.scales + row * (w.k_pad / w.segment) : nullptr;
    const uint64_t tile_inputs = 16 * w.row_k, tiles_per_segment = w.segment ? w.segment / tile_inputs : 1;
    for (uint64_t c = 0; c < 64; c++)
        out[c] = 0.0f;
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Decoder decoder{w, block};
        const uint8_t* run = w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk));
        const uint64_t begin = chunk * w.tiles_per_chunk;
        const uint64_t end = begin + w.tiles_per_chunk < w.tiles ? begin + w.tiles_per_chunk : w.tiles;
        float sum[64] = {};
        int64_t integer[64] = {};
        float real[64] = {};
        for (uint64_t t = begin; t < end; t++) {
            decoder.tile(run, t, values);
            for (uint64_t c = 0; c < 64; c++)
                for (uint64_t i = 0; i < tile_inputs; i++) {
                    const uint64_t k = t * tile_inputs + i;
                    if (a.integer)
                        integer[c] += int64_t(reinterpret_cast<const int32_t*>(x)[k]) * values[c][i];
                    else if (w.kind == Kind::bf16)
                        sum[c] = std::fma(reinterpret_cast<const float*>(x)[k], from_bits(uint32_t(values[c][i]) << 16), sum[c]);
                    else
                        real[c] = std::fma(reinterpret_cast<const float*>(x)[k], float(values[c][i]), real[c]);
                }
            if (w.segment && (t + 1) % tiles_per_segment == 0) {
                const uint64_t s = t / tiles_per_segment;
                for (uint64_t c = 0; c < 64; c++) {
                    const float scale = scale_of(w, block, s, c);
                    sum[c] = a.integer ? std::fma(float(integer[c]), x_scales[s] * scale, sum[c]) : std::fma(real[c], scale, sum[c]);
                    integer[c] = 0, real[c] = 0.0f;
                }
            }
        }
        for (uint64_t c = 0; c < 64; c++)
            out[c] += sum[c];
    }
}

}  // namespace

const Kernel reference_kernel = {"reference", 1, [](const CpuFeatures&) { return true; }, row_bytes, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
