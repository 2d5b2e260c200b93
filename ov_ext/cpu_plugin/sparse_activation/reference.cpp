// The reference kernel: scalar, for any CPU, and what every other kernel is checked against.
#include <cmath>

#include "../support/reference_activations.hpp"
#include "lists.hpp"
#include "places.hpp"

namespace ov_ext::sparse_activation {
namespace {

uint64_t keep(const View& w, const void* x, bool x_is_bf16, bool all, const Kept& kept) {
    uint64_t end = 0, total = 0;
    for (uint64_t s = 0; s < w.segments; s++) {
        kept.starts[s] = uint32_t(end);
        float of_segment[default_segment];
        float* const values = kept.integer ? of_segment : kept.values + end;
        uint64_t count = 0;
        for (uint64_t k = s * w.segment; k < (s + 1) * w.segment && k < w.k; k++) {
            const float value = load_x(x, x_is_bf16, k);
            const bool stays = !(std::fabs(value - w.centre) <= load<float>(w.threshold + 4 * k * w.threshold_step));
            total += stays;
            if (!stays && !all)
                continue;
            const float rest = w.replacement ? value - load<float>(w.replacement + 4 * k * w.replacement_step) : value;
            if (!all)
                kept.channels[end + count] = uint32_t(k);
            values[count++] = stays ? rest : 0.0f;
        }
        if (!count)
            continue;
        if (kept.integer) {
            int32_t wide[default_segment];
            quantize({count, count, count, count}, values, false, wide, kept.factors + s);
            for (uint64_t i = 0; i < count; i++)
                kept.codes[end + i] = int8_t(wide[i]);
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

void multiply(const View& w, const Kept& kept, uint64_t first, uint64_t last, uint64_t chunk, float* out) {
    const Segments segments(w, chunk);
    for (uint64_t output = 0; output < (last - first) * w.block_n; output++) {
        const uint64_t block = first + output / w.block_n, c = output % w.block_n;
        float chunk_sum = 0.0f;
        for (uint64_t s = segments.begin; s < segments.end; s++) {
            const uint64_t begin = kept.starts[s], end = kept.starts[s + 1];
            if (begin == end)
                continue;
            int64_t integer = 0;
            float real = 0.0f;
            for (uint64_t i = begin; i < end; i++) {
                const int32_t weight = weight_at(w.kind, w.values + (kept.channels[i] * w.blocks + block) * block_bytes, c);
                if (kept.integer)
                    integer += weight * kept.codes[i];
                else
                    real = std::fma(kept.values[i], w.kind == Kind::bf16 ? bf16_to_float(uint16_t(weight)) : float(weight), real);
            }
            if (const uint8_t* scales = scales_of(w, block, s)) {
                const float scale = w.scales_f32 ? load<float>(scales + 4 * c) : f16_to_float(load<uint16_t>(scales + 2 * c));
                chunk_sum = std::fma(kept.integer ? float(integer) : real, kept.integer ? kept.factors[s] * scale : scale, chunk_sum);
            } else {
                chunk_sum = real;
            }
        }
        out[output] += chunk_sum;
    }
}

}  // namespace

const Kernel reference_kernel = {InstructionSet::reference, keep, multiply, nullptr};

}  // namespace ov_ext::sparse_activation
