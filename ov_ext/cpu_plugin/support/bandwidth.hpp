// The machine's read bandwidth, measured the way the kernels read: forward, every byte once, each thread its own part.
#pragma once

#include <cstdint>

namespace ov_ext {

struct ReadBandwidth {
    double best, median;  // GB/s
};

constexpr uint64_t smallest_buffer = 4096;  // bytes, so that each of the parts that threads take has a few lines

// threads: 0 = the arena of the caller.
ReadBandwidth read_bandwidth(uint64_t bytes, int threads, int repeats);

}  // namespace ov_ext
