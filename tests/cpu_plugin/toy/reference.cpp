#include "kernel.hpp"
#include "support/reference_activations.hpp"

namespace toy {
namespace {

void prepare(const ov_ext::RowShape& row, const float* x, void* to, float* scales) {
    ov_ext::quantize(row, x, false, static_cast<int32_t*>(to), scales);
}

int64_t multiply(const uint8_t* masks, const uint8_t* values, const void* codes, uint64_t slices) {
    int64_t sum = 0;
    for (uint64_t i = 0; i < 64 * slices; i++)
        if (ov_ext::load<uint64_t>(masks + i / 64 * 8) >> (i % 64) & 1)
            sum += int8_t(*values++) * static_cast<const int32_t*>(codes)[i];
    return sum;
}

}  // namespace

const Kernel reference_kernel = {ov_ext::InstructionSet::reference, prepare, multiply};

}  // namespace toy
