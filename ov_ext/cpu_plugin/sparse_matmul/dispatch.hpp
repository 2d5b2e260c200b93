// Which kernel runs, and the loop over blocks and rows around it.
#pragma once

#include <optional>
#include <vector>

#include "kernel.hpp"

namespace ov_ext::sparse_matmul {

// The kernel for a number of rows of x: the fastest one measured, or the one for an instruction set that is wanted, or that OV_EXT_ISA
// names. A kernel that has no code for such activations gives way to the next best one; the reference kernel takes everything.
// Throws UnavailableInstructionSet when OV_EXT_ISA names one that does not exist or cannot run here.
const Kernel& select_kernel(const BlobView& w, int64_t activation_group, uint64_t rows, std::optional<InstructionSet> wanted = {});

// Whether one row of x meets the dense form of a sparse weight sooner than the sparse form, on this CPU: where expanding takes longer than
// reading what it saves.
bool dense_form_is_faster(const BlobView& sparse, int64_t activation_group);

// Whether the kernel that runs for few rows reads the compensation of such a weight. The one for many rows reads it only if that one does.
bool reads_compensation(const BlobView& w, int64_t activation_group);

// Checks that an activation group fits a weight: 0 (floating point), -1 (per row), or a multiple of the weight's segment.
void check_activation_group(const BlobView& w, int64_t activation_group);

// One of the weights that x meets, and where its product goes: y[rows, w.n], contiguous.
struct Product {
    BlobView w;
    void* y;
};

// y[rows, n] = x[rows, k] · Wᵀ + bias for each of some weights that read activations alike (same_activations), in one parallel region.
// x and y are both f32 or both bf16 bits, contiguous. A kernel that reads compensation must find it. Same bits for any number of threads, and in any company of weights.
void matmul(const std::vector<Product>& products, const Kernel& kernel, const void* x, bool is_bf16, uint64_t rows,
            int64_t activation_group);

// Whether two weights take the same prepared activations: same kind, inputs and segments.
bool same_activations(const BlobView& a, const BlobView& b);

}  // namespace ov_ext::sparse_matmul
