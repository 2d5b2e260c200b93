#include "kernel.hpp"
#include "support/avx2_activations.hpp"
#include "support/avx2_expand.hpp"

namespace toy {
namespace {

void prepare(const ov_ext::RowShape& row, const float* x, void* to, float* scales) {
    ov_ext::quantize(row, x, false, false, static_cast<uint8_t*>(to), scales);
}

int64_t multiply(const uint8_t* masks, const uint8_t* values, const void* codes, uint64_t slices) {
    int64_t sum = 0;
    for (uint64_t slice = 0; slice < slices; slice += 2, masks += 16) {
        alignas(32) uint16_t offsets[16];
        ov_ext::look_up<16>(masks, offsets);
        for (int s = 0; s < 2; s++) {
            __m256i half[2];
            const uint64_t mask = ov_ext::load<uint64_t>(masks + 8 * s);
            ov_ext::expand_bytes(values, mask, offsets + 8 * s, half);
            values += __builtin_popcountll(mask);
            int8_t weights[64];
            __builtin_memcpy(weights, half, 64);
            for (int i = 0; i < 64; i++)
                sum += weights[i] * static_cast<const int8_t*>(codes)[64 * (slice + uint64_t(s)) + uint64_t(i)];
        }
    }
    return sum;
}

}  // namespace

const Kernel avx2_kernel = {ov_ext::InstructionSet::avx2, prepare, multiply};

}  // namespace toy
