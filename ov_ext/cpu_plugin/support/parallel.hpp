// Parallel loops in the arena of the calling thread: inside OpenVINO that is the stream's own arena, so thread and stream settings of
// the user hold. Never OpenMP, never a pool of our own.
#pragma once

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <cstdint>

namespace ov_ext {

inline int max_threads() { return tbb::this_task_arena::max_concurrency(); }

// Calls body(first, last) on disjoint ranges that cover [0, count), in equal shares when there is enough work.
template <class Body>
void parallel_ranges(uint64_t count, const Body& body) {
    if (count <= 1 || max_threads() == 1) {
        if (count)
            body(uint64_t(0), count);
        return;
    }
    tbb::parallel_for(
        tbb::blocked_range<uint64_t>(0, count), [&](const tbb::blocked_range<uint64_t>& r) { body(r.begin(), r.end()); },
        tbb::static_partitioner());
}

}  // namespace ov_ext
