// Which kernel runs, and the loop over blocks and rows around it.
#pragma once

#include <optional>

#include "kernel.hpp"

namespace ov_ext::sparse_activation {

// The best kernel that can run here, or that of an instruction set that is wanted, or that OV_EXT_ISA names: where this operation has none
// of its own, the next weaker one. Throws UnavailableInstructionSet when OV_EXT_ISA names one that does not exist or cannot run here.
const Kernel& select_kernel(std::optional<InstructionSet> wanted = {});

// Checks that an activation group fits a weight: 0 (floating point), or its segment.
void check_activation_group(const View& w, int64_t activation_group);

// y[rows, n] = x~[rows, k] · Wᵀ + bias, x~ by the rule of the weight. x and y are both f32 or both bf16 bits, contiguous. Same bits for any
// number of threads, and for a row in any company.
void matmul(const View& w, const Kernel& kernel, const void* x, bool is_bf16, uint64_t rows, int64_t activation_group, void* y);

}  // namespace ov_ext::sparse_activation
