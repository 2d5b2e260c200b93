// Attention of new tokens to a cache and to each other: cuts it into parts, runs a kernel on each, merges them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cache.hpp"

namespace ov_ext::sparse_attention {

// An additive mask, f32 [batch or 1, queries or 1, columns]; no data: none.
struct Mask {
    const float* data = nullptr;
    uint64_t batch = 0, queries = 0, columns = 0;
};

// New tokens of as many sequences as the cache has. q: f32 [sequences, q_heads, count, head_dim]; k, v: f32 [sequences, heads, count,
// head_dim], not yet appended.
struct NewTokens {
    const float *q, *k, *v;
    uint64_t q_heads, count;
    float scale;
    bool causal;  // a new token attends to those before it and itself; else the mask says to which
};

// The one to run: the best available, or the one that OV_EXT_ISA or the caller names. Throws UnavailableInstructionSet.
const Kernel& select_kernel(std::optional<InstructionSet> wanted = std::nullopt);

// Writes y, f32 [sequences, q_heads, count, head_dim]. A row that may attend to nothing gets zeros.
void attend(const Cache& cache, const Kernel& kernel, const NewTokens& now, const Mask& mask, float* y);

}  // namespace ov_ext::sparse_attention
