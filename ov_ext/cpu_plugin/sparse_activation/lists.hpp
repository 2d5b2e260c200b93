// What the kernels share: how a list of kept inputs ends, where weights and scales lie. Safe in kernel objects: everything is in an anonymous
// namespace.
#pragma once

#include "../support/floats.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_activation {
namespace {

// Ends a segment of integers, whose `count` codes and channels begin at entry `from`. Returns its end, a multiple of `together`.
INLINE uint64_t end_segment(const Kept& kept, uint64_t segment, bool all, uint64_t from, uint64_t count) {
    int32_t sum = 0;
    for (uint64_t i = from; i < from + count; i++)
        sum += kept.codes[i];
    kept.sums[segment] = sum;
    for (; count % together; count++) {
        kept.codes[from + count] = 0;
        if (!all)
            kept.channels[from + count] = kept.channels[from + count - 1];
    }
    return from + count;
}

// Prefetching may read the list beyond its end.
INLINE void end_list(const Kept& kept, uint64_t end) {
    for (uint64_t i = 0; i < entries_ahead; i++)
        kept.channels[end + i] = end ? kept.channels[end - 1] : 0;
}

// A block's part of rows, which are whole cache lines but for the alignment of the blob.
struct Rows {
    const uint8_t* first;  // of input 0
    uint64_t stride, bytes;

    INLINE Rows(const View& w, uint64_t begin, uint64_t end)
        : first(w.values + begin * block_bytes),
          stride(w.blocks * block_bytes),
          bytes((end - begin) * block_bytes) {}
    INLINE const uint8_t* of(uint32_t channel) const { return first + channel * stride; }
};

// Walks along the rows of a list, two lines a step, and brings them nearer. A prefetch never faults.
class Ahead {
  public:
    INLINE Ahead(const Rows& rows, const uint32_t* next) : m_rows(rows), m_next(next) { begin(); }
    INLINE void step() {
        __builtin_prefetch(m_at, 0, 2);
        __builtin_prefetch(m_at + 64, 0, 2);
        m_at += 128;
        if (m_at == m_end)
            begin();
    }

  private:
    INLINE void begin() {
        m_at = m_rows.of(*m_next++);
        m_end = m_at + m_rows.bytes;
    }
    const Rows& m_rows;
    const uint32_t* m_next;
    const uint8_t *m_at, *m_end;
};

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
