#include "bandwidth.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#include "parallel.hpp"

namespace ov_ext {
namespace {

// Sixteen sums, so that neither addition latency nor the compiler's vector width limits the loop.
uint64_t sum(const uint64_t* p, uint64_t count) {
    uint64_t sums[16] = {};
    for (uint64_t i = 0; i + 16 <= count; i += 16) {
        __builtin_prefetch(p + i + 256);
        __builtin_prefetch(p + i + 264);
        for (int j = 0; j < 16; j++)
            sums[j] += p[i + uint64_t(j)];
    }
    uint64_t total = 0;
    for (uint64_t s : sums)
        total += s;
    return total;
}

}  // namespace

ReadBandwidth read_bandwidth(uint64_t bytes, int threads, int repeats) {
    const uint64_t count = bytes / 8, parts = 64;
    std::vector<double> rates;
    std::atomic<uint64_t> sink{0};  // keeps the sums alive
    const auto measure = [&] {
        std::unique_ptr<uint64_t[]> data(new uint64_t[count]);
        parallel_ranges(parts, [&](uint64_t begin, uint64_t end) {
            for (uint64_t i = begin * (count / parts); i < end * (count / parts); i++)
                data[i] = i;
        });
        for (int r = 0; r < repeats; r++) {
            const auto start = std::chrono::steady_clock::now();
            parallel_ranges(parts, [&](uint64_t begin, uint64_t end) {
                sink += sum(data.get() + begin * (count / parts), (end - begin) * (count / parts));
            });
            const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
            rates.push_back(double(count / parts * parts * 8) / elapsed.count() / 1e9);
        }
    };
    with_threads(threads, measure);
    std::sort(rates.begin(), rates.end());
    return {rates.back(), rates[rates.size() / 2]};
}

}  // namespace ov_ext
