// How activations become 8-bit integers: the rule, once for every instruction set, so that all give the same bits.
//
// Each group of inputs of a row has one factor, max|x| / 127, and codes q = round(x * 127 / max|x|), ties to even. A group that is
// practically zero (below 2^-120, where the inverse would overflow) becomes zero; a group with NaN or infinity gets factor NaN, which
// makes the whole output row NaN. The factor is written once for each segment, because kernels scale the sum of each segment.
//
// Safe in kernel objects: everything is in an anonymous namespace.
#pragma once

#include "activations.hpp"
#include "floats.hpp"

namespace ov_ext {
namespace {

// largest(begin, end): the largest bit pattern of |x| among these inputs. Bit patterns are ordered like the values, NaN above infinity.
// encode(begin, end, padded_end, inverse): writes round(x * inverse) for [begin, end), zeros for [end, padded_end); inverse 0 means all
// zeros, whatever x is.
template <class Largest, class Encode>
INLINE void quantize_groups(const RowShape& row, float* scales, const Largest& largest, const Encode& encode) {
    constexpr uint32_t infinity = 0x7F800000, smallest = 0x03800000;  // bits of infinity and of 2^-120
    for (uint64_t begin = 0; begin < row.k_pad; begin += row.group) {
        const uint64_t padded_end = begin + row.group < row.k_pad ? begin + row.group : row.k_pad;
        const uint64_t end = padded_end < row.k ? padded_end : row.k;
        const uint32_t bits = largest(begin, end);
        const bool finite = bits < infinity, zero = bits < smallest;
        const float peak = from_bits(bits);
        const float factor = !finite ? __builtin_nanf("") : zero ? 0.0f : peak / 127.0f;
        encode(begin, end, padded_end, finite && !zero ? 127.0f / peak : 0.0f);
        for (uint64_t s = begin / row.segment; s * row.segment < padded_end; s++)
            scales[s] = factor;
    }
}

}  // namespace
}  // namespace ov_ext
