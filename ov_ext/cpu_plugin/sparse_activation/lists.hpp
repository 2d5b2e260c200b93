// What the kernels share: how a list of kept inputs ends, where weights and scales lie. Safe in kernel objects: everything is in an anonymous
// namespace.
#pragma once

#include "../support/floats.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_activation {
namespace {

// The codes of a segment, which lie at codes[0..count), to pairs. `from` is the segment's first entry. Returns its end, an even place.
INLINE uint64_t write_pairs(const Kept& kept, uint64_t segment, uint64_t from, uint64_t count, int8_t* codes) {
    int32_t sum = 0;
    for (uint64_t i = 0; i < count; i++)
        sum += codes[i];
    kept.sums[segment] = sum;
    if (count % 2) {
        kept.channels[from + count] = kept.channels[from + count - 1];
        codes[count++] = 0;
    }
    for (uint64_t i = 0; i < count; i += 2)
        kept.codes[(from + i) / 2] = uint32_t(load<uint16_t>(codes + i)) * 0x10001u;
    return from + count;
}

// Prefetching may read the list beyond its end.
INLINE void end_list(const Kept& kept, uint64_t end) {
    for (uint64_t i = 0; i < entries_ahead; i++)
        kept.channels[end + i] = end ? kept.channels[end - 1] : 0;
}

// Segments of a chunk.
struct Segments {
    uint64_t begin, end;
    INLINE Segments(const View& w, uint64_t chunk) {
        const uint64_t each = chunk_k / w.segment;
        begin = chunk * each;
        end = begin + each < w.segments ? begin + each : w.segments;
    }
};

// Scales of the outputs from a block on, as they lie in the blob; null for bf16.
INLINE const uint8_t* scales_of(const View& w, uint64_t block, uint64_t segment) {
    return w.scales ? w.scales + ((w.group ? segment * w.n_pad : 0) + block * w.block_n) * (w.scales_f32 ? 4 : 2) : nullptr;
}

}  // namespace
}  // namespace ov_ext::sparse_activation
