#include "kernel.hpp"
#include "support/avx512_activations.hpp"
#include "support/avx512_core_expand.hpp"

namespace toy {
namespace {

void prepare(const ov_ext::RowShape& row, const float* x, void* to, float* scales) {
    ov_ext::quantize(row, x, false, 0, static_cast<uint8_t*>(to), ov_ext::piece_bytes, scales);
}

int64_t multiply(const uint8_t* masks, const uint8_t* values, const void* codes, uint64_t slices) {
    int64_t sum = 0;
    for (uint64_t slice = 0; slice < slices; slice++) {
        int8_t weights[64];
        _mm512_storeu_si512(weights, ov_ext::expand_bytes(masks, values));
        for (int i = 0; i < 64; i++)
            sum += weights[i] * static_cast<const int8_t*>(codes)[64 * slice + uint64_t(i)];
    }
    return sum;
}

}  // namespace

const Kernel avx512_core_kernel = {ov_ext::InstructionSet::avx512_core, prepare, multiply};

}  // namespace toy
