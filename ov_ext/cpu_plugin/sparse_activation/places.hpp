// Where the weight of an output lies in a row: see "Sections" in format.md. Safe in kernel objects: everything is in an anonymous namespace.
#pragma once

#include "../support/unaligned.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_activation {
namespace {

INLINE uint64_t place_of_byte(uint64_t c) { return 16 * (c >> 2 & 1) + 8 * (c >> 4 & 1) + 2 * (c & 3) + (c >> 3 & 1); }

// The bits of a bf16 weight, the code of an integer one. c: output of the block.
INLINE int32_t weight_at(Kind kind, const uint8_t* row, uint64_t c) {
    if (kind == Kind::bf16)
        return load<uint16_t>(row + 2 * (16 * (c >> 4) + 2 * (c & 7) + (c >> 3 & 1)));
    if (kind == Kind::int8)
        return int8_t(row[32 * (c >> 5) + place_of_byte(c)]);
    return (row[32 * (c >> 6) + place_of_byte(c)] >> (c >> 5 & 1 ? 4 : 0) & 15) - 8;
}

}  // namespace
}  // namespace ov_ext::sparse_activation
