// Parallel loops in the arena of the calling thread: inside OpenVINO that is the stream's own arena, so thread and stream settings of
// the user hold. Never OpenMP, never a pool of our own.
#pragma once

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace ov_ext {

inline int max_threads() { return tbb::this_task_arena::max_concurrency(); }

// Calls body(first, last) on disjoint ranges that cover [0, count), in equal shares when there is enough work. A body must not rely on how
// the ranges are cut: one thread takes all of it in one call, several in any order.
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

// Calls body(i) for every i of [0, count), in parallel. After an exception no further i are begun, and the last one thrown reaches
// the caller.
template <class Body>
void parallel_each(uint64_t count, const Body& body) {
    std::mutex mutex;
    std::exception_ptr error;
    std::atomic<bool> failed{false};
    parallel_ranges(count, [&](uint64_t first, uint64_t last) {
        try {
            for (uint64_t i = first; i < last && !failed; i++)
                body(i);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            error = std::current_exception();
            failed = true;
        }
    });
    if (failed)
        std::rethrow_exception(error);
}

// Runs body in an arena of so many threads; 0 = in that of the caller.
template <class Body>
void with_threads(int threads, const Body& body) {
    if (threads > 0)
        tbb::task_arena(threads).execute(body);
    else
        body();
}

}  // namespace ov_ext
