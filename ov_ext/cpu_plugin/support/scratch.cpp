#include "scratch.hpp"

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

namespace ov_ext {

struct Scratch::Kept {  // free memory of a thread and its sizes
    std::vector<std::pair<Buffer, uint64_t>> buffers;
};

Scratch::Kept& Scratch::kept() {
    static thread_local Kept kept;
    return kept;
}

Scratch::Scratch(uint64_t bytes) {
    constexpr uint64_t alignment = 64;
    auto& free = kept().buffers;
    if (!free.empty() && free.back().second >= bytes) {
        m_buffer = std::move(free.back().first);
        m_bytes = free.back().second;
        free.pop_back();
    } else {
        m_bytes = bytes;
        m_buffer.reset(static_cast<uint8_t*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)));
        if (!m_buffer)
            throw std::bad_alloc();
    }
}

Scratch::~Scratch() {
    constexpr uint64_t keep_buffers = 4;
    auto& free = kept().buffers;
    if (m_bytes > keep_bytes)
        return;
    if (free.size() == keep_buffers)  // the one that fitted worst
        free.erase(std::min_element(free.begin(), free.end(), [](const auto& a, const auto& b) { return a.second < b.second; }));
    free.emplace_back(std::move(m_buffer), m_bytes);
}

}  // namespace ov_ext
