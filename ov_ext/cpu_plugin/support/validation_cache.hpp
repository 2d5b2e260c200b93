// Which memory was found valid, so that the content of a constant blob is checked once and not at every call.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace ov_ext {

// An entry holds the owner of the memory (an OpenVINO Constant): an address alone proves nothing, the next blob may be mapped to it.
// Plugins may show an operation a copy of the Constant, or one for each stream, so there can be several entries. Clones of an operation
// start with an empty cache. Safe to use from several threads; two of them may check the same memory at the same time.
class ValidationCache {
  public:
    bool knows(const void* owner, const void* address, size_t bytes) {
        std::lock_guard<std::mutex> lock(m_mutex);
        for (const Entry& entry : m_valid)
            if (entry.owner.get() == owner && entry.address == address && entry.bytes == bytes)
                return true;
        return false;
    }
    void add(std::shared_ptr<const void> owner, const void* address, size_t bytes) {
        std::lock_guard<std::mutex> lock(m_mutex);
        m_valid.push_back({std::move(owner), address, bytes});
    }

  private:
    struct Entry {
        std::shared_ptr<const void> owner;
        const void* address;
        size_t bytes;
    };
    std::mutex m_mutex;
    std::vector<Entry> m_valid;
};

}  // namespace ov_ext
