// The reference kernel: scalar, for any CPU, and what every other kernel is checked against. It multiplies pruned elements too (as
// zeros), so that infinities and NaN in the activations behave as in a dense product.
#include <cmath>

#include "../support/reference_activations.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

uint64_t row_bytes(const BlobView& w, int64_t) { return 4 * w.k_pad; }

void prepare(const Activations& a, Kind, const void* x, bool x_is_bf16, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row * a.stride;
    if (a.integer)
        quantize(a.row, x, x_is_bf16, reinterpret_cast<int32_t*>(to), a.scales + row * (a.row.k_pad / a.row.segment));
    else
        copy_as_f32(a.row, x, x_is_bf16, a.rounded, reinterpret_cast<float*>(to));
}

float scale_of(const BlobView& w, uint64_t block, uint64_t segment, uint64_t column) {
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, group = w.group ? segment : 0;
    const uint64_t i = (block * groups + group) * block_n + column;
    return w.scales_f32 ? load<float>(w.scales + 4 * i) : f16_to_float(load<uint16_t>(w.scales + 2 * i));
}

constexpr uint64_t most_tile_inputs = panel_slices * 4;  // of a k tile: 4 inputs a slice, of bf16 2

// Decodes one k tile: values[column][input of the tile], as integers or as bf16 bit patterns.
struct Decoder {
    const BlobView& w;
    uint64_t block;
    uint64_t cursor[2] = {0, 0};

    void tile(const uint8_t* run, uint64_t t, int32_t values[block_n][most_tile_inputs]) {
        const uint64_t elements = panel_n * w.slice_k;
        for (uint64_t panel = 0; panel < block_panels; panel++)
            for (uint64_t s = 0; s < panel_slices; s++) {
                const uint64_t index = ((block * w.tiles + t) * block_panels + panel) * panel_slices + s;
                uint64_t mask = ~0ull;
                if (!w.dense)
                    mask = w.kind == Kind::bf16 ? load<uint32_t>(w.masks + 4 * index) : load<uint64_t>(w.masks + 8 * index);
                for (uint64_t e = 0; e < elements; e++)
                    values[panel * panel_n + e / w.slice_k][s * w.slice_k + e % w.slice_k] = mask >> e & 1 ? next(run, s & 1) : 0;
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

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t, float* out) {
    int32_t values[block_n][most_tile_inputs];
    const uint8_t* x = static_cast<const uint8_t*>(a.data) + row * a.stride;
    const float* x_scales = a.integer ? a.scales + row * (w.k_pad / w.segment) : nullptr;
    const uint64_t tile_inputs = panel_slices * w.slice_k, tiles_per_segment = w.segment ? w.segment / tile_inputs : 1;
    for (uint64_t c = 0; c < block_n; c++)
        out[c] = 0.0f;
    for (uint64_t chunk = first; chunk < last; chunk++) {
        Decoder decoder{w, block};
        const uint8_t* run = w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk));
        const uint64_t begin = chunk * w.tiles_per_chunk;
        const uint64_t end = begin + w.tiles_per_chunk < w.tiles ? begin + w.tiles_per_chunk : w.tiles;
        float sum[block_n] = {};
        int64_t integer[block_n] = {};
        float real[block_n][2] = {};  // even and odd inputs
        for (uint64_t t = begin; t < end; t++) {
            decoder.tile(run, t, values);
            for (uint64_t c = 0; c < block_n; c++)
                for (uint64_t i = 0; i < tile_inputs; i++) {
                    const uint64_t k = t * tile_inputs + i;
                    if (a.integer)
                        integer[c] += int64_t(reinterpret_cast<const int32_t*>(x)[k]) * values[c][i];
                    else
                        real[c][i % 2] =
                            std::fma(reinterpret_cast<const float*>(x)[k],
                                     w.kind == Kind::bf16 ? bf16_to_float(uint16_t(values[c][i])) : float(values[c][i]), real[c][i % 2]);
                }
            if (w.segment && (t + 1) % tiles_per_segment == 0) {
                const uint64_t s = t / tiles_per_segment;
                for (uint64_t c = 0; c < block_n; c++) {
                    const float scale = scale_of(w, block, s, c);
                    sum[c] =
                        std::fma(a.integer ? float(integer[c]) : real[c][0] + real[c][1], a.integer ? x_scales[s] * scale : scale, sum[c]);
                    integer[c] = 0, real[c][0] = real[c][1] = 0.0f;
                }
            }
        }
        for (uint64_t c = 0; c < block_n; c++)
            out[c] += w.segment ? sum[c] : real[c][0] + real[c][1];
    }
}

}  // namespace

const Kernel reference_kernel = {InstructionSet::reference, 1, false, row_bytes, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
