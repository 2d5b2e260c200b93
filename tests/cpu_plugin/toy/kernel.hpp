// A second operation, as small as one can be: the product of bitmap-compressed 8-bit weights, 64 for each mask, and one row of x that is
// quantized to 8 bits. It shows that an operation finds in support/ all that is not its own.
#pragma once

#include <cstdint>

#include "support/activations.hpp"
#include "support/instruction_set.hpp"

namespace toy {

struct Kernel {
    ov_ext::InstructionSet isa;
    // Codes of x without an offset; to: [k_pad], of a type that the kernel chooses, 4 bytes at most.
    void (*prepare)(const ov_ext::RowShape& row, const float* x, void* to, float* scales);
    int64_t (*multiply)(const uint8_t* masks, const uint8_t* values, const void* codes, uint64_t slices);
};

extern const Kernel reference_kernel;
#if defined(__x86_64__)
extern const Kernel avx2_kernel, avx512_core_kernel, avx512_kernel;
#endif

}  // namespace toy
