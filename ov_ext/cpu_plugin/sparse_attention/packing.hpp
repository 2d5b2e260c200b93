// Packing 64 tokens of one head, and back: see format.md.
#pragma once

#include <cstdint>

#include "kernel.hpp"

namespace ov_ext::sparse_attention {

// D - floor(D * level).
uint64_t kept_of(uint64_t head_dim, double level);

// k, v: f32 [block_tokens] pointers to head_dim values. Writes block_bytes(shape).
void pack_block(const BlockShape& shape, const float* const* k, const float* const* v, uint8_t* block);

// The values that a packed block stands for, f32 [block_tokens, head_dim].
void unpack_block(const BlockShape& shape, const uint8_t* block, float* k, float* v);

uint64_t bytes_of_block(const BlockShape& shape);

}  // namespace ov_ext::sparse_attention
