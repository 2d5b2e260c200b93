// Sizes of a packed block: see format.md. Safe in kernel objects: everything is in an anonymous namespace.
#pragma once

#include <cstdint>

#include "../support/unaligned.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_attention {
namespace {

// Offsets in a block, bytes.
INLINE uint64_t key_masks_at() { return 2 * block_tokens * 4; }
INLINE uint64_t value_masks_at(const BlockShape& s) { return key_masks_at() + 8 * s.head_dim; }
INLINE uint64_t code_bytes(const BlockShape& s, uint64_t kept) { return (s.int4 ? half_tokens : block_tokens) * kept; }
INLINE uint64_t key_codes_at(const BlockShape& s) { return value_masks_at(s) + 8 * s.head_dim; }
INLINE uint64_t value_codes_at(const BlockShape& s) { return key_codes_at(s) + code_bytes(s, s.k_kept); }
INLINE uint64_t block_bytes(const BlockShape& s) { return (value_codes_at(s) + code_bytes(s, s.v_kept) + 63) / 64 * 64; }

// Where the codes of a half begin, from the first code on: nibbles share their bytes.
INLINE uint64_t half_at(const BlockShape& s, uint64_t kept, int half) { return s.int4 ? 0 : half * half_tokens * kept; }

// Codes of 4 bits.
INLINE int level_of(int code) { return code < 8 ? code - 8 : code - 7; }

}  // namespace
}  // namespace ov_ext::sparse_attention
